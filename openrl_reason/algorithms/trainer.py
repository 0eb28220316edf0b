"""The loop that every algorithm shares: plan, start, resume, step, evaluate, checkpoint, export, stop. An algorithm fills in the step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from openrl_reason.algorithms.best import MODES, BestModel
from openrl_reason.algorithms.common import check_adapters
from openrl_reason.atomic import remove_unfinished, write_json
from openrl_reason.config import changed_settings, require, save_config, to_dict
from openrl_reason.errors import CheckpointError, ConfigError
from openrl_reason.folders import RUN, claimed, refuse_others
from openrl_reason.observe.breakdown import time_breakdown
from openrl_reason.observe.plots import plot_curves
from openrl_reason.observe.report import ReportConfig, report
from openrl_reason.observe.run_log import RunLog
from openrl_reason.observe.trackers import TrackConfig, Trackers, check_track
from openrl_reason.workers.placement import Placement, PlacementConfig, Role

Callback = Callable[[int, Mapping[str, Any]], None]
"""Called after each step with the number of finished steps and the step's metrics."""

NO_LIMIT = 1_000_000
"""run.steps of algorithms whose epochs decide."""


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    output_dir: str = "runs/run"
    """Folder for the resolved config, metrics.jsonl, rollouts.jsonl, checkpoints, curves.png and the exported model."""
    steps: int = 100
    """Optimisation steps (for online algorithms: one collection of rollouts each)."""
    seed: int = 0
    """Every random choice derives from it."""
    eval_every: int = 0
    """Evaluate every so many steps (0: only as eval_at_start and eval_at_end say)."""
    eval_at_start: bool = True
    """Evaluate before the first step."""
    eval_at_end: bool = True
    """Evaluate after the last step."""
    save_every: int = 0
    """Write a checkpoint every so many steps (0: none; the trained model is exported at the end in any case)."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; an old one is deleted only after a new one is complete."""
    best_metric: str = ""
    """Metric of the evaluations, for instance eval/arithmetic/pass@1, by which the best model so far is kept in output_dir/best/model, with best.json
    (step, value) beside it. Empty: none is kept."""
    best_mode: str = "max"
    """max: the larger the better; min: the smaller."""
    resume: bool = False
    """Continue from the newest checkpoint of output_dir (from the start if it has none)."""
    dry_run: bool = False
    """Print the plan (actors, bundles, batch arithmetic, memory) and stop."""
    log_rollouts: int = 8
    """Rollouts per step written to rollouts.jsonl: whole groups of siblings as far as they fit (-1: all)."""
    log_rollout_tokens: bool = True
    """Write each token's text, advantage and log-prob with them, for the report (about 25 bytes a token)."""
    report: bool = True
    """Write report.html when the run ends."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Trackers beside metrics.jsonl."""


