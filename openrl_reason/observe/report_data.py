"""What the report knows about a run, read from its folder: config, metrics, curves thinned for the page, key figures.

Nothing here needs the run to have ended: a line that a kill or a writer in mid-sentence cut short is left out and counted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from openrl_reason.config import require
from openrl_reason.errors import DataError, did_you_mean
from openrl_reason.observe.breakdown import PARTS

MAX_POINTS = 2000
"""A curve with more points is thinned: per bucket of steps its smallest and its largest value stay, and the bucket's mean for smoothing."""
MAX_TIMING_BARS = 120
BOOKKEEPING = ("step", "event")

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    name: str
    """As shown: the folder's name, with its parents where several runs would have the same."""
    folder: Path
    train: list[Record]
    """Records of steps, by step; of a step that is there twice the later line."""
    evals: list[Record]
    """Records of evaluations, by step."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.yaml, or empty."""
    num_damaged: int = 0
    """Lines of metrics.jsonl that are no JSON objects with a step."""
    total_steps: int | None = None
    """Of progress.json: steps that are planned, where the config leaves that to the data."""

    @property
    def rollouts_path(self) -> Path:
        return self.folder / "rollouts.jsonl"


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs at ``paths``: folders, or their metrics.jsonl."""
    require(bool(paths), "runs", list(paths), "name at least one run folder")
    folders = [Path(path).expanduser() for path in paths]
    folders = [(folder.parent if folder.name == "metrics.jsonl" else folder).absolute() for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise DataError(f"there is no run folder {folder}{did_you_mean(folder.name, siblings)}")
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "rollouts.jsonl")):
            inside = sorted(entry.parent.name for entry in folder.glob("*/metrics.jsonl"))
            hint = f"; its folders {', '.join(inside)} hold runs: name them" if inside else ""
            raise DataError(f"{folder} holds neither metrics.jsonl nor rollouts.jsonl, so it is no run{hint}")
    twice = [str(folder) for folder in dict.fromkeys(folders) if folders.count(folder) > 1]
    require(not twice, "runs", twice, "the same run is named twice")
    return [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises DataError if there is nothing in it to show."""
    by_event: dict[str, dict[int, Record]] = {"train": {}, "eval": {}}
    num_damaged = 0
    for record in json_lines(folder / "metrics.jsonl"):
        step = record.get("step") if record else None
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not math.isfinite(step):
            num_damaged += 1
            continue
        event = "eval" if record.get("event") == "eval" else "train"
        # Evaluations of one step may come as several lines, one per set: they belong together.
        earlier = by_event[event].get(step, {}) if event == "eval" else {}
        by_event[event][step] = earlier | record
    if num_damaged:
        print(f"{folder / 'metrics.jsonl'}: {num_damaged} lines cannot be read and are left out")
    if not any(by_event.values()) and not any(json_lines(folder / "rollouts.jsonl")):
        raise DataError(f"{folder} has nothing to show: neither metrics.jsonl nor rollouts.jsonl holds a readable record")
    train, evals = ([rows[step] for step in sorted(rows)] for rows in by_event.values())
    return Run(name, folder, train, evals, _read_config(folder / "config.yaml"), num_damaged, _read_total(folder / "progress.json"))


