"""Step splitting: the two laws on hostile strings, the cuts of the published systems, and the map onto tokens."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from openrl_reason.core.steps import STEP_KINDS, check_step_kind, split_steps, steps_of_pieces, steps_of_tokens
from openrl_reason.errors import ConfigError
from openrl_reason.tasks.gsm8k import strip_calculations
from tests.timing import passes

DATA = Path(__file__).resolve().parents[3] / "shared/data"
KINDS = [*STEP_KINDS, "fixed:1", "fixed:7"]
FILLED_KINDS = ("gsm8k", "math", "sentence")
"""Kinds of which no step is only blanks, unless the whole text is."""

ALPHABET = [
    "a", "B", " ", "\n", "\r", "\t", ". ", ".$ ", "$", ".", "\n\n", "é",
    "漢", "\U0001f600", "\ud800", "\udfff", "\u2028", "\x85", "\x0b", "\x0c", "\0",
    "Thought:", "Action 1:", "Observation 12:", "Thought", "\nThought 3: ", "\r\nAction: ",
    "\n#### 7", "#### ", "1. ", "\n2. ", "?", "! ", "...", "。", "」", "A. B", "\\[", "\\]", "\\(",
    "\\begin{align*}", "\\end{align*}", "[asy]", ", ",
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


@pytest.mark.parametrize("kind", [*KINDS, *SPLITTERS])
def test_steps_join_to_the_text_and_none_is_empty(kind):
    for text in random_texts(10_000):
        steps = split_steps(text, SPLITTERS.get(kind, kind))
        assert "".join(steps) == text and all(steps), (text, steps)
        assert isinstance(steps, list)


@pytest.mark.parametrize("kind", FILLED_KINDS)
def test_no_step_is_only_blanks_unless_the_text_is(kind):
    for text in random_texts(10_000, seed=3):
        if text.strip():
            assert all(step.strip() for step in split_steps(text, kind)), text
    for blank in (" ", "\n", "\n\n \t\n", "\r\n" * 30, "\u2028"):
        assert split_steps(blank, kind) == [blank]


@pytest.mark.parametrize("kind", [*KINDS, *SPLITTERS])
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
        ("fixed:3", "abcdefgh", ["abc", "def", "gh"]),
        ("fixed:80", "short", ["short"]),
        ("gsm8k", "2+2=4\n4*3=12\n#### 12", ["2+2=4", "\n4*3=12\n#### 12"]),
        ("gsm8k", "\n \na\nb", ["\n \na", "\nb"]),
        ("gsm8k", "a\n\n \nb\n", ["a\n\n ", "\nb\n"]),
        ("gsm8k", "a\nb\n\n\n#### 5\n", ["a", "\nb\n\n\n#### 5\n"]),
        ("gsm8k", "a\n#### 5\nso much\nfor that", ["a\n#### 5\nso much\nfor that"]),
        ("gsm8k", "a\nb\n#### 5\nwait\n#### 6\nyes", ["a", "\nb\n#### 5", "\nwait\n#### 6\nyes"]),
        ("gsm8k", "\n#### 5", ["\n#### 5"]),
        ("gsm8k", "#### 5", ["#### 5"]),
        ("gsm8k", "#### #### 5\n####6", ["#### #### 5", "\n####6"]),  # the published answer prefix has its space
        ("sentence", 'It is 12. He said "no." Then (yes!) what?', ["It is 12. ", 'He said "no." ', "Then (yes!) what?"]),
        ("sentence", "Use it, e.g. here. See J. Smith... Done", ["Use it, e.g. here. ", "See J. Smith... ", "Done"]),
        ("sentence", "3.14 is pi.", ["3.14 is pi."]),
        ("sentence", "a line\ngoes on.\nNext", ["a line\ngoes on.\n", "Next"]),
        ("sentence", "Title\n\n1. One\n2. Two", ["Title\n\n", "1. One\n", "2. Two"]),
        ("sentence", "はい。「いいえ。」 そう", ["はい。", "「いいえ。」 ", "そう"]),
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
    for kind in ("fixed", "fixed:", "fixed:0", "fixed:-1", "fixed:2.5", "fixed:x", "fixed:\u0663"):
        with pytest.raises(ConfigError, match="of at least 1"):
            check_step_kind(kind)
    for kind in (None, 3, ""):
        with pytest.raises(ConfigError, match="unknown step kind"):
            check_step_kind(kind)
    for kind in (*KINDS, list):
        check_step_kind(kind)


@pytest.mark.parametrize("unit", ["a", " ", "\n", ".", "! ", "1.", "\n1. ", "。", "...)", "\n#### ", "\n#### 1", " \n", "a. "])
@pytest.mark.parametrize("kind", ["gsm8k", "sentence", "fixed:9"])
def test_a_million_characters_take_less_than_ten_plain_passes(kind, unit):
    text = unit * (1_000_000 // len(unit))
    assert passes(lambda: split_steps(text, kind), bound=10) < 10
    steps = split_steps(text, kind)
    assert sum(map(len, steps)) == len(text)


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="needs the GSM8K data in ../shared/data/gsm8k")
def test_gold_solutions_of_gsm8k_have_as_many_steps_as_published():
    counts = []
    for name in ("train", "test"):
        for line in (DATA / f"gsm8k/{name}.jsonl").read_text().splitlines():
            solution = json.loads(line)["answer"]
            steps = split_steps(solution, "gsm8k")
            assert "".join(steps) == solution
            assert len(split_steps(strip_calculations(solution), "gsm8k")) == len(steps)
            counts.append(len(steps))
    assert len(counts) == 8792 and max(counts) == 11
    assert sum(counts) / len(counts) == pytest.approx(3.59, abs=0.01)


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
