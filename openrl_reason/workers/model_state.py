"""What one rank writes into a checkpoint and reads back: safetensors and JSON, nothing pickled, every bit restored.

A rank's files hold its own partitions, so a checkpoint fits the number of ranks and the ZeRO stage it was written with, and says so when
asked for another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openrl_reason.errors import CheckpointError
from openrl_reason.workers.deepspeed_engine import adam_state, master_partitions, refresh_model_from_masters

if TYPE_CHECKING:
    from openrl_reason.workers.model_worker import ModelWorker

_FROZEN = "weights.safetensors"

_ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")

_WAY_OUT = "Resume with the settings of the checkpoint, or export the checkpoint's model and start a new run from the export."


def save_worker_state(worker: ModelWorker, folder: Path, step: int | None = None) -> None:
    """Writes ``rank-00000.safetensors`` and ``.json`` for this rank. ``step``: the driver's count, noted beside the worker's own."""
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if worker.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(worker.device)
    state = adam_state(worker.engine)
    for index, master in enumerate(master_partitions(worker.engine)):
        tensors[f"master/{index}"] = master.detach()
        for key in _ADAM_KEYS if master in state else ():
            tensors[f"{key}/{index}"] = state[master][key].detach()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"rank-{worker.rank:05d}"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, stem.with_suffix(".safetensors"))
    record = {"step": worker.step, "driver_step": step, **_identity(worker)}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_worker_state(worker: ModelWorker, folder: Path) -> None:
    """Restores master weights, moments, RNG and step count, and rounds the masters into the model. Collective."""
    stem = folder / f"rank-{worker.rank:05d}"
    record = _read_record(stem.with_suffix(".json"), worker)
    for name, here in _identity(worker).items():
        if record.get(name) != here:
            raise CheckpointError(f"{folder} was written with {name} {record.get(name)}, and this run has {name} {here}. {_WAY_OUT}")
    tensors = _read_tensors(stem.with_suffix(".safetensors"))
    masters, state = master_partitions(worker.engine), adam_state(worker.engine)
    for index, master in enumerate(masters):
        saved = tensors.get(f"master/{index}")
        if saved is None or saved.shape != master.shape:
            shape = None if saved is None else tuple(saved.shape)
            raise CheckpointError(f"{folder} holds partition {index} of shape {shape}, this run's has {tuple(master.shape)}. {_WAY_OUT}")
        master.data.copy_(saved)
        state.pop(master, None)  # a checkpoint from before the first step has no moments
        if f"exp_avg/{index}" in tensors:
            state[master] = {key: tensors[f"{key}/{index}"].to(master.device) for key in _ADAM_KEYS}
    refresh_model_from_masters(worker.engine)
    torch.set_rng_state(tensors["rng/cpu"])
    if worker.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], worker.device)
    worker.step = record["step"]


def save_frozen_weights(worker: ModelWorker, folder: Path) -> None:
    """The whole weights of a model that is only run, written by rank 0: a refreshed reference cannot be found again in its model folder."""
    tensors = worker.named_full_tensors()
    if worker.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in tensors}, folder / _FROZEN)
    worker.finish_gathering(tensors)


def load_frozen_weights(worker: ModelWorker, folder: Path) -> None:
    """Restores ``save_frozen_weights``, on any number of ranks."""
    worker.load_full_tensors(_read_tensors(folder / _FROZEN).items())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _identity(worker: ModelWorker) -> dict[str, Any]:
    """What must be alike for a checkpoint to fit."""
    config = worker.config
    trained = [p for p in worker.model.parameters() if p.requires_grad]
    return {
        "num_ranks": worker.world_size,
        "zero_stage": config.zero_stage,
        "dtype": config.dtype,
        "lora.rank": config.lora.rank,
        "trained_parameters": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in trained),
    }


def _read_record(path: Path, worker: ModelWorker) -> dict[str, Any]:
    if not path.is_file():
        path = path.with_name("rank-00000.json")  # a checkpoint of fewer ranks: the first one's record says how many
    if not path.is_file():
        raise CheckpointError(f"there is no state of the {worker.role} model in {path.parent}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
