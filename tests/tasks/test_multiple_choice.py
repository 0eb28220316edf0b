"""Multiple choice: published formats, option order, letters and indices, the kind of grader."""

import itertools
import json
import random
from pathlib import Path

import pytest

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks import TaskConfig, load_task
from openrl_reason.tasks.base import select_items
from openrl_reason.tasks.multiple_choice import LETTERS

DATA = Path(__file__).resolve().parents[3] / "shared/data/logiqa2"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real LogiQA 2.0 files are not at {DATA}")

LOGIQA = {
    "id": 7, "answer": 2, "text": "All cats purr. Tom is a cat.", "question": "What follows?",
    "options": ["Tom barks.", "Nothing.", "Tom purrs.", "Tom is a dog."],
    "type": {"Categorical Reasoning": True, "Disjunctive Reasoning": False, "Conjunctive Reasoning": True},
}  # fmt: skip
RECLOR = {"id_string": "val_3", "context": LOGIQA["text"], "question": "What follows?", "answers": LOGIQA["options"], "label": 2}
PROMPT = """Context:
All cats purr. Tom is a cat.

Question:
What follows?

Options:
A. Tom barks.
B. Nothing.
C. Tom purrs.
D. Tom is a dog."""


def task_of(tmp_path, rows, name="multiple_choice", file="test.jsonl", **config):
    path = tmp_path / file
    path.write_text(json.dumps(rows) if file.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
    return load_task(TaskConfig(name=name, test_path=str(path), **config))


def test_logiqa_lines_in_a_txt_file_are_read(tmp_path):
    (item,) = task_of(tmp_path, [LOGIQA], "logiqa2", "test.txt").items("test")
    assert (item.prompt, item.gold, item.solution) == (PROMPT, "C", "The answer is C.")
    assert item.info["type"] == ["Categorical Reasoning", "Conjunctive Reasoning"] and item.info["id"] == 7 and item.info["order"] == "ABCD"
    assert select_items([item], ["7"]) == [item]


def test_a_reclor_list_is_read_and_its_hidden_labels_are_refused(tmp_path):
    (item,) = task_of(tmp_path, [RECLOR], "reclor", "val.json").items("test")
    assert (item.prompt, item.gold, item.info["id"]) == (PROMPT, "C", "val_3")
    for hidden in ({**RECLOR, "label": -1}, {key: value for key, value in RECLOR.items() if key != "label"}):
        with pytest.raises(DataError, match=r"test.json, row 1: there is no label in column 'label'.*val\.json"):
            task_of(tmp_path, [RECLOR, hidden], "reclor", "test.json").items("test")


@pytest.mark.parametrize("name", ["logiqa2", "reclor", "multiple_choice"])
def test_without_a_file_the_flag_is_named(name):
    with pytest.raises(ConfigError, match="--task.train_path"):
        load_task(TaskConfig(name=name)).items("train")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 26])
def test_the_right_option_stays_right_in_every_order(tmp_path, count):
    rng = random.Random(count)
    rows = [{"question": f"q{n}", "options": [f"option {n}.{k}" for k in range(count)], "answer": rng.randrange(count)} for n in range(40)]
    orders = ["", "random", "".join(rng.sample(LETTERS[:count], count)), LETTERS[:count][::-1]]
    for order, row_items in zip(orders, [task_of(tmp_path, rows, option_order=order).items("test") for order in orders], strict=True):
        for row, item in zip(rows, row_items, strict=True):
            shown = item.info["options"]
            assert shown[LETTERS.index(item.gold)] == row["options"][row["answer"]]
            assert sorted(shown) == sorted(row["options"])
            assert [row["options"][LETTERS.index(letter)] for letter in item.info["order"]] == shown
            if order not in ("", "random"):
                assert item.info["order"] == order
            assert f"{item.gold}. {row['options'][row['answer']]}" in item.prompt.split("\n")


def test_random_orders_differ_between_items_and_seeds_and_not_between_runs_or_neighbours(tmp_path):
    rows = [{"question": f"q{n}", "options": list("wxyz"), "answer": 0} for n in range(60)]

    def orders(rows, seed):
        return [item.info["order"] for item in task_of(tmp_path, rows, option_order="random", seed=seed).items("test")]

    assert orders(rows, 1) == orders(rows, 1) != orders(rows, 2)
    assert len(set(orders(rows, 1))) > 10
    assert orders(rows[30:], 1) == orders(rows, 1)[30:]


def test_an_identity_belongs_to_a_question_in_one_order(tmp_path):
    rows = [{"question": "q", "options": ["w", "x", "y"], "answer": 1}]
    ids = ["".join(letters) for letters in itertools.permutations("ABC")]
    items = [task_of(tmp_path, rows, option_order=order).items("test")[0] for order in (*ids, *ids)]
    assert len({item.task_id for item in items}) == 6
    assert [item.task_id for item in items[:6]] == [item.task_id for item in items[6:]]
    assert task_of(tmp_path, rows).items("test")[0].task_id == items[0].task_id


