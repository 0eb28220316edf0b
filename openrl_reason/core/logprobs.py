"""Log-probabilities of tokens straight from the last hidden states: the language-model head without its [N, vocab] logits.

Logits exist one tile at a time: all N rows against a block of the vocabulary, small enough that a tile holds ``chunk_tokens * V``
numbers. Blocks of the vocabulary rather than of tokens, because each block of the head is then read once, the head's gradient is written
once (in its own dtype, by one product over all tokens) and nothing of the head's size is accumulated.

With p the softmax of z = (h W^T + b) / T, the gradients are
    d log p_y / d z = onehot(y) - p                     d H / d z_v = -p_v (log p_v + H)
so for a frozen head the forward pass already knows d log p_y / d h = (W_y - p W) / T, an [N, H] matrix: it keeps that, and the backward
pass multiplies it by the incoming gradient and never touches the vocabulary. Otherwise the backward pass computes each tile again.

The same pass gives the exact distance from a reference model, whose tile (from its own hidden states and head) is computed beside. With q
its softmax, at the same temperature,
    reverse  KL(p || q) = sum_v p_v (log p_v - log q_v)     d / d z_v = p_v (log p_v - log q_v - KL)
    forward  KL(q || p)                                     d / d z_v = p_v - q_v
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_TOKENS = 128


KL_DIRECTIONS = ("reverse", "forward")


@dataclass(frozen=True)
class Reference:
    """A reference model's distributions, as what its head makes of its hidden states. Nothing of it is differentiated."""

    hidden: Tensor
    """[N, H'] of the same tokens."""
    weight: Tensor
    """[V, H'], its output head."""
    bias: Tensor | None = None
    """[V]."""
    direction: str = "reverse"
    """"reverse": KL(policy || reference); "forward": KL(reference || policy)."""

    def rows(self, index: Tensor) -> Reference:
        """The rows ``index`` of the hidden states."""
        return Reference(self.hidden.index_select(0, index), self.weight, self.bias, self.direction)


@dataclass(frozen=True)
class TokenScores:
    """What is known of each scored token [N], float32 (float64 for float64 inputs)."""

    logprobs: Tensor
    entropy: Tensor | None = None
    """Nats, of the distribution the token was drawn from; None unless asked for."""
    kl: Tensor | None = None
    """Nats, exact, between that distribution and the reference's; None without a reference."""


def token_scores(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    with_entropy: bool = False,
    bias: Tensor | None = None,
    reference: Reference | None = None,
) -> TokenScores:
    """log softmax(hidden @ lm_head_weight.T / temperature)[token_ids], and if asked for the entropy of each row's distribution and its exact
    KL divergence from (or to) a reference's.

    ``hidden`` [N, H], ``lm_head_weight`` [V, H], ``token_ids`` int [N], ``bias`` [V]. Row i scores ``token_ids[i]`` with ``hidden[i]``: **no
    shift here**, see ``shifted_token_scores``. Differentiable in hidden, weight and bias, through all three results. The softmax is taken
    in float32 whatever the inputs' dtype. ``chunk_tokens`` bounds memory: about ``chunk_tokens * V`` logits are alive at a time (twice that
    with a reference); it does not change the result beyond rounding.
    Raises ``ValueError`` for inconsistent shapes or dtypes, a temperature that is not positive, or a token id outside the vocabulary.
    """
    _check(hidden, lm_head_weight, token_ids, temperature, chunk_tokens, bias)
    if reference is not None:
        _check_reference(reference, hidden, lm_head_weight)
    head_is_frozen = not (lm_head_weight.requires_grad or (bias is not None and bias.requires_grad))
    keep_direction = torch.is_grad_enabled() and hidden.requires_grad and head_is_frozen and reference is None
    settings = _Settings(float(temperature), chunk_tokens, with_entropy, keep_direction, reference)
    return TokenScores(*_TokenScores.apply(hidden, lm_head_weight, bias, token_ids, settings))


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
    """``token_scores`` without a reference, as the log-probs [N] alone or, with ``with_entropy``, as (log-probs, entropy)."""
    scores = token_scores(
        hidden, lm_head_weight, token_ids, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy, bias=bias
    )
    return (scores.logprobs, scores.entropy) if with_entropy else scores.logprobs


