"""Packed sequences do not see one another: scoring them together equals scoring each alone."""

import pytest
import torch

from openrl_reason.errors import ConfigError, MissingDependencyError
from openrl_reason.models.attention import PACKED, choose_attention, packed_attention, packed_forward_kwargs
from openrl_reason.models.loading import load_causal_lm
from openrl_reason.models.policy import LanguageModel
from tests.helpers_models import random_batch, write_tiny_model


def alone(path, batch):
    """Log-probs from transformers' own eager forward, one sequence at a time, with the plain formula."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    pieces = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.token_ids[None, start:end]
        scores = torch.log_softmax(model(ids).logits[0], -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        pieces.append(torch.cat([torch.zeros(1), scores]))
    return torch.cat(pieces), model


def packed_model(path, **kwargs):
    choose_attention("packed", torch.device("cpu"))
    return LanguageModel(load_causal_lm(path, "float32", attn_implementation=PACKED), attn_impl=PACKED, **kwargs)


@pytest.mark.parametrize("kind,heads", [("qwen2", (4, 2)), ("qwen2", (4, 4)), ("llama", (4, 1))])
def test_packed_equals_each_sequence_alone_in_value_and_gradient(tmp_path, kind, heads):
    path = write_tiny_model(tmp_path / "m", kind=kind, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    batch = random_batch([7, 1, 23, 2, 40])
    expected, reference = alone(path, batch)
    model = packed_model(path)
    logprobs, entropy = model(batch.token_ids, batch.cu_seqlens)
    assert entropy is None
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    logprobs.sum().backward()
    expected.sum().backward()
    for (name, ours), (_, theirs) in zip(model.model.named_parameters(), reference.named_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_sliding_window_is_kept_within_each_segment(tmp_path):
    path = write_tiny_model(tmp_path / "m", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    batch = random_batch([30, 5, 12])
    expected, _ = alone(path, batch)
    torch.testing.assert_close(packed_model(path)(batch.token_ids, batch.cu_seqlens)[0], expected, atol=1e-5, rtol=0)
    no_window = write_tiny_model(tmp_path / "plain")
    assert not torch.allclose(expected, alone(no_window, batch)[0], atol=1e-3), "the window must matter for this test to mean anything"


def test_gradient_checkpointing_changes_nothing(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    batch = random_batch([9, 14])
    plain, checkpointed = packed_model(path), packed_model(path)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()
        model(batch.token_ids, batch.cu_seqlens)[0].sum().backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_flash_attention_gets_the_variable_length_arguments():
    kwargs = packed_forward_kwargs(torch.tensor([0, 3, 10]), "flash_attention_2")
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 3, 10]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32 and kwargs["max_length_q"] == kwargs["max_length_k"] == 7


def test_what_sdpa_cannot_compute_is_refused():
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="softcap"):
        packed_attention(torch.nn.Module(), query, query, query, None, softcap=30.0)
    with pytest.raises(ValueError, match="not an attention mask"):
        packed_attention(torch.nn.Module(), query, query, query, torch.ones(1, 4))
    with pytest.raises(MissingDependencyError, match="attention: auto"):
        choose_attention("flash_attention_2", torch.device("cpu"))


def test_rotary_embeddings_that_change_with_length_are_limited_to_the_original_context():
    from transformers import LlamaConfig

    from openrl_reason.models.loading import position_limit

    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 32}
    assert position_limit(LlamaConfig(max_position_embeddings=128)) == 128
    assert position_limit(LlamaConfig(max_position_embeddings=128, rope_parameters=long)) == 32
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert position_limit(LlamaConfig(max_position_embeddings=128, rope_parameters=dynamic)) == 128
