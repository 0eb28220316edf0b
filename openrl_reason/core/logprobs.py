"""Log-probabilities of tokens straight from the last hidden states: the language-model head without its [N, vocab] logits.

Logits exist one tile at a time: all N rows against a block of the vocabulary, small enough that a tile holds ``chunk_tokens * V``
numbers. Blocks of the vocabulary rather than of tokens, because each block of the head is then read once, the head's gradient is written
once (in its own dtype, by one product over all tokens) and nothing of the head's size is accumulated.

With p the softmax of z = (h W^T + b) / T, the gradients are
    d log p_y / d z = onehot(y) - p                     d H / d z_v = -p_v (log p_v + H)
so for a frozen head the forward pass already knows d log p_y / d h = (W_y - p W) / T, an [N, H] matrix: it keeps that, and the backward
pass multiplies it by the incoming gradient and never touches the vocabulary. Otherwise the backward pass computes each tile again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_TOKENS = 128


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    with_entropy: bool = False,
    bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ lm_head_weight.T / temperature)[token_ids], and the entropy of each row's distribution (nats) if asked for.

    ``hidden`` [N, H], ``lm_head_weight`` [V, H], ``token_ids`` int [N], ``bias`` [V]; results [N], float32 (float64 for float64 inputs).
    Row i scores ``token_ids[i]`` with ``hidden[i]``: **no shift here**, see ``shifted_token_logprobs``. Differentiable in hidden, weight
    and bias, also through the entropy. The softmax is taken in float32 whatever the inputs' dtype. ``chunk_tokens`` bounds memory: about
    ``chunk_tokens * V`` logits are alive at a time; it does not change the result beyond rounding.
    Raises ``ValueError`` for inconsistent shapes or dtypes, a temperature that is not positive, or a token id outside the vocabulary.
    """
    _check(hidden, lm_head_weight, token_ids, temperature, chunk_tokens, bias)
    head_is_frozen = not (lm_head_weight.requires_grad or (bias is not None and bias.requires_grad))
    keep_direction = torch.is_grad_enabled() and hidden.requires_grad and head_is_frozen
    logprobs, entropy = _TokenLogprobs.apply(hidden, lm_head_weight, bias, token_ids, float(temperature), chunk_tokens, with_entropy, keep_direction)
    return (logprobs, entropy) if with_entropy else logprobs


