"""Where the answer stands in a response: the last ``\\boxed{...}``, the last ``####``, the last "answer is". Standard library only.

Every function reads its text once, from the left or from the right: a response of a million braces costs milliseconds.
"""

from __future__ import annotations

import re

# Nobody boxes more than this; what is longer is an answer that equals nothing.
MAX_ANSWER = 2000

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])")
_ANSWER_IS = re.compile(r"answer\s{0,3}(?:is\b|:|=)[\s:]{0,8}", re.IGNORECASE)
_NEXT_WORD = re.compile(r"\s*+(\\[A-Za-z]++|[^\s{}$\\]++)")


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


def matching_brace(text: str, start: int) -> int:
    """The index of the ``}`` that closes the ``{`` at ``start``, or -1. Escaped braces do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed`` (or ``\\fbox``) holds: the braces matched, or the word behind it (``\\boxed 5``).

    None when there is none, and also when the last one is empty or never closed: an earlier box is not the final answer."""
    last = _last_match(_BOX, text)
    if last is None:
        return None
    start = last.end()
    while start < len(text) and text[start] in " \t\n":
        start += 1
    if text[start : start + 1] == "{":
        end = matching_brace(text, start)
        content = text[start + 1 : end] if end >= 0 else ""
    else:
        word = _NEXT_WORD.match(text, start)
        content = word[1] if word else ""
    return content.strip() or None


def after_mark(text: str, mark: str = "####") -> str | None:
    """The rest of the line behind the last ``mark``; None without the mark or with nothing behind it."""
    _, found, tail = text.rpartition(mark)
    return (tail.split("\n", 1)[0].strip() or None) if found else None


def after_answer_is(text: str) -> str | None:
    """The rest of the line behind the last "answer is" or "answer:", without the sentence's period; None when there is none."""
    last = _last_match(_ANSWER_IS, text)
    if last is None:
        return None
    return text[last.end() :].split("\n", 1)[0].strip().removesuffix(".").strip() or None
