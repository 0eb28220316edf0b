"""Compares expressions by value: exactly while everything is rational, else to 80 digits and more, at several points if there are variables.

Every step is bounded before it is taken: rationals stay below :data:`MAX_BITS` bits, powers, factorials and exponentials are refused by
the size their result would have. Nothing is simplified and nothing searched for, so no expression takes long.
"""

from __future__ import annotations

import zlib
from fractions import Fraction

import mpmath
from mpmath import mp

from openrl_reason.tasks.grade_scan import Tree

MAX_BITS = 20_000
MAX_NUMERIC_BITS = 40_000  # the binary exponent of a number that is not rational
MAX_FACTORIAL = 1_500
DIGITS = 80
MAX_STEPS = 4_000

Value = Fraction | mpmath.mpf | mpmath.mpc


class Unbounded(ValueError):
    """A value too large to compute; or a tree that has no value (a tuple, words)."""


class Undefined(ValueError):
    """No value at this point: a division by zero, the logarithm of zero."""


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction):
        if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
            raise Unbounded("a number of too many digits")
        return value
    size = abs(value)
    if not mpmath.isfinite(size):
        raise Undefined("not finite")
    if size and abs(mpmath.mag(size)) > MAX_NUMERIC_BITS:
        raise Unbounded("a number too large or too small")
    if isinstance(value, mpmath.mpc) and value.imag == 0:
        return value.real
    return value


def numeric(value: Value) -> mpmath.mpf | mpmath.mpc:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


