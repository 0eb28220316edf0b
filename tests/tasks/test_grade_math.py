"""The strict grader of mathematics: what is equal is right, what is not is wrong, and only the last box is the answer."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from grade_math_cases import DIFFERENT, EQUAL

from openrl_reason.tasks import grade_math as module
from openrl_reason.tasks.grade_extract import last_boxed
from openrl_reason.tasks.grade_math import Answer, check_dependencies, grade_math, grade_math_lenient
from openrl_reason.tasks.graders import load_grader

DATA = Path(__file__).parents[3] / "shared" / "data" / "math"


def score(gold, answer):
    return grade_math(f"so the answer is \\boxed{{{answer}}}.", gold)[0]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_an_answer_that_says_the_same_is_right(gold, answer):
    assert score(gold, answer) == 1.0


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_an_answer_that_says_something_else_is_wrong(gold, answer):
    assert score(gold, answer) == 0.0


def test_every_tolerance_of_the_published_graders_is_refused():
    for gold, answer in [("18", "0.18"), ("18", "1800"), ("14.8", "1480"), ("1", "1.0005"), ("i", "j"), ("5", "500")]:
        assert score(gold, answer) == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"first \boxed{3}, then \boxed{4}", "4"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\fbox{7}", "7"), (r"\boxed 5.", "5."),
        (r"\boxed{ x }", "x"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{ 1 \right\}}", r"\left\{ 1 \right\}"),
        (r"\boxed{a} \boxed{}", None), (r"\boxed{a} \boxed{b", None), ("boxed{5}", None), ("the answer is 5", None), ("#### 5", None), ("", None),
        (r"\boxed", None), (r"\boxed{ }", None), (r"\boxedx{5}", None), (r"\boxed\frac", r"\frac"), (r"\boxed{\boxed{5}}", "5"),
    ],
)  # fmt: skip
def test_the_answer_is_what_the_last_box_holds(text, found):
    assert last_boxed(text) == found


def test_without_a_box_there_is_no_answer_and_an_earlier_box_does_not_step_in():
    for text in ("5", "the answer is 5", "#### 5", r"\boxed{5} or \boxed{", r"\boxed{5} \boxed{}", ""):
        assert grade_math(text, "5") == (0.0, None)
    assert grade_math(r"\boxed{\!}", "5") == (0.0, None), "layout alone is no answer"


def test_the_lenient_kind_reads_a_mark_or_a_sentence_where_there_is_no_box():
    assert grade_math_lenient("#### 5", "5")[0] == grade_math_lenient("so the answer is $5$.", "5")[0] == 1.0
    assert grade_math_lenient(r"the answer is 4, no: \boxed{5}", "5")[0] == 1.0
    assert grade_math_lenient(r"the answer is 5 \boxed{", "5") == (0.0, None)
    assert grade_math_lenient("5", "5") == (0.0, None), "no last-number fallback"


@pytest.mark.parametrize(
    "same",
    [
        [r"\frac12", r"\frac{1}{2}", "0.5", "1/2", r"\dfrac{2}{4}", "x = 0.5"], ["1,2", "2, 1", r"2\text{ and }1"], ["(x+1)^2", "x^2+2x+1"],
        [r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"], [r"\text{(B)}", "B", "(B)"], [r"90^\circ", "90"], [r"\{2,1\}", r"\{1, 2\}"],
        [r"\text{Monday}", "monday"], ["1,234", "1234", "1,\\!234"], [r"5\text{ cm}", "5 centimeters"],
    ],
)  # fmt: skip
def test_equal_answers_have_one_parsed_text_for_the_majority_vote(same):
    assert len({grade_math(f"\\boxed{{{answer}}}", "7")[1] for answer in same}) == 1


def test_different_answers_have_different_parsed_texts():
    answers = ["5", "-5", r"\sqrt5", "(1,2)", "[1,2]", "(1,2]", "(2,1)", "1,2", r"\{1,2\}", "101_2", "101_3", "x+1", "x-1", "(x+y)^{99}", "x+y^{99}"]
    assert len({Answer(answer).canonical for answer in answers}) == len(answers)


def test_a_gold_answer_may_still_be_in_its_box_and_must_not_be_empty():
    assert grade_math(r"\boxed{5}", r"so \boxed{5}.")[0] == 1.0
    for gold in ("", "  ", r"\boxed{}", "$$"):
        with pytest.raises(ValueError, match="empty"):
            grade_math(r"\boxed{5}", gold)


def test_latex_that_only_the_gold_makes_necessary_is_left_to_math_verify():
    assert score(r"\int x \, dx", r"\int x dx") == 1.0
    assert score(r"\int x \, dx", "x") == 0.0
    assert score("5", r"\int_0^5 1 dx") == 0.0, "an answer is a value, not a task for a computer algebra system"


def test_a_missing_or_strange_dependency_is_an_error_at_load_time(monkeypatch):
    check_dependencies()
    real = importlib.metadata.version

    def version(package):
        if package == "antlr4-python3-runtime":
            return "4.9.3"
        return real(package)

    monkeypatch.setattr(module.importlib.metadata, "version", version)
    for kind in ("math", "math_lenient", "math_parity", "gsm8k_parity"):
        with pytest.raises(RuntimeError, match=r"antlr4-python3-runtime 4\.13.*found 4\.9\.3"):
            load_grader(kind)

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(module.importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match="math-verify.*found none"):
        load_grader("math")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the MATH data in ../shared/data/math")
@pytest.mark.parametrize(("split", "rows"), [("math500", 500), ("test", 5000), ("train", 7498)])
def test_every_reference_solution_grades_one_and_none_of_the_neighbours_does(split, rows):
    solutions = [json.loads(line)["solution"] for line in (DATA / f"{split}.jsonl").read_text().splitlines()]
    pairs = [(solution, last_boxed(solution)) for solution in solutions]
    pairs = [(solution, gold) for solution, gold in pairs if gold]  # two solutions of the training split box nothing
    assert len(pairs) == rows
    assert [gold for solution, gold in pairs if grade_math(solution, gold)[0] != 1.0] == []
    if split == "math500":
        wrong = [grade_math(solution, gold)[0] for solution, (_, gold) in zip((s for s, _ in pairs), pairs[1:], strict=False)]
        same = sum(Answer(a).canonical == Answer(b).canonical for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False))
        assert sum(wrong) == same < 20