def shifted_token_scores(
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
    reference: Reference | None = None,
) -> TokenScores:
    """The one place where logits are shifted against tokens: entry t = log p(token_t | tokens before it in its segment).

    ``hidden`` [N, H] as the model returns it (row t has read token t), packed by ``cu_seqlens`` [B+1]. The first token of a segment has no
    prediction: every result is 0.0 there. ``score_mask`` bool [N] leaves out further tokens (0.0 as well), prompts for instance, and the
    head's work for them. ``reference``: its hidden states are **already shifted** (row t predicts token t), as ``shifted_rows`` makes them.
    Otherwise as ``token_scores``; entry t of entropy and KL is that of the distribution token t was drawn from.
    """
    index = _scored_index(token_ids, cu_seqlens, score_mask)
    scores = token_scores(
        hidden.index_select(0, index - 1),
        lm_head_weight,
        token_ids.index_select(0, index),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=with_entropy,
        bias=bias,
        reference=None if reference is None else reference.rows(index),
    )
    parts = (scores.logprobs, scores.entropy, scores.kl)
    return TokenScores(*(None if part is None else part.new_zeros(len(token_ids)).index_copy(0, index, part) for part in parts))


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
    """``shifted_token_scores`` without a reference, as the log-probs [N] alone or, with ``with_entropy``, as (log-probs, entropy)."""
    scores = shifted_token_scores(
        hidden, lm_head_weight, token_ids, cu_seqlens, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy, bias=bias,
        score_mask=score_mask,
    )  # fmt: skip
    return (scores.logprobs, scores.entropy) if with_entropy else scores.logprobs


def shifted_rows(hidden: Tensor, token_ids: Tensor, cu_seqlens: Tensor, score_mask: Tensor | None = None) -> Tensor:
    """[N, H] -> [N, H]: the hidden state that predicts each token in that token's row; 0 where ``shifted_token_scores`` scores nothing."""
    index = _scored_index(token_ids, cu_seqlens, score_mask)
    return torch.zeros_like(hidden).index_copy(0, index, hidden.index_select(0, index - 1))


def _scored_index(token_ids: Tensor, cu_seqlens: Tensor, score_mask: Tensor | None) -> Tensor:
    """Places of the tokens that have a prediction and are asked for."""
    scored = torch.ones(len(token_ids), dtype=torch.bool, device=token_ids.device) if score_mask is None else score_mask.clone()
    starts = cu_seqlens[:-1].to(torch.int64)
    scored[starts[cu_seqlens.diff() > 0]] = False
    return scored.nonzero().squeeze(-1)


def _check_reference(reference: Reference, hidden: Tensor, weight: Tensor) -> None:
    if reference.direction not in KL_DIRECTIONS:
        raise ValueError(f"unknown direction of the KL {reference.direction!r}; known: {', '.join(KL_DIRECTIONS)}")
    rows, columns = reference.hidden, reference.weight
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or len(rows) != len(hidden) or len(columns) != len(weight):
        raise ValueError(
            f"the reference has hidden states {tuple(rows.shape)} and a head {tuple(columns.shape)}; the policy {tuple(hidden.shape)} and"
            f" {tuple(weight.shape)}: rows and vocabularies must be the same"
        )


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


