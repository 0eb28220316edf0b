"""Writing a model as a Hugging Face folder that ``from_pretrained`` and ``vllm serve`` take as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from openrl_reason.atomic import atomic_folder
from openrl_reason.models.loading import DTYPES
from openrl_reason.models.turn_end import end_token_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


def export_hf(
    named_tensors: Iterable[tuple[str, Tensor]],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    generation_config: GenerationConfig | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 << 30,
) -> Path:
    """Streams ``named_tensors`` (Hugging Face names, each tied weight once) into safetensors shards beside config and tokenizer.

    ``dtype``: ``float32``, ``bfloat16``, or None to keep each tensor's own. At most one shard is in memory at a time. Complete or absent:
    raises CheckpointError, naming the folder, if the disk refuses. Returns the folder.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        written_dtype = _write_shards(named_tensors, temporary, DTYPES[dtype] if dtype else None, max_shard_bytes)
        config = copy.deepcopy(config)
        config.dtype = written_dtype
        config.use_cache = True
        config.save_pretrained(temporary)
        if generation_config is not None:
            _with_ends(generation_config, tokenizer).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder


def _with_ends(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """With the token that ends a turn of the tokenizer's chats among its EOS ids, so that whoever serves the model stops there."""
    listed = generation_config.eos_token_id
    ids = [listed] if isinstance(listed, int) else list(listed or [])
    missing = [token for token in (end_token_ids(tokenizer) if tokenizer is not None else ()) if token not in ids]
    if not missing:
        return generation_config
    generation_config = copy.deepcopy(generation_config)
    generation_config.eos_token_id = ids + missing
    return generation_config


def _write_shards(named_tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None, max_bytes: int) -> torch.dtype:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size, total, written_dtype = 0, 0, torch.float32
    for name, tensor in named_tensors:
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).clone().contiguous()
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > max_bytes:
            _write_shard(shard, folder, len(shards))
            shards.append(list(shard))
            shard, size = {}, 0
        shard[name] = tensor
        size, total = size + bytes_here, total + bytes_here
        written_dtype = tensor.dtype if tensor.is_floating_point() else written_dtype
    _write_shard(shard, folder, len(shards))
    shards.append(list(shard))
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / "model.safetensors")
        return written_dtype
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(index)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return written_dtype


def _write_shard(shard: dict[str, Tensor], folder: Path, index: int) -> None:
    save_file(shard, folder / _shard_name(index), metadata={"format": "pt"})


def _shard_name(index: int) -> str:
    return f"shard-{index}.safetensors"
