"""What the published evaluations of OREO and DeepSeek-Math accept, kinds ``gsm8k_parity`` and ``math_parity``: for comparable figures.

Not a reward: a factor of 100 either way and a distance of 0.001 are right here, ``j`` is ``i``, brackets of tuples are not looked at.
Written from the described behaviour (spec/oreo.md 1.9 and appendix C). Where those evaluations hand the text of the model to sympy's
``parse_expr``, which executes it, and wait for a child process, this one reads it with :mod:`grade_latex` and computes with
:mod:`grade_values`: so a power tower is wrong at once, and the verdict does not depend on the load of the machine. What differs by that
is listed in docs/grading.md.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from mpmath import mp

from openrl_reason.tasks.grade_clean import clean
from openrl_reason.tasks.grade_extract import MAX_ANSWER, matching_brace
from openrl_reason.tasks.grade_latex import read
from openrl_reason.tasks.grade_math import check_dependencies
from openrl_reason.tasks.grade_scan import Tree, Unreadable
from openrl_reason.tasks.grade_values import Unbounded, numeric, precision, same_value, symbols, values_at_points

TOLERANCE = 1e-3
_LAST_NUMBER = re.compile(r"-?(?:[0-9]*\.)?[0-9]+")
_AND = re.compile(r"\\text\{\s*and\s*\}")
_BRACKETED = re.compile(r"[(\[].+[)\]]")
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", re.DOTALL)
_MAX_ANSWERS = 50


def load_gsm8k_parity() -> Callable[[str, str], object]:
    check_dependencies()
    return grade_gsm8k_parity


def load_math_parity() -> Callable[[str, str], object]:
    check_dependencies()
    return grade_math_parity


# -- extraction


def extract(text: str) -> list[str]:
    """The answers, normalised: "final answer is $...$. I hope", else all boxes, else behind the last "he answer is", else the last
    program output, else the last number."""
    found: list[str] = []
    if "final answer is $" in text and "$. I hope" in text:
        found = [text.split("final answer is $", 1)[1].split("$. I hope", 1)[0]]
    elif "boxed" in text:
        found = _boxes(text)
    elif "he answer is" in text:
        found = [text.rsplit("he answer is", 1)[1]]
    else:
        output = text.rsplit("```output", 1)[1].split("```", 1)[0].strip() if "```output" in text else ""
        found = [output or _last_number(text)]
        if not found[0]:
            return []
    return [_first_line(answer) for answer in found]


def _first_line(answer: str) -> str:
    line = answer.strip().split("\n", 1)[0][: MAX_ANSWER + 1]
    return normalise(line.lstrip(":").rstrip(".").rstrip("/"))


def _boxes(text: str) -> list[str]:
    """What the last boxes hold, in order; those that are never closed are left out."""
    starts = [match.end() - 1 for match in re.finditer(r"boxed\{", text)][-_MAX_ANSWERS:]
    found = []
    for start in starts:
        end = matching_brace(text, start)
        if end >= 0:
            found.append(text[start + 1 : end])
    return found


def _last_number(text: str) -> str:
    last = ""
    for match in _LAST_NUMBER.finditer(text.replace(",", "")):
        last = match.group()
    return last


_REMOVED = re.compile(r"\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\$|\\mathbf|\\mathrm|\\cdot|x\\in")
_TRAILING_UNIT = re.compile(r"(.*?\S.*?)\s*\\text\{[^{}]*\}", re.DOTALL)


def normalise(text: str) -> str:
    """One spelling, as those evaluations understand it: no layout, no units at the end, no dollar signs, ``j`` for ``i``, ``a/b`` a fraction."""
    if len(text) > MAX_ANSWER:
        return text[:60]
    text = text.strip().replace("\n", "").rstrip(".")
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[6:-1]
    text = re.sub(r"[tdc]frac", "frac", text)
    text = _REMOVED.sub("", text)
    if unit := _TRAILING_UNIT.fullmatch(text):
        text = unit[1]
    text = re.sub(r"\{[cm]?m\}(?:\^[23])?|\\mbox\{[^{}]*\}|p\.m\.$", "", text.strip()).strip() or text.strip()
    text = re.sub(r"([0-9])\s*t$", r"\1", text).replace("\\%", "%")
    text = text.replace("infinity", "\\infty") if "infinity" in text else re.sub(r"(?<!\\)inf(?!ty)", r"\\infty", text)
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"([0-9])\.0+(?![0-9])", r"\1", text)
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    text = re.sub(r"\\sqrt(-?[0-9.a-zA-Z]+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+(\w+)$", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\\])(?:\{|([^{\\]))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else "{"), text)
    text = re.sub(r"^(-?[0-9]{1,200})/(-?[0-9]{1,200})$", r"\\frac{\1}{\2}", text)
    return re.sub(r"[\\,.]+$", "", text)


# -- comparison


def _digits(text: str) -> float | None:
    """The number that a text is, with commas and a percent sign allowed."""
    plain = text.replace(",", "").strip()
    percent = plain.endswith("%")
    plain = plain.removesuffix("%").removesuffix("\\") if percent else plain
    if len(plain) > 400 or not re.fullmatch(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?", plain):
        return None
    value = float(plain)
    return value / 100 if percent else value


def math_equal(answer: str, gold: str, depth: int = 0) -> bool:
    """Equal as numbers up to a factor of 100 and a distance of 0.001, part by part, or as expressions."""
    if answer == gold:
        return True
    a, b = _digits(answer), _digits(gold)
    if a is not None and b is not None:
        return any(math.isclose(reference, a, abs_tol=TOLERANCE) for reference in (b / 100, b, b * 100))
    if not answer or depth > 5:
        return False
    answer, gold = answer.strip(), gold.strip()
    if _BRACKETED.match(answer) and _BRACKETED.match(gold):
        parts, others = answer[1:-1].split(","), gold[1:-1].split(",")
        if len(parts) == len(others) <= _MAX_ANSWERS and all(math_equal(x, y, depth + 1) for x, y in zip(parts, others, strict=True)):
            return True
    if _same_matrix(answer, gold, depth):
        return True
    if answer.count("=") == gold.count("=") == 1:
        return _same_equation(answer, gold)
    if len(value := _behind_name(answer)) and "=" not in gold:
        return math_equal(value, gold, depth + 1)
    if len(value := _behind_name(gold)) and "=" not in answer:
        return math_equal(answer, value, depth + 1)
    return symbolic_equal(answer, gold)


def _behind_name(text: str) -> str:
    """``5`` for ``x=5``; "" if the text is no such equation."""
    name, _, value = text.partition("=")
    return value if text.count("=") == 1 and len(name.strip()) <= 2 else ""


def _same_matrix(answer: str, gold: str, depth: int) -> bool:
    a, b = _MATRIX.fullmatch(answer), _MATRIX.fullmatch(gold)
    if a is None or b is None:
        return False
    rows = [[row.split("&") for row in match[1].split("\\\\") if row.strip()] for match in (a, b)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    return all(math_equal(x, y, depth + 1) for row, other in zip(*rows, strict=True) for x, y in zip(row, other, strict=True))


@functools.lru_cache(maxsize=256)
def _tree(text: str) -> Tree | None:
    try:
        return read(clean(text))
    except Unreadable:
        return None


def _difference(text: str) -> Tree | None:
    left, _, right = text.partition("=")
    a, b = _tree(left), _tree(right)
    return None if a is None or b is None else ("add", a, ("neg", b))


def _same_equation(answer: str, gold: str) -> bool:
    a, b = _difference(answer), _difference(gold)
    return a is not None and b is not None and (_same_expression(a, b) or _same_expression(("neg", a), b))


def symbolic_equal(answer: str, gold: str) -> bool:
    a, b = _tree(answer), _tree(gold)
    return a is not None and b is not None and _same_expression(a, b)


def _same_expression(a: Tree, b: Tree) -> bool:
    if a == b or same_value(a, b):
        return True
    if symbols(a) or symbols(b):
        return False
    try:
        with precision(a, b):
            return any(mp.almosteq(numeric(x), numeric(y), 1e-9, TOLERANCE) for x, y in values_at_points([a, b]))
    except Unbounded:
        return False


def _same_answer(answer: str, gold: str) -> bool:
    """One answer against one gold; unions part by part, in any order."""
    if "\\cup" in answer and "\\cup" in gold:
        return _same_answers(answer.split("\\cup")[:_MAX_ANSWERS], gold.split("\\cup")[:_MAX_ANSWERS])
    a, b = _float(answer), _float(gold)
    return (a is not None and b is not None and abs(a - b) < TOLERANCE) or bool(gold) and answer == gold or math_equal(answer, gold)


def _float(text: str) -> float | None:
    return None if text.strip().endswith("%") else _digits(text)


def _same_answers(answers: list[str], golds: list[str]) -> bool:
    """Every answer has a gold and every gold an answer."""
    matched = [[_same_answer(answer, gold) for gold in golds] for answer in answers]
    return all(map(any, matched)) and all(map(any, zip(*matched, strict=True))) and bool(answers)


# -- the kinds


def _gold_text(gold: str) -> str:
    if not gold.strip():
        raise ValueError(f"the gold answer {gold!r} is empty")
    return gold


def grade_gsm8k_parity(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if the last extracted answer is the gold number, by :func:`math_equal`."""
    expected = normalise(_gold_text(gold).rpartition("####")[2])
    found = extract(answer_text)
    answer = found[-1] if found else ""
    return (1.0 if answer and _same_answer(answer, expected) else 0.0), answer or None


