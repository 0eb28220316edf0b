"""Losses of policies and critics. Pure: ``(loss, metrics)`` out, nothing logged, nothing reduced over ranks.

**The denominator is an argument.** A loss is a sum over what it is given, divided by ``denominator``: the count of the *global* batch. So
losses and gradients of micro-batches add up to those of the whole batch, however it was cut. None means the count of what is given.

**Metrics add up too**: they are contributions already divided by the denominator, so their sum over micro-batches and ranks is the global
value; keys that end in ``/max`` or ``/min`` combine by maximum or minimum instead. They are detached 0-dim tensors.

**What a mask hides does not exist**: inputs are replaced, not multiplied by zero, so NaN there (an unknown behaviour log-prob) reaches
neither the loss nor the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openrl_reason.core.kl import AdaptiveKL, FixedKL, kl_loss, kl_penalty
from openrl_reason.core.losses_offline import implicit_process_rewards, oreo_policy_loss, oreo_value_loss
from openrl_reason.core.losses_preference import dpo_loss, kto_loss, kto_reference_point
from openrl_reason.core.segments import segment_broadcast, segment_count, segment_mean

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "dpo_loss",
    "entropy_loss",
    "explained_variance",
    "implicit_process_rewards",
    "kl_loss",
    "kl_penalty",
    "kto_loss",
    "kto_reference_point",
    "oreo_policy_loss",
    "oreo_value_loss",
    "policy_loss",
    "sft_loss",
    "value_loss",
]

Metrics = dict[str, Tensor]
_MAX_LOG_RATIO = 20.0  # e^20: beyond it a ratio is clipped or absurd, and exp must stay finite so that its gradient is not inf * 0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    denominator: float | Tensor | None = None,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    importance_correction: str | None = None,
    importance_cap: float = 2.0,
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient (PPO, Schulman et al. 2017, eq. 7): -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) / denominator.

    All per-token inputs [N], ``mask`` bool. Gradient flows to ``logprobs`` alone.

    * ``dual_clip`` c > 1: where A < 0 the objective is at least c A (Ye et al. 2020), so a huge ratio cannot dominate.
    * ``ratio_level`` "token": r_t = exp(logprob - old). "sequence": r is exp of the *mean* log-ratio over the sequence's masked tokens,
      the same for each of them (GSPO, Zheng et al. 2025, eq. 7); needs ``cu_seqlens`` [B+1].
    * ``token_weights`` [N] multiply terms (1 / length for a sequence mean, with ``denominator`` the number of sequences).
    * ``importance_correction`` weighs each token by u = exp(old - behaviour), the trainer's against the engine's probability of a sampled
      token: "truncate" min(u, ``importance_cap``) or "mask" (u where u <= cap, else 0). Unknown (NaN) behaviour log-probs count as u = 1.

    Raises ``ValueError`` for settings that cannot work.
    """
    _check_clips(clip_low, clip_high, dual_clip)
    _check_levels(ratio_level, cu_seqlens, importance_correction, behaviour_logprobs, importance_cap)
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    if ratio_level == "sequence":
        log_ratio = segment_broadcast(segment_mean(log_ratio, cu_seqlens, mask), cu_seqlens)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages.detach(), 0.0)
    weights = mask.to(ratio.dtype) if token_weights is None else torch.where(mask, token_weights, 0.0).to(ratio.dtype)
    metrics: Metrics = {}
    importance = _importance_weights(old_logprobs, behaviour_logprobs, mask, importance_correction, importance_cap)
    if importance is not None:
        metrics = _importance_metrics(importance, weights, mask, denominator, importance_cap)
        importance = torch.where(importance <= importance_cap, importance, importance_cap if importance_correction == "truncate" else 0.0)
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    terms = objective * (weights if importance is None else weights * importance)
    loss = -terms.sum() / denominator
    metrics |= _policy_metrics(loss, ratio.detach(), log_ratio.detach(), advantages, weights, mask, clip_low, clip_high, denominator)
    return loss, metrics


def _check_clips(clip_low, clip_high, dual_clip):
    if not 0.0 <= clip_low <= 1.0 or clip_high < 0.0:
        raise ValueError(f"clip_low ({clip_low}) must lie in [0, 1] and clip_high ({clip_high}) must not be negative")
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must exceed 1, it is {dual_clip}")


def _check_levels(ratio_level, cu_seqlens, importance_correction, behaviour_logprobs, importance_cap):
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level must be 'token' or 'sequence', it is {ratio_level!r}")
    if ratio_level == "sequence" and cu_seqlens is None:
        raise ValueError("ratio_level='sequence' needs cu_seqlens")
    if importance_correction not in (None, "truncate", "mask"):
        raise ValueError(f"importance_correction must be None, 'truncate' or 'mask', it is {importance_correction!r}")
    if importance_correction is not None and (behaviour_logprobs is None or importance_cap <= 0.0):
        raise ValueError(f"importance_correction needs behaviour_logprobs and a positive importance_cap (it is {importance_cap})")


