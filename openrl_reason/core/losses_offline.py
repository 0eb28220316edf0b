"""Losses on given data: OREO, and the rewards a DPO-like policy implies. Conventions as in ``losses``."""

from __future__ import annotations

import torch
from torch import Tensor

from openrl_reason.core.segments import reverse_cumsum, segment_broadcast, segment_count, segment_ids, segment_max, segment_starts, segment_sum

OREO_LEVELS = ("token", "step", "response", "no_stop_gradient", "one_step")
OREO_AVERAGES = ("sequence", "state")


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
    returns: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    average: str = "sequence",
    clip_log_ratio: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREO's critic (arXiv 2412.16145, eq. 8): mean over sequences of the mean over their states of delta_t^2, where

        delta_t = V(s_t) - R_t + beta sum_{i >= t} (logprob_i - ref_logprob_i)      over action tokens i,

    the residual of the soft Bellman equation, 0 for all t at the optimum. Per-token tensors [N], ``rewards_B`` [B]; ``state_mask[t]``: a
    state stands before token t. Gradient to ``values`` alone. ``denominator``: sequences in the global batch (default B); a sequence
    without states (a prompt that filled the limit) contributes 0.

    ``returns`` [N]: R_t, the reward still to come, where steps have rewards of their own (default: ``rewards_B`` at every token).
    ``sequence_weights`` [B] multiply a sequence's contribution. ``average``: "sequence", or "state": every state weighs the same, and the
    denominator is the states in the global batch. ``clip_log_ratio``: the sum of log-ratios is held within +- that.
    """
    tail = reverse_cumsum(_log_ratio(logprobs, ref_logprobs, action_mask).detach(), cu_seqlens)
    extra = {}
    if clip_log_ratio is not None:
        clipped = tail.clamp(-clip_log_ratio, clip_log_ratio)
        extra["clipped"] = (clipped != tail).to(tail.dtype)
        tail = clipped
    delta = values - _returns(returns, rewards_B, tail, cu_seqlens) + beta * tail
    return _squared("oreo_value", delta, state_mask, cu_seqlens, denominator, sequence_weights, average, {"value": values.detach(), **extra})


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
    returns: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    average: str = "sequence",
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREO's policy loss: the same residual, seen from the policy; gradient to ``logprobs`` alone. With l_t the log-ratio and sg[] a
    stop-gradient:

    * "token" (eq. 9): beta (l_t + sg[sum_{i>t} l_i]), so d loss / d logprob_t = 2 beta delta_t / (T B);
    * "step": the same with a whole step as the action: gradient through l up to the next state, sg[] beyond it;
    * "response" (eq. 10): the first state only, gradient through the whole sum, not divided by the number of states;
    * "no_stop_gradient": every state, gradient through every sum (DQO, Liu et al. 2024);
    * "one_step": V_t - r_t - V_next + beta l, with the next state's value in place of what follows it, and l over the tokens up to it.

    Arguments as in ``oreo_value_loss``. On data that does not cover all actions this loss alone is degenerate: add a KL term.
    """
    if level not in OREO_LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(OREO_LEVELS)}")
    log_ratio = _log_ratio(logprobs, ref_logprobs, action_mask)
    values, returns = values.detach(), _returns(returns, rewards_B, log_ratio, cu_seqlens)
    delta = values - returns
    if level == "token":
        rest = reverse_cumsum(log_ratio.detach(), cu_seqlens) - log_ratio.detach()
        tail = log_ratio + rest
    elif level == "step":
        tail = _step_tail(log_ratio, state_mask, cu_seqlens)
    elif level == "one_step":
        tail = _own_step(log_ratio, state_mask, cu_seqlens)
        delta = delta - _at_next_state(delta, state_mask, cu_seqlens)  # V and R of the next state in place of what follows
    else:
        tail = reverse_cumsum(log_ratio, cu_seqlens)
    if level == "response":
        state_mask = first_states(state_mask, cu_seqlens)
    shown = {"value": values}
    return _squared("oreo_policy", delta + beta * tail, state_mask, cu_seqlens, denominator, sequence_weights, average, shown)


