"""Log-probs of whole responses under a reference, computed once and kept on disk: no second model while the policy trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openrl_reason.algorithms.sampling import running_group
from openrl_reason.atomic import naming_disk_errors
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.segments import segment_mean, segment_sum
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import CheckpointError
from openrl_reason.workers.model_config import ModelConfig, TrainedModelConfig

SEQUENCES_PER_CALL = 2048
"""Log-probs are asked for in parts of this many sequences, which bounds the driver's memory."""


def response_logprobs(logprobs: Tensor, batch: TokenBatch, *, mean: bool = False) -> Tensor:
    """Summed (or mean) log-prob [B] of each sequence's action tokens, from per-token ones [N]. Differentiable."""
    return (segment_mean if mean else segment_sum)(logprobs, batch.cu_seqlens, batch.action_mask)


def score_responses(
    policy: Any, parts: Iterable[Sequence[Trajectory]], *, temperature: float = 1.0, mean: bool = False, adapters: bool = True
) -> Tensor:
    """float32: the summed (or mean) log-prob of each response of all ``parts``, in order, under the present weights of a model group.

    ``adapters=False`` scores with the model as it was before LoRA.
    """
    found = [torch.zeros(0)]
    for part in parts:
        batch = TokenBatch.from_trajectories(part)
        logprobs = policy.logprobs(batch, temperature=temperature, adapters=adapters)["logprobs"]
        found.append(response_logprobs(logprobs, batch, mean=mean))
    return torch.cat(found)


@contextlib.contextmanager
def reference_model(policy: Any, config: TrainedModelConfig, path: str, placement: Any, seed: int) -> Iterator[tuple[Any, bool]]:
    """(the group that scores for the reference, its ``adapters``): the policy, which stands at its start, without its adapters; or, with a
    ``path``, a model of its own on as many ranks, which ends with the block."""
    if not path:
        yield policy, not config.lora.rank
        return
    own = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    own |= {"path": path, "zero_stage": 3 if config.zero_stage == 3 else 0, "gradient_checkpointing": False}
    with running_group(ModelConfig(**own), "reference", placement, seed) as group:
        yield group, True


def in_parts(items: Sequence[Any], size: int = SEQUENCES_PER_CALL) -> Iterable[Sequence[Any]]:
    """Consecutive runs of at most ``size`` items."""
    return (items[first : first + size] for first in range(0, len(items), size))


def kept_scores(path: Path, identity: str, compute: Callable[[], Mapping[str, Tensor]], *, reuse: bool) -> dict[str, Tensor]:
    """The tensors that ``compute`` returns, kept in the safetensors file ``path`` under ``identity``: all that they depend on.

    With ``reuse`` a file of the same identity is read in place of computing; one of another identity is computed again and replaced.

    Raises:
        CheckpointError: with ``reuse``, the file cannot be read; or the disk refuses.
    """
    if reuse and path.exists():
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("identity") == identity:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}. Delete it to have it computed again") from error
    started = time.perf_counter()
    tensors = dict(compute())
    with naming_disk_errors(path):
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, {"identity": identity})
        temporary.replace(path)
    print(f"reference log-probs of {max(map(len, tensors.values()))} responses: {time.perf_counter() - started:.1f} s")
    return tensors
