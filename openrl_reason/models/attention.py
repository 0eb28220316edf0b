"""Attention over packed sequences: several sequences lie end to end in one row, and none may look into another.

On a GPU with flash-attn installed, its variable-length kernel does exactly this. Elsewhere, sdpa runs once per sequence while all linear
layers see the packed row. (Measured against padding, length buckets and a block-diagonal mask on CPU; the loop wins on ragged batches.
Left out: transformers' own packed sdpa, which leaks across sequences when an all-ones ``attention_mask`` comes with the position ids.)
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openrl_reason.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from openrl_reason.models.prefix_scores import SegmentPasts

PACKED = "openrl_packed"
"""Name under which the segment-looped attention is registered with transformers."""


def choose_attention(setting: str, device: torch.device) -> str:
    """The transformers attention name for ``ModelConfig.attention`` on ``device``."""
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if setting == "flash_attention_2":
        if device.type != "cuda" or not has_flash:
            raise MissingDependencyError(
                f"attention: flash_attention_2 needs a GPU and the flash-attn package (device here: {device.type}). Use attention: auto, "
                "or install it: pip install flash-attn --no-build-isolation"
            )
        return "flash_attention_2"
    if setting == "auto" and device.type == "cuda" and has_flash:
        return "flash_attention_2"
    register_packed_attention()
    return PACKED


def register_packed_attention() -> None:
    """Makes ``attn_implementation="openrl_packed"`` known to transformers. Safe to call twice."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    # No mask is ever built: the segments are the mask.
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def packed_forward_kwargs(cu_seqlens: Tensor, attn_impl: str) -> dict[str, Any]:
    """What a transformers decoder needs besides ``input_ids`` and ``position_ids`` to keep packed sequences apart.

    ``cu_seqlens`` int [B+1]: where each sequence starts, and the total. ``attn_impl``: a name from ``choose_attention``.
    """
    lengths = cu_seqlens.diff().tolist()
    if attn_impl == PACKED:
        return {"segment_lengths": lengths}
    assert attn_impl.startswith("flash_attention"), f"{attn_impl} does not keep packed sequences apart"
    bounds = cu_seqlens.to(torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: list[int] | None = None,
    segment_pasts: SegmentPasts | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment. query [1, Hq, N, D], key and value [1, Hk, N, D] -> [1, N, Hq, D].

    Without ``segment_lengths`` the row is one sequence. With ``segment_pasts`` each segment continues what went before.
    Raises ConfigError for score functions that sdpa cannot reproduce.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"this model's attention uses {name}, which packed attention lacks; use attention: flash_attention_2")
    if attention_mask is not None:
        raise ValueError("packed attention takes segment lengths, not an attention mask")
    # split, not slicing: its backward writes every gradient once, where slices would each fill a whole tensor with zeros.
    lengths = [query.shape[2]] if segment_lengths is None else segment_lengths
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    splits = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    for segment, (q, k, v) in enumerate(splits):
        if segment_pasts is not None:
            k, v = segment_pasts.extend(module.layer_idx, segment, k, v)
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        piece = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        pieces.append(piece.transpose(1, 2))
    return torch.cat(pieces, dim=1), None


def _mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """bool [num_queries, num_keys] where the queries are the last of the keys' tokens, or the window is shorter; else None (plain causal)."""
    if num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window):
        return None
    positions = torch.arange(num_keys, device=device)
    distance = positions[num_keys - num_queries :, None] - positions[None, :]
    return (distance >= 0) & (distance < (sliding_window or num_keys))
