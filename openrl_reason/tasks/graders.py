"""Grading functions: ``(answer_text, gold) -> (score, parsed)``, and the registry of their kinds.

Standard library only, because small worker processes import it; what the other kinds need is imported when a kind is first loaded.

Numbers are compared as canonical decimal strings, exactly: no float, no tolerance, no factor of 100, nothing is evaluated, and a
million digits cost no more than reading them. Both sides are normalised alike: ``18``, ``18.0``, ``$18``, ``18%``, ``18 dollars`` and
``+18.`` are one number; ``1,234.00`` is ``1234``; ``1,8`` is no number at all.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openrl_reason.user_code import load_function

STATUSES = ("ok", "no_answer", "timeout", "memory", "crashed", "error")

# Possessive quantifiers (`*+`): these patterns read hostile text and must not backtrack.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*+)?+|\.[0-9]++)"
_CURRENCY = r"[$\u00a3\u20ac]?"
# sign, currency, number or fraction, percent, then at most a unit in words ("18 dollars per day"): never a second number.
_ANSWER = re.compile(
    rf"\s*+(?P<sign>[-+\u2212]?)\s*+{_CURRENCY}\s*+(?P<sign2>[-+\u2212]?)(?P<number>{_DECIMAL})(?:\s*+/\s*+(?P<denominator>[0-9]++))?"
    r"(?P<unit>(?:[^\W\d_]|[\s./'()%-])*+)"
)
_ANYWHERE = re.compile(rf"(?<![\w.,])[-\u2212]?{_CURRENCY}{_DECIMAL}(?!,[0-9])")
# Words that would make the number another number, or one of several.
_NOT_UNITS = frozenset("k m bn hundred thousand million billion trillion dozen half third quarter or to and times plus minus not squared".split())
_MARK = "####"


@dataclass(frozen=True)
class GradeResult:
    """What became of one answer."""

    score: float
    """The reward, usually 0 or 1. It is 0.0 whenever ``status`` is not "ok", but look at the status before calling it a wrong answer."""
    parsed: str | None
    """The answer that was found in the text, in canonical form; None when there was none."""
    status: str
    """ok, no_answer (nothing to compare), timeout, memory, crashed (the process died), error (the grader raised)."""
    detail: str = ""
    """For a failure, its cause in words."""


def canonical_number(text: str) -> str | None:
    """The number that ``text`` consists of (with sign, currency, %, unit words allowed around it), or None.

    ``-0`` is ``0``; trailing zeros and the trailing period go; ``6/4`` is ``1.5`` and ``1/3`` stays ``1/3`` in lowest terms."""
    # A match against an answer of many thousand characters could backtrack; no honest answer is that long.
    match = _ANSWER.fullmatch(text) if len(text) <= 4096 else None
    if match is None or (match["sign"] and match["sign2"]):
        return None
    words = re.findall(r"[^\W\d_]+", match["unit"].lower())
    if any(word in _NOT_UNITS or (len(word) > 3 and word.removesuffix("s") in _NOT_UNITS) for word in words):
        return None
    negative = (match["sign"] or match["sign2"]) in ("-", "\u2212")
    whole, _, decimals = match["number"].replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    if match["denominator"] is not None:
        value = _divide(whole, decimals, match["denominator"])
        if value is None:
            return None
    return f"-{value}" if negative and value != "0" else value


def _divide(whole: str, decimals: str, denominator: str) -> str | None:
    from fractions import Fraction

    if len(whole) + len(decimals) + len(denominator) > 60 or int(denominator) == 0:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals) * int(denominator))
    rest, power = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest = rest // 10 if rest % 10 == 0 else rest // 5 if rest % 5 == 0 else rest // 2
        power += 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    scaled = str(value.numerator * 10**power // value.denominator).rjust(power + 1, "0")
    whole_part, decimal_part = scaled[: len(scaled) - power], scaled[len(scaled) - power :].rstrip("0")
    return f"{whole_part}.{decimal_part}" if decimal_part else whole_part


def final_number(text: str) -> str | None:
    """Strict reading: the number that fills the line after the last ``####``; None without the mark or without exactly one number."""
    _, mark, tail = text.rpartition(_MARK)
    return canonical_number(tail.lstrip(" ").split("\n", 1)[0]) if mark else None


def last_number(text: str) -> str | None:
    """Lenient reading, for models never taught the mark: as strict where there is a ``####``, else the last number in the text."""
    if _MARK in text:
        return final_number(text)
    found = None
    for match in _ANYWHERE.finditer(text):
        found = match
    return canonical_number(found.group()) if found else None


