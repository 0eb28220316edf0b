"""A folder that is not a model is refused with what it lacks."""

import json
import shutil

import pytest

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.loading import check_vocabulary, load_causal_lm, load_config, load_tokenizer
from tests.helpers_models import write_tiny_model


@pytest.fixture
def folder(tmp_path):
    write_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("load", [load_tokenizer, load_config, lambda path: load_causal_lm(path, "float32")])
def test_every_loader_says_what_is_missing(folder, tmp_path, load):
    with pytest.raises(ConfigError, match="path is empty"):
        load("")
    with pytest.raises(DataError, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is a file"):
        load(str(folder / "config.json"))
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="no \\*.safetensors.*pytorch_model.bin is pickled"):
        load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="no config.json"):
        load(str(folder))


def test_a_hub_name_is_not_looked_for_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no model at Qwen/Qwen2-0.5B"):
        load_config("Qwen/Qwen2-0.5B")


def test_a_damaged_config_and_damaged_weights_are_named(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="does not load"):
        load_causal_lm(str(folder), "float32")
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json cannot be used"):
        load_config(str(folder))


def test_a_missing_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        load_tokenizer(str(folder))


def test_the_end_token_stands_in_for_a_missing_pad_token(folder, caplog):
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "no pad token" in caplog.text


def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder, tmp_path):
    small = tmp_path / "small"
    write_tiny_model(small, vocab_size=40)
    with pytest.raises(DataError, match="token id 66.*only 40 embeddings"):
        check_vocabulary(load_tokenizer(str(folder)), load_config(str(small)), str(small))


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_noise(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(str(folder), "float32")


def test_models_that_bend_their_logits_are_refused(folder):
    for name, value in (("final_logit_softcapping", 30.0), ("logits_scaling", 8.0)):
        changed = folder.parent / name
        shutil.copytree(folder, changed)
        edit_json(changed / "config.json", **{name: value})
        with pytest.raises(ConfigError, match=name):
            load_config(str(changed))
