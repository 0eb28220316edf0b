"""The leakage guard: what counts as the same question, and that every task with files has it."""

import json
import time
from pathlib import Path

import pytest

from openrl_reason.data.readers import read_rows
from openrl_reason.errors import DataError
from openrl_reason.tasks import TaskConfig, load_task
from openrl_reason.tasks.leakage import PUBLISHED_TWINS, asks_a_test_question, item_hash, overlap, packed_lines, question_hash, unpack
from openrl_reason.tasks.math_task import published_test_hashes

DATA = Path(__file__).resolve().parents[3] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not at {DATA}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "copy",
    ["What is $x^{2} + 3$ for x=5?", "what is  $x^2+3$\nfor $x = 5$ ?", "WHAT IS X^2 + 3 FOR X = 5", "What is $\\left(x^2\\right)+3$ for x=5"],
)
def test_spacing_case_punctuation_and_latex_layout_do_not_hide_a_copy(copy):
    assert question_hash(copy) == question_hash("What is $x^2+3$ for $x=5$?")


@pytest.mark.parametrize("other", ["What is $x^2-3$ for $x=5$?", "What is $x^2+4$ for $x=5$?", "What is $x2+3$ for $x=5$?", "What is $x^2+3$?"])
def test_other_numbers_and_operators_are_other_questions(other):
    assert question_hash(other) != question_hash("What is $x^2+3$ for $x=5$?")


def test_a_minus_is_a_minus_in_any_spelling_and_a_hyphen_is_none():
    assert question_hash("3\u22122") == question_hash("3 - 2") == question_hash("3\u20132") != question_hash("3 2")
    assert question_hash("a well-known fact") == question_hash("a well known fact")
    assert question_hash("\ud800 lone") == question_hash("\ud800 lone") and question_hash("") != question_hash("a")


def test_shipped_hashes_can_be_made_again():
    questions = [f"question number {number}?" for number in range(100)]
    text = "".join(json.loads(line.strip()) for line in packed_lines(questions))
    assert unpack(text) == {question_hash(question) for question in questions}


