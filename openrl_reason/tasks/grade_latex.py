"""Reads a final answer written in LaTeX into a small tree: numbers, expressions, tuples, intervals, sets, unions, relations, matrices, units.

Only reading happens here, by a recursive descent over at most :data:`grade_extract.MAX_ANSWER` characters, nested at most
:data:`MAX_DEPTH` deep; nothing is computed and nothing evaluated. Standard library only. A tree is nested tuples:
``("num", Fraction) ("sym", name) ("add" | "mul", *terms) ("neg" | "deg" | "pct", a) ("div" | "pow", a, b) ("call", name, *args)
("pm", "±" | "∓", a) ("group", brackets, *items) ("set" | "union" | "list" | "ratio", *items) ("rel", ops, *sides)
("matrix", kind, *rows) ("unit", a, name) ("based", digits, base) ("text", words)``.
"""

from __future__ import annotations

import re
from fractions import Fraction

from openrl_reason.tasks.grade_clean import BREAK, FUNCTIONS, LEFT_SET, RIGHT_SET
from openrl_reason.tasks.grade_scan import MAX_DIGITS, Cursor, Tree

MAX_DEPTH = 30
MAX_CHAIN = 8


GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar emptyset varnothing triangle angle ldots cdots dots".split()
)
_CURRENCIES = {"￥": "dollar", "£": "pound sterling", "€": "euro"}
_RELATIONS = "=<>≤≥≠∈≈→"


def _mentions_names(tree: object) -> bool:
    """Whether there is a variable or a word in it."""
    if not isinstance(tree, tuple) or not tree:
        return False
    return tree[0] == "text" or (tree[0] == "sym" and tree[1] not in ("pi", "e", "i")) or any(map(_mentions_names, tree))


def _times(left: Tree, right: Tree) -> Tree:
    """A product, kept flat, so that a long one makes no deep tree."""
    return (*left, right) if left[0] == "mul" else ("mul", left, right)


