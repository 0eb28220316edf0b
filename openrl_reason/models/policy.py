"""A causal language model that scores packed sequences: token ids in, log-probabilities out, no [N, vocabulary] tensor on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openrl_reason.core.logprobs import Reference, shifted_rows, shifted_token_scores
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.attention import packed_forward_kwargs
from openrl_reason.models.loading import position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ModelOutput:
    """What a model says about a packed micro-batch. Every tensor is flat, [N]; entry t belongs to token t."""

    logprobs: Tensor | None = None
    """log p(token_t | tokens before it), 0.0 at the first token of each sequence."""
    entropy: Tensor | None = None
    """Entropy in nats of the distribution token t was drawn from; None unless asked for."""
    values: Tensor | None = None
    """Value of the state before token t; None for a policy."""
    kl: Tensor | None = None
    """Exact KL (nats) between the distribution token t was drawn from and the reference's; None without ``tokens["ref_hidden"]``."""


class TokenScoringHead(nn.Linear):
    """The output head, scoring given tokens instead of returning logits.

    It *owns* the weight, so that ZeRO-3 gathers it around this module's forward and backward, tied to the embeddings or not.
    """

    chunk_tokens = 128
    reference_head: tuple[Tensor, Tensor | None] | None = None
    """Weight [V, H'] and bias of a reference model's head, for the exact KL. Plain tensors: neither trained, saved nor partitioned."""
    kl_direction = "reverse"

    @classmethod
    def replacing(cls, head: nn.Module, chunk_tokens: int) -> TokenScoringHead:
        """A scoring head around the parameters (the very objects) of ``head``."""
        if type(head) is not nn.Linear:
            raise ConfigError(f"the model's output head is a {type(head).__name__}; only a plain linear head can be scored in chunks")
        scoring = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        scoring.weight, scoring.bias, scoring.chunk_tokens = head.weight, head.bias, chunk_tokens
        return scoring

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        temperature: float,
        with_entropy: bool,
        score_mask: Tensor | None,
        ref_hidden: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        reference = None
        if ref_hidden is not None:
            assert self.reference_head is not None, "set_reference_head comes first"
            reference = Reference(ref_hidden, *self.reference_head, self.kl_direction)
        scores = shifted_token_scores(
            hidden, self.weight, token_ids, cu_seqlens, temperature=temperature, chunk_tokens=self.chunk_tokens, with_entropy=with_entropy,
            bias=self.bias, score_mask=score_mask, reference=reference,
        )  # fmt: skip
        return (scores.logprobs, scores.entropy) if reference is None else (scores.logprobs, scores.entropy, scores.kl)


class LanguageModel(nn.Module):
    """Wraps a transformers causal language model for packed scoring. Its head is replaced in place by a ``TokenScoringHead``."""

    def __init__(self, model: PreTrainedModel, *, attn_impl: str, head_chunk_tokens: int = 128):
        super().__init__()
        self.model = model
        self.attn_impl = attn_impl
        self.max_positions = position_limit(model.config)
        model.set_output_embeddings(TokenScoringHead.replacing(model.get_output_embeddings(), head_chunk_tokens))

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
        score_mask: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        with_hidden: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """token_ids [N], cu_seqlens [B+1] -> (logprobs [N], entropy [N] or None), both float32.

        ``logprobs[t]`` = log p(token_t | tokens before it in its sequence) of softmax(logits / temperature); 0.0 at a sequence's first
        token and, with ``score_mask`` bool [N], at tokens that it leaves out (prompts, for instance: the head does not work for them).
        ``ref_hidden`` [N, H'] adds a third result: the exact KL [N] (nats) from or to the reference whose head ``set_reference_head`` gave.
        ``with_hidden`` adds the hidden states [N, H] that predict each scored token: another model's ``ref_hidden``.
        Raises DataError for a sequence longer than the model's positions.
        """
        hidden = self.hidden_states(token_ids, cu_seqlens)
        scores = self.model.get_output_embeddings()(hidden, token_ids, cu_seqlens, temperature, with_entropy, score_mask, ref_hidden)
        return (*scores, shifted_rows(hidden, token_ids, cu_seqlens, score_mask)) if with_hidden else scores

    def set_reference_head(self, weight: Tensor, bias: Tensor | None, direction: str) -> None:
        """What ``ref_hidden`` is multiplied by: the reference's output head, and which way the KL goes ("reverse" is KL(policy || reference))."""
        head = self.model.get_output_embeddings()
        head.reference_head, head.kl_direction = (weight, bias), direction

    def hidden_states(self, token_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The decoder's final hidden states, [N, H]."""
        return packed_hidden_states(
            self.model.get_decoder(), token_ids, cu_seqlens, attn_impl=self.attn_impl, max_positions=self.max_positions
        )


def packed_hidden_states(decoder: nn.Module, token_ids: Tensor, cu_seqlens: Tensor, *, attn_impl: str, max_positions: int | None) -> Tensor:
    """The final hidden states [N, H] of packed sequences, which do not see one another. Raises DataError for one beyond ``max_positions``."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    if max_positions is not None and longest > max_positions:
        raise DataError(f"a sequence has {longest} tokens, but the model has {max_positions} positions")
    position_ids = torch.arange(token_ids.shape[0], device=token_ids.device) - cu_seqlens[:-1].repeat_interleave(lengths)
    output = decoder(
        input_ids=token_ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        **packed_forward_kwargs(cu_seqlens, attn_impl),
    )
    return output.last_hidden_state[0]
