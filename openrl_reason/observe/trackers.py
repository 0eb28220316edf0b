"""Weights & Biases and TensorBoard beside ``metrics.jsonl``, which is always written and stays the record.

Both place a training step at the number of finished steps (the first is 1, as on the console), so that an evaluation after n steps stands
where training step n does. A tracker that fails while the run goes on is reported once and counted; settings that cannot work are refused
before the start. The API key comes from the environment alone: it is no setting, and nothing here writes or passes it on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason.atomic import write_json
from openrl_reason.config import require as check
from openrl_reason.environment import require
from openrl_reason.errors import ConfigError
from openrl_reason.observe.redact import redact, redact_text, redact_values

WANDB_MODES = ("", "online", "offline")
COLUMNS = ("prompt", "response", "reward", "status", "parsed", "gold")


@dataclass(frozen=True)
class TrackConfig:
    """Trackers beside metrics.jsonl."""

    wandb: str = ""
    """Weights & Biases: online (with WANDB_API_KEY in the environment), offline (to be uploaded with `wandb sync`), or empty for none."""
    project: str = "openrl_reason"
    """W&B project."""
    entity: str = ""
    """W&B user or team. Empty: the default of the account."""
    group: str = ""
    """W&B group, for runs that belong together (seeds of one experiment)."""
    name: str = ""
    """W&B name of the run. Empty: the name of the output folder."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    tensorboard: bool = False
    """Write TensorBoard event files to the folder `tensorboard` of the run."""
    rollout_rows: int = 8
    """Rollouts per step and source in the trackers' tables, at most (run.log_rollouts limits them first). 0: none."""
    rollout_chars: int = 4000
    """Characters of a prompt or a response in those tables; the middle of a longer one is left out."""


def check_track(config: TrackConfig) -> None:
    """Refuses what cannot work, before anything is started.

    Raises:
        ConfigError: an unknown mode, a missing WANDB_API_KEY, a limit that is none.
        MissingDependencyError: the package of a tracker that was asked for is missing.
    """
    check(config.wandb in WANDB_MODES, "run.track.wandb", config.wandb, "use online, offline, or leave it empty")
    check(config.rollout_rows >= 0, "run.track.rollout_rows", config.rollout_rows, "use 0 for none, or a number of rows")
    check(config.rollout_chars >= 100, "run.track.rollout_chars", config.rollout_chars, "use at least 100")
    if config.wandb:
        check(bool(config.project), "run.track.project", config.project, "W&B needs the name of a project")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of W&B's own crashes; read when it is imported
        require("wandb", "for --run.track.wandb")
    if config.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "--run.track.wandb is 'online', but WANDB_API_KEY is not set: export it (it is taken from the environment alone), or use offline"
        )
    if config.tensorboard:
        require("tensorboard", "for --run.track.tensorboard")