class Reader(Cursor):
    """The grammar: from lists and relations down to numbers and names."""

    # -- items and relations

    def answer(self) -> Tree:
        tree = self.items("")
        if self.peek():
            raise self.fail("text left over")
        return tree

    def items(self, closing: str) -> Tree:
        """Items up to the end or one of ``closing``; a list if there are several."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail("nested too deeply")
        found = [self.relation()]
        while self.take(",;"):
            if not self.peek() or self.peek() in closing:
                break
            found.append(self.relation())
        self.depth -= 1
        return found[0] if len(found) == 1 else ("list", *found)

    def relation(self) -> Tree:
        sides, ops = [self.ratio()], ""
        while op := self.take(_RELATIONS):
            side = self.ratio()
            if op == "≈" and not _mentions_names(sides[-1]):
                continue  # 1/3 ≈ 0.33 says 1/3
            ops += "=" if op == "≈" else op
            sides.append(side)
        return ("rel", ops, *sides) if ops else sides[0]

    def ratio(self) -> Tree:
        parts = [self.union()]
        while not self.in_brackets and self.take(":"):
            parts.append(self.union())
        if len(parts) == 1:
            return parts[0]
        if parts[-1][0] == "unit":  # 8:34 p.m.
            return ("unit", ("ratio", *parts[:-1], parts[-1][1]), parts[-1][2])
        return ("ratio", *parts)

    def union(self) -> Tree:
        parts = [self.measured()]
        while self.take("∪"):
            parts.append(self.measured())
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def measured(self) -> Tree:
        """A sum with its unit, or words."""
        if self.command() == "text":
            words = self.words()
            if self.take("_"):
                return ("based", words.upper(), self.base_digits())
            return ("text", words)
        tree = self.sum()
        unit = self.unit()
        return ("unit", tree, unit) if unit else tree

    # -- arithmetic

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail("nested too deeply")
        terms = []
        while True:
            sign = self.take("+-±∓")
            if terms and not sign:
                break
            while more := self.take("+-"):
                sign = "-" if (more == "-") != (sign == "-") and sign in ("", "+", "-") else "+" if sign in ("", "+", "-") else sign
            term = self.product()
            terms.append(("neg", term) if sign == "-" else ("pm", sign, term) if sign and sign in "±∓" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self, argument: bool = False) -> Tree:
        """Factors, explicit or side by side. In the argument of a function without brackets the next function ends it."""
        tree = self.factor()
        divisions = 0
        while True:
            if not argument and (op := self.take("*/")):
                sign = self.take("-")
                right = self.factor()
                right = ("neg", right) if sign else right
                divisions += op == "/"
                tree = ("div", tree, right) if op == "/" else _times(tree, right)
            elif self.starts_factor(argument):
                tree = self.juxtapose(tree, self.factor())
            else:
                return tree
            if divisions > MAX_CHAIN:
                raise self.fail("too many divisions")

    def juxtapose(self, left: Tree, right: Tree) -> Tree:
        """``2\\frac{1}{3}`` is a mixed number, ``2\\frac{x}{3}`` and ``2\\frac{7}{3}`` are products; two numbers side by side are neither."""
        if left[0] == "num" and left[1].denominator == 1 and right[0] == "div":
            top, bottom = right[1], right[2]
            if top[0] == bottom[0] == "num" and 0 < top[1] < bottom[1] and top[1].denominator == bottom[1].denominator == 1:
                return ("add", left, right)
        if right[0] == "num" and left[0] == "num":
            match = re.compile(r"\s*/\s*([0-9]+)(?![0-9.])").match(self.text, self.at)
            if left[1].denominator == 1 and match and len(match[1]) < 10 and 0 < right[1] < int(match[1]):
                self.at = match.end()
                return ("add", left, ("div", right, ("num", Fraction(int(match[1])))))
            raise self.fail("two numbers side by side")
        return _times(left, right)

    def starts_factor(self, argument: bool) -> bool:
        character = self.peek()
        if not character:
            return False
        if character == "\\":
            name = self.command()
            return name in GREEK or name in ("pi", "frac", "sqrt", "binom", "overline", "begin") or (name in FUNCTIONS and not argument)
        if character == "|":
            return self.in_bars == 0
        return character.isascii() and character.isalnum() or character in "([{.⌊⌈∞" + LEFT_SET and not (argument and character in "([")

    def factor(self) -> Tree:
        tree = self.atom()
        for _ in range(MAX_CHAIN):
            if self.take("^"):
                tree = ("pow", tree, self.exponent())
            elif self.take("!"):
                tree = ("call", "factorial", tree)
            elif self.take("°"):
                tree = ("deg", tree)
            elif self.take("%"):
                tree = ("pct", tree)
            elif tree[0] == "num" and self.peek() == "_":
                raise self.fail("a number with a subscript inside of an expression")
            else:
                return tree
        raise self.fail("too many signs behind a factor")

    def exponent(self) -> Tree:
        if self.peek() == "{":
            return self.braced()
        sign = self.take("-+")
        match = re.compile(r"\s*([0-9]+)").match(self.text, self.at)
        if match and len(match[1]) <= MAX_DIGITS:
            self.at = match.end()
            tree: Tree = ("num", Fraction(int(match[1])))
        else:
            tree = self.atom()
        return ("neg", tree) if sign == "-" else tree

    def braced(self) -> Tree:
        """``{...}`` as an argument."""
        self.expect("{")
        outer, self.in_bars = self.in_bars, 0
        tree = self.items("}")
        self.in_bars = outer
        self.expect("}")
        return tree

    def argument(self) -> Tree:
        """What follows a command: braces, or one token, of a number its first digit."""
        if self.peek() == "{":
            return self.braced()
        if (digit := self.peek()) and digit in "0123456789":
            self.at += 1
            return ("num", Fraction(int(digit)))
        return self.atom()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail("nested too deeply")
        tree = self.read_atom()
        self.depth -= 1
        return tree

    def read_atom(self) -> Tree:
        character = self.peek()
        if not character:
            raise self.fail("the end came too early")
        if character in "0123456789.":
            return self.number()
        if character == "\\":
            return self.read_command()
        if character in "([⟨":
            return self.bracketed()
        if character == "{":
            return self.braced()
        if character == LEFT_SET:
            return self.set()
        if character in "|⌊⌈":
            return self.bars(character)
        if character in _CURRENCIES:
            self.at += 1
            sign = self.take("-")
            tree = self.atom()
            return ("unit", ("neg", tree) if sign else tree, _CURRENCIES[character])
        if character == "∞":
            self.at += 1
            return ("sym", "∞")
        if character.isascii() and character.isalpha():
            self.at += 1
            return self.symbol(character)
        raise self.fail(f"unexpected {character!r}")

    def bracketed(self) -> Tree:
        opening = self.take("([⟨")
        self.in_brackets += 1
        outer, self.in_bars = self.in_bars, 0
        tree = self.items(")]⟩")
        self.in_brackets -= 1
        self.in_bars = outer
        closing = self.take(")]⟩")
        brackets = (opening + closing).replace("⟨", "(").replace("⟩", ")")
        if not closing or (tree[0] != "list" and brackets not in ("()", "[]")):
            raise self.fail("brackets that do not match")
        return ("group", brackets, *tree[1:]) if tree[0] == "list" else tree

    def set(self) -> Tree:
        self.expect(LEFT_SET)
        if self.take(RIGHT_SET):
            return ("set",)
        self.in_brackets += 1
        self.in_bars += 1  # the bar of a set builder is no absolute value
        tree = self.items("|:" + RIGHT_SET)
        if self.take("|:"):
            tree = self.items(RIGHT_SET)
            self.expect(RIGHT_SET)
        else:
            self.expect(RIGHT_SET)
            tree = ("set", *tree[1:]) if tree[0] == "list" else ("set", tree)
        self.in_brackets -= 1
        self.in_bars -= 1
        return tree

    def bars(self, opening: str) -> Tree:
        self.at += 1
        closing, name = {"|": ("|", "abs"), "⌊": ("⌋", "floor"), "⌈": ("⌉", "ceil")}[opening]
        self.in_bars += 1
        tree = self.sum()
        self.in_bars -= 1
        self.expect(closing)
        return ("call", name, tree)

    # -- commands

    def read_command(self) -> Tree:
        name = self.command()
        if not name:
            raise self.fail("a stray backslash")
        self.at += 1 + len(name)
        if name in ("emptyset", "varnothing"):
            return ("set",)
        if name == "pi" or name in GREEK:
            return ("sym", "pi") if name == "pi" else self.symbol("\\" + name)
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name == "binom":
            top = self.argument()
            return ("call", "binom", top, self.argument())
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.matrix()
        if name == "text":
            self.at -= 5
            return ("text", self.words())
        raise self.fail(f"unknown command \\{name}", foreign=True)

    def root(self) -> Tree:
        index = None
        if self.peek() == "[":
            self.at += 1
            index = self.sum()
            self.expect("]")
        tree = self.argument()
        return ("call", "sqrt", tree) if index is None else ("call", "root", tree, index)

    def function(self, name: str) -> Tree:
        base = power = None
        if self.take("_"):
            base = self.argument()
        if self.take("^"):
            power = self.exponent()
        if self.peek() == "(" or self.peek() == "{":
            inner = self.atom()
            if inner[0] == "group":
                return ("call", name, *inner[2:])
            if self.peek() == "^" or self.peek() == "°":
                inner = ("pow", inner, self.exponent()) if self.take("^") else ("deg", inner) if self.take("°") else inner
        else:
            inner = self.product(argument=True)
        if name == "log" and base is not None:
            tree: Tree = ("call", "log", inner, base)
        else:
            tree = ("call", name, inner)
        if power == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan", "cot"):
            return ("call", "arc" + name, inner)
        return tree if power is None else ("pow", tree, power)

    def matrix(self) -> Tree:
        match = re.compile(r"\s*\{\s*([a-zA-Z]*)\*?\s*\}\s*(?:\{[lcr| ]*\})?").match(self.text, self.at)
        kind = match[1] if match else ""
        if kind not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array"):
            raise self.fail(f"unknown environment {kind!r}", foreign=True)
        assert match is not None
        self.at = match.end()
        rows, row = [], []
        self.in_brackets += 1
        while True:
            if self.command() == "end":
                break
            if self.take(BREAK):
                rows.append(tuple(row))
                row = []
                continue
            row.append(self.relation())
            self.take("&")
        self.in_brackets -= 1
        self.at = self.text.find("}", self.at) + 1 or len(self.text)
        if row:
            rows.append(tuple(row))
        return ("matrix", "v" if kind[0] in "vV" else "p", *rows)


_BASED = re.compile(r"(-?)\s*0*([0-9A-Z]*(?:\.[0-9A-Z]+)?)\s*_\s*(?:\{\s*(?:\\text\{)?\s*([0-9]{1,2}|[a-z]+)\s*\}?\s*\}|([0-9]{1,2}))")
_NUMBER_WORDS = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True)) | {"sixteen": 16}


def read_based(text: str) -> Tree | None:
    """``101_2``, ``3A_{12}``: digits with their base, else None. In base ten it is a number."""
    match = _BASED.fullmatch(text.replace(" ", "")) if len(text) < 200 else None
    if match is None or not (match[2] or match[0].lstrip("-").startswith("0")):
        return None
    name = match[3] or match[4]
    base = _NUMBER_WORDS.get(name, name)
    digits = match[2].rstrip("0").rstrip(".") if "." in match[2] else match[2]
    digits = (digits or "0") if not digits.startswith(".") else "0" + digits
    if str(base) == "10" and re.fullmatch(r"[0-9.]+", digits):
        return ("num", Fraction(match[1] + digits))
    return ("based", match[1] + digits, str(base))


def read(text: str, thousands: bool = True) -> Tree:
    """The tree of a cleaned answer. Raises :class:`Unreadable`."""
    based = read_based(text)
    if based is not None:
        return based
    return Reader(text, thousands).answer()
