"""How far predicted values are from the truth, and how well they rank next steps. Pure numpy; everything random is seeded.

Problems are the unit of chance: the states of one problem share its difficulty and often their tokens. Intervals are percentile bootstraps
over problems; every number here is a function of sums over states, so a resample of problems is a weighted sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from openrl_reason.core.seeds import derive_seed
from openrl_reason.evaluation.intervals import IntervalConfig, wilson

METRICS = ("mae", "rmse", "bias", "correlation", "within")
_SAME = 1e-12
"""Values closer than this are equal: means of the same rewards in another order."""


@dataclass(frozen=True)
class Truths:
    """Mean reward of many rollouts at each of S states."""

    values: np.ndarray
    """float64 [S]; NaN where no rollout has a reward."""
    stderrs: np.ndarray
    """float64 [S]: standard error of each value, from the sample variance (for 0/1 rewards p (1 - p) / (n - 1) under the root)."""
    counts: np.ndarray
    """int64 [S]: rollouts with a reward."""
    centres: np.ndarray
    variances: np.ndarray
    """float64 [S] both: cautious values and their variances, for tests of differences: no certainty where all rollouts agree (see ``truths``)."""

    def take(self, places: Any) -> Truths:
        """Those of the states at ``places`` (indices, a slice or a mask)."""
        return Truths(*(column[places] for column in vars(self).values()))


def truths(rewards: Sequence[np.ndarray]) -> Truths:
    """The values of S states from the rewards of their rollouts; a NaN is a rollout without a reward and is left out.

    Of rewards within 0 .. 1 the cautious value is p = (sum + 1) / (n + 2) and its variance p (1 - p) / (n + 2) (Agresti and Caffo 2000), an upper
    bound where they are not 0/1; of other rewards they are the mean and its squared standard error.
    """
    known = [np.asarray(own, np.float64)[np.isfinite(own)] for own in rewards]
    counts = np.array([len(own) for own in known], np.int64)
    values = np.array([own.mean() if len(own) else math.nan for own in known])
    stderrs = np.array([own.std(ddof=1) / math.sqrt(len(own)) if len(own) > 1 else math.nan for own in known])
    unit = all(((own >= 0) & (own <= 1)).all() for own in known)
    if not unit:
        return Truths(values, stderrs, counts, values, stderrs**2)
    moved = (values * counts + 1) / (counts + 2)
    return Truths(values, stderrs, counts, moved, moved * (1 - moved) / (counts + 2))


def noise_floor(truth: Truths) -> dict[str, float]:
    """The error that a perfect estimator would show, because the truth is itself a mean of rollouts.

    ``noise_rmse`` is the root of the mean squared standard error; ``noise_mae`` is sqrt(2 / pi) times the mean standard error (the mean
    absolute value of a normal deviate).
    """
    known = truth.stderrs[np.isfinite(truth.stderrs)]
    if not len(known):
        return {"noise_rmse": math.nan, "noise_mae": math.nan}
    return {"noise_rmse": float(np.sqrt(np.mean(known**2))), "noise_mae": float(math.sqrt(2 / math.pi) * known.mean())}


class Resamples:
    """Resamples of the problems, drawn once and shared by all estimators, so that their numbers vary together."""

    def __init__(self, problems: np.ndarray, config: IntervalConfig) -> None:
        """``problems`` [S]: the problem of each state, any labels."""
        self.config = config
        labels, self.problem_ids = np.unique(problems, return_inverse=True)
        self.num_problems = len(labels)
        rng = np.random.default_rng(derive_seed(config.seed, "values bootstrap"))
        shares = np.full(self.num_problems, 1 / max(1, self.num_problems))
        # float32 holds these small counts exactly in half the memory.
        self._weights = rng.multinomial(self.num_problems, shares, size=config.num_resamples).astype(np.float32) if self.num_problems > 1 else None

    def estimate(self, columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(value, low, high), each [M]: ``statistic`` maps sums [..., C] of ``columns`` [S, C] to [..., M].

        Resamples for which a number is not defined are left out of its interval. Fewer than two problems have no interval (NaN).
        """
        sums_P = np.zeros((self.num_problems, columns.shape[1]))
        np.add.at(sums_P, self.problem_ids, columns)
        value = statistic(columns.sum(axis=0))
        if self._weights is None:
            return value, np.full_like(value, math.nan), np.full_like(value, math.nan)
        drawn = np.concatenate([statistic(part.astype(np.float64) @ sums_P) for part in np.array_split(self._weights, 16)])
        tail = (1 - self.config.confidence) / 2
        low, high = np.full_like(value, math.nan), np.full_like(value, math.nan)
        for metric in np.flatnonzero(np.isfinite(drawn).any(axis=0) & np.isfinite(value)):
            own = drawn[:, metric]
            low[metric], high[metric] = np.quantile(own[np.isfinite(own)], [tail, 1 - tail])
        return value, low, high


