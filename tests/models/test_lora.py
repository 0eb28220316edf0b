"""Adapters start as the identity, merge exactly, and can be switched off."""

import pytest
import torch

from openrl_reason.errors import ConfigError
from openrl_reason.models.lora import adapted_layers, adapters_disabled, add_lora, count_trained, merged_weight
from openrl_reason.models.scalar_model import load_scalar_model
from openrl_reason.workers.model_config import LoraConfig
from tests.helpers_models import random_batch, write_tiny_model
from tests.models.test_attention import packed_model


@pytest.fixture
def model(tmp_path):
    return packed_model(write_tiny_model(tmp_path / "m", tied=False))


def test_only_the_named_modules_are_adapted_and_only_adapters_train(model):
    add_lora(model.model, LoraConfig(rank=2, target_modules="q_proj, v_proj"))
    assert {name.split(".")[-1] for name in adapted_layers(model.model)} == {"q_proj", "v_proj"}
    assert all((".lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_a_merged_layer_computes_what_base_and_adapter_compute(model):
    add_lora(model.model, LoraConfig(rank=3, alpha=12.0))
    batch = random_batch([10, 20])
    base = model(batch.token_ids, batch.cu_seqlens)[0]
    layers = adapted_layers(model.model)
    assert "lm_head" not in layers and len(layers) == 14
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    adapted = model(batch.token_ids, batch.cu_seqlens)[0]
    assert not torch.allclose(adapted, base, atol=1e-2)
    with adapters_disabled(model):
        torch.testing.assert_close(model(batch.token_ids, batch.cu_seqlens)[0], base)
    torch.testing.assert_close(model(batch.token_ids, batch.cu_seqlens)[0], adapted)
    with torch.no_grad():
        merged = {name: merged_weight(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.base_layer.weight.copy_(merged[name])
    with adapters_disabled(model):
        torch.testing.assert_close(model(batch.token_ids, batch.cu_seqlens)[0], adapted, atol=1e-4, rtol=1e-4)


def test_targets_that_match_nothing_are_refused(model):
    with pytest.raises(ConfigError, match="lora.target_modules is 'nothing_here': .*use all-linear, or some of q_proj, k_proj"):
        add_lora(model.model, LoraConfig(rank=2, target_modules="nothing_here"))


def test_one_wrong_name_among_right_ones_is_refused(model):
    with pytest.raises(ConfigError, match="no module 'vproj' .did you mean 'v_proj'"):
        add_lora(model.model, LoraConfig(rank=2, target_modules="q_proj,vproj"))
    add_lora(model.model, LoraConfig(rank=2, target_modules="self_attn.q_proj,v_proj"))
    assert len(adapted_layers(model.model)) == 4


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
@pytest.mark.parametrize("scalar", [False, True])
def test_what_is_trained_is_counted_without_the_weights_as_it_is_with_them(tmp_path, targets, scalar):
    path, config = write_tiny_model(tmp_path / "m"), LoraConfig(rank=3, target_modules=targets)
    counted = count_trained(path, config, scalar=scalar)
    loaded = load_scalar_model(path, "float32") if scalar else packed_model(path).model
    add_lora(loaded, config, also_train=("score",) if scalar else ())
    assert counted == sum(parameter.numel() for parameter in loaded.parameters() if parameter.requires_grad) > 0