def _compare(parsed: str | None, gold: str) -> tuple[float, str | None]:
    expected = canonical_number(gold)
    if expected is None:
        raise ValueError(f"the gold answer {gold!r} is not a number")
    return (1.0 if parsed is not None and parsed == expected else 0.0), parsed


def grade_final_number(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if :func:`final_number` of the answer equals the gold number."""
    return _compare(final_number(answer_text), gold)


def grade_last_number(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if :func:`last_number` of the answer equals the gold number."""
    return _compare(last_number(answer_text), gold)


class _Lazy:
    """A grader whose module is imported when its kind is first loaded: it may be heavy, and may lack a package."""

    def __init__(self, module: str, name: str, *arguments: object, loader: bool = False) -> None:
        self.module, self.name, self.arguments, self.loader = module, name, arguments, loader

    def load(self) -> Callable[[str, str], object]:
        found = getattr(importlib.import_module(f"openrl_reason.tasks.{self.module}"), self.name)
        return found(*self.arguments) if self.loader else found

    def __call__(self, answer_text: str, gold: str) -> object:
        return self.load()(answer_text, gold)


GRADERS: dict[str, Callable[[str, str], object]] = {
    "arithmetic": grade_final_number,
    "gsm8k": grade_final_number,
    "gsm8k_lenient": grade_last_number,
    "gsm8k_parity": _Lazy("grade_parity", "load_gsm8k_parity", loader=True),
    "math": _Lazy("grade_math", "load_math", loader=True),
    "math_lenient": _Lazy("grade_math", "load_math_lenient", loader=True),
    "math_parity": _Lazy("grade_parity", "load_math_parity", loader=True),
    "text": _Lazy("grade_choice", "grade_text"),
    "yes_no": _Lazy("grade_choice", "grade_yes_no"),
    **{f"choice{options}": _Lazy("grade_choice", "load_choice", options, loader=True) for options in range(2, 27)},
}


def _kinds() -> str:
    return ", ".join([*(kind for kind in GRADERS if not kind.startswith("choice")), "choice2 to choice26 (by the number of options)"])


def check_gold(kind: str, gold: str) -> None:
    """Raise ValueError if no answer can ever equal ``gold``: cheap, for use when a data set is loaded. Kinds by path are not checked."""
    if kind in ("arithmetic", "gsm8k", "gsm8k_lenient"):
        _compare(None, gold)
    elif kind.startswith("choice") and kind in GRADERS:
        from openrl_reason.tasks.grade_choice import choice_gold

        choice_gold(gold, int(kind[len("choice") :]))
    elif kind == "yes_no":
        from openrl_reason.tasks.grade_choice import yes_no_gold

        yes_no_gold(gold)
    elif kind in GRADERS and not gold.strip().strip("."):
        raise ValueError(f"the gold answer {gold!r} is empty")


def check_kind(kind: str) -> None:
    """Raise ValueError unless ``kind`` is built in, ``module:function`` or ``path/to/file.py:function``. Nothing is imported."""
    source, colon, function = kind.rpartition(":")
    if kind in GRADERS:
        return
    if not (colon and source and function.isidentifier()):
        near = difflib.get_close_matches(kind, GRADERS, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"grader {kind!r} is unknown{meant}. Use {_kinds()}, 'module:function' or 'path/to/file.py:function'")
    if source.endswith(".py") and not Path(source).is_file():
        raise ValueError(f"grader {kind!r}: there is no file {source}")


def load_grader(kind: str) -> Callable[[str, str], object]:
    """The function behind ``kind``. Importing a user's module runs its code: called in the worker process only.

    Raises ValueError for an unknown kind, RuntimeError where a package that the kind needs is missing or of another version."""
    if kind in GRADERS:
        grader = GRADERS[kind]
        return grader.load() if isinstance(grader, _Lazy) else grader
    check_kind(kind)
    source, _, function = kind.rpartition(":")
    return load_function(source, function)


def as_result(returned: object) -> GradeResult:
    """A grader may return a number, ``(number, parsed)`` or a GradeResult. Anything else, or a number that is not finite, is an error."""
    if isinstance(returned, GradeResult) and returned.status in STATUSES and abs(returned.score) < float("inf"):
        return returned
    pair = isinstance(returned, tuple) and len(returned) == 2
    score, parsed = returned if pair else (returned, None)  # type: ignore[misc]
    if not isinstance(score, numbers.Real) or not abs(score) < float("inf"):
        return GradeResult(0.0, None, "error", f"the grader returned {returned!r}; expected a finite number or (number, parsed)")
    missing = pair and parsed is None
    return GradeResult(float(score), None if parsed is None else str(parsed), "no_answer" if missing else "ok")
