"""The lower half of reading LaTeX answers: a cursor over one cleaned answer, and the pieces that need no grammar. See :mod:`grade_latex`."""

from __future__ import annotations

import re
from fractions import Fraction

from openrl_reason.tasks.grade_units import unit_name

MAX_DIGITS = 1000

Tree = tuple
"""A read answer or a part of it; :mod:`grade_latex` lists the kinds."""

_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_PLAIN_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")


class Unreadable(ValueError):
    """The text is not an answer this module reads. ``foreign`` when the cause is a LaTeX command it does not know."""

    def __init__(self, message: str, foreign: bool = False) -> None:
        super().__init__(message)
        self.foreign = foreign


class Cursor:
    """One cleaned answer, read from the left. ``thousands``: whether ``1,234`` outside of brackets is one number."""

    def __init__(self, text: str, thousands: bool = True) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.in_bars = 0
        self.in_brackets = 0
        self.thousands = thousands

    def fail(self, what: str, foreign: bool = False) -> Unreadable:
        return Unreadable(f"{what} at {self.at}", foreign)

    def peek(self) -> str:
        """The next character that is not a space; "" at the end."""
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, characters: str) -> str:
        found = self.peek()
        if found and found in characters:
            self.at += 1
            return found
        return ""

    def command(self) -> str:
        """The name of the command that comes next, or ""."""
        if self.peek() != "\\":
            return ""
        match = re.compile(r"\\([A-Za-z]+)").match(self.text, self.at)
        return match[1] if match else ""

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise self.fail(f"expected {character!r}")

    def words(self) -> str:
        parts = []
        while self.command() == "text":
            start = self.text.index("{", self.at)
            end = self.text.find("}", start)
            if end < 0:
                raise self.fail("open text")
            parts.append(self.text[start + 1 : end])
            self.at = end + 1
        return re.sub(r"\s+", " ", " ".join(parts)).strip()

    def unit(self) -> str:
        parts = []
        while self.command() == "text" or (parts and self.peek() == "/"):
            if self.take("/"):
                parts.append("per")
            words = self.words()
            if not words:
                continue
            power = ""
            if self.take("^"):
                power = str(self.exponent_digits())
            parts.append(f"{words}^{power}" if power else words)
        return unit_name(" ".join(parts)) if parts else ""

    def exponent_digits(self) -> int:
        match = re.compile(r"\s*(?:\{\s*(-?[0-9])\s*\}|([0-9]))").match(self.text, self.at)
        if not match:
            raise self.fail("expected the power of a unit")
        self.at = match.end()
        return int(match[1] or match[2])

    def number(self) -> Tree:
        pattern = _NUMBER if self.thousands and not self.in_brackets else _PLAIN_NUMBER
        match = pattern.match(self.text, self.at)
        if match is None or len(match.group()) > MAX_DIGITS:
            raise self.fail("no number, or too long a one")
        self.at = match.end()
        whole, point, decimals = match.group().replace(",", "").partition(".")
        value = Fraction(int((whole or "0") + decimals), 10 ** len(decimals))
        if self.text.startswith("\\overline{", self.at) and point:  # 0.\overline{3}: a repeating decimal, exactly
            end = self.text.index("}", self.at)
            period = self.text[self.at + 10 : end]
            self.at = end + 1
            value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return ("num", value)

    def symbol(self, name: str) -> Tree:
        if self.take("_"):
            name += "_" + plain_subscript(self.subscript())
        while self.text[self.at : self.at + 1] == "'":
            self.at += 1
            name += "'"
        return ("sym", name)

    def subscript(self) -> str:
        if self.peek() == "{":
            end = self.text.find("}", self.at)
            if end < 0:
                raise self.fail("open subscript")
            found = self.text[self.at + 1 : end]
            self.at = end + 1
            return found
        found = self.command()
        found = f"\\{found}" if found else self.peek()
        self.at += len(found)
        return found

    def base_digits(self) -> str:
        base = plain_subscript(self.subscript())
        if not base:
            raise self.fail("an empty base")
        return base


def plain_subscript(text: str) -> str:
    """What a subscript says, without braces, spaces and the name of the command it is set in."""
    return re.sub(r"\\text|[\s{}]", "", text)
