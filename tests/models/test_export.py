"""An export is a complete Hugging Face folder or nothing."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from openrl_reason.errors import CheckpointError
from openrl_reason.models import export
from openrl_reason.models.loading import load_causal_lm, load_tokenizer
from tests.helpers_models import random_batch, write_tiny_model
from tests.models.test_attention import alone


def parts(path):
    model = load_causal_lm(path, "float32")
    return list(model.named_parameters()), model.config, load_tokenizer(path), model.generation_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 20_000])
def test_an_export_loads_and_scores_like_the_model(tmp_path, tied, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_tiny_model(tmp_path / "m", tied=tied)
    named, config, tokenizer, generation = parts(path)
    folder = export.export_hf(named, config, tokenizer, tmp_path / "out", generation_config=generation, max_shard_bytes=shard_bytes)
    batch = random_batch([12, 7])
    assert torch.equal(alone(path, batch)[0], alone(str(folder), batch)[0])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied and model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).encode("12+3") == tokenizer.encode("12+3")
    names = sorted(file.name for file in folder.iterdir())
    assert "generation_config.json" in names and "config.json" in names
    shards = [name for name in names if name.endswith(".safetensors")]
    assert (shards == ["model.safetensors"]) is (shard_bytes > 20_000)
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for _, t in named)
        assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())


def test_the_dtype_can_be_chosen(tmp_path):
    named, config, tokenizer, _ = parts(write_tiny_model(tmp_path / "m"))
    folder = export.export_hf(named, config, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "model.safetensors").values())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert config.dtype != torch.bfloat16, "the model's own config is left alone"


def test_a_full_disk_leaves_the_earlier_export_as_it_was(tmp_path, monkeypatch):
    named, config, tokenizer, _ = parts(write_tiny_model(tmp_path / "m"))
    folder = export.export_hf(named, config, tokenizer, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(CheckpointError, match=f"could not write {tmp_path}/out.*No space left"):
        export.export_hf(named, config, tokenizer, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
