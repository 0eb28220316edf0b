"""The model made on the spot: same seed, same bytes; it loads like any other; every text survives its tokenizer."""

import string

import pytest
import torch

from openrl_reason.errors import ConfigError
from openrl_reason.models.tiny import VOCAB_SIZE, make_model

SMALL = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64, "max_position": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_callers_random_state_alone(folder, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = make_model(tmp_path / "a" / "again", **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(path.name for path in folder.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    other = make_model(tmp_path / "other", **SMALL, seed=1)
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_it_loads_with_the_auto_classes(tied, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_model(tmp_path / "m", **SMALL, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.architectures == ["Qwen2ForCausalLM"] and model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None and tokenizer.model_max_length == 128
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("1+1=?", return_tensors="pt")).logits).all()


def test_every_printable_character_is_one_token_and_every_text_survives(tokenizer):
    for character in string.printable:
        assert len(tokenizer(character)["input_ids"]) == 1, repr(character)
    for text in (string.printable, "12+7=19\n#### 19", "  two  spaces ", "na\u00efve \u65e5\u672c \U0001f600", "\r\n\t\x00", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode()), "one token per byte, nothing added"
    assert max(tokenizer("".join(map(chr, range(1, 400))))["input_ids"]) < VOCAB_SIZE


def test_the_chat_template_marks_turns_with_single_tokens(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template([*messages, messages[1]], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|user|>u<|assistant|>a<|endoftext|><|user|>u<|assistant|>"
    assert len(tokenizer(text)["input_ids"]) == 10
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "suau"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 65}, "not divisible by num_heads=2"),
        ({"num_heads": 4}, "try num_heads=1"),
        ({"num_heads": 2, "num_kv_heads": 3}, r"use one of \[1, 2\]"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_shapes_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        make_model(tmp_path / "m", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_replaced_only_on_request_and_whole(tmp_path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    make_model(target, **SMALL)  # an empty folder is fine
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite true"):
        make_model(target, **SMALL)
    from transformers import Qwen2ForCausalLM

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2ForCausalLM, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space"):
            make_model(target, **SMALL, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["m"]
    make_model(target, **SMALL, overwrite=True)
    assert not (target / "notes.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        make_model(tmp_path / "file", **SMALL)
