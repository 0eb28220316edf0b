"""Settings of a model group, and the learning-rate schedule they describe. Light: imports neither torch nor DeepSpeed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from openrl_reason.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the low-rank update of every adapted weight; 0 trains the full model. (Hu et al. 2021, arXiv:2106.09685)"""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: str = "all-linear"
    """``all-linear`` (every linear layer but the output head) or comma-separated module names: ``q_proj,v_proj``."""

    def __post_init__(self):
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; it must be 0 (no LoRA) or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """A model on ``num_ranks`` DeepSpeed ranks. On its own: a model that is only run (reference, reward model)."""

    path: str = ""
    """Folder (or hub name) of a Hugging Face causal language model in safetensors format."""
    dtype: str = "bfloat16"
    """``float32`` or ``bfloat16``. In bfloat16 the optimiser keeps float32 master weights."""
    num_ranks: int = 1
    """Data-parallel ranks, one Ray actor each."""
    zero_stage: int = 1
    """ZeRO stage 0 (nothing partitioned), 1 (optimiser state), 2 (and gradients) or 3 (and parameters). In bfloat16 a trained
    model at stage 0 runs at stage 1, which adds gradients up in float32."""
    offload_parameters: bool = False
    """Keep the parameters in host memory between uses (needs ``zero_stage: 3``)."""
    attention: str = "auto"
    """``auto`` (flash-attn where installed and on a GPU, else ``packed``), ``packed`` or ``flash_attention_2``."""
    tokens_per_micro_batch: int = 4096
    """Sequences are packed into micro-batches of at most this many tokens; one longer sequence makes its own."""
    head_chunk_tokens: int = 128
    """Tokens whose vocabulary distribution is materialised at a time."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder. Off unless you trust where it comes from."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    timeout_s: float = 1800.0
    """A call that no rank finishes within this many seconds counts as hung, and the run stops."""

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError(f"offload_parameters needs zero_stage 3, and zero_stage is {self.zero_stage}")
        if self.attention not in ("auto", "packed", "flash_attention_2"):
            raise ConfigError(f"attention is {self.attention!r}; it must be 'auto', 'packed' or 'flash_attention_2'")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}; it must be positive")
        for name in ("num_ranks", "tokens_per_micro_batch", "head_chunk_tokens", "threads_per_rank"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"{name} is {self.__dict__[name]}; it must be at least 1")


@dataclass(frozen=True)
class TrainedModelConfig(ModelConfig):
    """A model that is trained: AdamW, a learning-rate schedule, clipping, and optionally LoRA."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """The last optimiser step runs at ``min_lr_ratio * lr``."""
    schedule: str = "cosine"
    """``cosine``, ``linear`` or ``constant``, after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of all optimiser steps over which the rate climbs linearly to ``lr``."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; norms and biases are never decayed."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    offload_optimizer: bool = False
    """Keep the optimiser's state, and run its step, in host memory (needs ``zero_stage`` 1 or more)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adaptation; the export and the weight sync carry the merged weights."""

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ConfigError(f"schedule is {self.schedule!r}; it must be 'cosine', 'linear' or 'constant'")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("offload_optimizer needs zero_stage 1, 2 or 3, and zero_stage is 0")
        if not all(0.0 <= beta < 1.0 for beta in self.betas) or self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"betas are {self.betas}, eps {self.eps}, weight_decay {self.weight_decay}: betas must lie in [0, 1), eps be positive and"
                " weight_decay not negative"
            )
        for name, low, high in (("lr", 0.0, None), ("min_lr_ratio", 0.0, 1.0), ("warmup_ratio", 0.0, 1.0), ("max_grad_norm", 0.0, None)):
            value = self.__dict__[name]
            if not (math.isfinite(value) and value >= low and (high is None or value <= high)):
                raise ConfigError(f"{name} is {value}; it must be at least {low}" + (f" and at most {high}" if high is not None else ""))


@dataclass(frozen=True)
class ScalarModelConfig(TrainedModelConfig):
    """A model with a number for every token (``models/scalar_model.py``): a critic, a reward model or a process-reward model."""

    head_init: str = "zero"
    """Start of a head that the folder does not have: ``zero`` (every value is 0 at first) or ``small`` (normal, 1 / sqrt(hidden size + 1))."""

    def __post_init__(self):
        super().__post_init__()
        if self.head_init not in ("zero", "small"):
            raise ConfigError(f"head_init is {self.head_init!r}; it must be 'zero' or 'small'")


def learning_rate(config: TrainedModelConfig, step: int, total_steps: int) -> float:
    """The rate of optimiser step ``step`` (0-based) of ``total_steps``: a pure function, so a resumed run needs no state.

    Warm-up takes the first w = round(warmup_ratio * total_steps) steps and climbs lr/w, 2 lr/w, ..., lr. What remains descends to
    ``min_lr_ratio * lr``, which the last step (``total_steps - 1``) uses exactly; so do steps beyond it.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    # The peak belongs to the last warm-up step, or to step 0 where there is no warm-up.
    peak = max(warmup - 1, 0)
    span = total_steps - 1 - peak
    progress = min((step - peak) / span, 1.0) if span > 0 else float(total_steps > 1)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape)