def shifted_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    with_entropy: bool = False,
    bias: Tensor | None = None,
    score_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The one place where logits are shifted against tokens: entry t = log p(token_t | tokens before it in its segment).

    ``hidden`` [N, H] as the model returns it (row t has read token t), packed by ``cu_seqlens`` [B+1]. The first token of a segment has no
    prediction: log-prob and entropy are 0.0 there. ``score_mask`` bool [N] leaves out further tokens (0.0 as well), prompts for instance,
    and the head's work for them. Otherwise as ``token_logprobs``; entry t of the entropy is that of the distribution token t was drawn
    from.
    """
    scored = torch.ones(len(token_ids), dtype=torch.bool, device=token_ids.device) if score_mask is None else score_mask.clone()
    starts = cu_seqlens[:-1].to(torch.int64)
    scored[starts[cu_seqlens.diff() > 0]] = False
    index = scored.nonzero().squeeze(-1)
    result = token_logprobs(
        hidden.index_select(0, index - 1),
        lm_head_weight,
        token_ids.index_select(0, index),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=with_entropy,
        bias=bias,
    )
    if with_entropy:
        return tuple(part.new_zeros(len(token_ids)).index_copy(0, index, part) for part in result)
    return result.new_zeros(len(token_ids)).index_copy(0, index, result)


def _check(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, chunk_tokens: int, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected [N, H], [V, H], [N]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(token_ids.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the vocabulary {weight.shape[0]} entries")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head_weight is {weight.dtype}; cast one of them")
    if not temperature > 0.0 or chunk_tokens < 1:
        raise ValueError(f"temperature ({temperature}) and chunk_tokens ({chunk_tokens}) must be positive")
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < weight.shape[0]:
        raise ValueError(f"token ids {int(token_ids.min())}..{int(token_ids.max())} do not fit a vocabulary of {weight.shape[0]}")


class _Tiles:
    """The head cut into blocks of the vocabulary: yields (block, weight block, scaled logits of that block in the softmax dtype)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_tokens: int):
        self.hidden, self.weight, self.bias, self.temperature = hidden, weight, bias, temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        budget = chunk_tokens * weight.shape[0] // max(len(hidden), 1)
        self.width = min(max(budget, 256), weight.shape[0])  # below 256 columns the products stop being efficient

    def __iter__(self):
        for start in range(0, self.weight.shape[0], self.width):
            block = slice(start, start + self.width)
            head = self.weight[block]
            logits = (self.hidden @ head.T).to(self.dtype)
            if self.bias is not None:
                logits += self.bias[block]
            if self.temperature != 1.0:
                logits /= self.temperature
            yield block, head, logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, temperature, chunk_tokens, with_entropy, keep_direction):
        tiles = _Tiles(hidden, weight, bias, temperature, chunk_tokens)
        num_rows = len(hidden)
        shape = dict(dtype=tiles.dtype, device=hidden.device)
        # Online softmax: everything below is relative to the running maximum. It starts finite, so that differences of it are never inf -
        # inf.
        maximum = torch.full((num_rows,), torch.finfo(tiles.dtype).min / 2, **shape)
        total, total_times_logit, chosen = (torch.zeros(num_rows, **shape) for _ in range(3))
        expected_head = torch.zeros(hidden.shape, **shape) if keep_direction else None
        for block, head, logits in tiles:
            place, inside = _locate(token_ids, block, logits)
            chosen = torch.where(inside, logits.gather(1, place).squeeze(1), chosen)
            new_maximum = torch.maximum(maximum, logits.amax(1))
            shrink, drop = (maximum - new_maximum).exp(), maximum - new_maximum
            logits.sub_(new_maximum[:, None])
            weights = logits.exp() if with_entropy else logits.exp_()
            if with_entropy:
                total_times_logit = shrink * (total_times_logit + total * drop) + _row_dot(weights, logits)
            total = shrink * total + weights.sum(1)
            if keep_direction:
                expected_head.mul_(shrink[:, None]).add_(weights.to(head.dtype) @ head)
            maximum = new_maximum
        log_normaliser = maximum + total.log()
        entropy = total.log() - total_times_logit / total if with_entropy else None
        direction = (weight[token_ids] - expected_head.div_(total[:, None])).div_(temperature) if keep_direction else None
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        # The parameter itself is saved, not a view of it: under ZeRO-3 its data is released after forward and gathered again for backward.
        ctx.save_for_backward(hidden, weight, bias, token_ids, log_normaliser, entropy, direction)
        ctx.set_materialize_grads(False)
        return chosen - log_normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, token_ids, log_normaliser, entropy, direction = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        if direction is not None and grad_entropy is None:
            return (grad_logprobs[:, None] * direction).to(hidden.dtype), *(None,) * 7
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_normaliser)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros(hidden.shape, dtype=log_normaliser.dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        for block, head, logits in _Tiles(hidden, weight, bias, ctx.temperature, ctx.chunk_tokens):
            grad_logits = _grad_logits(logits, block, token_ids, log_normaliser, entropy, grad_logprobs, grad_entropy)
            if needs_bias:
                grad_bias[block] = (grad_logits.sum(0) / ctx.temperature).to(bias.dtype)
            narrow = grad_logits.div_(ctx.temperature).to(weight.dtype) if ctx.temperature != 1.0 else grad_logits.to(weight.dtype)
            if needs_hidden:
                grad_hidden.add_(narrow @ head)
            if needs_weight:
                torch.mm(narrow.T, hidden, out=grad_weight[block])
        return (grad_hidden.to(hidden.dtype) if needs_hidden else None), grad_weight, grad_bias, *(None,) * 5


def _locate(token_ids: Tensor, block: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's token in this tile [N, 1] (any column where it lies elsewhere), and whether it lies in it [N]."""
    local = token_ids.to(torch.int64) - block.start
    inside = (local >= 0) & (local < logits.shape[1])
    return local.clamp(0, logits.shape[1] - 1)[:, None], inside


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """[N]: sum over columns of left * right, without the product as a matrix."""
    return torch.bmm(left[:, None, :], right[:, :, None]).flatten()


def _grad_logits(logits, block, token_ids, log_normaliser, entropy, grad_logprobs, grad_entropy) -> Tensor:
    """Gradient with respect to the scaled logits of a tile; overwrites ``logits``."""
    place, inside = _locate(token_ids, block, logits)
    logits.sub_(log_normaliser[:, None])
    if grad_entropy is None:
        grad = logits.exp_().mul_(-grad_logprobs[:, None])
    else:
        probabilities = logits.exp()
        grad = logits.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_logprobs[:, None]).mul_(probabilities)
    return grad.scatter_add_(1, place, torch.where(inside, grad_logprobs, 0.0)[:, None])
