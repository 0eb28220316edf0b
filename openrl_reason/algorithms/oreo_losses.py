"""OREO's losses on a model group's outputs, and what is told about a batch. The formulas are in ``core/losses_offline.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openrl_reason.algorithms.oreo_config import OREOAlgoConfig
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.kl import kl_penalty
from openrl_reason.core.losses import oreo_policy_loss, oreo_value_loss
from openrl_reason.core.losses_offline import hinge_loss, importance_weights
from openrl_reason.core.segments import reverse_cumsum, segment_ids, segment_mean, segment_sum
from openrl_reason.core.states import state_mask

QUARTERS = 4
"""Parts of a response for which values are judged one by one."""


def oreo_batch(batch: TokenBatch, positive_B: Tensor, level: str) -> TokenBatch:
    """``batch`` with what the losses read: ``tokens["states"]``, ``tokens["returns"]``, ``sequences["positive"]``.

    Values are learnt at every token but for level "step", where a step is the action and states stand between steps; the policy's
    states are the same, of which level "response" uses the first.
    """
    states = state_mask(batch, "step" if level == "step" else "token")
    returns = reverse_cumsum(batch.tokens["rewards"], batch.cu_seqlens)
    return batch.with_tokens(states=states, returns=returns).with_sequences(positive=positive_B)


def oreo_denominators(batch: TokenBatch, average: str, level: str) -> dict[str, float]:
    """Of the global batch."""
    states, sequences = float(batch.tokens["states"].sum()), float(batch.num_sequences)
    policy = sequences if average == "sequence" or level == "response" else states
    return {
        "sequences": sequences, "value": sequences if average == "sequence" else max(states, 1.0), "policy": max(policy, 1.0),
        "positive": max(float(batch.sequences["positive"].sum()), 1.0),
    }  # fmt: skip


@dataclass(frozen=True)
class OREOPolicyLoss:
    """The policy's residual loss, the regulariser and the hinge. Reads ``tokens["values"]`` and ``["ref_logprobs"]``."""

    algo: OREOAlgoConfig
    kl_coefficient: float

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[Tensor, dict[str, Any]]:
        algo, logprobs, ref_logprobs = self.algo, outputs.logprobs, batch.tokens["ref_logprobs"]
        mask, states, edges = batch.action_mask, batch.tokens["states"], batch.cu_seqlens
        weights = importance_weights(logprobs, ref_logprobs, mask, edges, clip=algo.importance_clip) if algo.importance else None
        loss, found = oreo_policy_loss(
            logprobs, ref_logprobs, batch.tokens["values"], batch.sequences["rewards"], mask, states, edges, beta=algo.beta, level=algo.level,
            denominator=denominators["policy"], returns=batch.tokens["returns"], sequence_weights=weights, average=algo.average,
        )  # fmt: skip
        metrics = {"train/policy_loss": found["oreo_policy_loss"]}
        if weights is not None:
            acts = segment_sum(mask.double(), edges) > 0  # not of a micro-batch that only keeps other ranks company
            metrics["train/importance_weight"] = (weights * acts).sum() / denominators["sequences"]
        if algo.hinge:
            hinge, found = hinge_loss(
                logprobs, ref_logprobs, mask, states, edges, batch.sequences["positive"] > 0, denominator=denominators["positive"]
            )
            loss, metrics["train/hinge_loss"] = loss + algo.hinge * hinge, found["hinge_loss"]
        kl = self._kl(outputs, batch)
        if kl is not None:
            kl = segment_mean(kl, edges, mask).sum() / denominators["sequences"]
            loss, metrics["train/kl"] = loss + self.kl_coefficient * kl, kl.detach()
        entropy = outputs.entropy
        if entropy is not None:
            metrics["train/entropy"] = segment_mean(entropy.detach(), edges, mask).sum() / denominators["sequences"]
        return loss, metrics | {"train/loss": loss.detach()}

    def _kl(self, outputs: Any, batch: TokenBatch) -> Tensor | None:
        """[N], nats."""
        if self.algo.exact_kl:
            return outputs.kl
        if self.algo.kl.kind == "k3":
            return kl_penalty(outputs.logprobs, batch.tokens["ref_logprobs"], kind="k3", mask=batch.action_mask)
        return None


@dataclass(frozen=True)
class OREOValueLoss:
    """The critic's residual loss. Reads ``tokens["logprobs"]`` and ``["ref_logprobs"]``, those of the policy before this step's update."""

    algo: OREOAlgoConfig

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[Tensor, dict[str, Any]]:
        algo, mask = self.algo, batch.action_mask
        logprobs, ref_logprobs = batch.tokens["logprobs"], batch.tokens["ref_logprobs"]
        weights = importance_weights(logprobs, ref_logprobs, mask, batch.cu_seqlens, clip=algo.importance_clip) if algo.importance else None
        loss, found = oreo_value_loss(
            outputs.values, logprobs, ref_logprobs, batch.sequences["rewards"], mask, batch.tokens["states"], batch.cu_seqlens, beta=algo.beta,
            denominator=denominators["value"], returns=batch.tokens["returns"], sequence_weights=weights, average=algo.average,
            clip_log_ratio=algo.clip_log_ratio,
        )  # fmt: skip
        metrics = {"critic/value_loss": found["oreo_value_loss"]}
        if "oreo_value/clipped" in found:
            metrics["offline/clipped_share"] = found["oreo_value/clipped"]
        return loss, metrics


# ---- what is told about a batch ----------------------------------------------------------------------------------------------------------


