"""Confidence intervals of means over items, and paired tests. Pure numpy; everything random is seeded.

Items are the unit of chance: the samples of one item share its difficulty, so they count as one cluster, never as independent trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from openrl_reason.core.seeds import derive_seed


@dataclass(frozen=True)
class IntervalConfig:
    """How intervals are computed."""

    confidence: float = 0.95
    """Share of repetitions in which the interval would cover the truth."""
    num_resamples: int = 10_000
    """Resamples of the bootstrap, and sign flips of the permutation test."""
    seed: int = 0
    """Their seed."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was found."""

    low: float
    high: float
    method: str
    """"wilson", "bootstrap", or "none" (fewer than two items)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items."""

    value: float
    interval: Interval
    stderr: float
    """Standard error over items; NaN for fewer than two."""
    num_items: int


def wilson(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction. 0 of n has low 0; n of n has high 1."""
    if trials < 1:
        return Interval(float("nan"), float("nan"), "none")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return Interval(0.0 if successes == 0 else max(0.0, low), 1.0 if successes == trials else min(1.0, high), "wilson")


def bootstrap(values: np.ndarray, config: IntervalConfig) -> Interval:
    """Percentile interval of the mean of ``values`` [I], resampled over items.

    A resample of items is a multinomial draw over the distinct values, of which there are few; that is the same distribution, and fast.
    """
    if len(values) < 2:
        return Interval(float("nan"), float("nan"), "none")
    levels, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(derive_seed(config.seed, "bootstrap"))
    means = rng.multinomial(len(values), counts / len(values), size=config.num_resamples) @ levels / len(values)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high), "bootstrap")


def estimate(values: np.ndarray, config: IntervalConfig, *, one_trial_each: bool = False) -> Estimate:
    """The mean of ``values`` [I] (NaN: the item has none and is left out) with its interval.

    The rule: one 0/1 trial per item, or all items at 0 or all at 1 (where a bootstrap would claim certainty): Wilson over items.
    Anything else: bootstrap over items. The standard error is the sample standard deviation over the root of the number of items.
    """
    values = values[np.isfinite(values)]
    count = len(values)
    if not count:
        return Estimate(float("nan"), Interval(float("nan"), float("nan"), "none"), float("nan"), 0)
    mean, extreme = float(values.mean()), bool((values == 0).all() or (values == 1).all())
    stderr = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else float("nan")
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if extreme or (one_trial_each and binary):
        return Estimate(mean, wilson(float(values.sum()), count, config.confidence), stderr, count)
    return Estimate(mean, bootstrap(values, config), stderr, count)


def difference(values: np.ndarray, config: IntervalConfig) -> Estimate:
    """The mean of paired differences [I] with its interval: bootstrap over items.

    Where no item differs, a bootstrap would claim certainty; Wilson's upper bound on the share of items that do is the interval's half width.
    """
    count, mean = len(values), float(values.mean())
    stderr = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else float("nan")
    if count > 1 and not values.any():
        bound = wilson(0, count, config.confidence).high
        return Estimate(mean, Interval(-bound, bound, "wilson"), stderr, count)
    return Estimate(mean, bootstrap(values, config), stderr, count)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: under "no difference" each discordant item is a fair coin."""
    total, fewer = wins + losses, min(wins, losses)
    if not total:
        return 1.0
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def sign_flip_test(values: np.ndarray, config: IntervalConfig) -> float:
    """Two-sided p-value of the paired permutation test: under "no difference" each item's difference [I] is as likely with the other sign.

    ``num_resamples`` random flips; the observed one counts as one of them, so that p is never 0.
    """
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    rng = np.random.default_rng(derive_seed(config.seed, "sign flips"))
    flipped = (2 * rng.binomial(counts, 0.5, size=(config.num_resamples, len(counts))) - counts) @ sizes
    observed = abs(values.sum())
    return float((1 + (np.abs(flipped) >= observed - 1e-9 * max(1.0, observed)).sum()) / (1 + config.num_resamples))