def _importance_weights(old_logprobs, behaviour_logprobs, mask, correction, cap) -> Tensor | None:
    if correction is None:
        return None
    difference = (old_logprobs - behaviour_logprobs).detach()
    known = mask & ~difference.isnan()
    return torch.where(known, difference, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _importance_metrics(importance, weights, mask, denominator, cap) -> Metrics:
    return {
        "importance_weight": (importance * weights).sum() / denominator,
        "importance_weight/max": torch.where(mask, importance, 0.0).max() if len(mask) else importance.new_zeros(()),
        "importance_capped_fraction": ((importance > cap) * weights).sum() / denominator,
    }


def _policy_metrics(loss, ratio, log_ratio, advantages, weights, mask, clip_low, clip_high, denominator) -> Metrics:
    """Fractions count tokens whose gradient the clip has removed, by side."""
    held_high = (ratio > 1.0 + clip_high) & (advantages > 0)
    held_low = (ratio < 1.0 - clip_low) & (advantages < 0)
    inside = torch.where(mask, ratio, 1.0)
    return {
        "policy_loss": loss.detach(),
        "clip_fraction/high": (held_high * weights).sum() / denominator,
        "clip_fraction/low": (held_low * weights).sum() / denominator,
        "approx_kl": ((ratio - 1.0 - log_ratio) * weights).sum() / denominator,  # k3 of the old against the new policy
        "ratio/max": inside.max() if len(inside) else inside.new_ones(()),
        "ratio/min": inside.min() if len(inside) else inside.new_ones(()),
    }


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Half the squared error, sum_t 1/2 (V_t - R_t)^2 / denominator over ``mask``; all [N].

    With ``clip`` each term is the larger of the errors of V and of V held within ``old_values`` +- clip (PPO's value clipping).
    The metrics hold the moments from which ``explained_variance`` is made once they are summed.
    """
    if clip is not None and (clip <= 0.0 or old_values is None):
        raise ValueError(f"value clipping needs old_values and a positive clip, it is {clip}")
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    values = torch.where(mask, values, 0.0)
    returns = torch.where(mask, returns.detach(), 0.0)
    squared_error = (values - returns) ** 2
    metrics: Metrics = {}
    if clip is not None:
        old_values = torch.where(mask, old_values.detach(), 0.0)
        held = old_values + (values - old_values).clamp(-clip, clip)
        held_error = (held - returns) ** 2
        beyond = (values - old_values).detach().abs() > clip  # within it both errors are the same up to rounding
        metrics["value_clip_fraction"] = ((held_error > squared_error).detach() & beyond & mask).sum() / denominator
        squared_error = torch.maximum(squared_error, held_error)
    loss = 0.5 * squared_error.sum() / denominator
    error = (returns - values).detach()
    metrics |= {
        "value_loss": loss.detach(),
        "value/mean": values.detach().sum() / denominator,
        "value/error": error.sum() / denominator,
        "value/error_squared": (error**2).sum() / denominator,
        "value/returns": returns.sum() / denominator,
        "value/returns_squared": (returns**2).sum() / denominator,
    }
    return loss, metrics


def explained_variance(metrics: dict[str, float]) -> float:
    """1 - Var(R - V) / Var(R) from ``value_loss`` metrics summed over the batch (denominator: its token count); NaN if R does not vary."""
    variance_of_returns = metrics["value/returns_squared"] - metrics["value/returns"] ** 2
    variance_of_error = metrics["value/error_squared"] - metrics["value/error"] ** 2
    return float("nan") if variance_of_returns <= 0 else float(1.0 - variance_of_error / variance_of_returns)


def entropy_loss(entropy: Tensor, mask: Tensor, *, denominator: float | Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Minus the mean entropy over ``mask``; the caller multiplies by its coefficient. Gradient flows if the entropy carries one."""
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    mean = torch.where(mask, entropy, 0.0).sum() / denominator
    return -mean, {"entropy": mean.detach()}


def sft_loss(
    logprobs: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: str = "token",
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the tokens in ``mask`` [N], in one of three reductions:

    * "token": sum over tokens / number of tokens (every token weighs the same);
    * "sequence": mean of each sequence, then / number of sequences (every sequence weighs the same);
    * "batch": sum over tokens / number of sequences (a sequence's likelihood).

    ``denominator`` is that number over the global batch. "sequence" needs ``cu_seqlens`` [B+1], "batch" needs it or the denominator.
    ``token_weights`` [N] multiply the terms and leave counts and lengths alone.
    """
    if reduction not in ("token", "sequence", "batch"):
        raise ValueError(f"reduction must be 'token', 'sequence' or 'batch', it is {reduction!r}")
    if cu_seqlens is None and (reduction == "sequence" or (reduction == "batch" and denominator is None)):
        raise ValueError(f"reduction={reduction!r} needs cu_seqlens")
    if denominator is None:
        denominator = mask.sum().clamp(min=1) if reduction == "token" else len(cu_seqlens) - 1
    terms = torch.where(mask, logprobs, 0.0)
    if token_weights is not None:
        terms = terms * torch.where(mask, token_weights, 0.0)
    if reduction == "sequence":
        terms = terms / segment_broadcast(segment_count(cu_seqlens, mask).clamp(min=1), cu_seqlens)
    loss = -terms.sum() / denominator
    return loss, {"sft_loss": loss.detach()}
