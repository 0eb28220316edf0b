"""Sums, means, maxima and scans over the segments of a packed tensor; no loop over segments and none over time.

``values`` is [N], ``cu_seqlens`` [B+1]: segment b is ``values[cu_seqlens[b]:cu_seqlens[b+1]]``; segments may be empty. Everything is
computed in float64 and returned in the dtype of ``values``. Segments never mix: a NaN in one leaves the others alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_BLOCK = 32  # tokens per row of the blocked scan; measured best of 16..128 on CPU (float64), see benchmarks/bench_gae.py


def segment_lengths(cu_seqlens: Tensor) -> Tensor:
    """int64 [B]."""
    return cu_seqlens.diff().to(torch.int64)


def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """int64 [N]: the segment of each token."""
    lengths = segment_lengths(cu_seqlens)
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def segment_starts(cu_seqlens: Tensor) -> Tensor:
    """int64 [N]: the index of the first token of each token's segment."""
    return cu_seqlens[:-1].to(torch.int64).repeat_interleave(segment_lengths(cu_seqlens))


def segment_broadcast(values_B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B, ...] -> [N, ...]: every token gets its segment's value. Differentiable."""
    return values_B.repeat_interleave(segment_lengths(cu_seqlens), dim=0)


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N] -> [B]: sum of the (masked) values; 0 for an empty segment. Differentiable. What the mask hides may be NaN."""
    return _reduce(values, cu_seqlens, mask, "sum", 0.0).to(values.dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N] -> [B]: mean of the (masked) values; 0 where there is nothing to average. Differentiable."""
    total = _reduce(values, cu_seqlens, mask, "sum", 0.0)
    return (total / segment_count(cu_seqlens, mask).clamp(min=1)).to(values.dtype)


def segment_max(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, empty: float = -torch.inf) -> Tensor:
    """[N] -> [B]: maximum of the (masked) values; ``empty`` where there is none. Differentiable."""
    highest = _reduce(values, cu_seqlens, mask, "max", -torch.inf)
    return torch.where(segment_count(cu_seqlens, mask) > 0, highest, empty).to(values.dtype)


def segment_count(cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """int64 [B]: the number of (masked) tokens of each segment."""
    if mask is None:
        return segment_lengths(cu_seqlens)
    edges = cu_seqlens.to(torch.int64)
    if not len(mask):
        return segment_lengths(cu_seqlens)
    up_to_edge = torch.where(edges > 0, mask.cumsum(0)[edges - 1], 0)
    return up_to_edge.diff()


def _reduce(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, kind: str, neutral: float) -> Tensor:
    wide = values.to(torch.float64)
    if mask is not None:  # where, not multiplication: 0 * NaN is NaN, in the value and in the gradient
        wide = torch.where(mask, wide, torch.full((), neutral, dtype=torch.float64, device=wide.device))
    return torch.segment_reduce(wide, kind, lengths=segment_lengths(cu_seqlens), initial=neutral, unsafe=True)


def shift_into_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Entry t becomes entry t - 1 of the same segment, and 0 at its first place: from "after token t" to "before token t". [N, ...]."""
    shifted = torch.roll(values, 1, dims=0)
    starts = cu_seqlens[:-1].to(torch.int64)[cu_seqlens.diff() > 0]
    return shifted.index_fill(0, starts, 0.0)


def reverse_cumsum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [N]: y_t = sum of x_i over i >= t in the same segment. Differentiable."""
    return discounted_reverse_scan(values, cu_seqlens, 1.0)


def discounted_reverse_scan(values: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    """[N] -> [N]: y_t = x_t + discount * y_{t+1}, with y = 0 beyond each segment. Differentiable in ``values``.

    A blocked scan: rows of 32 tokens are multiplied by the triangle of powers discount^(j-i), and the carries between rows are a scan 32
    times shorter. Powers are only ever multiplied, never divided by, so a small discount cannot overflow. Raises ``ValueError`` outside 0
    <= discount <= 1.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], it is {discount}")
    return _DiscountedScan.apply(values, cu_seqlens, float(discount))


class _DiscountedScan(torch.autograd.Function):
    """The scan is linear; its transpose is the same scan in the other direction of time."""

    @staticmethod
    def forward(ctx, values: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.discount = discount
        return _scan(values.to(torch.float64), segment_lengths(cu_seqlens), discount, True).to(values.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cu_seqlens,) = ctx.saved_tensors
        return _scan(grad.to(torch.float64), segment_lengths(cu_seqlens), ctx.discount, False).to(grad.dtype), None, None


def _scan(values: Tensor, lengths: Tensor, discount: float, reverse: bool) -> Tensor:
    """Scan of float64 ``values`` [N] over segments of ``lengths`` [B]; towards the past if ``reverse``."""
    if values.numel() == 0:
        return values.clone()
    num_rows_B = (lengths + (_BLOCK - 1)) // _BLOCK  # every segment starts a row of its own
    num_rows = int(num_rows_B.sum())
    aligned = num_rows * _BLOCK == values.numel()
    if aligned:
        rows = values.view(num_rows, _BLOCK)
    else:
        shift_B = (num_rows_B.cumsum(0) - num_rows_B) * _BLOCK - (lengths.cumsum(0) - lengths)
        place = torch.arange(values.numel(), device=values.device) + shift_B.repeat_interleave(lengths)
        rows = values.new_zeros(num_rows * _BLOCK).index_copy_(0, place, values).view(num_rows, _BLOCK)
    scanned = rows @ _tables(discount, reverse, rows.device)[0]
    if int(num_rows_B.max()) > 1:
        _carry_between_rows(scanned, num_rows_B, discount, reverse)
    flat = scanned.view(-1)
    return flat if aligned else flat.index_select(0, place)


@lru_cache(maxsize=64)
def _tables(discount: float, reverse: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The triangle [BLOCK, BLOCK] with discount^(distance from source to target), and what each place of a row keeps of the carry [BLOCK]."""
    index = torch.arange(_BLOCK)
    gap = index[:, None] - index[None, :]  # source minus target
    powers = torch.tensor([discount**exponent for exponent in range(_BLOCK + 1)], dtype=torch.float64)
    triangle = torch.where(gap >= 0, powers[gap.clamp(min=0)], 0.0)
    if reverse:
        return triangle.to(device), powers[1:].flip(0).to(device)
    return triangle.T.contiguous().to(device), powers[1:].to(device)


def _carry_between_rows(scanned: Tensor, num_rows_B: Tensor, discount: float, reverse: bool) -> None:
    """Adds, in place, what each row inherits from the rows on its far side: the scan of the rows' totals, with discount^BLOCK."""
    totals = _scan(scanned[:, 0 if reverse else -1].contiguous(), num_rows_B, discount**_BLOCK, reverse)
    inherited = torch.zeros_like(totals)
    last_rows = num_rows_B.cumsum(0) - 1
    if reverse:
        inherited[:-1] = totals[1:]
        inherited[last_rows[num_rows_B > 0]] = 0.0  # nothing beyond a segment's last row
    else:
        inherited[1:] = totals[:-1]
        inherited[(last_rows - num_rows_B + 1)[num_rows_B > 0]] = 0.0
    scanned.addr_(inherited, _tables(discount, reverse, scanned.device)[1])
