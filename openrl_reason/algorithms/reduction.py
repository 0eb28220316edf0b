"""How per-token terms become one number: a weight per token and one global denominator, so that any cut of the batch sums to the same."""

from __future__ import annotations

import torch

from openrl_reason.core.batch import TokenBatch
from openrl_reason.errors import ConfigError

REDUCTIONS = {
    "token": "sum over tokens / number of action tokens in the global batch (DAPO; the usual SFT mean)",
    "sequence": "mean over each sequence's action tokens, then over sequences (GRPO; VinePPO's SFT)",
    "batch": "sum over tokens / number of sequences (a policy gradient of whole-response log-probs)",
    "constant": "sum over tokens / (sequences x longest allowed response) (Dr. GRPO)",
}


def loss_weights(batch: TokenBatch, reduction: str, *, max_response_tokens: int | None = None) -> tuple[torch.Tensor, float]:
    """(weights [N], denominator) such that ``sum(weights * mask * term) / denominator`` is the reduction named.

    The denominator is that of ``batch``, which must be the whole minibatch of an optimiser step, not a rank's part of it.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"loss reduction is {reduction!r}: use one of {', '.join(REDUCTIONS)}")
    ones = torch.ones(batch.num_tokens, dtype=torch.float32)
    if reduction == "token":
        return ones, float(max(1, batch.num_actions))
    if reduction == "sequence":
        actions_B = torch.zeros(batch.num_sequences).index_add_(0, batch.sequence_ids, batch.action_mask.float())
        return (1.0 / actions_B.clamp(min=1.0))[batch.sequence_ids], float(batch.num_sequences)
    if reduction == "batch":
        return ones, float(batch.num_sequences)
    assert max_response_tokens, "the constant reduction needs the response limit"
    return ones, float(batch.num_sequences * max_response_tokens)
