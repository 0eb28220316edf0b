"""Cutting a response into reasoning steps, and mapping the cuts onto the tokens that were sampled.

Two laws hold for every string (empty, lone surrogates, lone carriage returns included): the pieces join to the text again, and no piece is
empty. A degenerate response is therefore one step, never a dropped sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from openrl_reason.errors import ConfigError, did_you_mean

StepSplitter = Callable[[str], Sequence[str]]

# Each pattern matches the delimiter; a step ends with it.
_DELIMITERS = {
    "newline": re.compile(r"\n"),
    # OREO's cuts for MATH: a line, a sentence, or a sentence that ends in a formula (arXiv 2412.16145, "period as delimiter").
    "newline_sentence": re.compile(r"\n|\. |\.\$ "),
}
# A header opens a step and the lines below continue it; the number is optional ("Thought:" as in ALFWorld, "Thought 2:" as in ReAct).
_REACT_HEADER = re.compile(r"^(?:Thought|Action|Observation)(?: ?\d+)?:", re.MULTILINE)
STEP_KINDS = (*_DELIMITERS, "react", "whole", "response")


def split_steps(text: str, kind: str | StepSplitter) -> list[str]:
    """Steps of ``text``; ``"".join(result) == text`` always, and no step is empty (so ``""`` has none).

    ``kind``: "newline" (a step ends with its line feed, an empty line is a step of its own, "\\r" is an ordinary character),
    "newline_sentence" (also after ". " and ".$ "), "react" (a step begins at a line headed Thought, Action or Observation), "whole" or
    "response" (one step), or a callable. A callable that raises, or whose pieces do not join to the text, yields one step: a
    splitter's mistake must not drop or change a sample. Raises ``ConfigError`` for an unknown name, never because of the text.
    """
    if callable(kind):
        return _call_splitter(kind, text)
    if kind in ("whole", "response"):
        return [text] if text else []
    if kind == "react":
        cuts = [match.start() for match in _REACT_HEADER.finditer(text)]
    elif kind in _DELIMITERS:
        cuts = [match.end() for match in _DELIMITERS[kind].finditer(text)]
    else:
        raise ConfigError(f"unknown step kind {kind!r}; known: {', '.join(STEP_KINDS)}, or a callable{did_you_mean(str(kind), STEP_KINDS)}")
    edges = [0, *cuts, len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False) if end > start]


def _call_splitter(splitter: StepSplitter, text: str) -> list[str]:
    whole = [text] if text else []
    try:
        pieces = list(splitter(text))
    except Exception:  # noqa: BLE001  the user's code may raise anything, and the contract is that a sample is never lost to its splitter
        return whole
    if not all(isinstance(piece, str) for piece in pieces) or "".join(pieces) != text:
        return whole
    return [piece for piece in pieces if piece]


def steps_of_tokens(steps: Sequence[str], token_starts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32 [T]: the step of each token, given the offset of its first character in ``"".join(steps)``.

    A token belongs to the step of its first character, so a token that straddles a cut belongs to the earlier step, and a step may own no
    token. Tokens that begin at the end of the text (an end-of-sequence token has no text) belong to the last step. No steps: all 0.
    """
    ends = np.cumsum([len(step) for step in steps], dtype=np.int64)
    found = np.searchsorted(ends, np.asarray(token_starts, dtype=np.int64), side="right")
    return np.minimum(found, max(len(steps) - 1, 0)).astype(np.int32)


def steps_of_pieces(steps: Sequence[str], pieces: Sequence[str] | Sequence[bytes]) -> np.ndarray:
    """int32 [T]: the step of each token, given the text of every token, as strings or (for byte-level vocabularies) as UTF-8 bytes.

    Pieces must join to the text of the steps; a byte piece that begins inside a character belongs to that character's step. Raises
    ``ValueError`` where they do not join, since the map would then be a guess.
    """
    if pieces and isinstance(pieces[0], bytes):
        steps = [step.encode("utf-8", "surrogatepass") for step in steps]
    joined, text = type(pieces[0])().join(pieces) if pieces else "", (b"" if pieces and isinstance(pieces[0], bytes) else "").join(steps)
    if pieces and joined != text:
        raise ValueError(f"the tokens' text is not the steps' text: {joined[:60]!r}... against {text[:60]!r}...")
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return steps_of_tokens(steps, lengths.cumsum() - lengths)
