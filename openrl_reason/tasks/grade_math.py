"""The strict grader of competition mathematics, kind ``math``: the reward that cannot be fooled.

The answer is what the last ``\\boxed{...}`` holds and nothing else. It is read by :mod:`grade_latex` into a tree and compared with the gold
by structure (tuples in order, lists, sets and unions in any order, brackets, units, number bases) and by exact value
(:mod:`grade_values`): no tolerance, no factor of 100. docs/grading.md says what is accepted.

math-verify 0.9.0 is asked only where the *gold* uses LaTeX this reader does not know. An audit of it and of latex2sympy2_extended 1.11.0:
``ExprExtractionConfig`` of math-verify ends in sympy's ``parse_expr``, which is ``eval``; ``LatexExtractionConfig`` is an ANTLR grammar whose
visitor builds sympy objects, and calls ``parse_expr`` on nothing but ``variable_values``, which stay empty here. So only the LaTeX side is
used, behind :func:`_small_enough`, with ``parsing_timeout=None`` and ``timeout_seconds=None`` (their timeouts are SIGALRM); a loop that gets
through is for the deadline of the worker process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
import sys

from openrl_reason.tasks.grade_clean import clean
from openrl_reason.tasks.grade_equal import expand, same, same_words
from openrl_reason.tasks.grade_extract import MAX_ANSWER, after_answer_is, after_mark, last_boxed
from openrl_reason.tasks.grade_latex import read
from openrl_reason.tasks.grade_render import canonical, plain_number
from openrl_reason.tasks.grade_scan import Tree, Unreadable

_NEEDED = {"math-verify": "0.9.", "latex2sympy2_extended": "1.", "antlr4-python3-runtime": "4.13."}
_THOUSANDS = re.compile(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def check_dependencies() -> None:
    """RuntimeError unless math-verify and the parser under it are the versions whose verdicts were tried. Called when the kind is loaded."""
    for package, prefix in _NEEDED.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not version.startswith(prefix):
            raise RuntimeError(
                f"the math graders need {package} {prefix}*, found {version or 'none'}: with another one, symbolic answers would silently be "
                f"graded wrong. Install it: pip install '{package}=={prefix}*'"
            )
    import latex2sympy2_extended.latex2sympy2
    import math_verify  # noqa: F401 - loaded now, so that a broken installation shows at load time

    probe = latex2sympy2_extended.latex2sympy2.latex2sympy(r"\frac{1}{2}")
    if str(probe.doit()) != "1/2":
        raise RuntimeError(f"latex2sympy2_extended reads \\frac{{1}}{{2}} as {probe}; its parser does not fit antlr4-python3-runtime")


def load_math() -> object:
    check_dependencies()
    return grade_math


def load_math_lenient() -> object:
    check_dependencies()
    return grade_math_lenient


def grade_math(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if the last ``\\boxed{...}`` of the answer equals the gold answer. ValueError for an empty gold."""
    return _grade(last_boxed(answer_text), gold)


def grade_math_lenient(answer_text: str, gold: str) -> tuple[float, str | None]:
    """As :func:`grade_math`; without a box, what follows the last ``####`` or the last "answer is"."""
    found = last_boxed(answer_text)
    if found is None and "\\boxed" not in answer_text:
        found = after_mark(answer_text) or after_answer_is(answer_text)
    return _grade(found, gold)


def _grade(found: str | None, gold: str) -> tuple[float, str | None]:
    expected = gold_answer(gold)
    if found is None:
        return 0.0, None
    if len(found) > MAX_ANSWER:
        return 0.0, found[:60] + "..."
    answer = parse_answer(found)
    if not answer.text:
        return 0.0, None
    return (1.0 if equal(expected, answer) else 0.0), answer.canonical


class Answer:
    """One final answer: as cleaned text, and as a tree if it could be read."""

    def __init__(self, text: str) -> None:
        self.text = clean(text)
        self.number = plain_number(self.text)
        self.tree: Tree | None = None
        self.foreign = False
        if self.number is None:
            try:
                self.tree = expand(read(self.text))
            except Unreadable as error:
                self.foreign = error.foreign
        else:
            self.tree = ("num", self.number)

    @functools.cached_property
    def canonical(self) -> str:
        return canonical(self.tree, self.text) if self.tree is not None else self.text[:200]

    @functools.cached_property
    def as_list(self) -> Tree | None:
        """The other reading of ``1,234``: two numbers."""
        if not _THOUSANDS.search(self.text):
            return None
        try:
            return expand(read(self.text, thousands=False))
        except Unreadable:
            return None


def parse_answer(text: str) -> Answer:
    return Answer(text)


@functools.lru_cache(maxsize=256)
def gold_answer(gold: str) -> Answer:
    """The gold answer, read; a text that still has its box is taken out of it. ValueError if there is nothing to match."""
    inner = last_boxed(gold) if "\\boxed" in gold else gold
    if inner and len(inner) > MAX_ANSWER:  # of an answer as long nothing is read, either
        raise ValueError(f"the gold answer has {len(inner)} characters, more than the {MAX_ANSWER} of the longest answer that is read")
    answer = parse_answer(inner or "")
    if not answer.text:
        raise ValueError(f"the gold answer {gold[:80]!r} is empty")
    return answer


def equal(gold: Answer, answer: Answer) -> bool:
    if gold.number is not None and answer.number is not None:
        return gold.number == answer.number
    if gold.text == answer.text:
        return True
    if gold.tree is not None and answer.tree is not None:
        if same(gold.tree, answer.tree):
            return True
        return _same_as_lists(gold, answer)
    if gold.tree is None and gold.foreign:
        return _math_verify(gold.text, answer.text)
    return "\\text" in gold.text and same_words(gold.text, answer.text)


def _same_as_lists(gold: Answer, answer: Answer) -> bool:
    """``100,200`` may be one number or two. If one side leaves no doubt, so does the other; the order then counts."""
    if gold.as_list is None and answer.as_list is None:
        return False
    a, b = gold.as_list or gold.tree, answer.as_list or answer.tree
    assert a is not None and b is not None
    return a[0] == b[0] == "list" and len(a) == len(b) and all(map(same, a[1:], b[1:]))


# -- the last resort


_RISKY = re.compile(r"[0-9]{5}|!|binom|\^.{0,12}\^|\^\s*\{?\s*-?\(?[0-9]{3}|\\(?:prod|Pi|Gamma|exp|sinh|cosh|tanh|sum|mod|gcd|lcm)|[^\x20-\x7e]")


def _small_enough(text: str) -> bool:
    """Whether sympy may see it: short, shallow, no long number, no tower of powers, no factorial, binomial, sum or product."""
    if len(text) > 200 or _RISKY.search(text):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= 6


def _math_verify(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    if not (_small_enough(gold) and _small_enough(answer)):
        return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the timeouts that are switched off on purpose
    parsed = []
    for text in (gold, answer):
        found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            return False
        parsed.append(found)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))
