"""Cutting a response into reasoning steps, and mapping the cuts onto the tokens that were sampled (docs/steps.md).

Two laws hold for every string (empty, lone surrogates, lone carriage returns included): the pieces join to the text again, and no piece is
empty. A degenerate response is therefore one step, never a dropped sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from openrl_reason.core.steps_math import math_cuts
from openrl_reason.errors import ConfigError, did_you_mean

StepSplitter = Callable[[str], Sequence[str]]

# A step ends with the first of these strings.
_ENDS = {
    "newline": ("\n",),
    # OREO's cuts for MATH: a line, a sentence, or a sentence that ends in a formula (arXiv 2412.16145, "period as delimiter").
    "newline_sentence": ("\n", ". ", ".$ "),
}
_DELIMITERS = {kind: re.compile("|".join(map(re.escape, ends))) for kind, ends in _ENDS.items()}
# A header opens a step and the lines below continue it; the number is optional ("Thought:" as in ALFWorld, "Thought 2:" as in ReAct).
_REACT_HEADER = re.compile(r"^(?:Thought|Action|Observation)(?: ?\d+)?:", re.MULTILINE)
# A line that is not blank, and its line feed.
_FILLED_LINE = re.compile(r"\n(?=[^\n]*\S)")
_FILLED = re.compile(r"\S")
_ANSWER_LINE = "\n#### "
# A sentence begins at a numbered line, and ends with what closes it and the blanks up to its line's end; an empty line ends one as well.
# The lookbehinds let a run of periods be tried once, not at each of its characters.
_SENTENCE_END = re.compile(
    r"(?P<item>^[ \t]*\d{1,3}\.(?=\s))"
    r"|(?<![.!?…])(?P<end>[.!?…]+[\"'”’)\]}]*)(?:\s*\n|[^\S\n]+)"
    r"|(?<![。！？])(?P<wide>[。！？]+[」』”’）]*)(?:\s*\n|[^\S\n]*)"
    r"|(?P<gap>\n\s*\n)",
    re.MULTILINE,
)
_INITIAL = re.compile(r"(?<![^\W_])[A-Z]")
_FIXED = re.compile(r"fixed:([1-9][0-9]{0,8})")
STEP_KINDS = (*_DELIMITERS, "react", "whole", "response", "gsm8k", "math", "sentence")
"""The kinds with a name; "fixed:N" is one more for each N."""


def check_step_kind(kind: str | StepSplitter) -> None:
    """Raises ``ConfigError`` where :func:`split_steps` does not know ``kind``."""
    if callable(kind) or kind in STEP_KINDS or _FIXED.fullmatch(str(kind)):
        return
    if str(kind).startswith("fixed"):
        raise ConfigError(f"step kind {kind!r}: 'fixed:N' needs a whole number of characters of at least 1, as in fixed:80")
    raise ConfigError(f"unknown step kind {kind!r}; known: {', '.join(STEP_KINDS)}, fixed:N, or a callable{did_you_mean(str(kind), STEP_KINDS)}")


def split_steps(text: str, kind: str | StepSplitter) -> list[str]:
    """Steps of ``text``; ``"".join(result) == text`` always, and no step is empty (so ``""`` has none).

    ``kind``: "newline" (a step ends with its line feed, an empty line is a step of its own, "\\r" is an ordinary character),
    "newline_sentence" (also after ". " and ".$ "), "react" (a step begins at a line headed Thought, Action or Observation), "whole" or
    "response" (one step), "gsm8k" and "math" (VinePPO's; a step begins with its line feed), "sentence", "fixed:N" (N characters each), or a
    callable. A callable that raises, or whose pieces do not join to the text, yields one step: a splitter's mistake must not drop or change
    a sample. Raises ``ConfigError`` for an unknown name, never because of the text.
    """
    if callable(kind):
        return _call_splitter(kind, text)
    check_step_kind(kind)
    edges = [0, *_cuts(text, kind), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False) if end > start]


def stop_strings(kind: str | StepSplitter) -> tuple[str, ...] | None:
    """The strings that end a step: where an engine that generates step by step has to stop (none for one step).

    None where the text of a step does not tell that it is over, but only what follows it: such steps are cut when more has been generated.
    """
    if kind in ("whole", "response"):
        return ()
    return _ENDS.get(kind) if isinstance(kind, str) else None


def _cuts(text: str, kind: str) -> Sequence[int]:
    """Ascending positions at which a step begins; 0 and the end may be among them."""
    if kind in _DELIMITERS:
        return [match.end() for match in _DELIMITERS[kind].finditer(text)]
    if kind == "react":
        return [match.start() for match in _REACT_HEADER.finditer(text)]
    if kind == "gsm8k":
        return _gsm8k_cuts(text)
    if kind == "math":
        return math_cuts(text)
    if kind == "sentence":
        return _sentence_cuts(text)
    fixed = _FIXED.fullmatch(kind)
    return range(0, len(text), int(fixed[1])) if fixed else ()


def _gsm8k_cuts(text: str) -> list[int]:
    """Before every line with something in it, but for the first and for answer lines; what follows the last answer line belongs to it.

    With one answer line that is the published rule, except that a blank line belongs to the step before it (there it is a step of its own).
    """
    first = _FILLED.search(text)
    if first is None:
        return []
    last_answer = text.rfind(_ANSWER_LINE)
    stop = last_answer if last_answer >= 0 else len(text)
    lines = [match.start() for match in _FILLED_LINE.finditer(text)]
    return [cut for cut in lines if first.start() < cut < stop and not text.startswith(_ANSWER_LINE, cut)]


def _sentence_cuts(text: str) -> list[int]:
    first = _FILLED.search(text)
    if first is None:
        return []
    cuts = []
    for match in _SENTENCE_END.finditer(text):
        cut = match.start() if match["item"] else match.end()
        if cut > first.start() and not (match["end"] and _goes_on(text, match)):
            cuts.append(cut)
    if cuts and text[cuts[-1] :].isspace():
        cuts.pop()
    return cuts


def _goes_on(text: str, match: re.Match[str]) -> bool:
    """Whether a period with a blank after it ends no sentence: small letters follow in its line ("e.g. this"), or it is an initial's."""
    if not match[0].endswith("\n") and text[match.end() : match.end() + 1].islower():
        return True
    return match["end"] == "." and match.start() > 0 and _INITIAL.match(text, match.start() - 1) is not None


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
