"""Answers are read strictly, compared exactly, and never evaluated."""

import random
import subprocess
import sys
import time

import pytest

from openrl_reason.tasks.graders import (
    GradeResult,
    as_result,
    canonical_number,
    check_gold,
    check_kind,
    final_number,
    grade_final_number,
    grade_last_number,
    last_number,
)


@pytest.mark.parametrize(
    "text",
    ["18", "18.0", "18.", "18.00", "$18", "$18.00", "18%", "18 %", "+18", " 18 ", "18 dollars", "18 dollars per day.", "018", "$ 18",
     "18/1", "36/2"],
)  # fmt: skip
def test_one_number_written_in_many_ways_is_one_number(text):
    assert canonical_number(text) == "18"
    assert grade_final_number(f"so\n#### {text}", "18") == (1.0, "18")
    assert grade_final_number("so\n#### 18", text) == (1.0, "18"), "the gold answer is normalised like the answer"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.00", "1234"), ("1,234,567", "1234567"), ("-5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("\u22125", "-5"), ("-0", "0"),
        ("-0.0", "0"), (".5", "0.5"), ("1/2", "0.5"), ("6/4", "1.5"), ("1/3", "1/3"), ("2/6", "1/3"), ("-1/8", "-0.125"),
        ("1/40", "0.025"),
        ("0.50", "0.5"), ("100", "100"), ("10.10", "10.1"), ("3 bolts", "3"), ("0", "0"),
    ],
)  # fmt: skip
def test_canonical_form(text, value):
    assert canonical_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "1,8", "1,23", "12,34,567", "1,2345", "18 19", "18 or 19", "18:00", "1e3", "12 thousand", "3 dozen", "12 thousands", "18 millions",
     "18 plus two", "18 minus nine", "18 and a half", "--5",
     "-$-5", "five", "x = 5", "18.5.2", "5 = 5", "(18)", "\u0661\u0668", "1/0", "18-19", "18; 20", "nan", "inf", "0x12",
     "1_000", "__import__('os')"],
)  # fmt: skip
def test_what_is_not_exactly_one_number_is_no_number(text):
    assert canonical_number(text) is None


WRONG = [("1480", "14.8"), ("0.18", "18"), ("1800", "18"), ("18.01", "18"), ("81", "18"), ("-18", "18")]


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_there_is_no_tolerance_and_no_factor_of_100(answer, gold):
    assert grade_final_number(f"#### {answer}", gold)[0] == 0.0


def test_the_last_mark_counts_and_only_its_line():
    assert final_number("#### 17\n#### 18") == "18"
    assert final_number("#### 18\nand 20 more") == "18"
    assert final_number("#### 18\n####") is None
    assert final_number("####\n18") is None
    assert final_number("the answer is 18") is None
    assert final_number("") is None


def test_lenient_reading_takes_the_last_whole_number_unless_there_is_a_mark():
    assert last_number("the answer is 18.") == "18"
    assert last_number("first 5, then $1,234.50 in all") == "1234.5"
    assert last_number("10-5=5") == "5"
    assert last_number("pay 1,8") is None
    assert last_number("5 or\n#### nothing") is None
    assert grade_last_number("it is -7", "-7") == (1.0, "-7")


def test_a_gold_answer_that_is_no_number_is_an_error_not_a_wrong_answer():
    with pytest.raises(ValueError, match="gold"):
        grade_final_number("#### 3", "three")


def test_grading_random_text_never_raises_and_hostile_text_costs_little():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("0123456789,.$%-+/ #\nax\u0663\ud800") for _ in range(rng.randint(0, 40)))
        grade_final_number(text, "1")
        grade_last_number(text, "1")
    hostile = ["#### " + "9" * 10**6, "#### " + "a" * 10**6, "#### 1" + " " * 4000 + "!", "#### 1" + "a " * 2000 + "1"]
    hostile += ["1,1" * 10**5, "#" * 10**6]
    start = time.perf_counter()
    for text in hostile:
        grade_final_number(text, "1")
        grade_last_number(text, "1")
    assert time.perf_counter() - start < 2.0


def test_what_a_grader_returns_is_checked():
    assert as_result(1) == GradeResult(1.0, None, "ok")
    assert as_result((0.5, "x")) == GradeResult(0.5, "x", "ok")
    assert as_result((0.0, None)).status == "no_answer"
    assert as_result(GradeResult(0.0, None, "no_answer")).status == "no_answer"
    for wrong in (float("nan"), float("inf"), "1", None, (1, 2, 3), (float("nan"), "x")):
        result = as_result(wrong)
        assert (result.status, result.score) == ("error", 0.0)


def test_kinds_are_checked_without_importing_anything(tmp_path):
    for kind in ("arithmetic", "gsm8k", "gsm8k_lenient", "no_such_module:function"):
        check_kind(kind)
    for kind in ("gsm8", "", ":f", "module:", "module:not a name", f"{tmp_path}/absent.py:f"):
        with pytest.raises(ValueError, match="grader"):
            check_kind(kind)


def test_an_unknown_kind_is_answered_with_the_nearest_and_a_short_list():
    for kind in ("choice2", "choice26", "math", "math_lenient", "gsm8k_parity", "math_parity", "text", "yes_no"):
        check_kind(kind)
    with pytest.raises(ValueError, match=r"grader 'mathh' is unknown \(did you mean 'math'\?\)\. Use .*choice2 to choice26") as error:
        check_kind("mathh")
    assert "choice13" not in str(error.value)
    for kind in ("choice1", "choice27", "choice", "choiceA"):
        with pytest.raises(ValueError, match="unknown"):
            check_kind(kind)


def test_a_gold_answer_that_nothing_can_match_is_refused_when_the_data_are_loaded():
    for kind, gold in [("gsm8k", "72"), ("choice4", "d"), ("yes_no", "Yes"), ("math", "x"), ("text", "a"), ("some.module:function", "")]:
        check_gold(kind, gold)
    for kind, gold in [
        ("gsm8k", "x"),
        ("choice4", "E"),
        ("yes_no", "maybe"),
        ("math", " "),
        ("text", "."),
        ("math_parity", ""),
        ("gsm8k_parity", ""),
    ]:
        with pytest.raises(ValueError, match="gold"):
            check_gold(kind, gold)


def test_the_registry_imports_nothing_heavy():
    code = "import sys, openrl_reason.tasks.graders; print([m for m in ('sympy', 'mpmath', 'math_verify', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
