"""Estimators of the values of states: functions from token ids to numbers, and the two kinds that a model gives.

A further estimator is a further function: ``analyze_values(config, estimators={"name": function})``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.losses_offline import implicit_process_rewards

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup

PrefixValues = Callable[[Sequence[tuple[int, ...]]], np.ndarray]
"""Token ids of S states, prompts included -> their values, float [S]; NaN where there is none."""
StepScores = Callable[[Sequence[tuple[int, ...]], Sequence[int]], np.ndarray]
"""Token ids of A responses up to the end of a step, and how many of them that step has -> how good each step is, float [A]. Good for ranking
the steps of one state alone: what is added to all of them does not matter."""


def prefix_batch(prefixes: Sequence[tuple[int, ...]], num_actions: Sequence[int] | None = None) -> TokenBatch:
    """Prefixes laid end to end; the last ``num_actions`` tokens of each are actions and its step 0 (None: no token is)."""
    lengths, actions = [len(prefix) for prefix in prefixes], num_actions if num_actions is not None else [0] * len(prefixes)
    own = [place >= length - count for length, count in zip(lengths, actions, strict=True) for place in range(length)]
    mask = torch.tensor(own, dtype=torch.bool)
    return TokenBatch(
        token_ids=torch.tensor([token for prefix in prefixes for token in prefix], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        action_mask=mask,
        step_ids=torch.where(mask, 0, -1),
        behaviour_logprobs=torch.full((sum(lengths),), float("nan")),
    )


def scalar_values(group: ModelGroup, *, scale: float = 1.0, shift: float = 0.0) -> PrefixValues:
    """shift + scale * what a model with a scalar head says of a prefix.

    ``ModelGroup.values`` has the value of the state *before* each token; that of the state after the last one is the unshifted score there.
    """

    def values(prefixes: Sequence[tuple[int, ...]]) -> np.ndarray:
        if not prefixes:
            return np.zeros(0)
        batch = prefix_batch(prefixes)
        scores = group.scores(batch)
        return shift + scale * scores[batch.cu_seqlens[1:].long() - 1].double().numpy()

    return values


def implicit_advantages(policy: ModelGroup, reference: ModelGroup, *, beta: float) -> StepScores:
    """beta sum log(policy / reference) over a step's tokens: the advantage that an optimal policy of KL-regularised RL implies (OREO, Wang
    et al. 2024, arXiv 2412.16145; Yuan et al. 2024, arXiv 2412.01981). Log-probs at temperature 1."""

    def scores(prefixes: Sequence[tuple[int, ...]], num_tokens: Sequence[int]) -> np.ndarray:
        if not prefixes:
            return np.zeros(0)
        batch = prefix_batch(prefixes, num_tokens)
        logprobs, ref_logprobs = policy.logprobs(batch)["logprobs"], reference.logprobs(batch)["logprobs"]
        return implicit_process_rewards(logprobs, ref_logprobs, batch.step_ids, batch.cu_seqlens, beta=beta).double().numpy()

    return scores
