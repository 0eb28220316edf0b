"""The leakage guard: training questions must not be held-out questions, in other spelling either.

Questions are compared by a 6-byte hash of their words, numbers and operators, so that case, spacing, punctuation and LaTeX layout do not hide
a copy, while ``3+4`` and ``3-4`` stay two questions. Of the published test splits of GSM8K and MATH the hashes are shipped, so that
the guard holds without those files; no text can be read back from them. To make such a file again:

    python -m openrl_reason.tasks.leakage test.jsonl problem > hashes.py
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from openrl_reason.errors import DataError

if TYPE_CHECKING:
    from openrl_reason.tasks.base import TaskItem

HASH_BYTES = 6
_TOKEN = re.compile(r"[^\W_]+|[-+/^=<>]")
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
_LATEX_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\(?=[dt]frac)[dt](?=frac)")

# Four problems of MATH's published test split stand in its published training split too, differing in spacing or punctuation only. The guard
# lets these through: it would refuse the published training data otherwise.
_TWINS = ("2abc2eab2999", "535b423f73e1", "a2b03ad602d6", "a9b943d069e5")
# A fifth one stands there with the choices of its competition below.
_TWIN_WITH_CHOICES = bytes.fromhex("bb7741d5d504")
PUBLISHED_TWINS = frozenset(bytes.fromhex(digits) for digits in _TWINS)


def normalised(question: str) -> str:
    """The words, numbers and operators of a question, in lower case, one blank apart."""
    if not question.isascii():
        question = unicodedata.normalize("NFKC", question).replace("\u2212", "-").replace("\u2013", "-")
    question = question.casefold()
    if "\\" in question:
        question = _LATEX_LAYOUT.sub(" ", question)
    if "-" in question:
        question = _HYPHEN.sub(" ", question)
    return " ".join(_TOKEN.findall(question))


def question_hash(question: str) -> bytes:
    """The hash by which two questions are the same."""
    return hashlib.blake2b(normalised(question).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def choice_key(context: str, question: str, options: Iterable[str]) -> str:
    """What identifies a multiple-choice question in whatever order its options stand."""
    return "\n".join([context, question, *sorted(options)])


def item_hash(item: TaskItem) -> bytes:
    """:func:`question_hash` of an item: of the prompt, of a chat's messages except the system's, or of a multiple-choice question."""
    if {"question", "options"} <= item.info.keys():
        return question_hash(choice_key(str(item.info.get("context", "")), str(item.info["question"]), map(str, item.info["options"])))
    if isinstance(item.prompt, str):
        return question_hash(item.prompt)
    return question_hash("\n".join(str(message["content"]) for message in item.prompt if message["role"] != "system"))


def overlap(train_items: Iterable[TaskItem], test_items: Iterable[TaskItem]) -> list[TaskItem]:
    """The training items whose question is also a test item's, in order. (Not the twins that the published splits share.)"""
    held_out = {item_hash(item) for item in test_items} - PUBLISHED_TWINS
    return [item for item in train_items if item_hash(item) in held_out]


def refuse_overlap(questions: Sequence[tuple[str, str]], held_out: Collection[bytes], source: str) -> None:
    """Raise DataError if one of the training ``questions``, pairs of (where, text), is among the ``held_out`` hashes."""
    leaked = [where for where, question in questions if (found := question_hash(question)) in held_out and found not in PUBLISHED_TWINS]
    if leaked:
        raise DataError(
            f"{len(leaked)} of the {len(questions)} training questions in {source} are held-out test questions (first: {leaked[0]}). Train "
            "on the training split, or pass --task.allow_test_data_in_training true if this is meant"
        )


TEST_QUESTION = "the prompt is a question of GSM8K's or MATH's published test split: accuracy on it would flatter a model that learned it"
"""What is told of a row for which ``asks_a_test_question`` holds."""


