"""The best model of a run by an evaluation metric, kept in ``best/`` of its folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from openrl_reason.atomic import atomic_folder, naming_disk_errors
from openrl_reason.errors import CheckpointError, ConfigError, did_you_mean

MODES = ("max", "min")


class BestModel:
    """``best/model`` (a Hugging Face folder) and ``best/best.json`` (metric, mode, value, step), replaced as a whole by each better evaluation.

    What is in the folder is all there is to remember, so a killed run goes on from it. A best model that was found after the checkpoint from which
    the run goes on stays, though its step is done again.
    """

    def __init__(self, run_folder: Path, metric: str, mode: str) -> None:
        self.folder, self.metric, self.mode = run_folder / "best", metric, mode
        self.value: float | None = None
        self.step = 0

    def begin(self, *, resumed: bool) -> None:
        """Reads what a run that is continued has found; a run that starts anew deletes what an earlier one left.

        Raises:
            ConfigError: it was chosen by another metric or mode.
            CheckpointError: it does not read.
        """
        record_file = self.folder / "best.json"
        if not resumed and record_file.is_file():
            with naming_disk_errors(self.folder):
                shutil.rmtree(self.folder)
        if not (self.metric and record_file.is_file()):
            return
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
            before, self.value, self.step = (record["metric"], record["mode"]), float(record["value"]), int(record["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {record_file}: {error}. Delete {self.folder} to begin anew") from error
        if before != (self.metric, self.mode):
            raise ConfigError(
                f"--run.best_metric {self.metric} --run.best_mode {self.mode}: {self.folder} was chosen by {before[0]} {before[1]}; keep these,"
                " or move that folder away"
            )

    def offer(self, metrics: Mapping[str, float], step: int, export: Callable[[Path], None]) -> str | None:
        """Keeps the present model, which ``export(folder)`` writes, if its evaluation is better than all before; a line about it, or None.

        Raises:
            ConfigError: there is no such metric.
            CheckpointError: the disk refuses; the best model before is untouched.
        """
        if not self.metric:
            return None
        if self.metric not in metrics:
            ends = ("_low", "_high", "_stderr")
            known = [name for name in metrics if not name.startswith("timing/") and not name.endswith(ends)]
            there = f"there are {', '.join(known)}{did_you_mean(self.metric, known)}" if known else "there are none: nothing is held out"
            raise ConfigError(f"--run.best_metric is {self.metric!r}, which is none of the evaluation's metrics: {there}")
        value = float(metrics[self.metric])
        if math.isnan(value):
            return f"{self.metric} has no value after {step} steps: not compared with the best"
        if self.value is not None and not (value > self.value if self.mode == "max" else value < self.value):
            return None
        with atomic_folder(self.folder) as folder:
            export(folder / "model")
            if not (folder / "model" / "config.json").is_file():
                raise CheckpointError(f"the ranks wrote nothing below {folder} that this machine sees: --run.output_dir must be on a shared disk")
            record = {"metric": self.metric, "mode": self.mode, "value": value, "step": step}
            (folder / "best.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        self.value, self.step = value, step
        return f"best model so far: {self.metric} {value:.4g} after {step} steps, in {self.folder / 'model'}"