def test_each_item_is_graded_by_its_own_number_of_options(tmp_path):
    rows = [{"question": "q", "options": list("wxyz")[:count], "answer": count - 1} for count in (2, 4)]
    task = task_of(tmp_path, rows)
    two, four = task.items("test")
    assert (task.grade_kind_of(two), task.grade_kind_of(four)) == ("choice2", "choice4")
    assert task.grade("The answer is B.", two).score == 1.0 and task.grade("The answer is B.", four).score == 0.0
    assert task.grade("The answer is D.", four).score == 1.0 and task.grade("The answer is D.", two).status == "no_answer"
    for item in (two, four):
        assert task.grade(item.solution, item).score == 1.0
    assert task_of(tmp_path, rows, grader="text").grade_kind_of(two) == "text"


@pytest.mark.parametrize(("label", "gold"), [(0, "A"), ("C", "C"), ("c", "C"), (" B ", "B"), ("2", "C"), (2, "C")])
def test_labels_are_letters_or_indices_from_zero(tmp_path, label, gold):
    assert task_of(tmp_path, [{"question": "q", "options": list("xyz"), "answer": label}]).items("test")[0].gold == gold


def test_options_may_carry_their_own_labels_and_columns_their_own_names(tmp_path):
    row = {"id": "Q1", "stem": "q", "passage": "p", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2", "why": "since y."}
    keys = {"input_key": "stem", "context_key": "passage", "options_key": "choices", "label_key": "answerKey", "id_key": "id", "solution_key": "why"}
    (item,) = task_of(tmp_path, [row], **keys).items("test")
    assert (item.gold, item.info["id"], item.solution) == ("B", "Q1", "since y.")
    assert item.prompt == "Context:\np\n\nQuestion:\nq\n\nOptions:\nA. x\nB. y"
    (plain,) = task_of(tmp_path, [{**row, "passage": None}], **keys).items("test")
    assert plain.prompt == "Question:\nq\n\nOptions:\nA. x\nB. y"


def test_a_template_may_place_the_parts_itself(tmp_path):
    template = "{context} | {question} | {options}?"
    row = {**LOGIQA, "text": "see {options}", "options": ["{question}", "b"], "answer": 0}
    task = task_of(tmp_path, [row], "logiqa2", prompt_template=template)
    assert task.prompt_text(task.items("test")[0]) == "see {options} | What follows? | A. {question}\nB. b?"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"answer": 4}, "label 4 is none of the options: use A, B, C, D or an index from 0 to 3"),
        ({"answer": "E"}, "label 'E'"),
        ({"answer": True}, "label True"),
        ({"options": ["one"]}, "1 options; 2 to 26"),
        ({"options": [str(n) for n in range(27)]}, "27 options"),
        ({"options": "A or B"}, "expected a list of texts"),
        ({"options": ["x", " ", "y", "z"]}, "expected a list of texts"),
        ({"question": ""}, "question"),
        ({"text": 3}, "context"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, change, match):
    with pytest.raises(DataError, match=rf"test\.jsonl:2: .*{match}"):
        task_of(tmp_path, [LOGIQA, LOGIQA | change], "logiqa2").items("test")


def test_orders_that_cannot_be_are_refused(tmp_path):
    for order in ("ABDE", "AAB", "A", "dcba", "shuffle"):
        with pytest.raises(ConfigError, match="--task.option_order"):
            task_of(tmp_path, [LOGIQA], "logiqa2", option_order=order)
    with pytest.raises(DataError, match="is for 3 options, and there are 4"):
        task_of(tmp_path, [LOGIQA], "logiqa2", option_order="CBA").items("test")


@needs_data
@pytest.mark.parametrize(("split", "count"), [("dev", 1569), ("test", 1572)])  # one more than line feeds: the last line has none
def test_every_row_of_the_real_data_is_an_item(split, count):
    for order in ("", "random"):
        items = load_task(TaskConfig(name="logiqa2", test_path=f"{DATA}/{split}.txt", option_order=order)).items("test")
        rows = [json.loads(line) for line in (DATA / f"{split}.txt").open()]
        assert len(items) == len(rows) == count
        assert all(item.info["options"][LETTERS.index(item.gold)] == row["options"][row["answer"]] for item, row in zip(items, rows, strict=True))
        assert sum(bool(item.info.get("type")) for item in items) > 0.98 * count
    assert max(map(len, ([item.info["order"] for item in items if item.gold == gold] for gold in "ABCD"))) < 0.3 * count
