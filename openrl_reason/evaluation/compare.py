"""``openrl-reason compare A.json B.json``: is one model better on the same items? Paired, since items differ more than models do."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.atomic import write_json
from openrl_reason.config import require
from openrl_reason.errors import ConfigError, DataError, did_you_mean
from openrl_reason.evaluation.config import check_intervals, check_output_file
from openrl_reason.evaluation.intervals import Estimate, IntervalConfig, difference, mcnemar, sign_flip_test
from openrl_reason.evaluation.metrics import GradedSamples, as_json, item_values
from openrl_reason.evaluation.table import print_table

RESULT_FORMAT = "openrl_reason evaluation 1"
_SET_KEYS = {"name", "items", "num_samples", "sampling", "estimates"}


@dataclass(frozen=True)
class CompareConfig:
    """Paired comparison of two results of `openrl-reason evaluate` on the same items: openrl-reason compare A.json B.json."""

    first: str = ""
    """Result file of the first model (the first word of the command line)."""
    second: str = ""
    """Result file of the second model (the second word)."""
    sets: tuple[str, ...] = ()
    """Names of the sets to compare. Empty: all that both have."""
    metric: str = "pass@1"
    """pass@1, pass@k or maj@k for any k up to the number of samples, or score."""
    common_items: bool = False
    """Compare on the items that both results have, where they differ. Otherwise that is refused."""
    output: str = ""
    """File for the comparison as JSON. Empty: only print."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence interval of the difference."""

    def __post_init__(self) -> None:
        known = re.fullmatch(r"score|(?:pass|maj)@[1-9]\d*", self.metric)
        require(bool(known), "metric", self.metric, "use score, or pass@k or maj@k with a number for k")
        check_intervals(self.intervals, "intervals")


@dataclass(frozen=True)
class Comparison:
    """Two results on one set."""

    name: str
    metric: str
    first: float
    second: float
    difference: Estimate
    """First minus second, per item."""
    wins: int
    """Items on which the first has the higher value."""
    losses: int
    ties: int
    left_out: int
    """Items without a value in one of the results: their grading failed."""
    test: str
    p_value: float
    notes: tuple[str, ...] = ()
    """What differs between the two evaluations beside the model."""


def read_result(path: str) -> dict[str, Any]:
    """A result file. Raises DataError for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected the --output file of openrl-reason evaluate") from None
    except ValueError:
        raise DataError(f"{path} is not JSON; expected the --output file of openrl-reason evaluate") from None
    if not isinstance(result, dict) or result.get("format") != RESULT_FORMAT:
        raise DataError(f"{path} is not a result of this version of openrl-reason evaluate: run the evaluation again with --output")
    whole = isinstance(result.get("sets"), list) and isinstance(result.get("model"), dict) and "path" in result["model"]
    if not whole or not all(isinstance(one, dict) and _SET_KEYS <= one.keys() for one in result["sets"]):
        raise DataError(f"{path} is a result of openrl-reason evaluate with parts missing: run the evaluation again with --output")
    return result


def compare_results(
    first: Mapping[str, Any], second: Mapping[str, Any], *,
    config: IntervalConfig, metric: str = "pass@1", names: Sequence[str] = (), common_items: bool = False,
) -> list[Comparison]:  # fmt: skip
    """Compares each set that both results have (or ``names``).

    The test: McNemar's, exact, where both have one 0/1 sample per item; else the paired permutation test on the items' means.

    Raises:
        ConfigError: no such set, or too few samples for the metric.
        DataError: the items differ and ``common_items`` is false.
    """
    left, right = ({one["name"]: one for one in result["sets"]} for result in (first, second))
    shared = [name for name in left if name in right]
    for name in names:
        require(name in shared, "sets", name, f"both results have {', '.join(shared) or 'no set in common'}{did_you_mean(name, shared)}")
    if not shared:
        raise ConfigError(f"the results have no set in common: {', '.join(left)}; {', '.join(right)}. Sets are matched by name")
    return [_compare_set(left[name], right[name], metric, config, common_items) for name in names or shared]


def _compare_set(first: Mapping[str, Any], second: Mapping[str, Any], metric: str, config: IntervalConfig, common_items: bool) -> Comparison:
    rows = _matching_rows(first, second, common_items)
    fewest = min(one["num_samples"] for one in (first, second))
    _, _, k = metric.partition("@")
    remedy = f"set {first['name']!r} has {fewest} samples per item: use another k, or name the sets that have enough in --sets"
    require(not k or int(k) <= fewest, "metric", metric, remedy)
    one, two = (_samples(result, picked) for result, picked in zip((first, second), zip(*rows, strict=True), strict=True))
    values, others = item_values(one, metric), item_values(two, metric)
    known = np.isfinite(values) & np.isfinite(others)
    if not known.any():
        raise DataError(f"set {first['name']!r}: no item has a {metric} in both results: their grading failed, or no answer was parsed")
    gains = values[known] - others[known]
    gains = np.where(np.abs(gains) < 1e-12, 0.0, gains)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    trials = one.scores.shape[1] == two.scores.shape[1] == 1 and set(np.unique(gains)) <= {-1.0, 0.0, 1.0}
    test, p_value = ("McNemar, exact", mcnemar(wins, losses)) if trials else ("permutation", sign_flip_test(gains, config))
    return Comparison(
        first["name"], metric, float(values[known].mean()), float(others[known].mean()), difference(gains, config),
        wins, losses, int((gains == 0).sum()), int((~known).sum()), test, p_value, _notes(first, second),
    )  # fmt: skip


def _matching_rows(first: Mapping[str, Any], second: Mapping[str, Any], common_items: bool) -> list[tuple[int, int]]:
    """Places of each item in both results, in the first one's order. The n-th appearance of a repeated id matches its n-th."""
    left, right = (_places(result["items"]) for result in (first, second))
    only_left, only_right = [key for key in left if key not in right], [key for key in right if key not in left]
    if (only_left or only_right) and not common_items:
        raise DataError(
            f"set {first['name']!r}: the results are on different items: {len(only_left)} only in the first{_some(only_left)}, {len(only_right)}"
            f" only in the second{_some(only_right)}, {len(left) - len(only_left)} in both: pass --common_items true to compare on those"
        )
    rows = [(place, right[key]) for key, place in left.items() if key in right]
    if not rows:
        raise DataError(f"set {first['name']!r}: the results have no item in common")
    return rows


def _places(items: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    seen: Counter[str] = Counter()
    places = {}
    for place, item in enumerate(items):
        places[item["id"], seen[item["id"]]] = place
        seen[item["id"]] += 1
    return places


def _some(keys: Sequence[tuple[str, int]]) -> str:
    return f" ({', '.join(name for name, _ in keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""


def _samples(result: Mapping[str, Any], rows: Sequence[int]) -> GradedSamples:
    """The verdicts of a result file as arrays; lengths and texts are not in it."""
    items = [result["items"][row] for row in rows]
    scores = np.array([[math.nan if score is None else score for score in item["scores"]] for item in items], dtype=np.float64)
    answers = [[None if vote is None else str(vote) for vote in item["votes"]] for item in items]
    statuses = [["ok" if math.isfinite(score) else "error" for score in row] for row in scores]
    return GradedSamples(scores, answers, statuses, np.zeros_like(scores), np.zeros_like(scores), [{} for _ in items])


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = {
        "graded by": [next(iter(one["estimates"])) for one in (first, second)],
        "samples per item": [one["num_samples"] for one in (first, second)],
    }
    pairs |= {name: [one["sampling"][name] for one in (first, second)] for name in first["sampling"]}
    notes = [f"{name}: {values[0]} and {values[1]}" for name, values in pairs.items() if values[0] != values[1]]
    if first.get("items_hash") == second.get("items_hash") and first.get("prompts_hash") != second.get("prompts_hash"):
        notes.append("the prompts differ (style, few-shot examples or chat template)")
    return tuple(notes)


def print_comparisons(comparisons: Sequence[Comparison], first: str, second: str) -> None:
    """Prints the comparisons as a table."""
    rows = []
    for one in comparisons:
        interval = one.difference.interval
        rows.append({
            "set": one.name, "metric": one.metric, "A": f"{100 * one.first:.1f}", "B": f"{100 * one.second:.1f}",
            "A - B": f"{100 * one.difference.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]",
            "A wins / B wins / ties": f"{one.wins} / {one.losses} / {one.ties}", "left out": str(one.left_out),
            "p": f"{one.p_value:.4f} ({one.test})",
        })  # fmt: skip
    print_table(rows, f"A: {first}\nB: {second}")
    for one in comparisons:
        for note in one.notes:
            print(f"  {one.name}: not only the model differs: {note}")


def compare_files(config: CompareConfig) -> list[Comparison]:
    """Reads, compares, prints and (with ``output``) writes."""
    require(bool(config.first and config.second), "second", config.second, "give two files: openrl-reason compare A.json B.json")
    if config.output:
        check_output_file(Path(config.output))
    first, second = read_result(config.first), read_result(config.second)
    comparisons = compare_results(first, second, config=config.intervals, metric=config.metric, names=config.sets, common_items=config.common_items)
    print_comparisons(comparisons, label(first, config.first), label(second, config.second))
    if config.output:
        plain = [vars(one) | {"difference": as_json(one.difference), "notes": list(one.notes)} for one in comparisons]
        write_json(config.output, {"first": first["model"], "second": second["model"], "comparisons": plain})
    return comparisons


def label(result: Mapping[str, Any], path: str) -> str:
    """A result's model and file."""
    return f"{result['model']['path']} ({path})"
