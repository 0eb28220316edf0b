"""RestEM (Singh et al. 2023, arXiv 2312.06585): sample, keep what is right, fine-tune the start on it, repeat. One iteration is rejection sampling.

* E: ``samples_per_prompt`` responses of the best model so far to every training question; those that are right are kept, ``max_per_prompt``
  of a question.
* M: from the base model again, ``epochs`` passes over them, maximising the mean over sequences of the mean log-prob of their tokens.
  Every ``run.eval_every`` optimiser steps, and at the end, the weights are a candidate: its accuracy on the validation questions decides.

It stops when an iteration's candidate is no better than the best before. A step of the run is an optimiser step.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from openrl_reason.algorithms.collect import Collector, readable
from openrl_reason.algorithms.common import (
    ItemSampler,
    checked_tokenizer,
    describe_model,
    estimate_memory,
    local_path,
    start_together,
    update_metrics,
    within_limit,
)
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.restem_config import RestEMConfig
from openrl_reason.algorithms.restem_selection import START, Progress, keep_right
from openrl_reason.algorithms.samples import BLOCKS, SampleBlocks
from openrl_reason.algorithms.sampling import check_transport, start_grader, start_rewarder, training_evaluator, with_stops_of
from openrl_reason.algorithms.sft import SupervisedLoss
from openrl_reason.algorithms.trainer import Callback, Trainer, print_plan
from openrl_reason.atomic import atomic_folder
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import CheckpointError, DataError, WorkerError
from openrl_reason.evaluation.sets import EvalSet, refuse_overlap, training_sets
from openrl_reason.observe.run_log import read_records
from openrl_reason.rewards.build import check_sources
from openrl_reason.rewards.config import describe_rewards
from openrl_reason.tasks.base import Task, TaskItem, load_task
from openrl_reason.workers.placement import Placement, Role


class RestEMTrainer(Trainer):
    """Expectation and maximisation in turns.

    Args:
        config: all settings.
        task: replaces the task that ``config.task`` names.
        reward_function: replaces ``config.reward``: any form of docs/rewards.md as a Python callable, which runs in a thread of this process.
        callbacks: called after each optimiser step with (finished steps, metrics).
    """

    headline: ClassVar = ("restem/iteration", "train/loss", "train/grad_norm", "train/lr", "timing/step")
    curves: ClassVar = ("train/loss", "train/grad_norm", "train/lr", "restem/iteration")
    traces: ClassVar = (*Trainer.traces, f"samples/*/{BLOCKS}")

    def __init__(
        self,
        config: RestEMConfig,
        *,
        task: Task | None = None,
        reward_function: Callable[..., Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, callbacks)
        self._task, self._reward_function = task, reward_function
        self.progress = Progress()
        self._expectation_metrics: dict[str, float] = {}
        self._referred: set[str] = set()  # states that the newest checkpoint speaks of

    def fit(self) -> None:
        """The whole run. With ``run.dry_run`` it prints the plan and returns."""
        print_plan(self)
        if self.run.dry_run:
            self.prepare()
            return
        with self:
            if self.done == 0 and self.run.eval_at_start:
                metrics = self.run_evaluation()
                self.progress.best_score = self._score(metrics)
            while not self.progress.outcome:
                kept = self.expectation()
                if kept:
                    self.maximisation(kept)
            self.conclude()

    def expectation(self) -> list[Trajectory]:
        """E: the right responses of the best model so far, from disk as far as they are there. Empty, and the run over, if there are none."""
        config, progress = self.config, self.progress
        started, blocks = time.perf_counter(), self._blocks()
        blocks.begin(keep=self.run.resume)
        if blocks.missing:
            if progress.step:
                raise CheckpointError(f"the samples that iteration {progress.iteration} was training on are gone from {blocks.folder}")
            self._load(progress.best)
            self._sync(progress.best_version)
            blocks.sample(self.collector, config.reward.max_failed_rate, self.log.say)
        rollouts = blocks.read()
        kept, counts = keep_right(
            rollouts.trajectories, threshold=config.threshold, max_per_prompt=config.max_per_prompt, choice=config.choice, dedup=config.dedup,
            keep_truncated=config.keep_truncated, seed=derive_seed(self.run.seed, progress.iteration),
        )  # fmt: skip
        shown = ", ".join(f"{name.removeprefix('restem/').replace('_', ' ')} {count:g}" for name, count in counts.items())
        self.log.say(f"iteration {progress.iteration}, E: {shown}")
        if not progress.step:
            self._expectation_metrics = rollouts.metrics | counts | {"timing/expectation": time.perf_counter() - started}
            tokenizer = self.tokenizer if self.run.log_rollout_tokens else None
            self.log.rollouts(readable(rollouts, self.done, self.run.log_rollouts, tokenizer=tokenizer))
        if not kept:
            rewards = rollouts.rewards[np.isfinite(rollouts.rewards)]
            highest = f"the highest reward is {rewards.max():g}" if len(rewards) else "none has a reward"
            total = len(rollouts.rewards)
            message = f"iteration {progress.iteration}: none of {total} responses is kept at --threshold {config.threshold:g}: {shown}"
            if progress.best == START:
                raise DataError(f"{message} ({highest}): lower it, use an easier task, or start from a model that solves some of it")
            progress.outcome = message
        return kept

    def maximisation(self, kept: Sequence[Trajectory]) -> None:
        """M: trains on them; candidates are evaluated, and the chosen one becomes the best model if it is better."""
        progress, config = self.progress, self.config
        if not progress.step:
            self._load(START if config.restart == "base" else progress.best)
        self.sampler = ItemSampler(kept, derive_seed(self.run.seed, "restem order", progress.iteration))
        self._num_positions = config.epochs * len(kept)
        total = -(-self._num_positions // config.batch_size)
        self._models_turn()
        self.policy.set_schedule(total, progress.step)
        while progress.iteration_is_open(total) and self.done < self.run.steps:
            self.run_step()
            due = self.run.eval_every and progress.step % self.run.eval_every == 0
            if due or progress.step == total or self.done == self.run.steps:
                self.evaluate_candidate()
            if self.run.save_every and self.done % self.run.save_every == 0 and progress.iteration_is_open(total):
                self.save()
        if progress.choice_score is None:  # resumed with --run.steps lowered to what it had done
            self.evaluate_candidate()
        progress.end_iteration(config.iterations)
        if self.done >= self.run.steps and not progress.outcome:
            progress.outcome = f"--run.steps {self.run.steps} are done"
        best = "" if progress.best_score is None else f"{progress.best_score:.4g}"
        self.log.say(f"iteration {progress.iteration - 1}, M: best model so far {progress.best}, {self._metric_name} {best}")
        self.save()  # at the end of each iteration in any case: the next one samples from the model just chosen

    def step(self) -> dict[str, float]:
        """One optimiser step of M."""
        started, progress, size = time.perf_counter(), self.progress, self.config.batch_size
        self._models_turn()
        left = self._num_positions - progress.step * size  # the last batch of all may be smaller
        batch = TokenBatch.from_trajectories(self.sampler.items(progress.step, size)[:left])
        weights, denominator = loss_weights(batch, "sequence")
        update = self.policy.update(
            batch.with_tokens(loss_weights=weights), SupervisedLoss(), {"loss": denominator}, temperature=self.config.temperature
        )
        metrics = update_metrics([update]) | self._expectation_metrics
        self._expectation_metrics = {}
        metrics |= {"restem/iteration": float(progress.iteration), "train/tokens": float(batch.num_tokens)}
        metrics["perf/tokens_per_second"] = batch.num_tokens / (time.perf_counter() - started)
        progress.step += 1
        return metrics

    def evaluate_candidate(self) -> None:
        """Validates the present weights and, if they are the iteration's choice, keeps their state."""
        started = time.perf_counter()
        metrics = self._evaluate_sets([self.validation])
        metrics["timing/evaluate"] = time.perf_counter() - started
        self.log.evaluation(self.done, metrics)
        self.keep_best(metrics)
        name = f"iteration-{self.progress.iteration:04d}-step-{self.progress.step:06d}"
        if self.progress.offer(name, self._score(metrics), self.done, self.config.selection):
            self._models_turn()
            with atomic_folder(self._states / name) as folder:
                self.policy.save_state(folder)
        self._delete_idle_states()

    def conclude(self) -> None:
        """Exports the best model, evaluates it on the test sets, writes curves and report."""
        self.log.say(f"{self.progress.outcome}; the best model is {self.progress.best}")
        self._load(self.progress.best)
        if self.run.eval_at_end and self.test_sets and not self._was_tested():
            self.log.evaluation(self.done, self._evaluate_sets(self.test_sets))
        self.finish()

    def _was_tested(self) -> bool:
        """Whether a run that is resumed after its end has evaluated the chosen model already."""
        records = read_records(self.folder / "metrics.jsonl")
        name = f"eval/{self.test_sets[0].name}/pass@1"
        return any(record["event"] == "eval" and record["step"] == self.done and name in record for record in records)

    def evaluate(self) -> dict[str, float]:
        """The present weights on the validation questions and the test sets."""
        return self._evaluate_sets([self.validation, *self.test_sets])

    def _evaluate_sets(self, sets: Sequence[EvalSet]) -> dict[str, float]:
        self._sync(self.done)
        metrics: dict[str, float] = {}
        for eval_set in sets:
            result = self.evaluator.run(eval_set, (self.run.seed, "eval"))
            metrics |= result.metrics
            tokenizer = self.tokenizer if self.run.log_rollout_tokens else None
            self.log.rollouts(result.records(step=self.done, limit=self.run.log_rollouts, tokenizer=tokenizer))
        return metrics

    @property
    def _metric_name(self) -> str:
        return f"eval/{self.validation.name}/pass@1"

    def _score(self, metrics: Mapping[str, float]) -> float:
        score = metrics[self._metric_name]
        if not np.isfinite(score):
            raise WorkerError(f"{self._metric_name} has no value, so candidates cannot be compared: not one validation answer could be graded")
        return float(score)

    # ---- actors, data and state ----------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        rollout = self.config.rollout
        return [Role("policy", self.config.policy.num_ranks), Role("engine", rollout.num_engines, gpus_per_actor=rollout.tensor_parallel)]

    def plan(self) -> list[tuple[str, str]]:
        config, engines = self.config, self.config.rollout
        kept = min(config.samples_per_prompt, config.max_per_prompt)
        every = f"every {self.run.eval_every} optimiser steps" if self.run.eval_every else "at the end of an iteration"
        return [
            ("iterations", f"at most {config.iterations}, from the {config.restart} model each; the first that does not improve is the last"),
            ("E: samples", f"{config.samples_per_prompt} to each question, of <= {config.sampling.max_new_tokens} tokens; at most {kept} are kept"),
            ("reward", "a Python function" if self._reward_function else describe_rewards(config.reward)),
            ("M: optimiser steps", f"{config.epochs} epochs of the kept responses, {config.batch_size} a step"),
            ("candidates", f"{every}; {config.selection} selection"),
            ("policy", describe_model(config.policy)),
            ("engines", f"{engines.num_engines} x {engines.dtype}, tensor parallel {engines.tensor_parallel}, context {engines.max_model_len}"),
            ("memory of the weights", estimate_memory(config.policy, engines=engines)),
        ]

    def prepare(self) -> None:
        config, limit = self.config, self.config.rollout.max_model_len
        self.model_path = local_path(config.policy.path)
        self.tokenizer = checked_tokenizer(self.model_path, limit, trust_remote_code=config.policy.trust_remote_code)
        self.task = self._task or load_task(config.task)
        if self.run.dry_run and not self._reward_function:
            check_sources(config.reward)
        self.sampling = with_stops_of(self.task, config.sampling)
        items, overlong = within_limit(self.task, "train", self.tokenizer, limit - config.sampling.max_new_tokens)
        sets = training_sets(config.eval, task=self.task, tokenizer=self.tokenizer, sampling=self.sampling, max_model_len=limit)
        if not self.task.config.allow_test_data_in_training:
            refuse_overlap(items, sets, self.task.config.train_path or f"task {self.task.name}")
        self._hold_out(items, sets)
        best, candidates = self.run.best_metric, f"eval/{self.validation.name}/"
        known = not best or best.startswith(candidates)
        require(known, "run.best_metric", best, f"candidates are evaluated on the validation questions alone: use {candidates}pass@1, for instance")
        bound = len(self.items) * min(config.samples_per_prompt, config.max_per_prompt) * config.epochs
        self.run = replace(self.run, steps=min(self.run.steps, config.iterations * -(-bound // config.batch_size)))
        for what, count in (("training", overlong), *((f"{one.name} evaluation", one.num_overlong) for one in sets)):
            if count:
                print(f"{count} {what} prompts leave no room for a full response within --rollout.max_model_len: left out")

    def _hold_out(self, items: Sequence[TaskItem], sets: Sequence[EvalSet]) -> None:
        """Sets ``items`` (training questions), ``validation`` and ``test_sets``."""
        config, count = self.config, self.config.validation_items
        if not count:
            self.items, self.validation, self.test_sets = list(items), sets[0], list(sets[1:])
            return
        require(count < len(items), "validation_items", count, f"there are {len(items)} training questions in all: use fewer, or 0")
        order = np.random.default_rng(derive_seed(self.run.seed, "restem validation")).permutation(len(items))
        held_out = [items[place] for place in sorted(order[:count])]
        names = {item.task_id for item in held_out}
        self.items = [item for item in items if item.task_id not in names]  # a question that comes twice is held out twice
        require(bool(self.items), "validation_items", count, "no training question is left: use fewer")
        sampling = replace(self.sampling, temperature=config.eval.temperature, top_p=config.eval.top_p)
        samples = config.eval.num_samples
        taken = any(one.name == "validation" for one in sets)
        require(not taken, "eval.sets", "validation", "with --validation_items this name is taken: rename the set, or use --validation_items 0")
        self.validation = EvalSet("validation", self.task, "train", held_out, 0, samples, sampling, (samples,))
        self.test_sets = list(sets)

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup
        from openrl_reason.workers.rollout import RolloutPool

        config, seed = self.config, self.run.seed
        self._take_turns = placement.gpu and config.placement.colocate
        check_transport(config.rollout, self._take_turns)
        grader, function = start_grader(config, stack), self._reward_function
        rewarder = start_rewarder(config, grader, stack, task=self.task, tokenizer=self.tokenizer, reward_function=function)
        policy = replace(config.policy, path=self.model_path)
        self.pool, self.policy = start_together(
            stack,
            lambda: RolloutPool(config.rollout, self.model_path, placement=placement, seed=seed),
            # The length of an iteration is known after its E alone: set_schedule tells.
            lambda: ModelGroup.start(policy, role="policy", placement=placement, seed=seed, total_steps=1, timeout_s=policy.timeout_s),
            side_by_side=not self._take_turns,  # vLLM measures the GPU's free memory while it starts
        )
        self._models_are_up = True
        with atomic_folder(self._states / START) as folder:  # also when resuming: this is before any checkpoint is loaded
            self.policy.save_state(folder)
        if self._take_turns:
            self.policy.offload()
            self._models_are_up = False
        self.collector = Collector(self.task, self.tokenizer, self.pool, rewarder)
        self.evaluator = training_evaluator(config, grader, rewarder, pool=self.pool, tokenizer=self.tokenizer, reward_function=function)

    def _blocks(self) -> SampleBlocks:
        config, iteration = self.config, self.progress.iteration
        names = [item.task_id for item in self.items]
        return SampleBlocks(
            self.folder / "samples" / f"iteration-{iteration:04d}", self.items, config.samples_per_prompt, self.sampling,
            (self.run.seed, "restem", iteration), config.prompts_per_block, content_id(self.model_path, self.progress.best, *names),
        )  # fmt: skip

    def _models_turn(self) -> None:
        """On shared GPUs: the engines sleep, the policy gets its memory back."""
        if self._take_turns and not self._models_are_up:
            self.pool.sleep()
            self.policy.reload()
            self._models_are_up = True

    def _engines_turn(self) -> None:
        """The other way round; within a weight sync, after the trainer has packed its weights and before the engines load them."""
        if self._take_turns and self._models_are_up:
            self.policy.offload()
            self.pool.wake()
            self._models_are_up = False

    def _sync(self, version: int) -> None:
        self._models_turn()
        self.pool.sync_weights(self.policy, version, between=self._engines_turn)

    def _load(self, state: str) -> None:
        self._models_turn()
        self.policy.load_state(self._states / state)

    @property
    def _states(self) -> Path:
        return self.folder / "states"

    def _delete_idle_states(self) -> None:
        """Deletes states that neither the present nor the newest checkpoint needs."""
        needed = {START, self.progress.best, self.progress.choice} | self._referred
        for folder in self._states.glob("iteration-*"):
            if folder.name not in needed:
                shutil.rmtree(folder)

    def save(self) -> Path:
        path = super().save()
        self._referred = {self.progress.best, self.progress.choice}
        self._delete_idle_states()
        return path

    def export(self, folder: Path) -> None:
        self._models_turn()
        self.policy.export_hf(folder)

    def save_workers(self, folder: Path) -> None:
        self._models_turn()
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")

    def load_workers(self, folder: Path) -> None:
        self._models_turn()
        self.policy.load_state(folder / "policy")

    def order(self) -> dict[str, Any]:
        names = (
            "samples_per_prompt", "threshold", "max_per_prompt", "choice", "dedup", "keep_truncated", "prompts_per_block", "restart", "epochs",
            "batch_size", "temperature", "selection",
        )  # fmt: skip
        items = content_id(*(item.task_id for item in self.items))
        own = {name: getattr(self.config, name) for name in names}
        return own | {"run.seed": self.run.seed, "training items": f"{len(self.items)} items ({items})", "validation items": self.validation.identity}

    def state(self) -> dict[str, Any]:
        return super().state() | {"restem": vars(self.progress)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.progress = Progress(**state["restem"])
        self.progress.reopen(iterations=self.config.iterations, steps_left=self.run.steps - self.done)
        self._referred = {self.progress.best, self.progress.choice}
