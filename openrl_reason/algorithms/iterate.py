"""``openrl-reason iterate``: rounds of collecting samples of the newest policy, training on them, and evaluating what came of it.

What published systems leave open is a setting, and recorded: which policy and reference a round starts from, whether its critic is new, and
whether old samples are kept (iterated OREO, Wang et al. 2024, arXiv 2412.16145, section 4.3, says nothing of the last three).

Stages run one after the other in this process. Engines and ranks are Ray actors that end with their stage, and the stage's private Ray with
them, so nothing of it stays in memory; what stays here is small, and errors, Ctrl-C, tasks and reward functions need no way into another process.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrl_reason.algorithms.collection import collect_samples
from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.algorithms.common import checked_tokenizer, local_path
from openrl_reason.algorithms.iterate_algorithms import ALGORITHMS, Algorithm, RoundInputs
from openrl_reason.algorithms.iterate_config import IterateConfig
from openrl_reason.algorithms.iterate_manifest import CHOICES, Manifest
from openrl_reason.algorithms.iterate_summary import summarise
from openrl_reason.algorithms.sampling import RewardFunction
from openrl_reason.algorithms.trainer import print_plan
from openrl_reason.atomic import naming_disk_errors
from openrl_reason.config import require, save_config
from openrl_reason.core.seeds import derive_seed
from openrl_reason.errors import DataError, WorkerError
from openrl_reason.evaluation.evaluate import EvaluateConfig, evaluate_model
from openrl_reason.evaluation.identity import model_identity
from openrl_reason.evaluation.sets import refuse_overlap
from openrl_reason.folders import ITERATED, claimed, refuse_others
from openrl_reason.tasks.base import Task, load_task

SEED_BITS = 31
"""Derived seeds go to engines, too, which take no larger ones."""


@dataclass(frozen=True)
class Stages:
    """What a round does. Each may be called again with the same config after a kill, and then goes on from what it had done."""

    collect: Callable[[CollectConfig], Mapping[str, Any]]
    """Writes ``trajectories/`` below ``config.output``; returns the manifest of the collection."""
    train: Callable[[Algorithm, Any], None]
    """Writes ``model/`` (and ``critic/``) below ``config.run.output_dir``."""
    evaluate: Callable[[EvaluateConfig], Any]
    """Writes the result file ``config.output``."""


def iterate(
    config: IterateConfig, *, task: Task | None = None, reward_function: RewardFunction | None = None, stages: Stages | None = None
) -> list[dict[str, Any]]:
    """Runs the rounds, or what is left of them, and returns the summary: an entry for the model to begin with and for each round.

    Args:
        task: replaces the task that ``config.task`` names.
        reward_function: replaces ``config.collect.reward``.
        stages: replaces what a round does.

    Raises:
        ConfigError, DataError: a setting or a file cannot work, or a round keeps no samples.
        CheckpointError: the folder holds a run with other settings, which are named.
        WorkerError: an actor failed. The same call goes on from there.
    """
    require(bool(config.model), "model", config.model, "name a model folder; `openrl-reason make-model` writes a small one")
    run = _Run(config, task, reward_function, stages)
    run.check()
    refuse_others(run.folder, "output", ITERATED)
    if config.dry_run:
        run.describe()
        return []
    with naming_disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    with claimed(run.folder, "output"):
        run.manifest.begin(config, model_identity(run.start))
        save_config(config, run.folder / "config.yaml")
        if config.evaluate_start:
            run.evaluate(None)
        for number in range(config.rounds):
            run.collect(number)
            run.train(number)
            run.evaluate(number)
    return summarise(run.folder, run.manifest.state, config.eval.intervals, show=True)


def train_in_process(algorithm: Algorithm, settings: Any) -> None:
    """``fit()`` of the algorithm's trainer, which is forgotten altogether: trainers refer to themselves, and hold memory maps and threads."""
    algorithm.trainer_class()(settings).fit()
    gc.collect()