class Evaluator:
    """The value of trees where the variables have the given values. ``real``: a value off the real line is Undefined."""

    def __init__(self, point: dict[str, Fraction], real: bool = False) -> None:
        self.point = point
        self.real = real
        self.steps = 0

    def __call__(self, tree: Tree) -> Value:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Unbounded("too long an expression")
        value = _checked(getattr(self, "_" + tree[0], self._none)(tree))
        if self.real and isinstance(value, mpmath.mpc):
            raise Undefined("not real")
        return value

    def _none(self, tree: Tree) -> Value:
        raise Unbounded(f"a {tree[0]} has no value")

    def _num(self, tree: Tree) -> Value:
        return tree[1]

    def _sym(self, tree: Tree) -> Value:
        name = tree[1]
        if name == "pi":
            return +mp.pi
        if name == "e":
            return +mp.e
        if name == "i":
            return mp.mpc(0, 1)
        return self.point[name]

    def _add(self, tree: Tree) -> Value:
        total: Value = Fraction(0)
        for term in tree[1:]:
            value = self(term)
            if not (isinstance(total, Fraction) and isinstance(value, Fraction)):
                total, value = numeric(total), numeric(value)
            total = _checked(total + value)
        return total

    def _mul(self, tree: Tree) -> Value:
        total: Value = Fraction(1)
        for term in tree[1:]:
            value = self(term)
            if not (isinstance(total, Fraction) and isinstance(value, Fraction)):
                total, value = numeric(total), numeric(value)
            total = _checked(total * value)
        return total

    def _neg(self, tree: Tree) -> Value:
        return -self(tree[1])

    def _deg(self, tree: Tree) -> Value:
        return numeric(self(tree[1])) * mp.pi / 180

    def _pct(self, tree: Tree) -> Value:
        value = self(tree[1])
        return value / 100

    def _div(self, tree: Tree) -> Value:
        top, bottom = self(tree[1]), self(tree[2])
        if _is_zero(bottom):
            raise Undefined("division by zero")
        if isinstance(top, Fraction) and isinstance(bottom, Fraction):
            return top / bottom
        return numeric(top) / numeric(bottom)

    def _pow(self, tree: Tree) -> Value:
        if tree[1] == ("sym", "e"):
            return self._exp(self(tree[2]))
        return self.power(self(tree[1]), self(tree[2]))

    def power(self, base: Value, exponent: Value) -> Value:
        if _is_zero(base):
            if isinstance(exponent, mpmath.mpc) or exponent <= 0:
                raise Undefined("zero to a power that is not positive")
            return Fraction(0)
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            exact = _rational_power(base, exponent)
            if exact is not None:
                return exact
        odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
        b, e = numeric(base), numeric(exponent)
        if abs(e) * (abs(mpmath.mag(abs(b))) + 1) > MAX_NUMERIC_BITS:
            raise Unbounded("a power too large")
        if odd_root and not isinstance(b, mpmath.mpc) and b < 0:  # the real root, as it is taught: (-8)^(1/3) = -2
            assert isinstance(exponent, Fraction)
            return mp.power(-b, e) * (-1 if exponent.numerator % 2 else 1)
        return mp.power(b, e)

    def _exp(self, value: Value) -> Value:
        v = numeric(value)
        if abs(v) > MAX_NUMERIC_BITS // 2:
            raise Unbounded("an exponential too large")
        return mp.exp(v)

    def _call(self, tree: Tree) -> Value:
        name = tree[1]
        function = getattr(self, "_call_" + name, None)
        arguments = [self(argument) for argument in tree[2:]]
        if function is not None and len(arguments) in _NUM_ARGUMENTS.get(name, (1,)):
            return function(*arguments)
        if name in _FUNCTIONS and len(arguments) == 1:
            value = numeric(arguments[0])
            if abs(value) > 1e6 and name in ("sinh", "cosh", "tanh"):
                raise Unbounded("a hyperbolic function of a large number")
            if isinstance(value, mpmath.mpc) and abs(value.imag) > 1e6:
                raise Unbounded("a function of a large complex number")
            try:
                return _FUNCTIONS[name](value)
            except (ZeroDivisionError, ValueError) as error:
                raise Undefined(name) from error
        raise Unbounded(f"function {name} of {len(arguments)} arguments")

    def _call_sqrt(self, value: Value) -> Value:
        return self.power(value, Fraction(1, 2)) if not _is_zero(value) else Fraction(0)

    def _call_root(self, value: Value, index: Value) -> Value:
        if not isinstance(index, Fraction) or index == 0:
            raise Unbounded("a root of a strange degree")
        return self.power(value, 1 / index)

    def _call_log(self, value: Value, base: Value | None = None) -> Value:
        if _is_zero(value):
            raise Undefined("the logarithm of zero")
        if base is None:
            return mp.log(numeric(value))
        bottom = mp.log(numeric(base)) if not _is_zero(base) else mp.mpf(0)
        if _is_zero(bottom):
            raise Undefined("a logarithm to base one or zero")
        return mp.log(numeric(value)) / bottom

    def _call_lg(self, value: Value) -> Value:
        return self._call_log(value, Fraction(10))

    def _call_ln(self, value: Value) -> Value:
        return self._call_log(value)

    def _call_exp(self, value: Value) -> Value:
        return self._exp(value)

    def _call_abs(self, value: Value) -> Value:
        return abs(value)

    def _call_floor(self, value: Value) -> Value:
        return Fraction(int(mp.floor(_real(value)))) if not isinstance(value, Fraction) else Fraction(value.__floor__())

    def _call_ceil(self, value: Value) -> Value:
        return -self._call_floor(-value)

    def _call_factorial(self, value: Value) -> Value:
        if abs(value) > MAX_FACTORIAL:
            raise Unbounded("the factorial of a large number")
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            return Fraction(mpmath.libmp.ifac(int(value)))
        try:
            return mp.gamma(numeric(value) + 1)
        except ValueError as error:
            raise Undefined("the factorial of a negative number") from error

    def _call_binom(self, n: Value, k: Value) -> Value:
        if abs(n) > MAX_FACTORIAL or abs(k) > MAX_FACTORIAL:
            raise Unbounded("a binomial of large numbers")
        value = mp.binomial(numeric(n), numeric(k))
        if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and n >= 0 and k >= 0:
            import math

            return Fraction(math.comb(int(n), int(k)))
        return value

    def _call_max(self, *values: Value) -> Value:
        return max(values, key=_real)

    def _call_min(self, *values: Value) -> Value:
        return min(values, key=_real)


_NUM_ARGUMENTS = {"log": (1, 2), "root": (2,), "binom": (2,), "max": range(1, 1000), "min": range(1, 1000)}
"""Of the functions that do not have one argument. A list in brackets, ``\\ln(1, 2)``, is read as arguments, however many there are."""
_FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "arcsin": mp.asin, "arccos": mp.acos,
    "arctan": mp.atan, "arccot": mp.acot, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
}  # fmt: skip


def _real(value: Value) -> mpmath.mpf:
    number = numeric(value)
    if isinstance(number, mpmath.mpc):
        raise Undefined("no order among complex numbers")
    return number