@dataclass(frozen=True)
class _Settings:
    temperature: float
    chunk_tokens: int
    with_entropy: bool
    keep_direction: bool
    reference: Reference | None

    def tiles(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Tiles:
        return _Tiles(hidden, weight, bias, self.temperature, self.chunk_tokens)

    def reference_tiles(self) -> _Tiles:
        reference = self.reference
        return self.tiles(reference.hidden.to(reference.weight.dtype), reference.weight, reference.bias)


class _OnlineSums:
    """Sums of e^z and e^z f over a vocabulary that comes in tiles, relative to the running maximum of z."""

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device):
        # The maximum starts finite, so that differences of it are never inf - inf.
        self.maximum = torch.full((num_rows,), torch.finfo(dtype).min / 2, dtype=dtype, device=device)
        self.total = torch.zeros(num_rows, dtype=dtype, device=device)

    def shift(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Subtracts the new maximum from ``logits`` in place; returns what sums so far must be multiplied by, and how far it rose (<= 0)."""
        new_maximum = torch.maximum(self.maximum, logits.amax(1))
        drop = self.maximum - new_maximum
        logits.sub_(new_maximum[:, None])
        self.maximum = new_maximum
        return drop.exp(), drop

    @property
    def log_normaliser(self) -> Tensor:
        return self.maximum + self.total.log()


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, settings):
        tiles, reference = settings.tiles(hidden, weight, bias), settings.reference
        num_rows, shape = len(hidden), dict(dtype=tiles.dtype, device=hidden.device)
        own, other = (_OnlineSums(num_rows, tiles.dtype, hidden.device) for _ in range(2))
        total_times_logit, total_times_gap, chosen = (torch.zeros(num_rows, **shape) for _ in range(3))
        expected_head = torch.zeros(hidden.shape, **shape) if settings.keep_direction else None
        reverse = reference is not None and reference.direction == "reverse"
        other_tiles = iter(settings.reference_tiles()) if reference is not None else None
        for block, head, logits in tiles:
            place, inside = _locate(token_ids, block, logits)
            chosen = torch.where(inside, logits.gather(1, place).squeeze(1), chosen)
            if reference is not None:
                other_logits = next(other_tiles)[2].to(tiles.dtype)
                gap = logits - other_logits  # z - y
            shrink, drop = own.shift(logits)
            weights = logits.exp() if settings.with_entropy else logits.exp_()
            if settings.with_entropy:
                total_times_logit = shrink * (total_times_logit + own.total * drop) + _row_dot(weights, logits)
            own.total = shrink * own.total + weights.sum(1)
            if reference is not None:
                other_shrink, _ = other.shift(other_logits)
                other_weights = other_logits.exp_()
                other.total = other_shrink * other.total + other_weights.sum(1)
                total_times_gap = (shrink if reverse else other_shrink) * total_times_gap + _row_dot(weights if reverse else other_weights, gap)
            if expected_head is not None:
                expected_head.mul_(shrink[:, None]).add_(weights.to(head.dtype) @ head)
        log_normaliser = own.log_normaliser
        entropy = own.total.log() - total_times_logit / own.total if settings.with_entropy else None
        kl = other_log_normaliser = None
        if reference is not None:  # log p - log q = z - y - (log Z_p - log Z_q)
            other_log_normaliser = other.log_normaliser
            mean_log_ratio = total_times_gap / (own if reverse else other).total - (log_normaliser - other_log_normaliser)
            kl = mean_log_ratio if reverse else -mean_log_ratio
        direction = (weight[token_ids] - expected_head.div_(own.total[:, None])).div_(settings.temperature) if expected_head is not None else None
        ctx.settings = settings
        # The parameter itself is saved, not a view of it: under ZeRO-3 its data is released after forward and gathered again for backward.
        ctx.save_for_backward(hidden, weight, bias, token_ids, log_normaliser, entropy, kl, other_log_normaliser, direction)
        ctx.set_materialize_grads(False)
        return chosen - log_normaliser, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_kl):
        hidden, weight, bias, token_ids, log_normaliser, entropy, kl, other_log_normaliser, direction = ctx.saved_tensors
        settings = ctx.settings
        if grad_logprobs is None and grad_entropy is None and grad_kl is None:
            return (None,) * 5
        if direction is not None and grad_entropy is None:
            return (grad_logprobs[:, None] * direction).to(hidden.dtype), *(None,) * 4
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_normaliser)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros(hidden.shape, dtype=log_normaliser.dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        other_tiles = iter(settings.reference_tiles()) if grad_kl is not None else None
        for block, head, logits in settings.tiles(hidden, weight, bias):
            logits.sub_(log_normaliser[:, None])
            from_kl = None
            if grad_kl is not None:
                other_logprobs = next(other_tiles)[2].to(logits.dtype).sub_(other_log_normaliser[:, None])
                from_kl = _kl_grad_logits(logits, other_logprobs, kl, grad_kl, settings.reference.direction)
            grad_logits = _grad_logits(logits, block, token_ids, entropy, grad_logprobs, grad_entropy)
            if from_kl is not None:
                grad_logits.add_(from_kl)
            if needs_bias:
                grad_bias[block] = (grad_logits.sum(0) / settings.temperature).to(bias.dtype)
            narrow = grad_logits.div_(settings.temperature).to(weight.dtype) if settings.temperature != 1.0 else grad_logits.to(weight.dtype)
            if needs_hidden:
                grad_hidden.add_(narrow @ head)
            if needs_weight:
                torch.mm(narrow.T, hidden, out=grad_weight[block])
        return (grad_hidden.to(hidden.dtype) if needs_hidden else None), grad_weight, grad_bias, None, None


def _locate(token_ids: Tensor, block: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's token in this tile [N, 1] (any column where it lies elsewhere), and whether it lies in it [N]."""
    local = token_ids.to(torch.int64) - block.start
    inside = (local >= 0) & (local < logits.shape[1])
    return local.clamp(0, logits.shape[1] - 1)[:, None], inside


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """[N]: sum over columns of left * right, without the product as a matrix."""
    return torch.bmm(left[:, None, :], right[:, :, None]).flatten()


def _grad_logits(logprobs, block, token_ids, entropy, grad_logprobs, grad_entropy) -> Tensor:
    """Gradient with respect to the scaled logits of a tile, through log-probs and entropy; overwrites ``logprobs``, the tile's log p."""
    place, inside = _locate(token_ids, block, logprobs)
    if grad_entropy is None:
        grad = logprobs.exp_().mul_(-grad_logprobs[:, None])
    else:
        probabilities = logprobs.exp()
        grad = logprobs.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_logprobs[:, None]).mul_(probabilities)
    return grad.scatter_add_(1, place, torch.where(inside, grad_logprobs, 0.0)[:, None])


def _kl_grad_logits(logprobs, other_logprobs, kl, grad_kl, direction) -> Tensor:
    """The same through the KL; overwrites ``other_logprobs``, the reference's log q of the tile."""
    if direction == "reverse":
        log_ratio = torch.sub(logprobs, other_logprobs, out=other_logprobs).sub_(kl[:, None])
        return log_ratio.mul_(grad_kl[:, None]).mul_(logprobs.exp())
    return torch.sub(logprobs.exp(), other_logprobs.exp_(), out=other_logprobs).mul_(grad_kl[:, None])
