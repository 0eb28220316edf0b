"""What a run leaves behind and shows: ``metrics.jsonl``, sampled rollouts, a progress bar or a line per step.

Metrics are one flat JSON object per step with a ``step`` and an ``event`` ("train" or "eval"). After a resume the lines of steps that will be
done again are removed first, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openrl_reason.observe.trackers import Trackers


def _json_number(value: Any) -> Any:
    """JSON has no NaN: a metric without a value is null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    """An evaluation for people: intervals behind their estimate, rates of what went wrong only when something did."""
    numbers = {name: _json_number(value) for name, value in metrics.items() if not name.startswith("timing/")}
    parts = []
    for name, value in numbers.items():
        if value is None or name.endswith(("_low", "_high", "_stderr", "_median", "distinct_answers")) or (name.endswith("_rate") and value == 0):
            continue
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        parts.append(f"{name} {value:.4g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""))
    return parts


class RunLog:
    """Writer of a run folder's logs.

    Args:
        folder: the run's output folder (exists).
        total_steps: for the progress bar.
        start_step: first step that will be written; records of it and later ones are removed from existing files.
        headline: metrics shown on the line or bar, in order.
        trackers: get everything that is recorded, after it has been written here; closed with this log.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, start_step: int = 0, headline: Sequence[str] = (), trackers: Trackers | None = None
    ) -> None:
        self.folder, self._headline, self._total = folder, tuple(headline), total_steps
        self._metrics = folder / "metrics.jsonl"
        self._rollouts = folder / "rollouts.jsonl"
        for path in (self._metrics, self._rollouts):
            _keep_steps_before(path, start_step)
        self._trackers = trackers
        if trackers is not None:
            trackers.say = self.say
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, unit="step")

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records step ``step`` (0-based) and shows its headline."""
        if self._trackers is not None:
            metrics = {**metrics, **self._trackers.metrics()}
        self._append(self._metrics, [{"step": step, "event": "train", **metrics}])
        if self._trackers is not None:
            self._trackers.train(step, metrics)
        parts = {name.split("/", 1)[-1] if name.startswith("train/") else name: metrics[name] for name in self._headline if name in metrics}
        shown = {
            name: f"{_json_number(value):.4g}" if isinstance(_json_number(value), (int, float)) else "-" for name, value in parts.items()
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        else:
            self.say(f"step {step + 1}/{self._total}  " + "  ".join(f"{name} {text}" for name, text in shown.items()))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records an evaluation made after ``step`` training steps, and shows it."""
        self._append(self._metrics, [{"step": step, "event": "eval", **metrics}])
        if self._trackers is not None:
            self._trackers.evaluation(step, metrics)
        self.say(f"evaluation after {step} steps:  " + "  ".join(_shown(metrics)))

    def rollouts(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends readable rollouts; each record has a ``step``."""
        self._append(self._rollouts, records)
        if self._trackers is not None:
            self._trackers.rollouts(records)

    def say(self, text: str) -> None:
        """A line for the operator that does not tear the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the progress bar and the trackers. May be called twice."""
        if self._trackers is not None:
            self._trackers.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps({k: _json_number(v) for k, v in record.items()}, ensure_ascii=False) + "\n" for record in records)
        with path.open("a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(lines)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a log; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="surrogatepass").split("\n"):  # splitlines() would also cut at U+2028 in a rollout
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_steps_before(path: Path, start_step: int) -> None:
    """Drops what a killed run wrote after its last checkpoint. An evaluation after ``start_step`` steps came before that checkpoint: it stays."""
    if not path.exists():
        return

    def is_done(record: dict[str, Any]) -> bool:
        is_eval = record.get("event") == "eval" or record.get("source", "").startswith("eval/")
        return record["step"] < start_step + (start_step > 0 and is_eval)

    kept = [record for record in read_records(path) if is_done(record)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8", errors="surrogatepass"
    )
    os.replace(temporary, path)
