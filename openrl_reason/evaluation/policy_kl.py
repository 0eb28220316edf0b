"""How far a policy is from a reference on its own responses: KL divergence by three estimators, per token and per response.

Responses are those of the first model of KL(p || q), drawn from its whole distribution at a temperature, and both models score them at that
temperature. With d = log p - log q at each token, k1 = d and k3 = e^-d + d - 1 have the expectation KL(p(. | s) || q(. | s)) in every state s, so
their sums over a response have that of the KL of whole responses (of at most the given length), by the chain rule; k2 = d^2 / 2 has not, but is close
to it where the models are close, and varies least (Schulman 2020, "Approximating KL divergence").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.kl import kl_penalty
from openrl_reason.core.segments import segment_count, segment_sum
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.value_accuracy import Resamples

KINDS = ("k1", "k2", "k3")


def response_sums(batch: TokenBatch, logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, np.ndarray]:
    """Per response, each [B]: ``num_tokens``, and the sum over its tokens of each estimator of KL(p || q) from log p and log q [N]."""
    sums = {"num_tokens": segment_count(batch.cu_seqlens, batch.action_mask).numpy()}
    for kind in KINDS:
        estimates = kl_penalty(logprobs.double(), ref_logprobs.double(), kind=kind, mask=batch.action_mask)
        sums[kind] = segment_sum(estimates, batch.cu_seqlens).numpy()
    return sums


def kl_estimates(sums: Mapping[str, np.ndarray], problems: np.ndarray, intervals: IntervalConfig) -> dict[str, dict[str, Any]]:
    """Estimator -> ``per_token`` (sum over all responses / number of their tokens) and ``per_response`` (mean sum), each {"value", "stderr", "low",
    "high", "method"}, in nats.

    ``problems`` [B]: whose responses are not independent of one another. Standard errors are of ratios of sums over problems (linearised), intervals
    are bootstraps over problems; fewer than two problems have neither.
    """
    count = len(problems)
    columns = np.stack([sums["num_tokens"], np.ones(count), *(sums[kind] for kind in KINDS)], axis=1).astype(np.float64)
    resamples = Resamples(problems, intervals)

    def ratios(totals: np.ndarray) -> np.ndarray:
        """Sums [..., 5] -> [..., 6]: per token and per response of each estimator."""
        return np.concatenate([totals[..., 2:] / totals[..., :1], totals[..., 2:] / totals[..., 1:2]], axis=-1)

    value, low, high = resamples.estimate(columns, ratios)
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for place, (kind, below) in enumerate([*((kind, 0) for kind in KINDS), *((kind, 1) for kind in KINDS)]):
        stderr = _ratio_stderr(sums[kind], columns[:, below], resamples.problem_ids)
        method = "bootstrap" if math.isfinite(low[place]) else "none"
        found[kind]["per_response" if below else "per_token"] = {
            "value": float(value[place]), "stderr": stderr, "low": float(low[place]), "high": float(high[place]), "method": method,
        }  # fmt: skip
    return found


def _ratio_stderr(above: np.ndarray, below: np.ndarray, problem_ids: np.ndarray) -> float:
    """Of sum(above) / sum(below) over independent clusters: root of n / (n - 1) x sum of squared residuals, over sum(below). NaN for one cluster."""
    count = int(problem_ids.max()) + 1
    if count < 2:
        return math.nan
    residuals = np.bincount(problem_ids, above - above.sum() / below.sum() * below)
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / below.sum())