class WandbTracker:
    """One W&B run per run folder, also over several resumes.

    Within W&B a training step s is at ``_step`` 2s + 1 and an evaluation after n steps at 2n: unique and in order of time. A resumed run leaves
    out what it logged before it was killed, since W&B cannot overwrite: the values of the first pass stay.
    """

    name = "wandb"

    def __init__(self, config: TrackConfig, folder: Path, start_step: int, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._wandb = require("wandb", "for --run.track.wandb")
        self._config, self._path = config, folder / "wandb_run.json"
        known = json.loads(self._path.read_text()) if start_step and self._path.exists() else {}
        self._state = {"run_id": known.get("run_id") or secrets.token_hex(4), "logged": known.get("logged", -1)}
        self._run = self._init(folder, redact(settings), say)
        write_json(self._path, self._state)
        # Online the server knows best what has arrived; an offline run is asked nothing, so its own record decides.
        self._first_new = self._run.starting_step if self._run.settings.mode == "online" else self._state["logged"] + 1
        self._newest = -1
        self._defined: set[str] = set()

    def _init(self, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> Any:
        wandb, config = self._wandb, self._config
        arguments = {
            "project": config.project, "entity": config.entity or None, "group": config.group or None, "name": config.name or folder.name,
            "tags": list(config.tags) or None, "config": dict(settings), "dir": str(folder), "id": self._state["run_id"], "resume": "allow",
            "reinit": "create_new",
            # What W&B would collect by itself could hold secrets: console text, the command line, the git remote, direct URLs of packages.
            "settings": wandb.Settings(
                console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_save_requirements=False, silent=True,
                init_timeout=30, finish_timeout=60, x_transaction_log_flush_interval=0.5,
            ),
        }  # fmt: skip
        try:
            return wandb.init(mode=config.wandb, **arguments)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(f"--run.track.wandb {config.wandb}: {redact_text(str(error))}") from None
        except wandb.errors.CommError as error:
            reason = redact_text(" ".join(str(error).split()))
            if any(refusal in reason for refusal in (" 401", " 403", " 404", "permission")):
                raise ConfigError(
                    f"--run.track.wandb online: the server refused ({reason}). Check WANDB_API_KEY, --run.track.entity and --run.track.project"
                ) from None
            say(f"W&B cannot be reached ({reason}): this run is kept offline; upload it later with `wandb sync {folder / 'wandb'}/offline-run-*`")
            wandb.teardown()  # W&B's service still holds the run id of the attempt; a new one is started
            os.environ.pop("WANDB_SERVICE", None)
            return wandb.init(mode="offline", **arguments)

    def train(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of step ``step`` (0-based)."""
        self._log(2 * step + 1, "step/train", step + 1, numbers)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of an evaluation after ``step`` steps."""
        self._log(2 * step, "step/eval", step, numbers)

    def rollouts(self, step: int, source: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of its own for this step and source."""
        is_eval = source.startswith("eval")
        table = self._wandb.Table(columns=list(COLUMNS), data=[[_cell(row.get(name)) for name in COLUMNS] for row in rows])
        self._log(2 * step + (not is_eval), "", 0, {f"rollouts/{source}": table})

    def _log(self, place: int, step_metric: str, x: int, values: Mapping[str, Any]) -> None:
        if place < self._first_new:
            return
        for name in (*values, step_metric) if step_metric else ():
            if name not in self._defined:
                self._run.define_metric(name, step_metric=None if name == step_metric else step_metric)
                self._defined.add(name)
        self._run.log(dict(values) | ({step_metric: x} if step_metric else {}), step=place)
        if place > self._newest:  # W&B keeps the newest step open: only those before it are safe on its disk
            self._record(self._newest)
            self._newest = place

    def _record(self, place: int) -> None:
        if place > self._state["logged"]:
            self._state["logged"] = place
            write_json(self._path, self._state)

    def close(self, failed: bool) -> None:
        """Marks the run finished or failed; waits at most a minute for uploads, and what is left stays on disk for `wandb sync`."""
        self._run.finish(exit_code=int(failed))
        self._record(self._newest)


class TensorBoardTracker:
    """Event files in the folder ``tensorboard`` of a run. On resume, what was written after the checkpoint is hidden (``purge_step``)."""

    name = "tensorboard"

    def __init__(self, folder: Path, start_step: int, settings: Mapping[str, Any]) -> None:
        require("tensorboard", "for --run.track.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # The evaluation after start_step steps came before the checkpoint: it stays. A run that begins anew hides everything.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0, flush_secs=30)
        self._writer.add_text("config", _verbatim(json.dumps(redact(settings), indent=1, default=str)), start_step)

    def train(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of step ``step`` (0-based)."""
        self._scalars(step + 1, numbers)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of an evaluation after ``step`` steps."""
        self._scalars(step, numbers)

    def _scalars(self, x: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, x)

    def rollouts(self, step: int, source: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows as one text."""
        texts = [f"**{name}**\n\n{_verbatim(str(_cell(row.get(name))))}" for row in rows for name in COLUMNS]
        self._writer.add_text(f"rollouts/{source}", "\n\n".join(texts), step + (not source.startswith("eval")))

    def close(self, failed: bool) -> None:
        """Writes what is buffered."""
        self._writer.close()


class Trackers:
    """All trackers of a run, behind the calls of ``RunLog``. Without any it costs nothing.

    Args:
        config: which trackers, checked with ``check_track``.
        folder: the run's output folder (exists).
        start_step: finished steps of the checkpoint that the run resumes from; 0 for a new run.
        settings: the run's resolved config as a dictionary (``config.to_dict``).

    Raises:
        ConfigError: W&B refuses the key, the project or the settings.
    """

    def __init__(self, config: TrackConfig, folder: Path, *, start_step: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        check_track(config)
        self.config, self.say = config, lambda text: print(text, file=sys.stderr, flush=True)
        self.failures: Counter[str] = Counter()
        self._active: list[WandbTracker | TensorBoardTracker] = []
        if config.tensorboard:
            self._active.append(TensorBoardTracker(folder, start_step, settings or {}))
        if config.wandb:
            self._active.append(WandbTracker(config, folder, start_step, settings or {}, self.say))

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """See ``RunLog.train``. Values that are no finite number are left out."""
        self._each("train", step, _finite(metrics))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """See ``RunLog.evaluation``."""
        self._each("evaluation", step, _finite(metrics))

    def rollouts(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Evenly spaced ones of each step and source, shortened, without the values of secret environment variables."""
        if not self._active or not self.config.rollout_rows:
            return
        groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for record in records:
            groups.setdefault((record["step"], record.get("source", "train")), []).append(record)
        for (step, source), group in groups.items():
            count = min(len(group), self.config.rollout_rows)
            chosen = [group[index * len(group) // count] for index in range(count)]
            self._each("rollouts", step, source, [self._shortened(record) for record in chosen])

    def _shortened(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {name: record.get(name) for name in COLUMNS}
        return {name: shorten(redact_values(value), self.config.rollout_chars) if isinstance(value, str) else value for name, value in row.items()}

    def metrics(self) -> dict[str, float]:
        """``track/failures/<tracker>``: failed calls so far, of those trackers that had any."""
        return {f"track/failures/{name}": float(count) for name, count in self.failures.items()}

    def close(self) -> None:
        """Ends the trackers; the run counts as failed if an exception is on its way. May be called twice."""
        active, failed = self._active, sys.exc_info()[0] is not None
        for tracker in active:
            self._guarded(tracker, "close", failed)
        self._active = []
        for name, count in self.failures.items():
            self.say(f"{name}: {count} calls failed; metrics.jsonl and rollouts.jsonl are complete")
        self.failures.clear()

    def _each(self, method: str, *args: Any) -> None:
        for tracker in self._active:
            self._guarded(tracker, method, *args)

    def _guarded(self, tracker: WandbTracker | TensorBoardTracker, method: str, *args: Any) -> None:
        """A tracker is an onlooker: whatever its package raises (a full disk, a lost service) must not end a run of days. Said once, counted."""
        try:
            # Packages print to a terminal that a progress bar owns.
            with contextlib.redirect_stdout(sys.stderr):
                getattr(tracker, method)(*args)
        except Exception as error:  # noqa: BLE001  see above
            if not self.failures[tracker.name]:
                cause = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
                self.say(f"warning: the tracker {tracker.name} failed in {method!r} ({cause}); the run goes on, further failures are only counted")
            self.failures[tracker.name] += 1


def shorten(text: str, limit: int) -> str:
    """``text``, or its two ends around a note of how many characters are missing."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, (bool, int, float)) and math.isfinite(value)}


def _cell(value: Any) -> Any:
    """A table's cell: numbers as they are, anything else as text that every encoder takes (a response may hold lone surrogates)."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return float(value) if isinstance(value, (int, float)) else str(value).encode("utf-8", "replace").decode()


def _verbatim(text: str) -> str:
    """As a Markdown code block, so that a response's own markup stays text."""
    return "\n".join("    " + line for line in text.split("\n"))
