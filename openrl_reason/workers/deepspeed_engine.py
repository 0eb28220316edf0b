"""Building DeepSpeed engines, and the few places where its ZeRO stages differ from one another.

Decisions that hold for all stages: losses carry their global denominator, so the worker multiplies by the number of ranks what DeepSpeed
divides by it; Adam is torch's fused AdamW everywhere, offloaded or not, so that nothing is compiled at run time and a resumed run is
bit-exact; gradients accumulate in float32.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openrl_reason.errors import MissingDependencyError
from openrl_reason.workers.model_config import ModelConfig, TrainedModelConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def import_deepspeed() -> Any:
    """deepspeed, with its compiler calls and its chatter turned off."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise MissingDependencyError("training models needs deepspeed. Install it: bash examples/scripts/install.sh") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Its bfloat16 optimiser prints a memory report that no setting turns off.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    # Shared-memory collectives would be compiled at first use; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon(deepspeed.runtime.compiler)
    return deepspeed


def _import_muon(compiler: Any) -> None:
    """An optimiser that every engine imports and none here uses: wrapping its functions for compilation would load torch's whole compiler."""
    compile_functions, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_functions


def init_process_group(
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
    device: torch.device,
    timeout_s: float,
    store: torch.distributed.Store | None = None,
) -> None:
    """Joins this process to its group: gloo on CPU, NCCL on GPU. A process that already belongs to one of the same size keeps it.

    ``store``: the rendezvous of rank 0, if it already listens (a port that was only probed could be taken by then).
    """
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == world_size, "this process already belongs to a process group of another size"
    elif world_size == 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store or torch.distributed.TCPStore(master_addr, master_port, is_master=rank == 0, wait_for_workers=False),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR=master_addr, MASTER_PORT=str(master_port))
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


def build_engine(model: nn.Module, config: ModelConfig, device: torch.device, hidden_size: int) -> DeepSpeedEngine:
    """A DeepSpeed engine around ``model``: with an optimiser for a ``TrainedModelConfig``, else for evaluation (ZeRO-3 only)."""
    deepspeed = import_deepspeed()
    optimizer = None
    if isinstance(config, TrainedModelConfig):
        optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    num_parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, device, hidden_size, num_parameters), dist_init_required=False
    )
    return engine


def deepspeed_config(config: ModelConfig, device: torch.device, hidden_size: int, num_parameters: int) -> dict[str, Any]:
    """The JSON that DeepSpeed reads."""
    bucket = min(-(-num_parameters // 16) * 16, 200_000_000)  # even, as ZeRO demands: a scalar head may make the number of parameters odd
    pin = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": device.type == "cuda",
    }
    if config.zero_stage == 3:
        # Vectors (norms, biases) stay whole: gathering them one by one costs more than it saves.
        zero |= {"stage3_param_persistence_threshold": 10 * hidden_size, "stage3_prefetch_bucket_size": min(bucket, 50_000_000)}
        if config.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the worker sets every accumulation boundary itself
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.dtype == "bfloat16":
        result["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if isinstance(config, TrainedModelConfig):
        if config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        # DeepSpeed clips at 1.0 unless told otherwise.
        result["gradient_clipping"] = 0.0 if clips_itself(config) else config.max_grad_norm
        if config.dtype == "bfloat16" and config.zero_stage > 0:
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def clips_itself(config: TrainedModelConfig) -> bool:
    """Stage 0 in float32 is the one mode in which DeepSpeed throws the gradient norm away: there the worker computes and clips."""
    return config.zero_stage == 0 and config.dtype == "float32"


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0.0:
        return [{"params": trainable, "weight_decay": 0.0}]
    matrices = [p for p in trainable if _num_dims(p) >= 2]
    vectors = [p for p in trainable if _num_dims(p) < 2]
    return [{"params": params, "weight_decay": decay} for params, decay in ((matrices, weight_decay), (vectors, 0.0)) if params]


def _num_dims(parameter: nn.Parameter) -> int:
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.dim()


def resident_tensors(model: nn.Module, engine: DeepSpeedEngine | None, device: torch.device) -> list[Tensor]:
    """Everything of lasting size that a rank holds on ``device``: weights, masters, moments, gradient buffers."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    if engine is not None and engine.optimizer is not None and hasattr(engine.optimizer, "step"):
        masters, state = master_partitions(engine), adam_state(engine)
        tensors += masters + [m.grad for m in masters if m.grad is not None]
        tensors += [value for master in masters if master in state for value in state[master].values()]
        for name in ("fp32_groups_gradients_flat", "grad_partitions_flat_buffer"):  # of the bfloat16 and of the ZeRO-3 optimiser
            held = vars(engine.optimizer).get(name)
            tensors += held if isinstance(held, list) else [] if held is None else [held]
    return [tensor for tensor in tensors if tensor.device.type == device.type]


class ParkedMemory:
    """Device memory given back while its content waits in host memory.

    Works on storages, not tensors: whatever views DeepSpeed keeps of a buffer stay valid, since the storage comes back in place.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        storages = {storage.data_ptr(): storage for tensor in tensors if (storage := tensor.untyped_storage()).nbytes()}
        self._parked = [(storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)) for storage in storages.values()]
        for storage, _ in self._parked:
            storage.resize_(0)

    def restore(self) -> None:
        for storage, content in self._parked:
            storage.resize_(content.nbytes())
            storage.copy_(content)
        self._parked = []


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 has partitioned are whole on every rank; ``modify`` keeps rank 0's changes. Collective."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def master_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's float32 master weights, in a fixed order: the tensors that Adam steps on."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return [p for group in _base_optimizer(engine).param_groups for p in group["params"]]


def adam_state(engine: DeepSpeedEngine) -> dict[Tensor, dict[str, Tensor]]:
    """torch AdamW's state, keyed by master partition; empty before the first step."""
    return _base_optimizer(engine).state


def _base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


@torch.no_grad()
def refresh_model_from_masters(engine: DeepSpeedEngine) -> None:
    """After the master partitions were overwritten: rounds them into the weights that the model computes with. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        if optimizer.persistent_parameters:
            # Their whole copies are stale; drop them before the partitions change under them.
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif not isinstance(optimizer, torch.optim.Optimizer):
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
