"""Graders of short answers: multiple choice (``choice2`` ... ``choice26``), exact text, yes/no. They read the response only, never the prompt.

A response may state its answer several times; the last statement counts, and one that names no allowed answer, or two of them, is no
answer. Standard library only; every pattern is bounded or possessive, since the text is hostile.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata

from openrl_reason.tasks.grade_extract import last_boxed

_WRAPPED = r"(?:\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{|[\s*$({\[\"'`]){0,8}"
_END = r"(?:[\s*$)}\].:,;!?\"'`]|$)"
_STATEMENTS = re.compile(
    r"(?P<mark>####)|(?P<finish>\bFinish\[)|(?P<is>\b(?:answer|correct (?:option|choice))\s{0,3}(?:is\b|:|=)[\s:]{0,8})", re.IGNORECASE
)
_LETTER = re.compile(rf"{_WRAPPED}(?:(?:option|choice)\s)?{_WRAPPED}(?P<letter>[A-Z])(?![A-Za-z0-9]|['\u2019][A-Za-z]){_WRAPPED}", re.DOTALL)
# Another letter behind the first: ", or (B)", "/B", "A B C" to the end. Not the "I" of "I think", and not a letter that a reason speaks of.
_REASON = r"(?:because|since|as|while|not)\b"
_ANOTHER = r"(?:[A-HJ-Z](?![A-Za-z])|I(?![A-Za-z]|\s[a-z]))"
_OTHER_LETTER = re.compile(
    rf"[\s*$)}}\].]{{0,8}}(?:,|;|/|&|\||\+|\(?\bor\b|\band\b)\s{{0,3}}+(?!{_REASON})[\s*$({{\[\\a-z]{{0,12}}{_ANOTHER}|(?:\s{{1,3}}[A-Z]){{1,26}}[\s.]{{0,3}}$"
)
# "A" and "I" are words of English: in running text they need a bracket, a full stop, the end of the line or "because" behind them.
_ENDS_LETTER = re.compile(r"\s*(?:[.,;:!?)\]}*$\"'`]|$|\n|because\b|since\b)")
_LAST_LINE = re.compile(r"[\s*$({\[\"'`]{0,8}(?:\\(?:text|textbf|mathrm|mathbf)\s?\{\(?)?([A-Z])[\s*$)}\].\"'`]{0,8}")
_LETTER_ALONE = re.compile(rf"{_WRAPPED}(?P<letter>[A-Z])(?:{_END}.{{0,500}})?", re.DOTALL)


def _letter_behind(text: str, start: int, prose: bool) -> str | None:
    """The letter stated at ``start``; "" for two letters; None if what follows is no letter."""
    piece = text[start : start + 200].split("\n", 1)[0]
    match = _LETTER.match(piece)
    if match is None:
        return None
    letter, behind = match["letter"], piece[match.end("letter") :]
    if _OTHER_LETTER.match(behind):
        return ""
    bracketed = piece[: match.start("letter")].rstrip().endswith(("(", "[", "{", "*", "$"))
    if letter in "AI" and prose and not bracketed and not _ENDS_LETTER.match(behind):
        return None
    return letter


def stated_letter(text: str) -> str | None:
    """The letter that the last statement of an answer names; None without a statement, or if the last one names none or several."""
    last, where = None, -1
    for match in _STATEMENTS.finditer(text):
        prose = match["mark"] is None
        letter = _letter_behind(text, match.end(), prose)
        if letter is not None or match["mark"]:
            last, where = letter or "", match.start()
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box > where:
        last, where = _letter_in_box(last_boxed(text)), box
    lines = text.rstrip().rsplit("\n", 1)
    if lines and len(lines[-1]) <= 40:
        alone = _LAST_LINE.fullmatch(lines[-1].strip())
        if alone and len(text.rstrip()) - len(lines[-1]) > where:
            last = alone[1]
    return last or None


def _letter_in_box(content: str | None) -> str:
    """``B``, ``(B)``, ``\\text{B}``, ``B. Paris`` and ``(B) Paris``; "" for anything else."""
    if content is None:
        return ""
    match = _LETTER.match(content[:200])
    if match is None:
        return ""
    behind = content[match.end("letter") : 200]
    if _OTHER_LETTER.match(behind) or not re.match(r"[\s*$]*(?:[).:}\]]|$)", behind):
        return ""
    return match["letter"]


def grade_choice(answer_text: str, gold: str, options: int = 26) -> tuple[float, str | None]:
    """1.0 if the stated letter is the gold letter, of the first ``options`` letters. ValueError for a gold outside of them."""
    expected = choice_gold(gold, options)
    letter = stated_letter(answer_text)
    if letter is None or letter not in string.ascii_uppercase[:options]:
        return 0.0, None
    return (1.0 if letter == expected else 0.0), letter


def choice_gold(gold: str, options: int) -> str:
    """The gold letter. ValueError if it is not one of the first ``options``."""
    letter = gold.strip().strip("().").strip()
    if len(letter) != 1 or letter.upper() not in string.ascii_uppercase[:options]:
        raise ValueError(f"the gold answer {gold[:80]!r} is not one of the letters A to {string.ascii_uppercase[options - 1]}")
    return letter.upper()


def load_choice(options: int) -> functools.partial[tuple[float, str | None]]:
    return functools.partial(grade_choice, options=options)


# -- text


def stated_text(text: str) -> str | None:
    """What follows the last ``####``, or is in the last box, whichever comes later; without either, the whole response."""
    mark = text.rfind("####")
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box > mark:
        content = last_boxed(text)
        wrapped = re.fullmatch(r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}\s*", content or "")
        return wrapped[1] if wrapped else content
    return text[mark + 4 :] if mark >= 0 else text


