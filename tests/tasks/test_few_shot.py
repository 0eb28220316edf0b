"""Few-shot prompts: which examples, and that the tokens of the question stay its own."""

import json
from pathlib import Path

import pytest

from openrl_reason.errors import DataError
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.tasks import TaskConfig, load_task

SMOLLM2 = Path("/opt/dev/smollm2-135m")
TRAIN = [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(1, 9)]
TEST = [{"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(50, 53)]


def tokenizers():
    yield make_tokenizer()
    if SMOLLM2.is_dir():
        from transformers import AutoTokenizer

        yield AutoTokenizer.from_pretrained(SMOLLM2)


def task_of(tmp_path, count, train=TRAIN, name="gsm8k", **config):
    paths = {}
    for split, rows in (("train", train), ("test", TEST)):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[f"{split}_path"] = str(path)
    return load_task(TaskConfig(name=name, num_few_shot=count, **paths, **config))


def test_plain_examples_are_solved_questions_before_the_question(tmp_path):
    task = task_of(tmp_path, 2)
    item = task.items("test")[0]
    first, second = task.few_shot_examples(item)
    assert task.prompt_text(item) == (
        f"Question: {first.prompt}\nAnswer:\n{first.solution}\n\nQuestion: {second.prompt}\nAnswer:\n{second.solution}\n\n"
        "Question: What is 50 and 1?\nAnswer:\n"
    )
    assert task.stop == ("\n\nQuestion:",)


def test_the_examples_are_the_same_for_every_question_and_depend_on_the_seed(tmp_path):
    chosen = set()
    for seed in range(6):
        task = task_of(tmp_path, 3, seed=seed)
        (same,) = {tuple(example.task_id for example in task.few_shot_examples(item)) for item in task.items("test")}
        again = task_of(tmp_path, 3, seed=seed)
        assert tuple(example.task_id for example in again.few_shot_examples(again.items("test")[1])) == same
        chosen.add(same)
    assert len(chosen) > 3


def test_no_example_is_the_question_itself_and_the_number_stays(tmp_path):
    disguised = {"question": TRAIN[0]["question"].upper().replace(" ", "  "), "answer": "#### 2"}
    task = task_of(tmp_path, 7, train=[*TRAIN, disguised], allow_test_data_in_training=True)
    for item in task.items("train"):
        examples = task.few_shot_examples(item)
        assert len(examples) == 7 == len({example.prompt for example in examples})
        assert item.prompt.lower().split() not in [example.prompt.lower().split() for example in examples]


@pytest.mark.parametrize("style", ["", "vineppo", "deepseek_math"])
def test_plain_prompts_are_token_exact_concatenations(tmp_path, style):
    for tokenizer in tokenizers():
        previous = []
        for count in range(4):
            task = task_of(tmp_path, count, prompt_style=style)
            item = task.items("test")[0]
            ids, text = task.encode_prompt(item, tokenizer), task.prompt_text(item)
            assert tokenizer.decode(ids) == text
            own = tokenizer(task.fill(item), add_special_tokens=False)["input_ids"]
            assert ids[-len(own) :] == own, "the question's tokens are its own, whatever stands before it"
            other = task.encode_prompt(task.items("test")[1], tokenizer)
            shots = ids[: len(ids) - len(own)]
            assert other[: len(shots)] == shots, "all questions share the tokens of the examples"
            assert previous == [] or len(ids) > len(previous)
            previous = ids
            for example in task.few_shot_examples(item):  # what the model sees of an example is what it would produce
                solution = task.encode_solution(example, tokenizer)[:-1]
                assert any(ids[start : start + len(solution)] == solution for start in range(len(ids)))


def test_chat_examples_are_turns_and_earlier_turns_are_a_token_prefix(tmp_path):
    for tokenizer in tokenizers():
        task = task_of(tmp_path, 2, prompt_style="oreo_qwen")
        item = task.items("test")[0]
        messages = task.messages(item)
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        first = task.few_shot_examples(item)[0]
        assert (messages[1]["content"], messages[2]["content"]) == (first.prompt, first.solution)
        ids = task.encode_prompt(item, tokenizer)
        assert tokenizer.decode(ids) == task.prompt_text(item, tokenizer)
        for end in (3, 5):
            head = tokenizer.apply_chat_template(messages[:end], tokenize=False)
            head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
            if task.prompt_text(item, tokenizer).startswith(head):
                assert ids[: len(head_ids)] == head_ids
            else:
                assert tokenizer.eos_token in head  # the tiny template closes a finished conversation
        assert task.stop == ()


def test_the_instruction_of_a_style_stands_once_before_the_examples(tmp_path):
    rows = [
        {"q": f"Is {n} even?", "options": ["Yes.", "No."], "answer": n % 2, "why": f"It is {n}.\nAction 1: Finish[The answer is {'AB'[n % 2]}.]"}
        for n in range(5)
    ]
    paths = {}
    for split, part in (("train", rows[:4]), ("test", rows[4:])):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({key: value for key, value in row.items() if split == "train" or key != "why"}) + "\n" for row in part))
        paths[f"{split}_path"] = str(path)
    config = TaskConfig(name="multiple_choice", prompt_style="react_v2", num_few_shot=2, input_key="q", solution_key="why", **paths)
    task = load_task(config)
    text = task.prompt_text(task.items("test")[0])
    assert text.count("Solve a question answering task") == 1 and text.startswith("Solve") and text.count("\n\nThought 1: It is ") == 2
    assert text.endswith("Question:\nIs 4 even?\n\nOptions:\nA. Yes.\nB. No.\n\nThought 1:")
    assert "\n\nQuestion:" in task.stop
    for item in task.few_shot_examples(task.items("test")[0]):
        assert task.grade(item.solution, item).score == 1.0


def test_examples_of_chat_rows_are_their_messages(tmp_path):
    rows = [
        {"q": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n}?"}], "a": str(n), "s": f"#### {n}"} for n in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(
        TaskConfig(name="file", train_path=str(path), input_key="q", label_key="a", solution_key="s", num_few_shot=2, apply_chat_template=True)
    )
    item = task.items("train")[1]
    assert [message["role"] for message in task.messages(item)] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert task.messages(item)[-1]["content"] == "1?" and "1?" not in [message["content"] for message in task.messages(item)[:-1]]


def test_too_few_examples_are_refused_with_the_ways_out(tmp_path):
    with pytest.raises(DataError, match="num_few_shot=8 needs 9 different training items with a reference solution, and there are 8"):
        task = task_of(tmp_path, 8)
        task.encode_prompt(task.items("test")[0], make_tokenizer())
    leaky = task_of(tmp_path, 1, train=[*TRAIN, TEST[0]])
    with pytest.raises(DataError, match="held-out test questions"):
        leaky.prompt_text(leaky.items("test")[0])


def test_generated_tasks_have_examples_too():
    task = load_task(TaskConfig(num_train=50, num_test=2, num_few_shot=3))
    text = task.prompt_text(task.items("test")[0])
    assert text.count("\n#### ") == 3 and text.endswith(f"\n\n{task.items('test')[0].prompt}\n") and task.stop == ()