class Trainer:
    """Base of the trainers. Use ``fit()``, or as a context manager around your own loop of ``run_step()`` calls.

    An algorithm supplies ``roles``, ``plan``, ``prepare``, ``build``, ``step``, ``evaluate``, ``export``, ``save_workers``, ``load_workers`` and,
    where it has any, ``state`` and ``load_state``. ``config.run`` and ``config.placement`` must exist.
    """

    headline: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar[tuple[str, ...]] = ()
    traces: ClassVar[tuple[str, ...]] = ("metrics.jsonl",)
    """Files (patterns) which tell, beside checkpoints, that a folder holds a run: whatever took work to make, before the first step too."""

    def __init__(self, config: Any, callbacks: Sequence[Callback] = ()) -> None:
        self.config, self.callbacks = config, tuple(callbacks)
        self.run: RunConfig = config.run
        self.done = 0  # finished steps
        self.log: RunLog | None = None
        self.best = BestModel(self.folder, self.run.best_metric, self.run.best_mode)
        self._stack = contextlib.ExitStack()
        check_run(self.run)

    # ---- what an algorithm supplies ------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        """The actor groups to place."""
        raise NotImplementedError

    def plan(self) -> list[tuple[str, str]]:
        """(what, how much) rows of the plan table."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Reads tokenizer, task and data in this process: what is wrong with them shows before any actor starts."""
        raise NotImplementedError

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        """Starts the actors; registers on ``stack`` what must be closed."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        """The step after ``done`` finished ones; returns its metrics. ``run_step`` also logs and counts it."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Metrics of the present weights on held-out items (``eval/...``)."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Writes the trained model as a Hugging Face folder."""
        raise NotImplementedError

    def save_workers(self, folder: Path) -> None:
        """Writes the state of all ranks below ``folder``."""
        raise NotImplementedError

    def load_workers(self, folder: Path) -> None:
        """Reads what ``save_workers`` wrote."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """JSON-able state of the driver: what decides the order of the data, and in subclasses baselines and controllers."""
        return {"order": self.order()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state`` gave.

        Raises:
            CheckpointError: the run would see other data, or another reference, than the one that wrote the checkpoint.
        """
        now = self.order()
        changed = [f"{name} was {old!r} and is {now.get(name)!r}" for name, old in state.get("order", {}).items() if now.get(name) != old]
        if changed:
            raise CheckpointError(
                f"cannot resume: the run would go on with other data, or against another reference, than it began with: {'; '.join(changed)}. Its "
                f"settings are in {self.folder / 'config.yaml'}"
            )

    def order(self) -> dict[str, Any]:
        """What the items of a step depend on, besides its number, and the reference that they are held against."""
        raise NotImplementedError

    # ---- what they share -----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.run.output_dir).absolute()  # actors have another working directory

    def start(self) -> None:
        """Creates the output folder, starts the actors and, with ``resume``, loads the newest checkpoint."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        from openrl_reason.workers.checkpoint import CheckpointManager

        refuse_others(self.folder, "run.output_dir", RUN)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(claimed(self.folder, "run.output_dir"))
            self.checkpoints = CheckpointManager(self.folder / "checkpoints", keep=self.run.keep_checkpoints)
        except OSError as error:
            raise ConfigError(f"--run.output_dir is {self.run.output_dir!r}: {error.strerror or error}") from None
        checkpoint = self.checkpoints.latest(clean=self.run.resume)
        if self.run.resume and not checkpoint and (self.folder / "metrics.jsonl").exists():
            print(f"there is no checkpoint in {self.folder}: starting from step 0, its logs are replaced")
        if not self.run.resume and (checkpoint or any(any(self.folder.glob(pattern)) for pattern in self.traces)):
            raise ConfigError(
                f"--run.output_dir {self.run.output_dir!r} holds a run already: add --run.resume to continue it, or choose another folder"
            )
        self.prepare()
        if checkpoint and self.run.resume:
            remedy = f"the run to resume has done {checkpoint.step} steps already: more --run.steps, or --epochs, continue it"
            require(checkpoint.step <= self.run.steps, "run.steps", self.run.steps, remedy)
        check_adapters(self.config)
        if self.run.resume:
            remove_unfinished(self.folder)
        self.best.begin(resumed=checkpoint is not None)
        placement = self._stack.enter_context(Placement(self.config.placement, self.roles()))
        self.build(placement, self._stack)
        if checkpoint:
            self.done = checkpoint.step
            self.load_state(checkpoint.state)
            self.load_workers(checkpoint.path)
        changes = changed_settings(self.config, self.folder / "config.yaml") if checkpoint else []
        changes = [change for change in changes if not change.startswith("--run.resume ")]
        save_config(self.config, self.folder / "config.yaml")
        write_json(self.folder / "progress.json", {"total_steps": self.run.steps})  # epochs are settings, too: config.yaml need not say it
        trackers = Trackers(self.run.track, self.folder, start_step=self.done, settings=to_dict(self.config))
        self.log = RunLog(self.folder, total_steps=self.run.steps, start_step=self.done, headline=self.headline, trackers=trackers)
        self._stack.callback(self.log.close)
        if checkpoint:
            self.log.say(f"resumed after step {self.done} from {checkpoint.path}")
        if changes:
            self.log.say(f"settings changed since: {', '.join(changes)}")

    def fit(self) -> None:
        """The whole run. With ``run.dry_run`` it prints the plan and returns."""
        print_plan(self)
        if self.run.dry_run:
            self.prepare()
            return
        with self:
            if self.done == 0 and self.run.eval_at_start:
                self.run_evaluation()
            while self.done < self.run.steps:
                self.run_step()
                last = self.done == self.run.steps
                if (self.run.eval_every and self.done % self.run.eval_every == 0) or (last and self.run.eval_at_end):
                    self.run_evaluation()
                if self.run.save_every and (last or self.done % self.run.save_every == 0):
                    self.save()
            self.finish()

    def run_step(self) -> dict[str, float]:
        """One ``step()``, timed, logged and counted."""
        started = time.perf_counter()
        metrics = self.step()
        metrics["timing/step"] = time.perf_counter() - started
        self.log.train(self.done, metrics)
        self.done += 1
        for callback in self.callbacks:
            callback(self.done, metrics)
        return metrics

    def run_evaluation(self) -> dict[str, float]:
        """One ``evaluate()``, timed and logged."""
        started = time.perf_counter()
        metrics = self.evaluate()
        metrics["timing/evaluate"] = time.perf_counter() - started
        self.log.evaluation(self.done, metrics)
        self.keep_best(metrics)
        return metrics

    def keep_best(self, metrics: Mapping[str, float]) -> None:
        """With ``run.best_metric``: exports the present model if its evaluation, these ``metrics``, is better than all before."""
        news = self.best.offer(metrics, self.done, self.export)
        if news:
            self.log.say(news)

    def save(self) -> Path:
        """Writes a complete checkpoint (atomically) and returns its folder."""

        def write(folder: Path) -> None:
            self.save_workers(folder)
            if not (folder / "model" / "config.json").is_file():
                raise CheckpointError(f"the ranks wrote nothing below {folder} that this machine sees: --run.output_dir must be on a shared disk")

        return self.checkpoints.save(self.done, write, self.state())

    def finish(self) -> None:
        """Exports the model, draws the curves and writes the report."""
        self.export(self.folder / "model")
        plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", train=self.curves, title=str(self.folder))
        breakdown = time_breakdown(self.folder / "metrics.jsonl")
        if breakdown:
            self.log.say("where the time of a step went:  " + "  ".join(f"{name} {share:.1%}" for name, share in breakdown.items()))
        if self.run.report:
            report(ReportConfig(runs=(str(self.folder),)))
        self.log.say(f"model: {self.folder / 'model'}   curves: {self.folder / 'curves.png'}   metrics: {self.folder / 'metrics.jsonl'}")

    def close(self) -> None:
        """Stops every actor this run started."""
        self._stack.close()

    def __enter__(self) -> Trainer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_run(run: RunConfig) -> None:
    """Checks the settings of a run as a whole."""
    require(run.steps >= 1, "run.steps", run.steps, "at least 1 step is needed")
    require(run.keep_checkpoints >= 1, "run.keep_checkpoints", run.keep_checkpoints, "at least 1 must be kept")
    for name in ("eval_every", "save_every"):
        require(getattr(run, name) >= 0, f"run.{name}", getattr(run, name), "use 0 for never, or a number of steps")
    require(run.best_mode in MODES, "run.best_mode", run.best_mode, f"use {' or '.join(MODES)}")
    evaluates = run.eval_every or run.eval_at_start or run.eval_at_end
    require(not run.best_metric or evaluates, "run.best_metric", run.best_metric, "nothing is evaluated: set --run.eval_every")
    check_track(run.track)
    require(run.log_rollouts >= -1, "run.log_rollouts", run.log_rollouts, "use -1 for all, 0 for none, or a number")


def print_plan(trainer: Trainer) -> None:
    """The start-up table: batch arithmetic, actors and the bundles they sit in."""
    from rich.console import Console
    from rich.table import Table

    placement = Placement(trainer.config.placement, trainer.roles())
    table = Table(title=f"plan: {type(trainer).__name__}", title_justify="left", show_header=False)
    for what, amount in trainer.plan():
        table.add_row(what, amount)
    for index, bundle in enumerate(placement.bundles):
        resources = " + ".join(f"{amount:g} {kind}" for kind, amount in sorted(bundle.resources.items(), reverse=True))
        table.add_row(f"bundle {index} ({resources})", ", ".join(f"{role}-{number}" for role, number in bundle.actors))
    Console(width=None if Console().is_terminal else 140, soft_wrap=False).print(table)


__all__ = ["Callback", "PlacementConfig", "RunConfig", "Trainer", "check_run", "print_plan"]