def offline_metrics(batch: TokenBatch, logprobs: Tensor, values: Tensor, beta: float) -> dict[str, float]:
    """``offline/*`` of a whole batch, always the same names; NaN where the batch has nothing to say (no wrong response, for instance).

    ``logprobs`` and ``values`` [N]: policy and critic on ``batch``, which has ``ref_logprobs``, ``states``, ``returns`` and ``positive``.

    * ``residual_*``: delta = V - R + beta (sum of what follows), 0 at the optimum, over states.
    * ``log_ratio_median_*``: of whole right and wrong responses; they part when the policy learns to tell them apart.
    * ``advantage_*``: of steps (or tokens, where those are the states): implicit, beta log pi/ref summed over the step, against explicit,
      V(after) - V(before), with the reward for the value after the last one. Equal at the optimum (arXiv 2412.16145, eq. 11 and 12).
    * ``value_auc``: how well V tells states of right responses from states of wrong ones, and by quarters of the response.
    """
    mask, states, edges, returns = batch.action_mask, batch.tokens["states"], batch.cu_seqlens, batch.tokens["returns"]
    log_ratio = torch.where(mask, logprobs - batch.tokens["ref_logprobs"], 0.0).double()
    tail = reverse_cumsum(log_ratio, edges)
    places = states.nonzero().squeeze(1)
    owners, at = segment_ids(edges)[places], values.double()[places]
    delta = at - returns.double()[places] + beta * tail[places]
    metrics = {
        "residual_mean": _mean(delta), "residual_abs": _mean(delta.abs()), "residual_std": _std(delta),
        "value_mean": _mean(at), "value_std": _std(at), "value_min": _extreme(at, "min"), "value_max": _extreme(at, "max"),
    }  # fmt: skip
    positive = batch.sequences["positive"] > 0
    totals = segment_sum(log_ratio, edges)
    metrics |= {"log_ratio_median_right": _median(totals[positive]), "log_ratio_median_wrong": _median(totals[~positive])}
    k3 = kl_penalty(logprobs, batch.tokens["ref_logprobs"], kind="k3", mask=mask)
    metrics["kl_k3"] = float(segment_mean(k3, edges, mask).double().mean())
    implicit, explicit = beta * _until_next(tail[places], owners), -_until_next(at - returns.double()[places], owners)
    metrics |= {
        "advantage_implicit_std": _std(implicit), "advantage_explicit_std": _std(explicit),
        "advantage_correlation": _correlation(implicit, explicit),
        "advantage_same_sign": _mean(((implicit > 0) == (explicit > 0)).double()),
    }  # fmt: skip
    metrics |= _value_auc(at, positive[owners], owners)
    return {f"offline/{name}": value for name, value in metrics.items()}


def _until_next(at: Tensor, owners: Tensor) -> Tensor:
    """Of a number at each state [S], what it loses until the next state of the same sequence; until 0 behind the last one."""
    after, follows = torch.zeros_like(at), owners[1:] == owners[:-1]
    after[:-1][follows] = at[1:][follows]
    return at - after


def explicit_advantages(batch: TokenBatch, values: Tensor) -> Tensor:
    """[N]: at each action token what its step (or itself) is worth by the critic: V after - V before, and the reward behind the last one."""
    states, edges = batch.tokens["states"], batch.cu_seqlens
    owners = segment_ids(edges)[states]
    found = -_until_next((values - batch.tokens["returns"])[states], owners)
    place = states.long().cumsum(0) - 1  # of the last state at or before the token
    spread = torch.where(place >= 0, found[place.clamp(min=0)], 0.0) if len(found) else torch.zeros_like(values)
    return torch.where(batch.action_mask, spread, 0.0)


def _value_auc(values: Tensor, right: Tensor, owners: Tensor) -> dict[str, float]:
    """Over all states, and over those of each quarter of their response."""
    order = torch.arange(len(owners))
    firsts = torch.ones(len(owners), dtype=torch.bool)
    firsts[1:] = owners[1:] != owners[:-1]
    runs = firsts.nonzero().squeeze(1)
    lengths = torch.cat([runs, torch.tensor([len(owners)])]).diff()
    position = order - runs.repeat_interleave(lengths)
    # By the middle of each state's share of the response: the last of three is in the last quarter, a single one in the third.
    quarter = (2 * position + 1) * QUARTERS // (2 * lengths.repeat_interleave(lengths)) if len(owners) else position
    found = {"value_auc": auc(values[right], values[~right])}
    for number in range(QUARTERS):
        inside = quarter == number
        found[f"value_auc_quarter_{number + 1}"] = auc(values[inside & right], values[inside & ~right])
    return found


def auc(positives: Tensor, negatives: Tensor) -> float:
    """The chance that one of ``positives`` is above one of ``negatives``, ties counting one half (Mann-Whitney); NaN if either is empty."""
    if not len(positives) or not len(negatives):
        return float("nan")
    ordered, positives = negatives.double().sort().values, positives.double()
    below = torch.searchsorted(ordered, positives, right=False)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return float((below + not_above).double().mean() / (2 * len(ordered)))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _std(values: Tensor) -> float:
    return float(values.std(unbiased=False)) if len(values) else float("nan")


def _extreme(values: Tensor, which: str) -> float:
    return float(getattr(values, which)()) if len(values) else float("nan")


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy())) if len(values) else float("nan")


def _correlation(left: Tensor, right: Tensor) -> float:
    if len(left) < 2 or float(left.std()) < 1e-12 or float(right.std()) < 1e-12:
        return float("nan")
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


__all__ = ["OREOPolicyLoss", "OREOValueLoss", "auc", "offline_metrics", "oreo_batch", "oreo_denominators"]
