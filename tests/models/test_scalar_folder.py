"""Which folders can be a critic of a policy: what does not fit is refused before any actor starts, with the flag and the numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from openrl_reason.errors import DataError
from openrl_reason.models.export import export_hf
from openrl_reason.models.loading import load_tokenizer
from openrl_reason.models.scalar_model import check_scalar_folder, load_scalar_model
from tests.helpers_models import VOCAB, write_tiny_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def tokenizer(policy):
    return load_tokenizer(policy)


def scalar_folder(policy, folder, num_labels=1):
    model = load_scalar_model(policy, "float32", num_labels=num_labels)
    return str(export_hf(model.state_dict().items(), model.config, load_tokenizer(policy), folder))


def check(path, tokenizer, length=128):
    check_scalar_folder(path, tokenizer, length, flag="critic.path")


def refused(path, tokenizer, match, length=128):
    with pytest.raises(DataError, match=match) as error:
        check(path, tokenizer, length)
    assert str(error.value).startswith(f"--critic.path {path}") and "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_of_the_same_vocabulary_is_accepted(tmp_path, tokenizer, tied):
    check(write_tiny_model(tmp_path / "other", tied=tied, seed=4), tokenizer)
    check(write_tiny_model(tmp_path / "wider", tied=tied, hidden_size=64), tokenizer)
    check(write_tiny_model(tmp_path / "padded", tied=tied, vocab_size=96), tokenizer)  # more embeddings than tokens is usual


def test_a_scalar_model_and_a_reward_model_of_transformers_are_accepted(tmp_path, policy, tokenizer):
    from transformers import AutoModelForSequenceClassification

    check(scalar_folder(policy, tmp_path / "critic"), tokenizer)
    reward = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=0)
    reward.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    check(str(tmp_path / "reward"), tokenizer)


def test_the_language_models_own_number_of_labels_is_nobodys_head(tmp_path, tokenizer):
    """transformers gives every config two labels; only a classification model has a head of them."""
    path = write_tiny_model(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    check(path, tokenizer)


def test_a_smaller_vocabulary_is_refused(tmp_path, tokenizer):
    path = write_tiny_model(tmp_path / "small", vocab_size=VOCAB - 3)
    refused(path, tokenizer, f"has {VOCAB - 3} embeddings, but the policy's tokenizer has token id {VOCAB - 1}: the vocabularies differ")


@pytest.mark.parametrize("change", ["swapped", "renamed", "missing", "more"])
def test_another_tokenizer_is_refused_with_the_first_token_that_differs_and_more_tokens_are_not(tmp_path, tokenizer, change):
    path = write_tiny_model(tmp_path / "m", vocab_size=96)
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    if change == "swapped":
        vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    elif change == "renamed":
        vocab["ö"] = vocab.pop("7")
    elif change == "missing":
        del vocab["7"]
    else:
        vocab["ö"] = VOCAB
    file.write_text(json.dumps(content))
    if change == "more":  # a padding token that a reward model added: what the policy writes is read as it is
        check_scalar_folder(path, tokenizer, 128, flag="critic.path")
        return
    first = {"swapped": "[01]", "renamed": "[7ö]", "missing": "7"}[change]
    refused(path, tokenizer, rf"another tokenizer than the policy \(they differ at id \d+, '{first}'\)")


def test_a_head_of_several_labels_is_refused(tmp_path, policy, tokenizer):
    refused(scalar_folder(policy, tmp_path / "classes", num_labels=4), tokenizer, "a head of 4 labels; one number for each token is needed")


def test_a_head_or_embeddings_of_another_size_than_the_config_says_are_refused(tmp_path, policy, tokenizer):
    for name, shape, match in (
        ("score.weight", (1, 48), r"head score.weight is \[1, 48\], but config.json says hidden size 32"),
        ("score.weight", (2, 32), r"head score.weight is \[2, 32\]"),
        ("model.embed_tokens.weight", (VOCAB, 48), rf"embeddings model.embed_tokens.weight are \[{VOCAB}, 48\]"),
        ("model.embed_tokens.weight", (VOCAB - 1, 32), rf"are \[{VOCAB - 1}, 32\], but config.json says vocabulary {VOCAB}"),
    ):
        folder = tmp_path / f"{name}-{shape[0]}-{shape[1]}"
        path = scalar_folder(policy, folder)
        tensors = load_file(folder / "model.safetensors")
        assert name in tensors
        save_file(tensors | {name: torch.zeros(shape)}, folder / "model.safetensors", metadata={"format": "pt"})
        refused(path, tokenizer, match)


def test_too_few_positions_are_refused_with_both_numbers(tmp_path, tokenizer):
    path = write_tiny_model(tmp_path / "short", max_position_embeddings=64)
    check(path, tokenizer, length=64)
    refused(path, tokenizer, "has 64 positions, and sequences have up to 65 tokens", length=65)


def test_what_is_no_model_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        check(str(tmp_path / "empty"), tokenizer)
