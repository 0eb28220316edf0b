"""Noise of policy gradients: what B independent batches say about the variance of a batch's gradient, and about the gradient they share.

With g_i the gradient of batch i, all numbers are functions of the inner products P_ij = <g_i, g_j>, so no gradient needs to be kept:

    variance  E |g - E g|^2     the trace of the covariance: mean of P_ii - mean of P_ij over i != j
    signal    |E g|^2           mean of P_ij over i != j; |mean of g_i|^2 would be too large by variance / B

Both are unbiased (U-statistics); the second may come out negative where noise drowns it. Noise to signal is their ratio, and times the prompts of a
batch it is the gradient noise scale: the prompts at which noise and signal are equal (McCandlish et al. 2018, arXiv 1812.06162).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Statistic = Callable[[np.ndarray], float]
"""Of products [..., B, B]."""


def inner_products(sketches: Sequence[Tensor]) -> np.ndarray:
    """float64 [B, B] of B sketches [k]; row by row, since all of them at once in float64 would double the memory."""
    products = np.zeros((len(sketches), len(sketches)))
    for i, one in enumerate(sketches):
        one = one.double()
        for j in range(i + 1):
            products[i, j] = products[j, i] = float(one.dot(sketches[j].double()))
    return products


def variance(products: np.ndarray) -> float:
    """Unbiased estimate of E |g - E g|^2 from products [B, B] of B >= 2 gradients."""
    return _mean_square(products) - signal(products)


def signal(products: np.ndarray) -> float:
    """Unbiased estimate of |E g|^2."""
    count = len(products)
    return float((products.sum() - np.trace(products)) / (count * (count - 1)))


def noise_to_signal(products: np.ndarray) -> float:
    """``variance`` / ``signal``; NaN where the signal is not positive."""
    found = signal(products)
    return variance(products) / found if found > 0 else math.nan


def cosine(products: np.ndarray) -> float:
    """Mean cosine of the angles between the gradients of two batches; NaN where one of them is 0."""
    norms = np.sqrt(np.diagonal(products))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = products / np.outer(norms, norms)
    return float(cosines[np.triu_indices(len(products), 1)].mean())


def _mean_square(products: np.ndarray) -> float:
    return float(np.trace(products) / len(products))


STATISTICS: dict[str, Statistic] = {
    "variance": variance, "signal": signal, "noise_to_signal": noise_to_signal, "cosine": cosine, "mean_square": _mean_square,
}  # fmt: skip


def gradient_noise(products: np.ndarray, first: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """``STATISTICS`` of products [B, B], each {"value", "stderr"}; standard errors by the jackknife over batches, NaN for fewer than three.

    ``first``: products of another credit's gradients on the same batches; ``relative_variance`` is then this variance over that one, and its standard
    error knows that both saw the same responses.
    """
    found = {name: jackknife(statistic, products) for name, statistic in STATISTICS.items()}
    if first is not None:
        found["relative_variance"] = jackknife(_relative_variance, np.stack([products, first]))
    return found


def _relative_variance(both: np.ndarray) -> float:
    below = variance(both[1])
    return variance(both[0]) / below if below > 0 else math.nan


def jackknife(statistic: Statistic, products: np.ndarray) -> dict[str, Any]:
    """Value and standard error (Efron and Stein 1981) of a statistic of products [..., B, B]."""
    count = products.shape[-1]
    value = statistic(products)
    if count < 3:
        return {"value": value, "stderr": math.nan}
    kept = [np.delete(np.arange(count), place) for place in range(count)]
    others = np.array([statistic(products[..., rows[:, None], rows]) for rows in kept])
    return {"value": value, "stderr": float(math.sqrt((count - 1) / count * ((others - others.mean()) ** 2).sum()))}