def accuracy(truth: np.ndarray, predictions: np.ndarray, resamples: Resamples, *, delta: float, mask: np.ndarray | None = None) -> dict[str, Any]:
    """``METRICS`` of predictions [S] against the truth [S], each {"value", "low", "high", "method"}, and ``num_states``.

    mae: mean absolute error. rmse: root of the mean squared error. bias: mean of prediction - truth. correlation: Pearson's; NaN where either
    is constant. within: share of states with an error of at most ``delta``. States where either is NaN, and those outside ``mask`` [S], are
    left out. Where all states are within (or none), the bootstrap would claim certainty: Wilson's interval over problems takes its place.
    """
    used = np.isfinite(truth) & np.isfinite(predictions)
    if mask is not None:
        used &= mask
    count = int(used.sum())
    x, y = np.where(used, predictions, 0.0), np.where(used, truth, 0.0)
    if count:  # about their means: the variance of values near 1 would drown in rounding otherwise
        centre_x, centre_y = x[used].mean(), y[used].mean()
    else:
        centre_x = centre_y = 0.0
    error, near = x - y, np.abs(x - y) <= delta + _SAME
    x, y = (x - centre_x) * used, (y - centre_y) * used
    columns = np.stack([used, np.abs(error), error**2, error, near & used, x, y, x * x, y * y, x * y], axis=1).astype(np.float64)
    value, low, high = resamples.estimate(columns, _accuracy_of_sums)
    found = {name: _interval(*numbers, "bootstrap") for name, *numbers in zip(METRICS, value, low, high, strict=True)}
    num_problems = len(np.unique(resamples.problem_ids[used]))
    found["within"] = _not_certain(found["within"], num_problems, resamples.config.confidence)
    return found | {"num_states": count, "num_problems": num_problems}


def _accuracy_of_sums(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 10] over states, as ``accuracy`` stacks them -> ``METRICS`` [..., 5]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        count, absolute, squared, error, near, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        var_x, var_y = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2
        both_vary = (var_x > _SAME) & (var_y > _SAME)
        correlation = np.where(both_vary, (xy / count - x * y / count**2) / np.sqrt(np.where(both_vary, var_x * var_y, 1.0)), math.nan)
        return np.stack([absolute / count, np.sqrt(squared / count), error / count, correlation, near / count], axis=-1)


def _interval(value: float, low: float, high: float, method: str) -> dict[str, Any]:
    known = math.isfinite(low) and math.isfinite(high)
    return {"value": float(value), "low": float(low), "high": float(high), "method": method if known else "none"}


def _not_certain(share: dict[str, Any], num_problems: int, confidence: float) -> dict[str, Any]:
    """A share with Wilson's interval over problems where it is 0 or 1, in which case the bootstrap would claim certainty."""
    if num_problems < 2 or share["value"] not in (0.0, 1.0):
        return share
    bounds = wilson(share["value"] * num_problems, num_problems, confidence)
    return _interval(share["value"], bounds.low, bounds.high, "wilson")


# ---- groups of states ------------------------------------------------------------------------------------------------------------


def position_bins(positions: np.ndarray, num_bins: int) -> np.ndarray:
    """int64 [S]: the bin of each relative position, [0, 1/n), [1/n, 2/n), ...; the position 1 belongs to the last."""
    # Positions are fractions such as 3/4, which a product in floating point may leave just below the edge.
    return np.minimum((positions * num_bins + 1e-9).astype(np.int64), num_bins - 1)