def split_answers(text: str, by_commas: bool) -> list[str]:
    """Several answers in one text: at commas if it is a list without brackets, at a word "and"."""
    if by_commas and not re.search(r"[()\[\]]", text):
        return [part.strip() for part in text.split(",")]
    return [part.strip() for part in _AND.split(text)]


def is_comma_list(gold: str) -> bool:
    """Whether a gold answer is a list. The published evaluations ask the question for the words "separated by commas"; a grader sees no
    question, so a gold with commas, no brackets, and not of the form of one number (``1,234``) takes their place."""
    return "," in gold and not re.search(r"[()\[\]]", gold) and not re.fullmatch(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", gold)


def grade_math_parity(answer_text: str, gold: str) -> tuple[float, str | None]:
    """1.0 if the last answers match the gold answers both ways, by :func:`math_equal`."""
    golds = extract(gold) if "boxed" in _gold_text(gold) else [_first_line(gold)]
    by_commas = any(map(is_comma_list, golds))
    expected = list(dict.fromkeys(part for text in golds for part in split_answers(text, by_commas)))
    found = list(dict.fromkeys(part for text in extract(answer_text) for part in split_answers(text, by_commas)))[-len(expected) :]
    if not any(found):
        return 0.0, None
    return (1.0 if _same_answers(found, expected[:_MAX_ANSWERS]) else 0.0), ", ".join(found)[:500]
