"""Canonical text of an answer, so that equal answers mostly have equal text: what majority votes and reports use."""

from __future__ import annotations

import re
from fractions import Fraction

from mpmath import mp

from openrl_reason.tasks.grade_equal import value_of
from openrl_reason.tasks.grade_scan import Tree
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
        items = sorted(map(render, tree[1:]))
        return ", ".join(items) if len(set(items)) > 1 else items[0]
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
    expanded = polynomial(tree)
    if expanded is not None:
        return _polynomial_text(expanded)
    kind = tree[0]
    if kind == "sym":
        return tree[1]
    if kind == "num":
        return number_text(tree[1])
    if kind == "add":
        return "(" + "+".join(sorted(map(render, tree[1:]))) + ")"
    if kind == "mul":
        return "*".join(sorted(map(_operand, tree[1:])))
    if kind == "neg":
        return f"-{_operand(tree[1])}"
    if kind == "div":
        return f"({_operand(tree[1])}/{_operand(tree[2])})"
    if kind == "pow":
        return f"{_operand(tree[1])}^{_operand(tree[2])}"
    if kind == "call":
        return f"{tree[1]}({', '.join(map(render, tree[2:]))})"
    raise Unbounded(f"no text for {kind}")


def _operand(tree: Tree) -> str:
    """The text of a part of a product, quotient or power: in brackets unless it is one name or one number."""
    text = render(tree)
    return f"({text})" if re.search(r"[-+*/^ ]", text) and not text.startswith("(") else text


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


Polynomial = dict[tuple[tuple[str, int], ...], Fraction]
_MAX_TERMS = 40
_MAX_POWER = 30


def polynomial(tree: Tree) -> Polynomial | None:
    """A polynomial with rational coefficients multiplied out, as monomial -> coefficient; None for anything else, or if it is too long."""
    kind = tree[0]
    if kind == "num":
        return {(): tree[1]} if tree[1] else {}
    if kind == "sym":
        return None if tree[1] in ("pi", "e", "i", "∞") else {((tree[1], 1),): Fraction(1)}
    if kind == "neg":
        inner = polynomial(tree[1])
        return None if inner is None else {monomial: -value for monomial, value in inner.items()}
    if kind in ("add", "mul"):
        parts = [polynomial(part) for part in tree[1:]]
        total: Polynomial | None = parts[0]
        for part in parts[1:]:
            total = None if total is None or part is None else (_sum if kind == "add" else _product)(total, part)
        return total
    if kind == "div":
        bottom = polynomial(tree[2])
        if bottom is None or set(bottom) != {()}:
            return None
        return polynomial(("mul", tree[1], ("num", 1 / bottom[()])))
    if kind == "pow" and tree[2][0] == "num" and tree[2][1].denominator == 1 and 0 < tree[2][1] <= _MAX_POWER:
        return polynomial(("mul", *[tree[1]] * int(tree[2][1])))
    return None


def _sum(a: Polynomial, b: Polynomial) -> Polynomial | None:
    total = {monomial: a.get(monomial, Fraction(0)) + b.get(monomial, Fraction(0)) for monomial in (*a, *b)}
    return _bounded({monomial: value for monomial, value in total.items() if value})


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for left, x in a.items():
        for right, y in b.items():
            powers = dict(left)
            for name, power in right:
                powers[name] = powers.get(name, 0) + power
            monomial = tuple(sorted(powers.items()))
            total[monomial] = total.get(monomial, Fraction(0)) + x * y
    return _bounded({monomial: value for monomial, value in total.items() if value})


def _bounded(total: Polynomial) -> Polynomial | None:
    small = all(value.numerator.bit_length() + value.denominator.bit_length() <= 400 for value in total.values())
    return total if small and len(total) <= _MAX_TERMS else None


def _polynomial_text(terms: Polynomial) -> str:
    """The terms by falling degree: ``x^2+2*x*y-1``."""
    parts = []
    for monomial in sorted(terms, key=lambda m: (-sum(power for _, power in m), m)):
        value = terms[monomial]
        names = "*".join(name if power == 1 else f"{name}^{power}" for name, power in monomial)
        factor = number_text(abs(value))
        text = factor if not names else names if factor == "1" else f"{factor}*{names}"
        parts.append(("-" if value < 0 else "+") + text)
    return "".join(parts).removeprefix("+") or "0"
