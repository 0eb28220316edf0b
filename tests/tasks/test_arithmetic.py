"""The generated task: right by construction, disjoint by content, reproducible."""

import random
import re

import pytest

from openrl_reason.core.steps import split_steps
from openrl_reason.errors import ConfigError
from openrl_reason.tasks.arithmetic import LEVELS, STYLES, generate_problem, split_of
from openrl_reason.tasks.base import TaskConfig, load_task
from openrl_reason.tasks.graders import grade_final_number

_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}


def evaluate(expression):
    """Usual precedence, one bracket pair at the front at most: a reading that shares nothing with the generator."""
    tokens, number = [], ""
    for character in expression:
        if character.isdigit():
            number += character
            continue
        if number:
            tokens.append(int(number))
            number = ""
        tokens.append(character)
    if number:
        tokens.append(int(number))

    def value(tokens):
        while "(" in tokens:
            close = tokens.index(")")
            open_ = max(index for index in range(close) if tokens[index] == "(")
            tokens = [*tokens[:open_], value(tokens[open_ + 1 : close]), *tokens[close + 1 :]]
        for level in ("*/", "+-"):
            index = 1
            while index < len(tokens):
                if tokens[index] in level:
                    if tokens[index] == "/":
                        assert tokens[index - 1] % tokens[index + 1] == 0, "divisions are exact"
                    tokens = [*tokens[: index - 1], _OPERATORS[tokens[index]](tokens[index - 1], tokens[index + 1]), *tokens[index + 2 :]]
                else:
                    index += 2
        return tokens[0]

    return value(tokens)


def numbers(equation):
    return [int(number) for number in re.findall(r"[0-9]+", equation)]


def problems(level, style, count=300):
    rng = random.Random(level)
    found = []
    while len(found) < count:
        problem = generate_problem(rng, level, style)
        if problem is not None:
            found.append(problem)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_column_additions_carry_from_line_to_line_and_their_digits_are_the_answer(level):
    for question, solution, answer in problems(level, "columns"):
        left, right = question.removesuffix("=?").split("+")
        *lines, last = solution.split("\n")
        assert last == f"#### {answer}" and int(left) + int(right) == int(answer) and len(lines) == len(left) == len(right) == level + 1
        assert grade_final_number(solution, answer) == (1.0, answer)
        carry, digits = 0, ""
        for line, a, b in zip(lines, reversed(left), reversed(right), strict=True):
            assert line == f"{a}+{b}+{carry}={int(a) + int(b) + carry:02d}"
            carry, digits = int(line[-2]), line[-1] + digits
        assert str(int(f"{carry}{digits}")) == answer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("style", ["expression", "word"])
def test_every_solution_grades_one_and_every_equation_holds(level, style):
    for question, solution, answer in problems(level, style):
        assert grade_final_number(solution, answer) == (1.0, answer), question
        assert grade_final_number(solution, str(int(answer) + 1))[0] == 0.0
        *equations, last = solution.split("\n")
        assert last == f"#### {answer}"
        for equation in equations:
            left, right = equation.split("=")
            assert evaluate(left) == int(right) >= 0, equation
        assert style == "columns" or equations[-1].endswith(f"={answer}")


@pytest.mark.parametrize("level", LEVELS)
def test_the_answer_is_what_the_expression_is_worth(level):
    for question, _, answer in problems(level, "expression"):
        assert evaluate(question.removesuffix("=?")) == int(answer), question


@pytest.mark.parametrize("level", LEVELS)
def test_word_problems_tell_every_number_of_their_solution(level):
    for question, solution, _ in problems(level, "word", 100):
        first, *rest = solution.split("\n")[:-1]
        told = [int(word.strip(",.")) for word in question.split() if word.strip(",.").isdigit()]
        assert told == [*numbers(first)[:2], *(numbers(equation)[1] for equation in rest)]


def test_harder_levels_have_more_steps_and_texts_stay_short():
    steps = []
    for level in LEVELS:
        found = problems(level, "expression")
        steps.append(sum(len(split_steps(solution, "newline")) for _, solution, _ in found) / len(found))
        assert max(len(question) for question, _, _ in found) <= 28
        assert max(len(solution) for _, solution, _ in found) <= 70
    assert steps == sorted(steps) and steps[0] == 4 and steps[-1] > 5
    assert all(len(question) <= 130 for level in LEVELS for question, _, _ in problems(level, "word", 100))


def test_train_and_test_are_disjoint_whatever_the_seeds_and_sizes():
    def prompts(split, seed):
        config = TaskConfig(levels=(1, 2, 3), styles=STYLES, num_train=2000, num_test=300, seed=seed)
        return {item.prompt for item in load_task(config).items(split)}

    train, test = prompts("train", 0) | prompts("train", 1), prompts("test", 0) | prompts("test", 2)
    assert train and test and not train & test
    assert all(split_of(prompt) == "train" for prompt in train)


def test_items_are_distinct_reproducible_and_a_longer_set_starts_with_the_shorter():
    short, long = (load_task(TaskConfig(num_train=size, levels=(1, 3))).items("train") for size in (50, 400))
    assert list(long[:50]) == list(short)
    assert len({item.prompt for item in long}) == len({item.task_id for item in long}) == 400
    assert list(load_task(TaskConfig(num_train=50, levels=(1, 3), seed=1)).items("train")) != list(short)
    assert [item.info["level"] for item in short[:4]] == [1, 3, 1, 3]


def test_a_share_of_the_solutions_may_be_the_bare_answer_and_still_grades_one():
    worked, mixed, bare = (load_task(TaskConfig(num_train=1000, direct_share=share)).items("train") for share in (0.0, 0.3, 1.0))
    kinds = [item.solution == f"#### {item.gold}" for item in mixed]
    assert 240 < sum(kinds) < 360
    for before, after, direct in zip(worked, mixed, kinds, strict=True):
        assert after.prompt == before.prompt and direct == (after.solution != before.solution)
        assert grade_final_number(after.solution, after.gold)[0] == 1.0
    assert all(item.solution == f"#### {item.gold}" for item in bare)


def test_settings_that_cannot_work_are_refused_with_what_would():
    with pytest.raises(ConfigError, match="num_train=99999 is more"):
        load_task(TaskConfig(levels=(1,), num_train=99999)).items("train")
    for wrong in ({"levels": (1, 6)}, {"levels": ()}, {"styles": ("expresion",)}, {"styles": ()}, {"num_test": -1}, {"direct_share": 1.5}):
        with pytest.raises(ConfigError):
            load_task(TaskConfig(**wrong))