ROWS = {
    "gsm8k": [{"question": f"How much is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(4)],
    "math": [{"problem": f"How much is {n} and 1?", "solution": f"\\boxed{{{n + 1}}}"} for n in range(4)],
    "file": [{"question": f"How much is {n} and 1?", "answer": f"{n + 1}"} for n in range(3)]
    + [{"question": [{"role": "user", "content": "x?"}], "answer": "1"}],
    "multiple_choice": [{"question": f"How much is {n} and 1?", "options": ["0", "1", str(n + 1)], "answer": 2} for n in range(1, 5)],
}


def other_row(name):
    return {key: "Who is it?" if key in ("question", "problem") else value for key, value in ROWS[name][0].items()}


@pytest.mark.parametrize("name", ROWS)
def test_every_task_with_files_refuses_held_out_questions(tmp_path, name):
    rows = ROWS[name]
    paths = {"train_path": write(tmp_path / "train.jsonl", rows), "test_path": write(tmp_path / "test.jsonl", rows[3:])}
    with pytest.raises(DataError, match=r"1 of the 4 training questions in .*train.jsonl:4.*--task.allow_test_data_in_training true"):
        load_task(TaskConfig(name=name, **paths)).items("train")
    more = paths | {"test_path": write(tmp_path / "more.jsonl", [other_row(name), rows[3]])}
    with pytest.raises(DataError, match="1 of the 4"):
        load_task(TaskConfig(name=name, num_test=1, **more)).items("train")
    allowed = load_task(TaskConfig(name=name, allow_test_data_in_training=True, **paths))
    train, test = allowed.items("train"), allowed.items("test")
    assert len(train) == 4 and overlap(train, test) == [train[3]] and overlap(train[:3], test) == []
    assert len(load_task(TaskConfig(name=name, num_train=3, **paths)).items("train")) == 3
    assert all(question_hash(allowed.question_of(row)) == item_hash(item) for row, item in zip(allowed._rows("train"), train, strict=True))


def test_the_order_of_the_options_does_not_hide_a_copy(tmp_path):
    row = {"question": "Which?", "options": ["one", "two", "three"], "answer": 0}
    turned = {"question": "Which?", "options": ["two", "three", "one"], "answer": 2}
    other = {"question": "Which?", "options": ["two", "three", "four"], "answer": 2}
    paths = {"train_path": write(tmp_path / "a.jsonl", [other, turned]), "test_path": write(tmp_path / "b.jsonl", [row])}
    with pytest.raises(DataError, match="1 of the 2 .*a.jsonl:2"):
        load_task(TaskConfig(name="multiple_choice", **paths)).items("train")


@needs_data
def test_the_guard_knows_the_published_math_test_problems():
    for name, expected in (("test", 5000), ("math500", 500), ("train", 4)):
        hashes = [question_hash(json.loads(line)["problem"]) for line in (DATA / f"math/{name}.jsonl").open()]
        assert sum(found in published_test_hashes() for found in hashes) == expected
        if name == "train":  # four problems are in both published splits; the guard must not refuse the published training data for them
            assert PUBLISHED_TWINS == published_test_hashes() & set(hashes)
    for name, count in (("test", 4996), ("math500", 500)):
        with pytest.raises(DataError, match=rf"{count} of the \d+ training questions"):
            load_task(TaskConfig(name="math", train_path=f"{DATA}/math/{name}.jsonl")).items("train")


@needs_data
def test_the_published_splits_pass_and_questions_shared_by_logiqa_splits_are_found():
    task = load_task(TaskConfig(name="math", train_path=f"{DATA}/math/train.jsonl", test_path=f"{DATA}/math/test.jsonl"))
    assert overlap(task.items("train"), task.items("test")) == []
    with pytest.raises(DataError, match="of the 1569 training questions"):
        load_task(TaskConfig(name="logiqa2", train_path=f"{DATA}/logiqa2/dev.txt", test_path=f"{DATA}/logiqa2/test.txt")).items("train")


def test_many_questions_are_compared_quickly():
    task = load_task(TaskConfig(num_train=1))
    items = [task.make_item(f"Ann has {n} pens and buys {n + 1} more for ${n}. How many are there now, all in all?", gold="1") for n in range(20_000)]
    started = time.perf_counter()
    assert overlap(items, items[::100]) == items[::100]
    assert time.perf_counter() - started < 3.0


PUT_AROUND = {
    "as it is": "{}", "question": "Question: {}\nAnswer:",
    "instruction behind": "User: {}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n\nAssistant:",
    "chat": "<|im_start|>system\nBe right.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "same line": "{} Please reason step by step, and put your final answer within \\boxed{{}}.", "in front": "Solve the following problem. {}",
    "gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "deepseek": "<\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c>",
    "vicuna": "A chat between a user and an assistant. USER: {} ASSISTANT:", "bold": "**Question:** {}",
    "headline": "### Instruction:\n{}\n\n### Response:", "few shots": "Question: What is one and one, all told?\nAnswer: 2\n\nQuestion: {}\nAnswer:",
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("form", list(PUT_AROUND))
@pytest.mark.parametrize("name, column, twins", [("gsm8k", "question", 0), ("math", "problem", 5)])
def test_prompts_of_offline_data_are_known_by_the_published_test_questions_in_them(name, column, twins, form):
    for split in ("train", "test"):
        prompts = [PUT_AROUND[form].format(row.values[column]) for row in read_rows(DATA / name / f"{split}.jsonl")]
        found, all_of_them = sum(map(asks_a_test_question, prompts)), len(prompts) - twins
        if split == "train":
            assert found == 0
        elif form == "few shots" and name == "math":  # of a question of several lines below others it cannot tell where it begins
            assert found > 0.6 * all_of_them
        else:
            assert 0.99 * all_of_them < found <= all_of_them


@needs_data
def test_no_offline_command_learns_a_test_question_unless_told_to(tmp_path):
    from openrl_reason.data.pairs import PairsConfig, read_pairs
    from openrl_reason.data.sft import SFTDataConfig, load_sft_trajectories
    from openrl_reason.models.tiny import make_tokenizer
    from tests.data.offline_helpers import as_sampled, encode

    question, tokenizer = read_rows(DATA / "gsm8k" / "test.jsonl", limit=1)[0].values["question"], make_tokenizer()
    ask = [{"role": "user", "content": question}]
    reply = [{"role": "assistant", "content": "18"}]
    rows = [{"prompt": f"{question}\n", "response": "18", "reward": 1}, {"prompt": ask, "response": "18", "reward": 1},
            {"messages": [*ask, *reply], "reward": 1}, {"prompt": question, "chosen": "18", "rejected": "17"},
            {"prompt": question, "completion": "18", "label": True}, as_sampled(tokenizer, "18", prompt=f"Q: {question}\nAnswer:")]  # fmt: skip
    for row in rows:
        with pytest.raises(DataError, match="x.jsonl:1: the prompt is a question of GSM8K's or MATH's published test split.*--data.allow_test_data"):
            encode(row, tokenizer)
        assert encode(row, tokenizer, bad_rows="skip")[1].counts["bad/test_question"] == 1
        assert encode(row, tokenizer, allow_test_data=True)[0]
    for row in ({"prompt": question, "completion": "18"}, {"messages": [*ask, *reply]}, {"prompt": ask, "completion": reply}):
        file = write(tmp_path / "rows.jsonl", [row])
        with pytest.raises(DataError, match="rows.jsonl:1: the prompt is a question of .* test split.*--data.allow_test_data"):
            load_sft_trajectories(SFTDataConfig(path=file), tokenizer)
        load_sft_trajectories(SFTDataConfig(path=file, allow_test_data=True), tokenizer)
    file = write(tmp_path / "pairs.jsonl", [{"prompt": question, "chosen": "18", "rejected": "17"}])
    with pytest.raises(DataError, match="pairs.jsonl:1: the prompt is a question of .* test split.*--pairs.allow_test_data"):
        read_pairs(PairsConfig(path=file), tokenizer)
    assert read_pairs(PairsConfig(path=file, allow_test_data=True), tokenizer).pairs
