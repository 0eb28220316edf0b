"""Whole weights out of a model that ZeRO-3 may have cut over the ranks, and into it, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from openrl_reason.errors import ConfigError
from openrl_reason.workers.deepspeed_engine import gathered

GATHER_BYTES = 256 << 20
"""ZeRO-3 makes about this many bytes of parameters whole at a time when weights are published or exported."""


def named_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, LoRA merged, tied weights once.

    Under ZeRO-3 this gathers, in buckets, on all ranks: every rank must run the iterator to its end. A tensor is valid until the next
    one is asked for.
    """
    from openrl_reason.models.lora import adapted_layers, merged_weight

    adapted = adapted_layers(model)
    entries: list[tuple[str, nn.Module | None, list[nn.Parameter]]] = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner = adapted.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        needed = [parameter] + ([owner.lora_A["default"].weight, owner.lora_B["default"].weight] if owner is not None else [])
        entries.append((name.replace(".base_layer.", "."), owner, needed))
    for bucket in _buckets(entries):
        with gathered([p for _, _, needed in bucket for p in needed]):
            for name, owner, needed in bucket:
                if owner is None:
                    yield name, needed[0].detach()
                else:
                    with torch.no_grad():
                        merged = merged_weight(owner)
                    yield name, merged


@torch.no_grad()
def load_full_tensors(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]], *, is_first: bool, role: str) -> None:
    """Overwrites all weights of a model. Collective under ZeRO-3, where the tensors of the first rank count.

    Raises:
        ConfigError: names or shapes do not fit, or weights are missing.
    """
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in named_tensors:
        if name not in parameters or _full_shape(parameters[name]) != tensor.shape:
            raise ConfigError(f"weight {name} {tuple(tensor.shape)} does not fit the {role} model: another architecture")
        with gathered([parameters[name]], modify=True):
            if is_first or not hasattr(parameters[name], "ds_id"):
                parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ConfigError(f"the copied weights lack {sorted(missing)[0]} (and {len(missing) - 1} more) of the {role} model")


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.shape


def _buckets(entries: list[tuple[str, Any, list[nn.Parameter]]]) -> Iterator[list[tuple[str, Any, list[nn.Parameter]]]]:
    """Consecutive runs of entries whose whole parameters take about GATHER_BYTES."""
    bucket, size = [], 0
    for entry in entries:
        bytes_here = sum((p.ds_numel if hasattr(p, "ds_numel") else p.numel()) * p.element_size() for p in entry[2])
        if bucket and size + bytes_here > GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += bytes_here
    if bucket:
        yield bucket