@functools.cache
def all_test_hashes() -> frozenset[bytes]:
    """Of the test splits of GSM8K and MATH, without the twins that the training splits have."""
    from openrl_reason.tasks import gsm8k_test_hashes, math_test_hashes

    return (unpack(gsm8k_test_hashes.PACKED) | unpack(math_test_hashes.PACKED)) - PUBLISHED_TWINS - {_TWIN_WITH_CHOICES}


@functools.lru_cache(maxsize=64)  # siblings stand together, and prompts may be long
def asks_a_test_question(prompt: str) -> bool:
    """Whether a prompt is a question of a published test split, as it is or with what is usual around one: chat markup, a role or a word in front,
    an instruction before or behind, other questions above. A question that was cut or reworded, or stands in a sentence, is not found."""
    known = all_test_hashes()
    return any(question_hash(text) in known for text in dict.fromkeys(_questions_in(prompt)))


_MARKUP = re.compile(r"<[|\uff5c][^|\uff5c<>]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|(?:start|end)_of_turn)>|\[/?INST\]|<(?:用户|AI)>")
_ROLE = re.compile(r"(?:^|(?<=\s))\**(?:system|user|human|assistant|model|question|problem|instruction|answer|solution|q|a)\**:\**(?=\s|$)", re.I)
_NAME = re.compile(r"\s*(?:system|user|human|model|assistant)\s*\n", re.IGNORECASE)
_BEFORE = re.compile(r"(?:solve|answer|work out)\s[^.:?]{0,80}[.:]\s+", re.IGNORECASE)
_ASKED_FOR = ("step by step", "step-by-step", "put your ")
"""What instructions behind a question say; the sentence is left off."""
_SHORTEST_LINE = 40
"""Characters of a line that is looked at on its own: shorter ones are in many prompts."""


def _questions_in(prompt: str) -> Iterator[str]:
    yield prompt
    for marked in _MARKUP.split(prompt):
        name = _NAME.match(marked)
        whole = marked[name.end() :] if name else marked
        for part in dict.fromkeys((whole, *_ROLE.split(whole))):
            lines = part.strip().split("\n")
            for first in range(2 if lines[0].rstrip().endswith(":") else 1):  # "### Instruction:"
                for last in range(len(lines), max(len(lines) - 4, first), -1):  # an instruction behind, and an "Assistant:" behind that
                    yield from _bare("\n".join(lines[first:last]))
            for line in lines if len(lines) > 1 else ():
                if len(line) >= _SHORTEST_LINE:
                    yield from _bare(line)


def _bare(text: str) -> Iterator[str]:
    """The text, and what is left of it without instructions in the same line."""
    yield text
    start, end = found.end() if (found := _BEFORE.match(text)) else 0, len(text)
    lower = text.lower()
    for words in _ASKED_FOR:
        place = lower.find(words, start)
        if 0 <= place < end:
            end = max(text.rfind(mark, start, place) for mark in ".?!$])}\n") + 1
    if start < end and (start, end) != (0, len(text)):
        yield text[start:end]


def unpack(packed: str) -> frozenset[bytes]:
    """The hashes in a shipped string."""
    joined = base64.b85decode(packed)
    return frozenset(joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES))


def packed_lines(questions: Iterable[str], width: int = 140) -> list[str]:
    """The hashes of the questions, sorted and joined, in base85, as the lines of a Python file."""
    joined = base64.b85encode(b"".join(sorted({question_hash(question) for question in questions}))).decode()
    return [f'    "{joined[start : start + width]}"' for start in range(0, len(joined), width)]


def main(path: str, column: str) -> None:
    """Print the file of hashes of a published test split."""
    from openrl_reason.data.readers import read_rows

    lines = packed_lines(str(row.values[column]) for row in read_rows(path, (column,), split="test"))
    about = "Fingerprints of the questions of a published test split, made by openrl_reason/tasks/leakage.py. No text can be read back from them."
    print(f'"""{about}"""\n\nPACKED = (')
    print("\n".join(lines))
    print(")")


if __name__ == "__main__":
    main(*sys.argv[1:3])
