"""One head module for values, rewards and process rewards: exact shifts, float32 numbers, and folders that transformers loads."""

import json

import pytest
import torch

from openrl_reason.core.segments import shift_into_segments
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.attention import PACKED, choose_attention
from openrl_reason.models.export import export_hf
from openrl_reason.models.scalar_model import ScalarModel, load_scalar_model
from tests.helpers_models import random_batch, write_tiny_model


def packed_scalar(path, dtype="float32", **kwargs):
    choose_attention("packed", torch.device("cpu"))
    return ScalarModel(load_scalar_model(path, dtype, attn_implementation=PACKED, **kwargs), attn_impl=PACKED)


def test_the_shift_stays_within_each_segment():
    shifted = shift_into_segments(torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([0, 3, 3, 4, 6]))
    assert shifted.tolist() == [0, 1, 2, 0, 0, 5]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_values_stand_before_their_token_and_equal_each_sequence_alone(tmp_path, kind):
    model = packed_scalar(write_tiny_model(tmp_path / "m", kind=kind), head_init="small")
    batch = random_batch([7, 1, 23, 2])
    scores = model(batch.token_ids, batch.cu_seqlens, shifted=False)
    values = model(batch.token_ids, batch.cu_seqlens)
    model.model.set_attn_implementation("eager")
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        alone = model.model(batch.token_ids[None, start:end]).logits[0, :, 0]
        torch.testing.assert_close(scores[start:end], alone, atol=1e-5, rtol=0)
        assert values[start] == 0
        torch.testing.assert_close(values[start + 1 : end], scores[start : end - 1], atol=0, rtol=0)


def test_the_last_token_counts_in_the_score_of_a_prefix(tmp_path):
    model = packed_scalar(write_tiny_model(tmp_path / "m"), head_init="small")
    batch = random_batch([9])
    other = batch.token_ids.clone()
    other[-1] = (other[-1] + 1) % 60 + 2
    one, two = (model(ids, batch.cu_seqlens, shifted=False) for ids in (batch.token_ids, other))
    assert one[-1] != two[-1] and torch.equal(one[:-1], two[:-1])
    assert torch.equal(model(batch.token_ids, batch.cu_seqlens), model(other, batch.cu_seqlens)), "no state holds the last token"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_head_is_zero_or_small_and_its_numbers_are_float32(tmp_path, dtype):
    path, batch = write_tiny_model(tmp_path / "m"), random_batch([5, 8])
    zero = packed_scalar(path, dtype)(batch.token_ids, batch.cu_seqlens, shifted=False)
    small = packed_scalar(path, dtype, head_init="small", seed=1)(batch.token_ids, batch.cu_seqlens, shifted=False)
    again = packed_scalar(path, dtype, head_init="small", seed=1)(batch.token_ids, batch.cu_seqlens, shifted=False)
    assert zero.dtype == small.dtype == torch.float32
    assert (zero == 0).all() and (small != 0).all() and torch.equal(small, again)
    if dtype == "bfloat16":
        assert not torch.equal(small, small.bfloat16().float()), "values come in the steps of bfloat16"
    with pytest.raises(ConfigError, match="head_init"):
        load_scalar_model(path, dtype, head_init="large")


def test_the_exported_folder_loads_with_its_head_here_and_in_transformers(tmp_path):
    from transformers import AutoModelForTokenClassification

    model, batch = packed_scalar(write_tiny_model(tmp_path / "m"), head_init="small"), random_batch([6])
    expected = model(batch.token_ids, batch.cu_seqlens, shifted=False)
    folder = export_hf(model.model.state_dict().items(), model.model.config, None, tmp_path / "critic")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForTokenClassification"]
    theirs = AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()
    torch.testing.assert_close(theirs(batch.token_ids[None]).logits[0, :, 0], expected, atol=1e-5, rtol=0)
    loaded = packed_scalar(str(folder))
    assert all(torch.equal(tensor, loaded.model.state_dict()[name]) for name, tensor in model.model.state_dict().items())
    torch.testing.assert_close(loaded(batch.token_ids, batch.cu_seqlens, shifted=False), expected, atol=1e-6, rtol=0)


def test_a_reward_model_of_transformers_is_a_warm_start(tmp_path):
    from transformers import AutoModelForSequenceClassification

    path = write_tiny_model(tmp_path / "m")
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0)
    reward.save_pretrained(tmp_path / "reward")
    model, batch = packed_scalar(str(tmp_path / "reward")), random_batch([6])
    expected = reward.eval()(batch.token_ids[None]).logits[0, 0]  # of the last token
    torch.testing.assert_close(model(batch.token_ids, batch.cu_seqlens, shifted=False)[-1], expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    model = load_scalar_model(path, "float32", num_labels=4)
    assert ScalarModel(model, attn_impl="sdpa").model.score.out_features == 4
    folder = export_hf(model.state_dict().items(), model.config, None, tmp_path / "classes")
    with pytest.raises(DataError, match="head of 4 labels; 1 are needed"):
        load_scalar_model(str(folder), "float32")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(DataError, match="does not load"):
        load_scalar_model(path, "float32")


def test_a_sequence_beyond_the_positions_is_refused_with_the_numbers(tmp_path):
    model, batch = packed_scalar(write_tiny_model(tmp_path / "m", max_position_embeddings=16)), random_batch([17])
    with pytest.raises(DataError, match="17 tokens.*16 positions"):
        model(batch.token_ids, batch.cu_seqlens)
