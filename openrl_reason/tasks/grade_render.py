"""Canonical text of an answer, so that equal answers mostly have equal text: what majority votes and reports use."""

from __future__ import annotations

import re
from fractions import Fraction

from mpmath import mp

from openrl_reason.tasks.grade_equal import value_of
from openrl_reason.tasks.grade_latex import Tree
from openrl_reason.tasks.grade_units import words_of
from openrl_reason.tasks.grade_values import DIGITS, Evaluator, Unbounded, Undefined, symbols

_PLAIN = re.compile(r"([-+]?)\s*(?:\$|\\\$)?\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(\.[0-9]*)?")
_FRACTION = re.compile(r"([-+]?)\s*(?:\\frac\s*\{?\s*([0-9]+)\s*\}?\s*\{\s*([0-9]+)\s*\}|([0-9]+)\s*/\s*([0-9]+))")
_EXPRESSIONS = frozenset("num sym add mul neg div pow call deg pct".split())


def plain_number(text: str) -> Fraction | None:
    """The fast path: a cleaned answer that is one integer, decimal or simple fraction, with no comma in it."""
    if not text or len(text) > 60 or "," in text:
        return None
    match = _PLAIN.fullmatch(text)
    if match and (match[2] or (match[3] and len(match[3]) > 1)):
        value = Fraction((match[2] or "0") + (match[3] or "").rstrip("."))
    else:
        match = _FRACTION.fullmatch(text)
        if match is None or (match[2] and len(match[2]) > 1 and "{" not in text[: match.start(2)]):
            return None
        top, bottom = (match[2], match[3]) if match[2] else (match[4], match[5])
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
    return -value if match[1] == "-" else value


def number_text(value: Fraction) -> str:
    """A decimal where it ends, else a fraction in lowest terms."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if value.numerator.bit_length() > 2000 or value.denominator.bit_length() > 2000:
        return f"a number of {max(value.numerator.bit_length(), value.denominator.bit_length())} bits"
    if rest != 1 or places > 12:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return f"-{text}" if value < 0 else text


def canonical(tree: Tree, text: str) -> str:
    """The canonical text of a tree; ``text`` where there is none."""
    try:
        return render(tree)[:500]
    except (Unbounded, RecursionError):
        return text[:200]


def render(tree: Tree) -> str:
    kind = tree[0]
    if kind in _EXPRESSIONS and kind not in ("deg", "pct"):
        return _expression(tree)
    if kind in ("deg", "pct"):
        return render(tree[1])
    if kind == "unit":
        return f"{render(tree[1])} {tree[2]}"
    if kind == "text":
        words = words_of(tree[1])
        return words.casefold() if len(words) > 1 else words
    if kind == "based":
        return f"{tree[1]}_{tree[2]}"
    if kind == "group":
        return tree[1][0] + ", ".join(map(render, tree[2:])) + tree[1][1]
    if kind == "set":
        return "{" + ", ".join(sorted(set(map(render, tree[1:])))) + "}"
    if kind == "list":
        return ", ".join(sorted(map(render, tree[1:])))
    if kind == "union":
        return " ∪ ".join(sorted(map(render, tree[1:])))
    if kind == "ratio":
        return ":".join(map(render, tree[1:]))
    if kind == "matrix":
        return "[" + ", ".join("[" + ", ".join(map(render, row)) + "]" for row in tree[2:]) + "]"
    if kind == "rel":
        value = value_of(tree)
        sides = list(map(render, tree[2:]))
        return render(value) if value is not None else "".join(a + op for a, op in zip(sides, f"{tree[1]} ", strict=True)).strip()
    if kind == "pm":
        return f"{tree[1]}{render(tree[2])}"
    raise Unbounded(f"no text for {kind}")


def _expression(tree: Tree) -> str:
    """Numbers by value; with variables, sums and products in alphabetical order."""
    if tree == ("sym", "∞") or tree == ("neg", ("sym", "∞")):
        return "∞" if tree[0] == "sym" else "-∞"
    if not symbols(tree):
        try:
            return _constant(tree)
        except (Undefined, Unbounded):
            pass
    kind = tree[0]
    if kind == "sym":
        return tree[1]
    if kind == "num":
        return number_text(tree[1])
    if kind == "add":
        return "(" + "+".join(sorted(map(render, tree[1:]))) + ")"
    if kind == "mul":
        return "*".join(sorted(_factors(tree)))
    if kind == "neg":
        return f"-{render(tree[1])}"
    if kind == "div":
        return f"({render(tree[1])}/{render(tree[2])})"
    if kind == "pow":
        return f"{render(tree[1])}^{render(tree[2])}"
    if kind == "call":
        return f"{tree[1]}({', '.join(map(render, tree[2:]))})"
    raise Unbounded(f"no text for {kind}")


def _factors(tree: Tree) -> list[str]:
    return [text for part in tree[1:] for text in (_factors(part) if part[0] == "mul" else [render(part)])]


def _constant(tree: Tree) -> str:
    with mp.workdps(DIGITS):
        value = Evaluator({})(tree)
        if isinstance(value, Fraction):
            return number_text(value)
        parts = [_irrational(mp.re(value)), _irrational(mp.im(value))]
        if mp.im(value) == 0:
            return parts[0]
        sign = "" if parts[1].startswith("-") else "+"
        return f"{parts[0] if parts[0] != '0' else ''}{sign if parts[0] != '0' else ''}{parts[1]}i"


def _irrational(value: object) -> str:
    """Twenty digits; three dots behind what does not end there."""
    rounded = mp.nint(value)
    if abs(value - rounded) < mp.mpf(10) ** -40:
        return str(int(rounded)) if abs(rounded) < 10**40 else mp.nstr(value, 20)
    text = mp.nstr(value, 20, min_fixed=-6, max_fixed=20, strip_zeros=True)
    return text if abs(mp.mpf(text) - value) < mp.mpf(10) ** -40 else text + "..."
