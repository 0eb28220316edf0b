"""Low-rank adaptation through peft, injected in place: module names stay those of the model, and the merge is explicit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openrl_reason.errors import ConfigError, DataError, MissingDependencyError, did_you_mean
from openrl_reason.models.loading import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from openrl_reason.workers.model_config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, *, also_train: tuple[str, ...] = ()) -> None:
    """Freezes the model and adds trainable adapters (they start as the identity).

    The modules named in ``also_train`` (a new head, say) get no adapter and are trained whole.

    Raises:
        ConfigError: a name in ``config.target_modules`` is no module's, or one that cannot carry an adapter. It begins with "lora.".
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
        _check_names(model, targets, config.target_modules, also_train)
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


def _check_names(model: PreTrainedModel, targets: list[str], setting: str, also_train: tuple[str, ...]) -> None:
    """Refuses a name that no module has. (peft adapts what the other names match, and says nothing.)"""
    from transformers.pytorch_utils import Conv1D

    ends = {".".join(parts[start:]) for parts in (name.split(".") for name, _ in model.named_modules()) for start in range(len(parts))}
    unknown = next((name for name in targets if name not in ends), None)
    if unknown is not None:
        linear = (name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
        known = [name for name in dict.fromkeys(linear) if name not in ("lm_head", *also_train)]
        remedy = f"use all-linear, or some of {', '.join(known)}, separated by commas"
        raise ConfigError(f"lora.target_modules is {setting!r}: the model has no module {unknown!r}{did_you_mean(unknown, known)}; {remedy}")


def count_trained(path: str, config: LoraConfig, *, scalar: bool = False, trust_remote_code: bool = False) -> int:
    """Parameters that are trained when the model of a folder gets these adapters (``scalar``: and a scalar head). Reads no weights.

    Raises:
        ConfigError: as ``add_lora``.
        DataError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    settings = load_config(path, trust_remote_code=trust_remote_code)
    settings.num_labels = 1
    try:
        with torch.device("meta"):  # modules and shapes, no memory
            kind = AutoModelForTokenClassification if scalar else AutoModelForCausalLM
            model = kind.from_config(settings, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise DataError(f"no model can be made of {path}/config.json: {str(error).strip().splitlines()[0]}") from error
    add_lora(model, config, also_train=("score",) if scalar else ())
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