def hinge_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    action_mask: Tensor,
    state_mask: Tensor,
    cu_seqlens: Tensor,
    positive_B: Tensor,
    *,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Holds right responses at least as likely as the reference has them (OREO's response-level option): the sum over right sequences of
    max(0, ref_logprob - logprob) of everything after the first state, / denominator (default: right sequences). ``positive_B`` bool [B]."""
    if denominator is None:
        denominator = positive_B.sum().clamp(min=1)
    tail = reverse_cumsum(_log_ratio(logprobs, ref_logprobs, action_mask), cu_seqlens)
    counted = first_states(state_mask, cu_seqlens) & segment_broadcast(positive_B, cu_seqlens)
    loss = torch.where(counted, (-tail).clamp(min=0.0), 0.0).sum() / denominator
    return loss, {"hinge_loss": loss.detach()}


def first_states(state_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """bool [N]: the first state of each sequence alone."""
    return state_mask & (_count_up_to(state_mask, cu_seqlens) == 1)


def importance_weights(logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor, cu_seqlens: Tensor, *, clip: float = 1.0) -> Tensor:
    """[B]: pi(y) / ref(y) of whole responses, detached; the log-ratio is held below ``clip``."""
    total = segment_sum(_log_ratio(logprobs, ref_logprobs, action_mask).detach(), cu_seqlens)
    return total.clamp(max=clip).exp()


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
    own = _own_step(log_ratio, state_mask, cu_seqlens)
    return own + (tail - own.detach())


def _own_step(log_ratio: Tensor, state_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of ``log_ratio`` from each token up to the next state or the end of its sequence."""
    return reverse_cumsum(log_ratio, _step_edges(state_mask, cu_seqlens))


def _step_edges(state_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Steps as segments of their own: a new one begins at every state and at every sequence."""
    begins = state_mask.clone()
    starts = cu_seqlens[:-1].to(torch.int64)[cu_seqlens.diff() > 0]
    begins[starts] = True
    return torch.cat([begins.nonzero().squeeze(1), torch.tensor([len(begins)], device=begins.device)])


def _at_next_state(values: Tensor, state_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N]: at each state, ``values`` of the next state of its sequence; 0.0 at the last one and outside states."""
    places, owners = state_mask.nonzero().squeeze(1), segment_ids(cu_seqlens)[state_mask]
    has_next = owners[:-1] == owners[1:]
    result = torch.zeros_like(values)
    result[places[:-1][has_next]] = values[places[1:][has_next]]
    return result


def _returns(returns: Tensor | None, rewards_B: Tensor, like: Tensor, cu_seqlens: Tensor) -> Tensor:
    return segment_broadcast(rewards_B.detach().to(like.dtype), cu_seqlens) if returns is None else returns.detach().to(like.dtype)


def _squared(name, delta, state_mask, cu_seqlens, denominator, weights_B, average, shown) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of delta^2 over states. ``shown``: further per-token numbers whose mean over states is reported."""
    if average not in OREO_AVERAGES:
        raise ValueError(f"unknown average {average!r}; known: {', '.join(OREO_AVERAGES)}")
    num_states_B, by_state = segment_count(cu_seqlens, state_mask), average == "state"
    if denominator is None:
        denominator = num_states_B.sum().clamp(min=1) if by_state else max(len(cu_seqlens) - 1, 1)
    delta = torch.where(state_mask, delta, 0.0)
    weights = state_mask.to(delta.dtype) if by_state else state_mask / segment_broadcast(num_states_B.clamp(min=1), cu_seqlens)
    of_sequence = 1.0 if weights_B is None else segment_broadcast(weights_B.detach().to(delta.dtype), cu_seqlens)
    loss = (delta**2 * weights * of_sequence).sum() / denominator
    metrics = {f"{name}_loss": loss.detach()}
    for key, numbers in ({"residual": delta.detach(), "residual_abs": delta.detach().abs()} | shown).items():
        metrics[f"{name}/{key}"] = (torch.where(state_mask, numbers, 0.0) * weights).sum() / denominator
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