def normal_text(text: str) -> str:
    """Compatibility forms unified, case folded, white space squeezed, trailing periods gone."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split()).rstrip(".").rstrip()


def grade_text(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if the stated text is the gold text, up to :func:`normal_text`."""
    expected = text_gold(gold)
    found = normal_text(stated_text(answer_text) or "")
    return (1.0 if found == expected else 0.0), found[:500] or None


def text_gold(gold: str) -> str:
    expected = normal_text(gold)
    if not expected:
        raise ValueError(f"the gold answer {gold[:80]!r} is empty")
    return expected


_YES_NO = re.compile(r"[\W_]*(?:the )?(yes|no)\b(?!\s+(?:or|and)\b|(?:[\s,/|&]|\b(?:or|and)\b){1,8}(?:yes|no)[\W_]*$)", re.IGNORECASE)
_ALONE = re.compile(r"[\W_]{0,8}(?:\\text\s?\{)?(yes|no)[\W_]{0,8}", re.IGNORECASE)


def stated_yes_no(text: str) -> str | None:
    """yes or no: in the last statement (box, ``####``, "answer is", ``Finish[``), or as the only word of the last line."""
    last, where = None, -1
    for match in _STATEMENTS.finditer(text):
        word = _YES_NO.match(text[match.end() : match.end() + 40].split("\n", 1)[0])
        if word or match["mark"]:
            last, where = (word[1].lower() if word else None), match.start()
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box > where:
        alone = _ALONE.fullmatch((last_boxed(text) or "")[:60])
        last, where = (alone[1].lower() if alone else None), box
    line = text.rstrip().rsplit("\n", 1)[-1]
    alone = _ALONE.fullmatch(line.strip()) if len(line) <= 40 else None
    if alone and len(text.rstrip()) - len(line) > where:
        last = alone[1].lower()
    return last


def grade_yes_no(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if the response says the gold's yes or no."""
    expected = yes_no_gold(gold)
    found = stated_yes_no(answer_text)
    return (1.0 if found == expected else 0.0), found


def yes_no_gold(gold: str) -> str:
    expected = normal_text(gold)
    if expected not in ("yes", "no"):
        raise ValueError(f"the gold answer {gold[:80]!r} is neither yes nor no")
    return expected