def _is_zero(value: Value) -> bool:
    """Zero, or what rounding left of it."""
    return value == 0 if isinstance(value, Fraction) else abs(value) < mp.mpf(10) ** (10 - mp.dps)


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """Exactly, for a whole exponent and for roots that come out even; None when the result is irrational."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and bits * abs(exponent.numerator) > 2 * MAX_BITS:
            raise Unbounded("a power too large")
        return base ** (exponent.numerator if abs(base) != 1 else exponent.numerator % 2)
    if exponent.denominator == 2 and base > 0 and abs(exponent.numerator) == 1:
        import math

        top, bottom = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if top * top == base.numerator and bottom * bottom == base.denominator:
            return Fraction(top, bottom) ** exponent.numerator
    return None


def symbols(tree: object) -> frozenset[str]:
    """The variables of a tree; pi, e and i are none."""
    return _symbols(tree) - {"pi", "e", "i"}


def _symbols(tree: object) -> frozenset[str]:
    if not isinstance(tree, tuple) or not tree:
        return frozenset()
    if tree[0] == "sym":
        return frozenset((tree[1],))
    return frozenset().union(*(_symbols(part) for part in tree))


def longest_literal(tree: object) -> int:
    """Digits of the longest number in a tree."""
    if isinstance(tree, Fraction):
        return (tree.numerator.bit_length() + tree.denominator.bit_length()) // 3 + 1
    return max((longest_literal(part) for part in tree), default=0) if isinstance(tree, tuple) else 0


def sample_points(names: frozenset[str], count: int = 14) -> list[dict[str, Fraction]]:
    """Fixed points that look like nothing special: every third between 0 and 1, every fourth of whole numbers, the others mixed in sign."""
    points = []
    for k in range(count):
        point = {}
        for name in sorted(names):
            hashed = zlib.crc32(f"{k}:{name}".encode("utf-8", "replace"))
            if k % 3 == 1:
                value = Fraction(1 + hashed % 29, 31 + hashed // 29 % 17)
            elif k % 4 == 3:
                value = Fraction(2 + hashed % 11)
            else:
                value = Fraction(1 + hashed % 97, 2 + hashed // 97 % 11)
            point[name] = -value if k % 2 == 0 and k and hashed >> 20 & 1 else value
        points.append(point)
    return points


def close(a: Value, b: Value) -> bool:
    """Exact for rationals; else to all digits but the last twenty."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    x, y = numeric(a), numeric(b)
    return abs(x - y) <= mp.mpf(10) ** (20 - mp.dps) * max(1, abs(x), abs(y))


def values_at_points(trees: list[Tree], want: int = 4) -> list[list[Value]]:
    """The values of all trees at each of several points where all have one. Raises Unbounded."""
    names = frozenset().union(*(symbols(tree) for tree in trees))
    if not names:
        try:
            evaluator = Evaluator({})
            return [[evaluator(tree) for tree in trees]]
        except Undefined:
            return []
    real = not any("i" in _symbols(tree) for tree in trees)
    found = []
    for point in sample_points(names):
        try:
            evaluator = Evaluator(point, real)
            found.append([evaluator(tree) for tree in trees])
        except Undefined:
            continue
        if len(found) >= want:
            break
    return found


def precision(*trees: Tree) -> object:
    """The context in which to compare these trees: digits enough that no decimal in them passes for an irrational number."""
    return mp.workdps(DIGITS + min(2000, 2 * max((longest_literal(tree) for tree in trees), default=0)))


def same_value(a: Tree, b: Tree) -> bool | None:
    """Whether two expressions are equal wherever both are defined; None if that cannot be told."""
    if symbols(a) != symbols(b) and not (symbols(a) and symbols(b)):
        names = symbols(a) | symbols(b)
        if "∞" in names:
            return False
    try:
        with precision(a, b):
            rows = values_at_points([a, b])
            return all(close(x, y) for x, y in rows) if rows else None
    except Unbounded:
        return None


def proportional(a: Tree, b: Tree) -> Value | None:
    """The constant c with a = c b at all points, not zero; None if there is none."""
    try:
        with precision(a, b):
            ratios = []
            for x, y in values_at_points([a, b], want=5):
                if _is_zero(x) or _is_zero(y):
                    continue
                exact = isinstance(x, Fraction) and isinstance(y, Fraction)
                ratios.append(x / y if exact else numeric(x) / numeric(y))
            return ratios[0] if len(ratios) >= 2 and all(close(ratios[0], ratio) for ratio in ratios[1:]) else None
    except Unbounded:
        return None
