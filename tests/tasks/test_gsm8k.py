"""Real GSM8K rows where they are at hand; the leakage guard; prompts from a file."""

import json
from pathlib import Path

import pytest

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks import GraderPool, TaskConfig, load_task
from openrl_reason.tasks.gsm8k import published_test_hashes, strip_calculations
from openrl_reason.tasks.leakage import question_hash

DATA = Path(__file__).resolve().parents[3] / "shared/data/gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real GSM8K files are not at {DATA}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"question": "Ann has 2 boxes of 9 pens. How many pens?", "answer": "2*9=<<2*9=18>>18\n#### 18"},
    {"question": "A farm sells 1,000 eggs and then 234. How many?", "answer": "1000+234=<<1000+234=1234>>1,234 eggs\n#### 1,234"},
]


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_reference_solution_of_the_real_data_grades_one(split, count):
    task = load_task(TaskConfig(name="gsm8k", train_path=f"{DATA}/train.jsonl", test_path=f"{DATA}/test.jsonl", num_train=0, num_test=0))
    items = task.items(split)
    assert len(items) == count
    with GraderPool() as pool:
        results = [pool.submit(item.solution, item.gold, task.grade_kind) for item in items]
        assert sum(future.result().score for future in results) == count
        assert pool.counts["ok"] == count
        wrong = [pool.submit(item.solution, item.gold + "1", task.grade_kind) for item in items[:500]]
        assert sum(future.result().score for future in wrong) == sum(item.gold == "0" for item in items[:500])
    assert not any("<<" in item.solution or ">>" in item.solution for item in items)


@needs_data
def test_the_guard_knows_the_published_test_questions_and_none_of_the_training_questions():
    for name, expected in (("test", 1319), ("train", 0)):
        questions = [json.loads(line)["question"] for line in (DATA / f"{name}.jsonl").open()]
        assert sum(question_hash(question) in published_test_hashes() for question in questions) == expected
    with pytest.raises(DataError, match="1319 of the 1319 training questions"):
        load_task(TaskConfig(name="gsm8k", train_path=f"{DATA}/test.jsonl")).items("train")


def test_a_test_question_in_the_training_data_is_refused_unless_allowed(tmp_path):
    hidden = {"question": ROWS[0]["question"].upper().replace(" ", "  "), "answer": "#### 18"}
    paths = {"train_path": write(tmp_path / "a.jsonl", [*ROWS[1:], hidden]), "test_path": write(tmp_path / "b.jsonl", ROWS[:1])}
    config = {"name": "gsm8k", **paths}
    with pytest.raises(DataError, match="1 of the 2 training questions.*a.jsonl:2.*--task.allow_test_data_in_training"):
        load_task(TaskConfig(**config)).items("train")
    assert len(load_task(TaskConfig(**config, allow_test_data_in_training=True)).items("train")) == 2


def test_golds_and_solutions_are_read_from_the_answer(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    items = load_task(TaskConfig(name="gsm8k", train_path=path)).items("train")
    assert [item.gold for item in items] == ["18", "1234"]
    assert items[0].solution == "2*9=18\n#### 18"
    assert load_task(TaskConfig(name="gsm8k", train_path=path, strip_calculations=False)).items("train")[0].solution == ROWS[0]["answer"]
    assert len(load_task(TaskConfig(name="gsm8k", train_path=path, num_train=1)).items("train")) == 1
    assert strip_calculations("a << b >> c <<1+1=2>>2") == "a  c 2"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"question": "x", "answer": "18"}, "####"),
        ({"question": "x", "answer": "#### many"}, "not a number"),
        ({"question": " ", "answer": "#### 1"}, "question"),
        ({"question": "x", "answer": None}, "####"),
        ({"query": "x", "answer": "#### 1"}, "no column 'question'.*there are: query, answer"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, match):
    path = write(tmp_path / "train.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=rf"train\.jsonl:2.*{match}"):
        load_task(TaskConfig(name="gsm8k", train_path=path)).items("train")


def test_without_network_the_hub_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="openai/gsm8k.*--task.train_path"):
        load_task(TaskConfig(name="gsm8k")).items("train")


def test_the_file_task_takes_any_columns_and_chat_messages(tmp_path):
    messages = [{"role": "user", "content": "2*9?"}]
    rows = [{"q": "2*9?", "a": 18, "s": "#### 18"}, {"q": messages, "a": "so\n#### $18", "s": None}]
    path = write(tmp_path / "p.jsonl", rows)
    keys = {"name": "file", "train_path": path, "input_key": "q", "label_key": "a", "solution_key": "s"}
    task = load_task(TaskConfig(**keys))
    text, chat = task.items("train")
    assert (text.gold, chat.gold, text.solution, chat.solution) == ("18", "18", "#### 18", None)
    assert task.grade_kind == "gsm8k" and task.grade("#### 18.0", text).score == 1.0
    assert task.prompt_text(text) == "2*9?"
    with pytest.raises(ConfigError, match="--task.apply_chat_template true"):
        task.prompt_text(chat)
    with pytest.raises(ConfigError, match="--task.test_path"):
        task.items("test")


BAD_ROWS = [{"q": "", "a": "1"}, {"q": 5, "a": "1"}, {"q": [], "a": "1"}, {"q": "x", "a": "one"}, {"q": "x", "a": None}, {"q": "x", "b": "1"}]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_the_file_task_refuses_bad_rows(tmp_path, row):
    path = write(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=r"p\.jsonl:1"):
        load_task(TaskConfig(name="file", train_path=path, input_key="q", label_key="a")).items("train")
