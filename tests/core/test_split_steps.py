"""Step splitting: the two laws on hostile strings, the cuts of the published systems, and the map onto tokens."""

import random

import numpy as np
import pytest

from openrl_reason.core.steps import STEP_KINDS, split_steps, steps_of_pieces, steps_of_tokens
from openrl_reason.errors import ConfigError

ALPHABET = [
    "a", "B", " ", "\n", "\r", "\t", ". ", ".$ ", "$", ".", "\n\n", "é",
    "漢", "\U0001f600", "\ud800", "\udfff", "\u2028", "\x85", "\x0b", "\x0c", "\0",
    "Thought:", "Action 1:", "Observation 12:", "Thought", "\nThought 3: ", "\r\nAction: ",
]  # fmt: skip


def random_texts(count: int, seed: int = 0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(0, 25)))


def broken(text):
    raise RuntimeError(text)


SPLITTERS = {
    "words": lambda text: text.split(" "),
    "characters": list,
    "raises": broken,
    "not a list": lambda text: None,
    "not strings": lambda text: [1, 2],
    "drops": lambda text: [text[1:]],
    "halves": lambda text: (text[: len(text) // 2], "", text[len(text) // 2 :]),
}


@pytest.mark.parametrize("kind", [*STEP_KINDS, *SPLITTERS])
def test_steps_join_to_the_text_and_none_is_empty(kind):
    for text in random_texts(5000):
        steps = split_steps(text, SPLITTERS.get(kind, kind))
        assert "".join(steps) == text and all(steps), (text, steps)
        assert isinstance(steps, list)


@pytest.mark.parametrize("kind", [*STEP_KINDS, *SPLITTERS])
def test_nothing_has_no_steps(kind):
    assert split_steps("", SPLITTERS.get(kind, kind)) == []


@pytest.mark.parametrize(
    ("kind", "text", "steps"),
    [
        ("newline", "ab\ncd", ["ab\n", "cd"]),
        ("newline", "a\n\nb\n", ["a\n", "\n", "b\n"]),
        ("newline", "a\rb\r\nc", ["a\rb\r\n", "c"]),
        ("newline_sentence", "A b. C=1.$ D\nE. F", ["A b. ", "C=1.$ ", "D\n", "E. ", "F"]),
        ("newline_sentence", "3.14 is pi.", ["3.14 is pi."]),
        (
            "react",
            "hm\nThought: x\nmore\nAction: go\nObservation: door",
            ["hm\n", "Thought: x\nmore\n", "Action: go\n", "Observation: door"],
        ),
        ("react", "Thought 1: x\nAction 1: Finish[A]", ["Thought 1: x\n", "Action 1: Finish[A]"]),
        ("react", "a Thought: inside a line", ["a Thought: inside a line"]),
        ("whole", "a\nb", ["a\nb"]),
        ("response", "a\nb", ["a\nb"]),
    ],
)
def test_cuts_fall_where_they_should(kind, text, steps):
    assert split_steps(text, kind) == steps


def test_a_callable_decides_but_its_mistakes_do_not_lose_the_sample():
    assert split_steps("a b", lambda text: ["a ", "", "b"]) == ["a ", "b"]
    for name in ("words", "raises", "not a list", "not strings", "drops"):
        assert split_steps("a b c", SPLITTERS[name]) == ["a b c"]


def test_an_unknown_kind_is_a_setting_that_cannot_work():
    with pytest.raises(ConfigError, match="did you mean 'newline'"):
        split_steps("a", "newlines")


@pytest.mark.parametrize(
    ("kind", "response", "num_prompt", "golden"),
    [
        ("newline", "ab\ncd", 3, "0010010000"),
        ("newline", "a\n\nb\n", 3, "0010110100"),
        ("newline_sentence", "A b. C=1.$ D\nE. F", 1, "10000100000101001000"),
    ],
)
def test_oreos_golden_state_masks_follow_from_the_steps(kind, response, num_prompt, golden):
    """One token per character; the published pipeline appends " </s>" to the response and marks the token *before* each step."""
    text = response + " "
    ids = steps_of_tokens(split_steps(text, kind), np.arange(len(text) + 1))  # </s> has no text: it starts at the end
    begins = np.diff(ids, prepend=-1) > 0
    marked = [False] * (num_prompt - 1) + begins.tolist() + [False]
    assert "".join("01"[mark] for mark in marked) == golden


def test_a_token_belongs_to_the_step_of_its_first_character():
    steps = ["ab\n", "cd\n", "e"]
    assert steps_of_pieces(steps, ["a", "b\nc", "d", "\n", "e", ""]).tolist() == [0, 0, 1, 1, 2, 2]
    assert steps_of_pieces(steps, ["ab\ncd\n", "e"]).tolist() == [0, 2]  # step 1 owns no token
    assert steps_of_pieces([], []).tolist() == [] and steps_of_tokens([], [0]).tolist() == [0]
    with pytest.raises(ValueError, match="not the steps' text"):
        steps_of_pieces(steps, ["ab"])


def test_bytes_of_one_character_belong_to_its_step():
    text = "é\n漢x"
    pieces = [bytes([byte]) for byte in text.encode()]
    assert steps_of_pieces(split_steps(text, "newline"), pieces).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_every_token_gets_one_step_and_steps_never_decrease():
    rng = random.Random(1)
    for text in random_texts(1000, seed=2):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(0, 12)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        steps = split_steps(text, "newline_sentence")
        ids = steps_of_pieces(steps, pieces)
        edges = np.cumsum([0] + [len(step) for step in steps])
        start = 0
        for piece, step in zip(pieces, ids, strict=True):
            if piece:
                assert edges[step] <= start < edges[step + 1]
            start += len(piece)
        assert (np.diff(ids) >= 0).all()
