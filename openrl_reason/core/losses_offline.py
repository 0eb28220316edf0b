"""Losses on given data: OREO, and the rewards a DPO-like policy implies. Conventions as in ``losses``."""

from __future__ import annotations

import torch
from torch import Tensor

from openrl_reason.core.segments import reverse_cumsum, segment_broadcast, segment_count, segment_ids, segment_max, segment_starts

OREO_LEVELS = ("token", "step", "response", "no_stop_gradient")


def oreo_value_loss(
    values: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards_B: Tensor,
    action_mask: Tensor,
    state_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREO's critic (arXiv 2412.16145, eq. 8): mean over sequences of the mean over their states of delta_t^2, where

        delta_t = V(s_t) - R + beta sum_{i >= t} (logprob_i - ref_logprob_i)      over action tokens i,

    the residual of the soft Bellman equation, 0 for all t at the optimum. Per-token tensors [N], ``rewards_B`` [B]; ``state_mask[t]``: a
    state stands before token t. Gradient to ``values`` alone. ``denominator``: sequences in the global batch (default B); a sequence
    without states (a prompt that filled the limit) contributes 0.
    """
    tail = reverse_cumsum(_log_ratio(logprobs, ref_logprobs, action_mask).detach(), cu_seqlens)
    return _oreo_loss("oreo_value", values, tail, rewards_B, state_mask, cu_seqlens, beta, denominator)


def oreo_policy_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards_B: Tensor,
    action_mask: Tensor,
    state_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    level: str,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREO's policy loss: the same residual, seen from the policy; gradient to ``logprobs`` alone. With l_t the log-ratio and sg[] a
    stop-gradient:

    * "token" (eq. 9): beta (l_t + sg[sum_{i>t} l_i]), so d loss / d logprob_t = 2 beta delta_t / (T B);
    * "step": the same with a whole step as the action: gradient through l up to the next state, sg[] beyond it;
    * "response" (eq. 10): the first state only, gradient through the whole sum, not divided by the number of states;
    * "no_stop_gradient": every state, gradient through every sum (DQO, Liu et al. 2024).

    Arguments as in ``oreo_value_loss``. On data that does not cover all actions this loss alone is degenerate: add a KL term.
    """
    if level not in OREO_LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(OREO_LEVELS)}")
    log_ratio = _log_ratio(logprobs, ref_logprobs, action_mask)
    if level == "token":
        rest = reverse_cumsum(log_ratio.detach(), cu_seqlens) - log_ratio.detach()
        tail = log_ratio + rest
    elif level == "step":
        tail = _step_tail(log_ratio, state_mask, cu_seqlens)
    else:
        tail = reverse_cumsum(log_ratio, cu_seqlens)
    if level == "response":
        state_mask = state_mask & (_count_up_to(state_mask, cu_seqlens) == 1)
    return _oreo_loss("oreo_policy", values.detach(), tail, rewards_B, state_mask, cu_seqlens, beta, denominator)


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor) -> Tensor:
    return torch.where(action_mask, logprobs - ref_logprobs.detach(), 0.0)


def _count_up_to(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [N]: how many entries of ``mask`` lie in the token's segment up to and including the token."""
    counts = torch.nn.functional.pad(mask.to(torch.int64).cumsum(0), (1, 0))
    return counts[1:] - counts[segment_starts(cu_seqlens)]


def _step_tail(log_ratio: Tensor, state_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """L_t - L_next(t) + sg[L_next(t)] at the states: value L_t, gradient through the tokens before the next state only.

    L_t - L_next(t) is the sum over t's own step, so steps are summed directly; there is no index of "the next state", hence no sentinel
    for "none" that could be mistaken for a state at index 0.
    """
    tail = reverse_cumsum(log_ratio.detach(), cu_seqlens)
    # Steps as segments of their own: a new one begins at every state and at every sequence.
    begins = state_mask.clone()
    starts = cu_seqlens[:-1].to(torch.int64)[cu_seqlens.diff() > 0]
    begins[starts] = True
    edges = torch.cat([begins.nonzero().squeeze(1), torch.tensor([len(begins)], device=begins.device)])
    own = reverse_cumsum(log_ratio, edges)
    return own + (tail - own.detach())


def _oreo_loss(name, values, tail, rewards_B, state_mask, cu_seqlens, beta, denominator) -> tuple[Tensor, dict[str, Tensor]]:
    if denominator is None:
        denominator = max(len(cu_seqlens) - 1, 1)
    rewards = segment_broadcast(rewards_B.detach().to(tail.dtype), cu_seqlens)
    delta = torch.where(state_mask, values - rewards + beta * tail, 0.0)
    weights = state_mask / segment_broadcast(segment_count(cu_seqlens, state_mask).clamp(min=1), cu_seqlens)
    loss = (delta**2 * weights).sum() / denominator
    shown = torch.where(state_mask, values.detach(), 0.0)
    delta = delta.detach()
    metrics = {
        f"{name}_loss": loss.detach(),
        f"{name}/residual": (delta * weights).sum() / denominator,
        f"{name}/residual_abs": (delta.abs() * weights).sum() / denominator,
        f"{name}/value": (shown * weights).sum() / denominator,
    }
    return loss, metrics


def implicit_process_rewards(logprobs: Tensor, ref_logprobs: Tensor, step_ids: Tensor, cu_seqlens: Tensor, *, beta: float) -> Tensor:
    """Reward of each step implied by a policy trained on outcomes (Yuan et al. 2024, arXiv 2412.01981): beta sum of (logprob -
    ref_logprob) over its tokens.

    ``step_ids`` [N]: the step of an action token, -1 elsewhere. Returns a flat tensor: the steps 0 .. max of the first sequence, then
    those of the second, ...; ``step_offsets`` says where each sequence begins. A step without tokens has reward 0. Sums over a sequence's
    steps equal beta log pi(y) / ref(y). Differentiable in ``logprobs``.
    """
    is_action = step_ids >= 0
    offsets = step_offsets(step_ids, cu_seqlens)
    index = (offsets[segment_ids(cu_seqlens)] + step_ids)[is_action]
    log_ratio = (logprobs - ref_logprobs.detach())[is_action]
    totals = torch.zeros(int(offsets[-1]), dtype=torch.float64, device=logprobs.device).index_add(0, index, log_ratio.to(torch.float64))
    return (beta * totals).to(logprobs.dtype)


def step_offsets(step_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [B+1]: where the steps of each sequence lie in a flat per-step tensor."""
    num_steps_B = segment_max(step_ids.to(torch.float64), cu_seqlens, empty=-1.0).to(torch.int64) + 1
    return torch.nn.functional.pad(num_steps_B.clamp(min=0).cumsum(0), (1, 0))
