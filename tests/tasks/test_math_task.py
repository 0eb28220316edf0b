"""MATH: golds from boxes, levels and subjects, the real data where it is at hand."""

import json
from pathlib import Path

import pytest

from openrl_reason.errors import DataError
from openrl_reason.tasks import TaskConfig, load_task
from openrl_reason.tasks.base import select_items

DATA = Path(__file__).resolve().parents[3] / "shared/data/math"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real MATH files are not at {DATA}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_items(tmp_path, *rows, **config):
    return load_task(TaskConfig(name="math", train_path=write(tmp_path / "train.jsonl", rows), **config)).items("train")


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("So \\boxed{4}.", "4"),
        ("\\boxed{1} at first, then $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("the set $\\boxed{\\{1, 2\\}}$", "\\{1, 2\\}"),
        ("$\\boxed 9$.", "9"),
        ("$\\fbox{\\text{(B)}}$", "\\text{(B)}"),
    ],
)
def test_the_gold_is_what_the_last_box_holds(tmp_path, solution, gold):
    (item,) = train_items(tmp_path, {"problem": "p?", "solution": solution, "level": "Level 3", "type": "Algebra"})
    assert (item.gold, item.solution, item.info["level"], item.info["type"]) == (gold, solution, 3, "Algebra")


def test_an_answer_column_serves_where_there_is_no_box(tmp_path):
    both, bare, zero = train_items(
        tmp_path,
        {"problem": "p?", "solution": "\\boxed{4}", "answer": "", "level": 2, "subject": "Geometry", "unique_id": "test/geometry/1.json"},
        {"problem": "q?", "answer": 5, "level": "Level ?"},
        {"problem": "r?", "solution": "so none", "answer": 0},
    )
    assert (both.gold, both.info["level"], both.info["type"], both.info["id"]) == ("4", 2, "Geometry", "test/geometry/1.json")
    assert (bare.gold, bare.solution, zero.gold) == ("5", None, "0") and "level" not in bare.info and "type" not in bare.info
    assert select_items([both, bare], ["test/geometry/1.json"]) == [both]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"problem": "p?", "solution": "it is 4"}, r"no gold answer: the solution has no \\boxed"),
        ({"problem": "p?", "solution": "\\boxed{4"}, "no gold answer"),
        ({"problem": " ", "solution": "\\boxed{4}"}, "problem"),
        ({"problem": "p?", "solution": 4}, "solution"),
        ({"question": "p?", "solution": "\\boxed{4}"}, "no column 'problem'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, match):
    with pytest.raises(DataError, match=rf"train\.jsonl:2.*{match}"):
        train_items(tmp_path, {"problem": "p?", "solution": "\\boxed{4}"}, row)


def test_answers_are_graded_as_mathematics(tmp_path):
    (item,) = train_items(tmp_path, {"problem": "p?", "solution": "\\boxed{\\frac{1}{2}}"})
    task = load_task(TaskConfig(name="math", train_path="x.jsonl"))
    assert task.grade_kind_of(item) == "math"
    assert task.grade("so it is $\\boxed{0.5}$", item).score == 1.0
    assert task.grade("so it is $\\boxed{50}$", item).score == 0.0


def test_the_hub_repository_stands_for_its_seven_subjects():
    named, unnamed = (load_task(TaskConfig(name="math", train_path=path)) for path in ("EleutherAI/hendrycks_math", ""))
    assert named.sources("train") == unnamed.sources("train") == unnamed.sources("test")
    assert len(named.sources("train")) == 7 and named.sources("train")[0] == "EleutherAI/hendrycks_math:algebra"
    assert load_task(TaskConfig(name="math", test_path="HuggingFaceH4/MATH-500")).sources("test") == ("HuggingFaceH4/MATH-500",)


@needs_data
def test_every_row_of_the_real_data_has_a_gold_a_subject_and_a_level():
    task = load_task(TaskConfig(name="math", train_path=f"{DATA}/train.jsonl", test_path=f"{DATA}/test.jsonl"))
    train, test = task.items("train"), task.items("test")
    assert (len(train), len(test)) == (7500, 5000)
    assert all(item.gold and item.info["type"] for item in (*train, *test))
    assert sum("level" not in item.info for item in train) == 2 and {item.info["level"] for item in test} == {1, 2, 3, 4, 5}
    assert len({item.info["type"] for item in test}) == 7
    empty = [item for item in train if "\\boxed{}" in item.solution]
    assert len(empty) == 2 and {item.gold for item in empty} == {"0"}


@needs_data
def test_math500_is_a_part_of_the_published_test_split():
    small = load_task(TaskConfig(name="math", test_path=f"{DATA}/math500.jsonl")).items("test")
    whole = load_task(TaskConfig(name="math", test_path=f"{DATA}/test.jsonl")).items("test")
    assert len(small) == 500
    golds = {item.prompt: item.gold for item in whole}
    assert all(item.prompt in golds for item in small)
    assert [item.info["id"] for item in select_items(small, ["test/precalculus/807.json"])] == ["test/precalculus/807.json"]
