"""Whether two answers, read by :mod:`grade_latex`, say the same: structure by structure, expressions by value.

Tuples and intervals keep their order and their brackets; lists, sets, unions and roots may come in any order. A unit may be left out on one
side, never changed. ``x = 5`` is 5; an equation is any non-zero multiple of itself. Inequalities, intervals and their unions are compared as
parts of the real line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpmath import mp

from openrl_reason.tasks.grade_scan import Tree
from openrl_reason.tasks.grade_units import may_be_left_out, words_of
from openrl_reason.tasks.grade_values import DIGITS, Unbounded, Undefined, numeric, proportional, same_value, symbols, values_at_points

INFINITY = ("sym", "∞")
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}


def expand(tree: Tree) -> Tree:
    """Alternatives written out: ``1 \\pm a`` becomes a list of two, ``x = 2, 3`` a list of values, ``x \\in S`` S."""
    if tree[0] == "list":
        items: list[Tree] = []
        for item in tree[1:]:
            grown = expand(item)
            items.extend(grown[1:] if grown[0] == "list" else (grown,))
        return ("list", *items)
    if _mentions_pm(tree):
        return ("list", _with_sign(tree, 1), _with_sign(tree, -1))
    if tree[0] == "set":
        return tree
    if tree[0] == "rel" and tree[1] == "∈":
        return tree[3]
    return tree


def _mentions_pm(tree: object) -> bool:
    return isinstance(tree, tuple) and bool(tree) and (tree[0] == "pm" or any(_mentions_pm(part) for part in tree))


def _with_sign(tree: Tree, sign: int) -> Tree:
    if tree[0] == "pm":
        inner = _with_sign(tree[2], sign)
        return inner if (tree[1] == "±") == (sign > 0) else ("neg", inner)
    return tuple(_with_sign(part, sign) if isinstance(part, tuple) and part else part for part in tree)


def split_unit(tree: Tree) -> tuple[Tree, str]:
    """The measured value and its unit, "" if there is none."""
    kind = tree[0]
    if kind == "unit":
        inner, within = split_unit(tree[1])
        return inner, " ".join(name for name in (within, tree[2]) if name)
    if kind == "deg":
        return tree[1], "degree"
    if kind == "pct":
        return tree[1], "percent"
    if kind == "neg":
        inner, unit = split_unit(tree[1])
        return ("neg", inner), unit
    if kind == "mul":  # 2x°, $5 x
        inner, unit = split_unit(tree[-1])
        return (*tree[:-1], inner), unit
    return tree, ""


def same(gold: Tree, answer: Tree) -> bool:
    """Whether two answers say the same."""
    if gold == answer:
        return True
    if answer[0] == "list" and gold[0] not in ("list", "set", "union", "rel", "text"):
        return all(same(gold, item) for item in answer[1:])  # 1/2 or 0.5: one answer, said twice
    if gold[0] == "rel" or answer[0] == "rel":
        return _same_relations(gold, answer)
    if "text" in (gold[0], answer[0]):
        a, b = _labels(gold), _labels(answer)
        return a is not None and b is not None and _same_labels(a, b)
    gold, gold_unit = split_unit(gold)
    answer, unit = split_unit(answer)
    if not _units_agree(gold_unit, unit):
        return False
    if gold[0] == "list" and answer[0] == "set" or gold[0] == "set" and answer[0] == "list":
        return _same_bag(gold[1:], answer[1:])
    if gold[0] == answer[0] and gold[0] in _BY_KIND:
        return _BY_KIND[gold[0]](gold, answer)
    if gold[0] in _NOT_EXPRESSIONS or answer[0] in _NOT_EXPRESSIONS:
        return _same_regions(gold, answer) or _same_matrices(_distributed(gold), _distributed(answer))
    if _has(gold, "matrix") or _has(answer, "matrix"):
        return _same_matrices(_distributed(gold), _distributed(answer))
    return bool(same_value(gold, answer))


def _units_agree(gold: str, unit: str) -> bool:
    if gold == unit:
        return True
    if gold and unit:
        return gold in ("unit", "unit^2", "unit^3") and gold == unit
    return may_be_left_out(gold or unit)


def same_words(gold: str, answer: str) -> bool:
    """Words and names in any case; a single letter as it is, with or without brackets."""
    a, b = words_of(gold), words_of(answer)
    if len(a) <= 1 or len(b) <= 1:
        return a == b and bool(a)
    return a.casefold() == b.casefold()


def _labels(tree: Tree) -> list[str] | None:
    """The words of an answer that consists of words: one text, perhaps with commas in it, a variable, or a list of them."""
    if tree[0] == "text":
        return [part for part in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", words_of(tree[1])) if part]
    if tree[0] == "sym":
        return [tree[1]]
    if tree[0] != "list":
        return None
    parts = [_labels(item) for item in tree[1:]]
    return None if None in parts else [word for part in parts for word in part or []]


def _same_labels(gold: list[str], answer: list[str]) -> bool:
    """Labels of one letter in any order; words in theirs, for "in which order" is a question, too."""
    if all(len(words_of(label)) == 1 for label in (*gold, *answer)):
        return sorted(map(words_of, gold)) == sorted(map(words_of, answer))
    return len(gold) == len(answer) and all(map(same_words, gold, answer))


def _same_in_order(gold: Tree, answer: Tree) -> bool:
    return len(gold) == len(answer) and all(map(same, gold[1:], answer[1:]))


def _same_groups(gold: Tree, answer: Tree) -> bool:
    return gold[1] == answer[1] and len(gold) == len(answer) and all(map(same, gold[2:], answer[2:]))


def _same_bag(gold: Sequence[Tree], answer: Sequence[Tree]) -> bool:
    """The same elements, as often, in any order: each gold element takes the first answer that equals it."""
    if len(gold) != len(answer) or len(gold) > 100:
        return False
    left = list(answer)
    for element in gold:
        match = next((index for index, other in enumerate(left) if same(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_sets(gold: Tree, answer: Tree) -> bool:
    if len(answer) > 2 * len(gold) + 8:  # few repetitions are honest, and telling a hundred elements apart takes a second
        return False
    return _same_bag(_distinct(gold[1:]), _distinct(answer[1:]))


def _distinct(items: Sequence[Tree]) -> list[Tree]:
    found: list[Tree] = []
    for item in items[:100]:
        if not any(same(other, item) for other in found):
            found.append(item)
    return found


def _same_unions(gold: Tree, answer: Tree) -> bool:
    return _same_bag(gold[1:], answer[1:]) or _same_regions(gold, answer)


def _same_matrices(gold: Tree, answer: Tree) -> bool:
    if gold[0] != "matrix" or answer[0] != "matrix" or gold[1] != answer[1] or [len(r) for r in gold[2:]] != [len(r) for r in answer[2:]]:
        return False
    return all(same(a, b) for row, other in zip(gold[2:], answer[2:], strict=True) for a, b in zip(row, other, strict=True))


def _has(tree: object, kind: str) -> bool:
    return isinstance(tree, tuple) and bool(tree) and (tree[0] == kind or any(_has(part, kind) for part in tree))


def _distributed(tree: Tree) -> Tree:
    """A number times a matrix, as one matrix."""
    if tree[0] == "neg" and (inner := _distributed(tree[1]))[0] == "matrix":
        return (*inner[:2], *(tuple(("neg", cell) for cell in row) for row in inner[2:]))
    if tree[0] == "mul":
        factors = [_distributed(factor) for factor in tree[1:]]
        matrices = [factor for factor in factors if factor[0] == "matrix"]
        if len(matrices) == 1:
            rest = [factor for factor in factors if factor[0] != "matrix"]
            return (*matrices[0][:2], *(tuple(("mul", *rest, cell) for cell in row) for row in matrices[0][2:]))
    if tree[0] == "div" and (inner := _distributed(tree[1]))[0] == "matrix":
        return (*inner[:2], *(tuple(("div", cell, tree[2]) for cell in row) for row in inner[2:]))
    return tree


def _same_based(gold: Tree, answer: Tree) -> bool:
    return gold == answer


_BY_KIND = {
    "list": lambda a, b: _same_bag(a[1:], b[1:]), "set": _same_sets, "union": _same_unions, "group": _same_groups, "ratio": _same_in_order,
    "matrix": _same_matrices, "based": _same_based,
}  # fmt: skip
_NOT_EXPRESSIONS = frozenset(_BY_KIND)


# -- relations and regions


def _is_name(side: Tree) -> bool:
    """Whether a side of an equation names what is asked for: ``x``, ``a_1``, ``AB``, ``f(x)``, ``x + y``, ``\\text{Area}``; ``2x`` does not."""
    if side[0] in ("text", "sym"):
        return side not in (("sym", "pi"), ("sym", "e"), ("sym", "i"), ("sym", "∞"))
    if side[0] == "mul" and len(side) == 3 and side[1][0] == "sym" and side[2][0] == "num":
        return True  # f(2)
    if side[0] in ("mul", "add", "div", "neg", "group", "deg"):
        return all(_is_name(part) for part in side[1:] if isinstance(part, tuple))
    return side[0] == "call" and side[1] in ("abs", "max", "min") and all(_is_name(part) for part in side[2:])


def _is_constant(tree: Tree) -> bool:
    return tree[0] not in ("text", "rel") and not symbols(tree)


def value_of(tree: Tree) -> Tree | None:
    """What ``x = 5`` or ``2 + 3 = 5`` gives: its last side, if the others are names or have the same value."""
    if tree[0] != "rel" or set(tree[1]) != {"="}:
        return None
    *others, last = tree[2:]
    if _is_name(last) and len(others) == 1 and not _is_name(others[0]):
        return others[0]
    names = [side for side in others if not _is_constant(side)]
    values = [side for side in others if _is_constant(side)]
    if all(_is_name(side) for side in names[:1]) and all(same(last, value) for value in values):
        return last
    return None


def _same_relations(gold: Tree, answer: Tree) -> bool:
    if gold[0] == "rel" and answer[0] == "rel":
        return _same_two_relations(gold, answer)
    relation, other = (gold, answer) if gold[0] == "rel" else (answer, gold)
    value = value_of(relation)
    if value is not None:
        return same(value, other) if relation is gold else same(other, value)
    if relation is gold and set(gold[1]) == {"="} and all(_is_constant(side) for side in gold[2:]):  # 0.56 = 56\%
        return any(same(side, answer) for side in gold[2:])
    return other[0] in ("group", "union", "set") and _same_regions(gold, answer)


def _same_two_relations(gold: Tree, answer: Tree) -> bool:
    if gold[1] == answer[1] and len(gold) == len(answer) and all(map(same, gold[2:], answer[2:])):
        return True
    flipped = "".join(_FLIPPED.get(op, op) for op in reversed(answer[1]))
    if gold[1] == flipped and len(gold) == len(answer) and all(map(same, gold[2:], reversed(answer[2:]))):
        return True
    if len(gold) == len(answer) == 4:
        return _same_one_relation(gold, answer)
    a, b = value_of(gold), value_of(answer)
    if a is not None and b is not None:
        return same(gold[2], answer[2]) and same(a, b)
    return symbols(gold) == symbols(answer) and _same_regions(gold, answer)


def _same_one_relation(gold: Tree, answer: Tree) -> bool:
    """``2x + y = 3`` is ``4x = 6 - 2y``; an inequality turns when both sides are multiplied by a negative number."""
    if symbols(gold) != symbols(answer) or any(side[0] in _NOT_EXPRESSIONS | {"text"} for side in (*gold[2:], *answer[2:])):
        return False
    if gold[1] not in _FLIPPED or answer[1] not in _FLIPPED:
        return False
    factor = proportional(("add", gold[2], ("neg", gold[3])), ("add", answer[2], ("neg", answer[3])))
    if factor is None:
        return False
    if gold[1] in "=≠":
        return gold[1] == answer[1]
    positive = mp.re(numeric(factor)) > 0
    return mp.im(numeric(factor)) == 0 and gold[1] == (answer[1] if positive else _FLIPPED[answer[1]])


def _same_regions(gold: Tree, answer: Tree) -> bool:
    """Intervals, their unions, and inequalities in one variable, as parts of the real line."""
    a, b = _region(gold), _region(answer)
    return a is not None and b is not None and a == b


def _region(tree: Tree) -> list[tuple] | None:
    """Sorted disjoint pieces ``(low, low_open, high, high_open)``; None if this is not a part of the real line with known ends."""
    pieces: list[tuple] = []
    try:
        for part in tree[1:] if tree[0] in ("union", "list") else (tree,):
            found = _pieces(part)
            if found is None:
                return None
            pieces.extend(found)
    except (Unbounded, Undefined):
        return None
    pieces.sort(key=lambda piece: (piece[0], piece[1]))
    merged: list[tuple] = []
    for low, low_open, high, high_open in pieces:
        if merged and (low < merged[-1][2] or low == merged[-1][2] and not (low_open and merged[-1][3])):
            start, start_open, end, end_open = merged[-1]
            if (high, not high_open) > (end, not end_open):
                end, end_open = high, high_open
            merged[-1] = (start, start_open, end, end_open)
        else:
            merged.append((low, low_open, high, high_open))
    return merged


def _pieces(tree: Tree) -> list[tuple] | None:
    infinity = mp.inf
    if tree[0] == "group" and len(tree) == 4:
        low, high = _end(tree[2]), _end(tree[3])
        return [(low, tree[1][0] == "(", high, tree[1][1] == ")")] if low < high else None
    if tree[0] == "set" and len(tree) > 1:
        return [(_end(item), False, _end(item), False) for item in tree[1:]]
    if tree[0] != "rel":
        return None
    named = [side for side in tree[2:] if not _is_constant(side) and side not in (INFINITY, ("neg", INFINITY))]
    if len(named) != 1 or not _is_name(named[0]):
        return None
    variable = named[0]
    ops, sides = tree[1], tree[2:]
    at = sides.index(variable)
    if ops == "≠":
        end = _end(sides[1 - at])
        return [(-infinity, True, end, True), (end, True, infinity, True)]
    low, low_open, high, high_open = -infinity, True, infinity, True
    for k, op in enumerate(ops):
        left, right = sides[k], sides[k + 1]
        if variable not in (left, right) or op not in "<>≤≥":
            return None
        bound = _end(right if left == variable else left)
        if (op in "<≤") == (left == variable):
            high, high_open = bound, op in "<>"
        else:
            low, low_open = bound, op in "<>"
    return [(low, low_open, high, high_open)] if low < high else None


def _end(tree: Tree) -> object:
    """One end of an interval, rounded so that equal values are equal; infinities included."""
    if tree in (INFINITY, ("neg", INFINITY)):
        return mp.inf if tree[0] == "sym" else -mp.inf
    tree, _ = split_unit(tree)
    if symbols(tree):
        raise Unbounded("an end with variables")
    with mp.workdps(DIGITS):
        rows = values_at_points([tree])
        value = numeric(rows[0][0]) if rows else None
        if value is None or mp.im(value) != 0:
            raise Undefined("an end that is no real number")
    with mp.workdps(DIGITS - 20):
        return +mp.mpf(value)
