"""The published evaluations, as described: their golden cases, tolerances included, and nothing executed."""


import pytest

from openrl_reason.tasks.grade_math import grade_math
from openrl_reason.tasks.grade_parity import extract, grade_gsm8k_parity, grade_math_parity, math_equal
from tests.timing import passes

GSM8K = [
    ("so #### 18", "18", True), ("#### 1,234", "1234", True), ("#### 0.18", "18", True), ("#### 1800", "18", True),
    ("18 eggs in 3 days", "3", True), ("#### 18.0", "18", True), ("the answer is 18.", "18", True), ("#### -72,500 ", "-72500", True),
    (r"\boxed{5} then #### 7", "7", False), ("no number", "7", False),
]  # fmt: skip
MATH = [
    (r"\boxed{\frac{1}{2}}", r"\frac12", True), (r"\boxed{0.5}", r"\frac{1}{2}", True), (r"\boxed{1,2}", "2,1", True),
    (r"\boxed{(1,2)}", "(1, 2)", True), (r"\boxed{3} then \boxed{4}", "4", True), (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", True), ("nothing", "4", False), (r"\boxed{}", "4", False), (r"\boxed{x=5}", "5", True),
    (r"\boxed{5\text{ cm}}", "5", True), (r"\boxed{\text{(B)}}", r"\text{B}", True),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True), (r"\boxed{1.0005}", "1", True),
    (r"\boxed{j}", "i", True), (r"\boxed{500}", "5", True),
]  # fmt: skip
EQUAL = [
    (r"\frac{1}{2}", "0.5", True), ("x^{2}+2x+1", "(x+1)^{2}", True), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("9**9**9**9", "5", False), (r"2\pi", "6.283185", True),
]  # fmt: skip
STRICT_REFUSES = {("#### 0.18", "18"), ("#### 1800", "18"), (r"\boxed{1.0005}", "1"), (r"\boxed{j}", "i"), (r"\boxed{500}", "5")}


@pytest.mark.parametrize(("text", "gold", "right"), GSM8K)
def test_the_golden_cases_of_gsm8k(text, gold, right):
    assert grade_gsm8k_parity(text, gold)[0] == float(right)


@pytest.mark.parametrize(("text", "gold", "right"), MATH)
def test_the_golden_cases_of_math(text, gold, right):
    assert grade_math_parity(text, gold)[0] == float(right)


@pytest.mark.parametrize(("answer", "gold", "right"), EQUAL)
def test_the_golden_cases_of_math_equal(answer, gold, right):
    assert passes(lambda: math_equal(answer, gold), bound=5) < 5
    assert math_equal(answer, gold) is right


@pytest.mark.parametrize(("text", "gold"), sorted(STRICT_REFUSES))
def test_what_only_a_tolerance_makes_right_is_wrong_in_strict(text, gold):
    boxed = text if "boxed" in text else "\\boxed{" + text.removeprefix("#### ") + "}"
    assert grade_math(boxed, gold)[0] == 0.0


def test_extraction_goes_by_priority():
    assert extract("final answer is $5$. I hope so, \\boxed{6}") == ["5"]
    assert extract("\\boxed{5} and the answer is 6") == ["5"]
    assert extract("The answer is 5\nand 7") == ["5"]
    assert extract("7\n```output\n5\n```\nso 8") == ["5"]
    assert extract("a 1,234.5 b") == ["1234.5"]
    assert extract("none") == []


def test_unions_matrices_and_equations_go_part_by_part():
    assert grade_math_parity(r"\boxed{(3,4)\cup(1,2)}", r"(1,2) \cup (3,4)")[0] == 1.0
    assert grade_math_parity(r"\boxed{[1,2)}", "(1,2)")[0] == 1.0, "published: the kind of bracket is not looked at"
    assert grade_math_parity(r"\boxed{y - 2x = 0}", "y=2x")[0] == 1.0
    assert grade_math_parity(r"\boxed{1,2}", "1,2,3")[0] == 0.0
    assert grade_math_parity(r"\boxed{2 \text{ and } 1}", r"1 \text{ and } 2")[0] == 1.0


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    for code in (f"__import__('pathlib').Path({str(target)!r}).touch()", f"open({str(target)!r}, 'w')", "().__class__.__bases__"):
        for text in (f"\\boxed{{{code}}}", f"the answer is {code}", f"#### {code}"):
            assert grade_math_parity(text, "5")[0] == 0.0
            grade_gsm8k_parity(text, "7")
    assert not target.exists()
