"""The text of tokens joins to the text of the response, whatever the model sampled."""

import numpy as np
import pytest

from openrl_reason.core.steps import split_steps
from openrl_reason.data.token_text import token_pieces, token_steps
from openrl_reason.models.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_join_to_what_the_tokenizer_decodes(tokenizer, seed):
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 200).tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = token_pieces(tokenizer, ids, text)
    if pieces is not None:
        assert len(pieces) == len(ids) and "".join(pieces) == text
        steps = split_steps(text, "newline")
        owners = token_steps(steps, pieces)
        assert (np.diff(owners) >= 0).all() and owners[-1] < max(1, len(steps))


def test_a_character_of_several_tokens_appears_with_the_last_of_them(tokenizer):
    text = "a😀\nb"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids, text)
    assert pieces == ["a", "", "", "", "😀", "\n", "b"]
    assert token_steps(split_steps(text, "newline"), pieces).tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_no_tokens_and_the_end_token_have_no_text(tokenizer):
    assert token_pieces(tokenizer, [], "") == []
    assert token_pieces(tokenizer, [tokenizer.eos_token_id], "") == [""]