def calibration(truth: np.ndarray, predictions: np.ndarray, num_bins: int) -> dict[str, Any]:
    """A reliability table: states in ``num_bins`` equal bins of the prediction, with both means; and ``error``, the mean absolute
    difference of the two weighted by states (the expected calibration error).

    The bins span 0 .. 1, or further if predictions do (soft values may).
    """
    used = np.isfinite(truth) & np.isfinite(predictions)
    x, y = predictions[used], truth[used]
    low, high = min(0.0, x.min(initial=0.0)), max(1.0, x.max(initial=1.0))
    bins = position_bins((x - low) / (high - low), num_bins)
    rows = []
    for number in range(num_bins):
        own = bins == number
        row = {"low": low + (high - low) * number / num_bins, "high": low + (high - low) * (number + 1) / num_bins, "num_states": int(own.sum())}
        rows.append(row | {"prediction": float(x[own].mean()) if own.any() else math.nan, "truth": float(y[own].mean()) if own.any() else math.nan})
    gaps = [row["num_states"] * abs(row["prediction"] - row["truth"]) for row in rows if row["num_states"]]
    return {"bins": rows, "error": math.fsum(gaps) / len(x) if len(x) else math.nan}


# ---- ranking of next steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairCounts:
    """Pairs of next steps at one state."""

    pairs: int
    """Pairs whose truths differ and for which there are predictions."""
    right: float
    """Of those, the ones that the predictions order alike; a tie of predictions counts one half."""
    tied: int
    """Pairs whose predictions are equal."""
    significant: int
    """Pairs whose truths differ by more than their sampling error explains."""
    significant_right: float
    """Of those, ordered alike."""


def count_pairs(truth: Truths, predictions: np.ndarray, *, confidence: float = 0.95) -> PairCounts:
    """Compares the order of ``predictions`` [A] with that of the truths of the A states after the steps.

    Significant: |difference| > z sqrt(variance_i + variance_j), with the cautious values and variances of ``truths``.
    """
    first, second = np.triu_indices(len(predictions), k=1)
    true, predicted = truth.values[first] - truth.values[second], predictions[first] - predictions[second]
    differ = np.isfinite(true) & np.isfinite(predicted) & (np.abs(true) > _SAME)
    true, predicted = true[differ], np.where(np.abs(predicted[differ]) > _SAME, predicted[differ], 0.0)
    right = np.where(predicted == 0, 0.5, (true * predicted > 0).astype(np.float64))
    spread = np.sqrt(truth.variances[first] + truth.variances[second])[differ]
    clear = np.abs(truth.centres[first] - truth.centres[second])[differ] > NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    return PairCounts(int(differ.sum()), float(right.sum()), int((predicted == 0).sum()), int(clear.sum()), float(right[clear].sum()))


def ranking_accuracy(counts: Sequence[PairCounts], problems: np.ndarray, config: IntervalConfig) -> dict[str, Any]:
    """``accuracy`` and ``accuracy_significant`` over all pairs of all states, with bootstrap intervals over ``problems`` [len(counts)]; the
    number of pairs, the share that is significant and the share of ties."""
    columns = np.array([[c.pairs, c.right, c.significant, c.significant_right] for c in counts], np.float64).reshape(-1, 4)

    def shares(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([sums[..., 1] / sums[..., 0], sums[..., 3] / sums[..., 2]], axis=-1)

    value, low, high = Resamples(problems, config).estimate(columns, shares)
    found = [_interval(*numbers, "bootstrap") for numbers in zip(value, low, high, strict=True)]
    asked = [len(np.unique(problems[columns[:, place] > 0])) for place in (0, 2)]  # problems with pairs, and with significant ones
    all_pairs, clear_pairs = (_not_certain(one, count, config.confidence) for one, count in zip(found, asked, strict=True))
    pairs, significant = sum(c.pairs for c in counts), sum(c.significant for c in counts)
    return {
        "accuracy": all_pairs, "accuracy_significant": clear_pairs,
        "num_states": sum(c.pairs > 0 for c in counts), "num_pairs": pairs, "num_significant": significant,
        "significant_share": significant / pairs if pairs else math.nan, "tied_share": sum(c.tied for c in counts) / pairs if pairs else math.nan,
    }  # fmt: skip