class _Run:
    def __init__(self, config: IterateConfig, task: Task | None, reward_function: RewardFunction | None, stages: Stages | None) -> None:
        self.config, self.algorithm = config, ALGORITHMS[config.algorithm]
        self.folder, self.start = Path(config.output).absolute(), local_path(config.model)
        self.task, self.manifest = task, Manifest(self.folder)
        self.stages = stages or Stages(
            collect=lambda own: collect_samples(own, task=task, reward_function=reward_function),
            train=train_in_process,
            evaluate=lambda own: evaluate_model(own, task),
        )

    # ---- what the stages of a round are given ----------------------------------------------------------------------------------------

    def model_after(self, number: int) -> str:
        """The policy of a round; of round -1 the model to begin with."""
        return self.start if number < 0 else str(self.round_folder(number) / "train/model")

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"

    def seed(self, number: int, stage: str) -> int:
        return derive_seed(self.config.seed, "iterate", number, stage) >> (63 - SEED_BITS)

    def collect_config(self, number: int) -> CollectConfig:
        config = self.config
        return replace(
            config.collect, model=self.model_after(number - 1), output=str(self.round_folder(number) / "collect"), seed=self.seed(number, "collect"),
            task=config.task, rollout=config.rollout, placement=config.placement,
        )  # fmt: skip

    def evaluate_config(self, number: int | None) -> EvaluateConfig:
        config, eval_, sampling = self.config, self.config.eval, self.config.collect.sampling
        place = self.folder / "start" if number is None else self.round_folder(number)
        return EvaluateConfig(
            model=self.model_after(-1 if number is None else number), output=str(place / "evaluate.json"), num_items=eval_.num_items,
            num_samples=eval_.num_samples, ks=eval_.ks, sets=eval_.sets, seed=config.seed, grader_processes=config.collect.grader_processes,
            grader_deadline_s=config.collect.grader_deadline_s, intervals=eval_.intervals, task=config.task,
            sampling=replace(sampling, temperature=eval_.temperature, top_p=eval_.top_p), rollout=config.rollout, placement=config.placement,
        )  # fmt: skip

    def inputs(self, number: int, data: tuple[str, ...]) -> RoundInputs:
        """What the choices say that the round trains from."""
        config, before = self.config, self.model_after(number - 1)
        warm = config.critic == "warm" and number > 0
        return RoundInputs(
            policy=before if config.policy == "previous" else self.start,
            reference=before if config.reference == "previous" else self.start,
            critic=str(self.round_folder(number - 1) / "train/critic") if warm else "",
            data=data, folder=self.round_folder(number) / "train", seed=self.seed(number, "train"),
        )  # fmt: skip

    def data(self, number: int) -> tuple[str, ...]:
        """The files of trajectories that the round learns from, oldest first."""
        rounds = range(number + 1) if self.config.data == "union" else (number,)
        found = [str(file) for one in rounds for file in sorted((self.round_folder(one) / "collect/trajectories").glob("part-*"))]
        if not found:
            raise DataError(f"round {number}: no sample is kept, so there is nothing to learn from: see --collect.threshold, or an easier task")
        return tuple(found)

    # ---- the stages ------------------------------------------------------------------------------------------------------------------

    def collect(self, number: int) -> None:
        if not self._begins(number, "collect"):
            return
        started = time.perf_counter()
        manifest = self.stages.collect(self.collect_config(number))
        self._finish(number, "collect", started, statistics=manifest["statistics"], seed=self.seed(number, "collect"))

    def train(self, number: int) -> None:
        if not self._begins(number, "train"):
            return
        started, inputs = time.perf_counter(), self.inputs(number, self.data(number))
        self.manifest.note_inputs(number, {
            "policy": self._short(inputs.policy), "reference": self._short(inputs.reference) if self.algorithm.has_reference else None,
            "critic": (self._short(inputs.critic) or "fresh") if self.algorithm.has_critic else None, "data": [*map(self._short, inputs.data)],
            "seed": inputs.seed,
        })  # fmt: skip
        if self.algorithm.one_path:
            inputs = replace(inputs, data=(link_files(inputs.data, self.round_folder(number) / "inputs"),))
        self.stages.train(self.algorithm, self.algorithm.settings_for(self.config, inputs))
        if not (inputs.folder / "model/config.json").is_file():
            raise WorkerError(f"round {number}: training left no model in {inputs.folder / 'model'}: --output must be on a disk that all ranks share")
        self._finish(number, "train", started, model=self._short(str(inputs.folder / "model")))

    def evaluate(self, number: int | None) -> None:
        if not self._begins(number, "evaluate"):
            return
        started, config = time.perf_counter(), self.evaluate_config(number)
        output = Path(config.output)
        if not output.exists():  # else it was finished and not noted: a result is there as a whole or not at all
            output.parent.mkdir(parents=True, exist_ok=True)
            self.stages.evaluate(config)
        self._finish(number, "evaluate", started, result=self._short(str(output)))
        summarise(self.folder, self.manifest.state, self.config.eval.intervals)

    def _begins(self, number: int | None, stage: str) -> bool:
        place = "the model to begin with" if number is None else f"round {number}"
        if stage in self.manifest.stages(number):
            print(f"{place}, {stage}: is finished")
            return False
        print(f"{place}, {stage}")
        return True

    def _finish(self, number: int | None, stage: str, started: float, **about: Any) -> None:
        self.manifest.finish(number, stage, {"seconds": round(time.perf_counter() - started, 1), **about})

    def _short(self, path: str) -> str:
        """Relative to the run's folder where it lies in it, so that the folder can be moved."""
        return os.path.relpath(path, self.folder) if path and Path(path).is_relative_to(self.folder) else path

    # ---- before anything starts ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuses what cannot work in any round, and training questions among those of the evaluation."""
        config = self.config
        self.algorithm.settings_for(config, self.inputs(0, ("trajectories",)))
        tokenizer = checked_tokenizer(self.start, config.rollout.max_model_len, named="model", trust_remote_code=config.rollout.trust_remote_code)
        task = self.task or load_task(config.task)
        sets = self.evaluate_config(None).eval_sets(task, tokenizer)
        if not config.task.allow_test_data_in_training:
            refuse_overlap(task.items("train"), sets, config.task.train_path or f"task {task.name}")

    def describe(self) -> None:
        """The plan of a round, stage by stage."""
        config = self.config
        choices = ", ".join(f"{name} {getattr(config, name)}" for name in CHOICES)
        print(f"{config.rounds} rounds of collect, train, evaluate; {choices}")
        collect_samples(replace(self.collect_config(0), dry_run=True), task=self.task)
        print_plan(self.algorithm.trainer_class()(self.algorithm.settings_for(config, self.inputs(0, ("trajectories",)))))
        evaluate_model(replace(self.evaluate_config(None), output="", dry_run=True), self.task)


def link_files(files: Iterable[str], folder: Path) -> str:
    """The folder, with nothing in it but links to the files, for a trainer that takes one path. They are relative: the run can be moved."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        link.unlink()
    for number, file in enumerate(map(Path, files)):
        (folder / f"{number:05d}{file.suffix}").symlink_to(os.path.relpath(file, folder))
    return str(folder)
