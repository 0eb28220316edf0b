"""Small pieces that several drivers use."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.order import EpochOrder
from openrl_reason.core.seeds import content_id
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.base import Task, TaskItem
from openrl_reason.workers.model_config import ModelConfig, ScalarModelConfig, TrainedModelConfig


class ItemSampler:
    """Which items a step trains on: a pure function of (seed, step), so that a resumed run needs no position. Each epoch is its own permutation."""

    def __init__(self, items: Sequence[Any], seed: int) -> None:
        self._items, self._order = items, EpochOrder(len(items), seed)
        names = [str(item.task_id) if hasattr(item, "task_id") else str(item) for item in items]
        self.identity = f"{len(items)} items ({content_id(*names)})"
        """Changes when the items or their order do."""

    def indices(self, step: int, count: int) -> list[int]:
        """Places of the ``count`` items of ``step``; epochs follow one another without a gap."""
        return self._order.indices(step, count)

    def items(self, step: int, count: int) -> list[Any]:
        """The ``count`` items of ``step``."""
        return [self._items[index] for index in self.indices(step, count)]


def within_limit(task: Task, split: str, tokenizer: Any, limit: int, first: int | None = None) -> tuple[list[TaskItem], int]:
    """(items whose prompts have at most ``limit`` tokens, how many were longer) among the first ``first`` items of a split (None: all).

    Raises:
        DataError: the split is empty, or every prompt is too long.
    """
    if first == 0:
        return [], 0
    encoded = task.encode_prompts(task.items(split)[:first], tokenizer, limit)
    return encoded.items, encoded.num_too_long


def local_path(path: str) -> str:
    """An absolute path for a folder of this machine, since actors have another working directory; a hub name as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def checked_tokenizer(
    path: str, length: int, *, named: str = "policy.path", flag: str = "rollout.max_model_len", trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a model folder, which the flag ``named`` names.

    Raises:
        ConfigError: the model has fewer positions than ``length``, the longest sequence, which ``flag`` sets.
        DataError: tokenizer and model do not belong together, or a weight file is broken.
    """
    from openrl_reason.models.loading import check_vocabulary, load_config, load_tokenizer, position_limit

    try:
        config = load_config(path, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        check_vocabulary(tokenizer, config, path)
        count_parameters(path)
    except DataError as error:
        raise DataError(f"--{named}: {error}") from error
    positions = position_limit(config)
    require(not positions or length <= positions, flag, length, f"the model has {positions} positions: use at most that")
    return tokenizer


def check_reference(path: str, tokenizer: Any, length: int, *, flag: str, trust_remote_code: bool = False) -> None:
    """Whether the model at ``path``, which ``flag`` names, can be the reference of a policy with ``tokenizer``.

    Raises:
        ConfigError, DataError: as ``checked_tokenizer``, or the two read other token ids.
    """
    from openrl_reason.models.loading import check_same_ids

    check_same_ids(checked_tokenizer(path, length, named=flag, flag=flag, trust_remote_code=trust_remote_code), tokenizer, f"--{flag} {path}")


def start_together(stack: contextlib.ExitStack, *starts: Callable[[], Any], side_by_side: bool = True) -> list[Any]:
    """What the functions return, called side by side: starting an actor is mostly waiting. ``close`` of each result goes on ``stack``.

    If one fails the others are closed and its error is raised.
    """
    with ThreadPoolExecutor(len(starts) if side_by_side else 1) as threads:
        futures = [threads.submit(start) for start in starts]
    for future in futures:
        if future.exception() is None and future.result() is not None:
            stack.callback(future.result().close)
    return [future.result() for future in futures]


def last_actions(batch: TokenBatch) -> torch.Tensor:
    """Index [B] of each sequence's last action token: where an outcome reward is paid."""
    places = torch.arange(batch.num_tokens).where(batch.action_mask, torch.tensor(-1))
    last = torch.full((batch.num_sequences,), -1).scatter_reduce_(0, batch.sequence_ids, places, reduce="amax")
    assert (last >= 0).all(), "a sequence without action tokens"
    return last


def update_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of the optimiser steps of one collection, under the field's names: means, maxima of keys that end in /max, sums of seconds."""
    metrics = {}
    for name in history[0]:
        values = [float(step[name]) for step in history]
        if name.startswith("seconds/"):
            metrics[name.replace("seconds/", "timing/")] = sum(values)
        else:
            value = max(values) if name.endswith("/max") else min(values) if name.endswith("/min") else sum(values) / len(values)
            metrics[name if "/" in name else f"train/{name}"] = value
    return metrics


def count_parameters(path: str) -> int | None:
    """Parameters of a model folder, read from its safetensors headers; None if there are none (a hub name, for instance)."""
    total = 0
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= file.stat().st_size - 8:
                raise DataError(f"{file} is no safetensors file (a Git LFS pointer, or cut short?): fetch it again")
            try:
                header = json.loads(stream.read(size))
            except ValueError:
                raise DataError(f"{file} is no safetensors file: fetch it again") from None
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        if max((entry["data_offsets"][1] for entry in entries), default=0) + 8 + size != file.stat().st_size:
            raise DataError(f"{file} is cut short: fetch it again")
        total += sum(int(np.prod(entry["shape"])) for entry in entries)
    return total or None


def describe_model(config: ModelConfig) -> str:
    """One line on a trained group."""
    count = count_parameters(config.path)
    size = f"{count / 1e6:.1f} M parameters" if count else "size unknown until loaded"
    return (
        f"{config.path} ({size}), {config.num_ranks} ranks, {config.dtype}, ZeRO {config.zero_stage},"
        f" micro-batches of <= {config.tokens_per_micro_batch} tokens"
    )


def trained_parameters(config: TrainedModelConfig, path: str, *, name: str) -> int | None:
    """Parameters of the model in ``path`` that have a gradient; None for a model that is no local folder and trained as a whole.

    Raises:
        ConfigError: ``--<name>.lora.target_modules`` fits nothing in the model.
    """
    if not config.lora.rank:
        return count_parameters(path)
    from openrl_reason.models.lora import count_trained

    try:
        return count_trained(path, config.lora, scalar=isinstance(config, ScalarModelConfig), trust_remote_code=config.trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"--{name}.{error}" if str(error).startswith("lora.") else str(error)) from None


def check_adapters(config: Any) -> None:
    """Refuses, before an actor loads anything, adapters that fit nothing in their model: ``config.policy``, ``config.critic``, ...

    A model without a path of its own starts as the policy.
    """
    for entry in fields(config):
        model = getattr(config, entry.name)
        if isinstance(model, TrainedModelConfig) and model.lora.rank:
            trained_parameters(model, local_path(model.path or config.policy.path), name=entry.name)


def estimate_memory(policy: TrainedModelConfig, *, name: str = "policy", trained: bool = True, engines: Any = None, reference: Any = None) -> str:
    """Bytes of weights, gradients and Adam states over all actors (activations and KV cache come on top).

    ``reference``: settings with a ``path`` (empty: the policy's), ``num_ranks`` and ``zero_stage``.
    """
    count = count_parameters(policy.path)
    if not count:
        return "unknown: the model is not a local folder"
    width = {"float32": 4, "bfloat16": 2}
    ranks, adapted = policy.num_ranks, trained_parameters(policy, policy.path, name=name)
    held = count + (adapted if policy.lora.rank else 0)  # adapters stand beside the weights, which then have no gradient
    weights = held * width[policy.dtype] * (1 if policy.zero_stage == 3 else ranks)
    learned = adapted if trained else 0
    gradients = learned * 4 * (1 if policy.zero_stage >= 2 else ranks)
    master = 0 if policy.dtype == "float32" and policy.zero_stage == 0 else 4
    optimizer = learned * (8 + master) * (1 if policy.zero_stage >= 1 else ranks)
    parts = [(name, weights + gradients + optimizer)]
    if engines is not None:
        parts.append(("engines", engines.num_engines * count * width[engines.dtype]))
    if reference is not None:
        size = count_parameters(reference.path) if reference.path else count
        parts.append(("reference", size and size * width[policy.dtype] * (1 if reference.zero_stage == 3 else reference.num_ranks)))
    return ", ".join(f"{name} {size / 2**30:.2f} GiB" if size else f"{name} unknown (not a local folder)" for name, size in parts)
