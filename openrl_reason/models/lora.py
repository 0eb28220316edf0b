"""Low-rank adaptation through peft, injected in place: module names stay those of the model, and the merge is explicit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openrl_reason.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from openrl_reason.workers.model_config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, *, also_train: tuple[str, ...] = ()) -> None:
    """Freezes the model and adds trainable adapters (they start as the identity). Raises ConfigError if no module matches.

    The modules named in ``also_train`` (a new head, say) get no adapter and are trained whole.
    """
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError("lora.rank > 0 needs peft. Install it: bash examples/scripts/install.sh") from error

    targets: str | list[str] = config.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in config.target_modules.split(",")]
        if {"lm_head", "embed_tokens", *also_train} & set(targets):
            raise ConfigError(f"lora.target_modules is {config.target_modules!r}; embeddings and output head cannot carry an adapter")
    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    settings.exclude_modules = list(also_train) or None
    dtype = model.dtype
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules is {config.target_modules!r}: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(tuple(f"{module}." for module in also_train)))
        parameter.data = parameter.data.to(dtype)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the model computes as if it had never been adapted: the reference policy, for free."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers, "the model has no adapters to disable"
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> LoRA layer, for every adapted linear layer; empty without LoRA."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}


def merged_weight(layer: nn.Module) -> Tensor:
    """base + (alpha / rank) B A, computed in float32 and rounded once to the base weight's dtype."""
    base = layer.base_layer.weight
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update = torch.matmul(up.float(), down.float()) * layer.scaling["default"]
    return (base.float() + update).to(base.dtype)