def _read_total(path: Path) -> int | None:
    try:
        total = json.loads(path.read_text(encoding="utf-8"))["total_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return total if isinstance(total, int) else None


def json_lines(path: Path) -> Iterator[Record | None]:
    """The objects of a JSON-lines file, one by one; None for a line that is none. A missing file has no lines."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield parse_line(line)


def parse_line(line: bytes) -> Record | None:
    """A line's object, or None. Lone surrogates, which a tokenizer's byte pieces can give, are kept."""
    try:
        value = json.loads(line.decode("utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        print(f"{path} is left out, it is no readable YAML: {' '.join(str(error).split())}")
        return {}
    return config if isinstance(config, dict) else {}


def short_names(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that tell them all apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    seen: dict[str, int] = {}
    for index, name in enumerate(names):  # the same folder named twice
        seen[name] = seen.get(name, 0) + 1
        names[index] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def number(value: Any) -> float:
    """A metric's value, NaN where there is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have ``name`` at all; a null is NaN."""
    rows = [(record["step"], number(record[name])) for record in records if name in record]
    table = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def metric_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics of which at least one value is a number, in order of appearance."""
    names: dict[str, bool] = {}
    for record in records:
        for name, value in record.items():
            if name not in BOOKKEEPING and not names.get(name):
                names[name] = math.isfinite(number(value))
    return [name for name, known in names.items() if known]


def thin(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> dict[str, list]:
    """A curve for the page: ``x`` and ``y``, and where it was thinned the buckets' means ``mx``, ``my`` with ``per``, the points in a bucket.

    Each bucket keeps its smallest and its largest value, in order, so that no spike is lost.
    """
    if len(x) <= max_points:
        return {"x": compact(x), "y": compact(y)}
    edges = np.linspace(0, len(x), max_points // 2 + 1).astype(int)
    kept, mean_x, mean_y = [], [], []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        values = y[first:last]
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            kept.append(first)
            continue
        low, high = known[values[known].argmin()], known[values[known].argmax()]
        kept += sorted({first + low, first + high})
        mean_x.append(x[first:last][known].mean())
        mean_y.append(values[known].mean())
    return {
        "x": compact(x[kept]),
        "y": compact(y[kept]),
        "mx": compact(np.array(mean_x)),
        "my": compact(np.array(mean_y)),
        "per": len(x) / len(edges[1:]),
    }


def compact(values: np.ndarray) -> list[float | int | None]:
    """Six significant digits and null for what is no number: short JSON that every browser reads."""
    plain = (float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist())
    return [int(value) if value is not None and value.is_integer() and abs(value) < 1e15 else value for value in plain]


def curves(run: Run) -> dict[str, dict[str, Any]]:
    """Every metric of the run, thinned. Evaluations of a rate or score come with an interval ``low``, ``high`` where one is logged."""
    found = {name: thin(*series(run.train, name)) for name in metric_names(run.train)}
    for name in metric_names(run.evals):
        x, y = series(run.evals, name)
        found[name] = thin(x, y) | {"eval": True}
        bounds = interval(run.evals, name)
        if bounds is not None and len(x) <= MAX_POINTS:
            found[name] |= {"low": compact(bounds[0]), "high": compact(bounds[1])}
    return found


def interval(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """95 % bounds of an evaluation's metric, from ``<name>_low``, ``<name>_high`` or 1.96 times ``<name>_stderr``; None without."""
    rows = [record for record in records if name in record]
    if any(f"{name}_low" in record for record in rows):
        low, high = (np.array([number(record.get(name + end)) for record in rows]) for end in ("_low", "_high"))
        return low, high
    if any(f"{name}_stderr" in record for record in rows):
        y, error = (np.array([number(record.get(key)) for record in rows]) for key in (name, f"{name}_stderr"))
        return y - 1.96 * error, y + 1.96 * error
    return None


def timing_table(run: Run) -> dict[str, Any]:
    """Seconds a step by part, in at most ``MAX_TIMING_BARS`` means over neighbouring steps, and each part's share of all steps but the first."""
    rows = [record for record in run.train if math.isfinite(number(record.get("timing/step")))]
    if not rows:
        return {}
    step = np.array([number(record["timing/step"]) for record in rows])
    parts = {part: np.array([sum(np.nan_to_num(number(record.get(name))) for name in names) for record in rows]) for part, names in PARTS.items()}
    parts = {part: seconds for part, seconds in parts.items() if seconds.any()}
    parts["rest"] = np.maximum(0.0, step - sum(parts.values(), np.zeros_like(step)))
    edges = np.linspace(0, len(rows), min(MAX_TIMING_BARS, len(rows)) + 1).astype(int)
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    measured = slice(1, None) if len(rows) > 1 else slice(None)  # the first step warms caches
    return {
        "x": [rows[first]["step"] for first, _ in spans],
        "last": [rows[last - 1]["step"] for _, last in spans],
        "parts": {part: compact(np.array([seconds[first:last].mean() for first, last in spans])) for part, seconds in parts.items()},
        "shares": {part: round(float(seconds[measured].sum() / max(step[measured].sum(), 1e-12)), 5) for part, seconds in parts.items()},
    }


def end_means(y: np.ndarray) -> tuple[float, float, int]:
    """Means of a curve's first and last tenth (1 to 20 values), and how many values that is."""
    y = y[np.isfinite(y)]
    if not len(y):
        return math.nan, math.nan, 0
    count = min(20, max(1, len(y) // 10))
    return float(y[:count].mean()), float(y[-count:].mean()), count


def key_figures(run: Run) -> list[dict[str, Any]]:
    """The tiles on top: what changed from start to end, with what is known of its precision."""
    tiles = []
    for name in metric_names(run.evals):
        if not name.startswith("eval/") or not name.endswith(("/pass@1", "/loss")):
            continue
        x, y = series(run.evals, name)
        known = np.flatnonzero(np.isfinite(y))
        bounds = interval(run.evals, name)
        first, last = known[0], known[-1]
        tile = {
            "label": name.removeprefix("eval/"),
            "metric": name,
            "first": y[first],
            "last": y[last],
            "kind": "share" if name.endswith("@1") else "number",
        }
        tile["note"] = f"evaluated after {x[first]:g} and {x[last]:g} steps" if first != last else f"evaluated after {x[last]:g} steps"
        if bounds is not None:
            tile["bounds"] = [[float(bounds[0][i]), float(bounds[1][i])] for i in (first, last)]
        tiles.append(tile)
    for name, label in (
        ("train/reward", "reward"),
        ("train/loss", "loss"),
        ("train/entropy", "entropy"),
        ("response_length/mean", "response length"),
    ):
        if name == "train/loss" and any(tile["metric"] == "train/reward" for tile in tiles):
            continue
        first, last, count = end_means(series(run.train, name)[1])
        if count:
            tiles.append(
                {
                    "label": label,
                    "metric": name,
                    "first": first,
                    "last": last,
                    "kind": "number",
                    "note": f"means of the first and last {_steps(count)}",
                }
            )
    for name in ("perf/tokens_per_second", "perf/trained_tokens_per_second", "perf/generated_tokens_per_second"):
        y = series(run.train, name)[1]
        if np.isfinite(y).any():
            tiles.append(
                {
                    "label": name.removeprefix("perf/").replace("_", " "),
                    "metric": name,
                    "last": float(np.nanmedian(y)),
                    "kind": "number",
                    "note": "median over steps",
                }
            )
            break
    seconds = wall_seconds(run)
    if seconds:
        tiles.append(
            {
                "label": "wall time",
                "metric": "",
                "last": seconds,
                "kind": "duration",
                "note": "steps and evaluations, without start and export",
            }
        )
    return [{key: _plain(value) for key, value in tile.items()} for tile in tiles]


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def wall_seconds(run: Run) -> float:
    """Seconds of all steps and evaluations."""
    total = np.nansum(series(run.train, "timing/step")[1]) + np.nansum(series(run.evals, "timing/evaluate")[1])
    return float(total)


def facts(run: Run, *, now: float | None = None) -> list[tuple[str, str]]:
    """(what, value) lines of the header, as far as the config and the log know them."""
    config, done = run.config, int(run.train[-1]["step"]) + 1 if run.train else 0
    planned = run.total_steps or _get(config, "run.steps")
    steps = f"{done} of {planned}" if isinstance(planned, int) else str(done)
    lines = [("algorithm", algorithm(config)), ("steps", steps), ("state", _state(run, done, planned, now))]
    for what, key in (("model", "policy.path"), ("task", "task.name"), ("data", "data.path"), ("seed", "run.seed")):
        value = _get(config, key)
        if value not in (None, ""):
            lines.append((what, str(value)))
    versions = config.get("versions")
    if isinstance(versions, dict):
        lines += [(str(name), str(version)) for name, version in versions.items()]
    return [(what, value) for what, value in lines if value]


def _state(run: Run, done: int, planned: Any, now: float | None) -> str:
    path = run.folder / "metrics.jsonl"
    if isinstance(planned, int) and done >= planned:
        return "finished"
    if not path.exists():
        return "no metrics yet"
    age = (now or time.time()) - path.stat().st_mtime
    recent = np.nanmedian(series(run.train[-20:], "timing/step")[1]) if run.train and "timing/step" in run.train[-1] else 60.0
    if age < max(60.0, 10 * recent):
        return "still running (a line was written in the last minutes)"
    return "stopped early, or still running" if isinstance(planned, int) else "unknown"


def algorithm(config: Mapping[str, Any]) -> str:
    """The algorithm's name as far as a config tells it."""
    if isinstance(config.get("algorithm"), str):
        return config["algorithm"]
    advantage = _get(config, "algo.advantage")
    if advantage:
        return f"reinforce ({advantage})"
    return "sft" if "data" in config and "algo" not in config else ""


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``(dotted name, value as text)`` of every setting."""
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows
