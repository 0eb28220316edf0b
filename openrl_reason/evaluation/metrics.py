"""What graded samples say about a model: pass@1, unbiased pass@k, maj@k, failures, lengths. Pure numpy; docs/evaluation.md defines it all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openrl_reason.evaluation.intervals import Estimate, IntervalConfig, estimate
from openrl_reason.evaluation.voting import maj_at_k

GRADED = ("ok", "no_answer")
"""Statuses with a verdict: an answer that was not given is a wrong answer. With any other the grader failed, which says nothing of the model."""
CORRECT = 1.0 - 1e-6
"""A sample is correct if its score is at least 1. Graders that give less for partial credit are told of by ``score``."""


@dataclass(frozen=True)
class GradedSamples:
    """``n`` graded samples of each of ``I`` items."""

    scores: np.ndarray
    """[I, n] score of each sample; NaN where its grader failed."""
    answers: list[list[str | None]]
    """[I][n] canonical answer; None where there was none."""
    statuses: list[list[str]]
    """[I][n] grading status."""
    lengths: np.ndarray
    """[I, n] response tokens."""
    truncated: np.ndarray
    """[I, n] whether the response was cut off by the length limit."""
    infos: list[Mapping[str, Any]]
    """[I] the items' info: what groups are made by."""

    @property
    def correct(self) -> np.ndarray:
        """[I, n] 1 or 0; NaN where the grader failed."""
        return np.where(np.isfinite(self.scores), self.scores >= CORRECT, np.nan)

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(np.isin(self.scores[np.isfinite(self.scores)], (0.0, 1.0)).all())

    def select(self, rows: Sequence[int]) -> GradedSamples:
        """The items at ``rows``."""
        picked = list(rows)
        return GradedSamples(
            self.scores[picked], [self.answers[row] for row in picked], [self.statuses[row] for row in picked],
            self.lengths[picked], self.truncated[picked], [self.infos[row] for row in picked],
        )  # fmt: skip


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` samples is correct: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1),
    as the product of 1 - k/i over i = n - c + 1 ... n, which neither overflows nor cancels. NaN for fewer than ``k`` samples."""
    if num_samples < k:
        return float("nan")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def item_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row [I] of [I, n] over its finite entries; NaN for a row without any."""
    finite = np.isfinite(values)
    sums = np.where(finite, values, 0.0).sum(axis=1)
    return np.divide(sums, finite.sum(axis=1), out=np.full(len(values), np.nan), where=finite.any(axis=1))


def item_values(samples: GradedSamples, metric: str) -> np.ndarray:
    """Value of a metric for each item [I]: "score", "pass@k" or "maj@k" for any k; NaN where an item has too few graded samples."""
    if metric == "score":
        return item_means(samples.scores)
    kind, _, number = metric.partition("@")
    k, correct = int(number), samples.correct
    if kind == "pass" and k == 1:
        return item_means(correct)
    values = []
    for row, answers in zip(correct, samples.answers, strict=True):
        graded = np.isfinite(row)
        if kind == "pass":
            values.append(pass_at_k(int(graded.sum()), int(row[graded].sum()), k))
        else:
            values.append(maj_at_k([answer for answer, known in zip(answers, graded, strict=True) if known], row[graded].tolist(), k))
    return np.array(values)


def metric_names(samples: GradedSamples, ks: Sequence[int]) -> list[str]:
    """pass@1, pass@k and, where answers can be voted on, maj@k for each k above 1; "score" where scores are not all 0 or 1."""
    voted = any(answer is not None for answers in samples.answers for answer in answers)
    large = sorted({k for k in ks if k > 1})
    names = ["pass@1", *(f"pass@{k}" for k in large), *(f"maj@{k}" for k in large if voted)]
    return names if samples.binary else [*names, "score"]


def estimates(samples: GradedSamples, ks: Sequence[int], config: IntervalConfig) -> dict[str, Estimate]:
    """Each metric of ``metric_names`` with its interval."""
    single = samples.scores.shape[1] == 1
    return {name: estimate(item_values(samples, name), config, one_trial_each=single) for name in metric_names(samples, ks)}


def failures_as_wrong(samples: GradedSamples) -> GradedSamples:
    """The same samples with every failed grading counted as a wrong answer."""
    return GradedSamples(np.nan_to_num(samples.scores, nan=0.0), samples.answers, samples.statuses, samples.lengths, samples.truncated, samples.infos)


def distinct_answers(samples: GradedSamples) -> float:
    """Mean number of different answers to an item, missing ones left out."""
    return float(np.mean([len({answer for answer in answers if answer is not None}) for answers in samples.answers]))


def summary(samples: GradedSamples, ks: Sequence[int], config: IntervalConfig, prefix: str) -> dict[str, float]:
    """Flat metrics ``<prefix>/...``: estimates with ``_low``, ``_high`` (and ``_stderr`` for pass@1), rates, lengths.

    Failed gradings are left out of the estimates. Where there were any, ``pass@k_failures_as_wrong`` is the lower bound that counts them as
    wrong answers, and ``<status>_count`` says how many of which kind.
    """
    found = estimates(samples, ks, config)
    metrics: dict[str, float] = {}
    for name, mean in found.items():
        metrics |= {name: mean.value, f"{name}_low": mean.interval.low, f"{name}_high": mean.interval.high}
        if name == "pass@1":
            metrics["pass@1_stderr"] = mean.stderr
    counts, total = Counter(status for row in samples.statuses for status in row), samples.lengths.size
    failed = {status: count for status, count in counts.items() if status not in GRADED}
    metrics |= {
        "response_length": float(samples.lengths.mean()),
        "response_length_median": float(np.median(samples.lengths)),
        "truncated_rate": float(samples.truncated.mean()),
        "no_answer_rate": counts["no_answer"] / total,
        "ungraded_rate": float(np.isnan(samples.scores).mean()),
    }
    if samples.scores.shape[1] > 1:
        metrics["distinct_answers"] = distinct_answers(samples)
    if np.isnan(samples.scores).any():
        bound = failures_as_wrong(samples)
        metrics |= {f"{name}_failures_as_wrong": _mean(item_values(bound, name)) for name in found if not name.startswith("maj")}
        metrics |= {f"{status}_count": float(count) for status, count in sorted(failed.items())}
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def group_tables(samples: GradedSamples, group_by: Sequence[str], ks: Sequence[int], config: IntervalConfig) -> dict[str, list[dict[str, Any]]]:
    """For each key of ``group_by`` that some item's info has: a row per value, with the items' count and every estimate.

    An item whose value is a list counts in each of its groups; one without the key is in the group "(none)".
    """
    tables = {}
    for key in group_by:
        if not any(info.get(key) is not None for info in samples.infos):
            continue
        groups: dict[str, list[int]] = {}
        for row, info in enumerate(samples.infos):
            value = info.get(key)
            values = value if isinstance(value, (list, tuple)) else ["(none)" if value is None else value]
            for name in dict.fromkeys(str(entry) for entry in values):
                groups.setdefault(name, []).append(row)
        tables[key] = [
            {"group": name, "items": len(groups[name])}
            | {metric: as_json(mean) for metric, mean in estimates(samples.select(groups[name]), ks, config).items()}
            for name in sorted(groups, key=_natural)
        ]
    return tables


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def as_json(mean: Estimate) -> dict[str, Any]:
    """An estimate as a JSON object; None for NaN."""
    numbers = {"value": mean.value, "low": mean.interval.low, "high": mean.interval.high, "stderr": mean.stderr}
    plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return plain | {"method": mean.interval.method, "items": mean.num_items}
