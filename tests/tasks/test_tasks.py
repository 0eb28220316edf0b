"""Prompts and solutions in token ids, chat templates, user tasks, the gym-like face."""

import pytest

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.tasks import GradeResult, Task, TaskConfig, TaskItem, grade, load_task
from openrl_reason.tasks.base import render_chat, select_items


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_prompt_and_solution_are_tokenised_apart_and_end_with_eos(tokenizer):
    task = load_task(TaskConfig(num_train=20))
    for item in task.items("train"):
        prompt, solution = task.encode_prompt(item, tokenizer), task.encode_solution(item, tokenizer)
        assert tokenizer.decode(prompt) == f"{item.prompt}\n"
        assert solution[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in prompt + solution[:-1]
        assert tokenizer.decode(solution[:-1]) == item.solution


def test_long_prompts_are_left_out_and_counted(tokenizer):
    task = load_task(TaskConfig(levels=(1, 5), num_train=40))
    items = task.items("train")
    lengths = [len(task.encode_prompt(item, tokenizer)) for item in items]
    limit = sorted(lengths)[20]
    encoded = task.encode_prompts(items, tokenizer, limit)
    assert encoded.num_too_long == sum(length > limit for length in lengths) > 0
    assert len(encoded.items) == len(encoded.prompt_ids) == 40 - encoded.num_too_long
    assert [task.encode_prompt(item, tokenizer) for item in encoded.items] == encoded.prompt_ids
    with pytest.raises(DataError, match="all 40 prompts"):
        task.encode_prompts(items, tokenizer, 2)


def test_a_chat_prompt_goes_through_the_template_once(tokenizer):
    task = load_task(TaskConfig(num_train=1, apply_chat_template=True, system_prompt="Be brief.", prompt_template="Q: {question}"))
    item = task.items("train")[0]
    assert task.prompt_text(item, tokenizer) == f"<|system|>Be brief.<|user|>Q: {item.prompt}<|assistant|>"
    assert tokenizer.decode(task.encode_prompt(item, tokenizer)) == task.prompt_text(item, tokenizer)
    assert task.encode_prompt(item, tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|system|>")


def test_a_missing_chat_template_is_named_with_the_way_out():
    bare = make_tokenizer()
    bare.chat_template = None
    task = load_task(TaskConfig(num_train=1, apply_chat_template=True))
    with pytest.raises(ConfigError, match="--task.apply_chat_template false"):
        task.encode_prompt(task.items("train")[0], bare)


def test_a_template_that_refuses_the_messages_is_bad_data():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        render_chat([{"role": "user", "content": "x"}], tokenizer)


def test_a_tokenizer_that_closes_every_text_does_not_close_prompts():
    from tokenizers.processors import TemplateProcessing

    closing = make_tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 1)])
    task = load_task(TaskConfig(num_train=1))
    item = task.items("train")[0]
    assert closing("x")["input_ids"][-1] == 1
    assert task.encode_prompt(item, closing)[-1] != 1
    assert task.encode_solution(item, closing).count(1) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"name": "gsm8"}, {"name": "no_file.py:Class"}, {"prompt_template": "no question"}, {"system_prompt": "x"}, {"num_train": -1},
     {"name": "file"}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        load_task(TaskConfig(**wrong))


def test_only_the_question_is_replaced_in_a_template_and_unknown_splits_are_refused(tokenizer):
    task = load_task(TaskConfig(num_train=1, prompt_template="{question} {query} \\boxed{}"))
    item = task.items("train")[0]
    assert task.prompt_text(item) == f"{item.prompt} {{query}} \\boxed{{}}"
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        task.items("validation")


def test_braces_in_a_question_are_only_text(tokenizer):
    task = load_task(TaskConfig(num_train=1))
    item = task.make_item("the set {1, {question}} = ?", gold="1")
    assert task.prompt_text(item) == "the set {1, {question}} = ?\n"


def test_the_environment_is_one_turn_long_and_pays_the_grade():
    task = load_task(TaskConfig(num_train=1))
    item = task.items("train")[0]
    env = task.env(item)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("x")
    assert env.reset() == f"{item.prompt}\n"
    assert env.step(item.solution)[1:3] == (1.0, True)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("again")
    env.reset()
    observation, reward, done, info = env.step("no idea")
    assert (observation, reward, done, info["status"]) == ("", 0.0, True, "no_answer")


def test_grade_is_importable_where_tasks_are():
    assert grade("#### 18.0", "$18", "gsm8k") == GradeResult(1.0, "18", "ok")


USER_TASK = """
from openrl_reason.tasks import Task
def grade_length(text, gold):
    return float(len(text) == int(gold))
class Lengths(Task):
    name = "lengths"
    grade_kind = f"{__file__}:grade_length"
    def load_split(self, split):
        return [self.make_item("x" * n, gold=str(n), solution="y" * n) for n in (1, 2)] if split == "train" else []
class NotATask:
    pass
"""


def test_a_users_task_comes_from_a_file_with_its_own_grader(tmp_path, tokenizer):
    path = tmp_path / "mine.py"
    path.write_text(USER_TASK)
    task = load_task(TaskConfig(name=f"{path}:Lengths"))
    assert isinstance(task, Task) and all(isinstance(item, TaskItem) for item in task.items("train"))
    assert task.grade("zz", task.items("train")[1]).score == 1.0
    assert task.grade("zzz", task.items("train")[1]).score == 0.0
    with pytest.raises(DataError, match="test split is empty"):
        task.items("test")
    with pytest.raises(ConfigError, match="did you mean 'Lengths'"):
        load_task(TaskConfig(name=f"{path}:Length"))
    with pytest.raises(ConfigError, match="it has: Lengths"):
        load_task(TaskConfig(name=f"{path}:NotATask"))


def test_identities_depend_on_content_alone():
    task = load_task(TaskConfig(num_train=1))
    assert task.make_item("a", gold="1").task_id == task.make_item("a", gold="1", info={"x": 1}).task_id
    assert task.make_item("a", gold="1").task_id != task.make_item("a", gold="2").task_id


def test_items_are_chosen_by_their_task_id_or_the_id_in_the_data():
    task = load_task(TaskConfig(num_train=1))
    a, b, c = (task.make_item(text, gold="1", info={"id": name}) for text, name in (("a", 7), ("b", "test/b.json"), ("c", 7)))
    plain = task.make_item("d", gold="1")
    items = [a, b, c, plain]
    assert select_items(items, ["test/b.json", a.task_id]) == [b, a]
    assert select_items(items, ["7", plain.task_id, c.task_id]) == [a, c, plain], "a repeated id stands for all its items, each comes once"
    assert select_items(items, []) == []
    with pytest.raises(DataError, match=r"2 of the 3 ids name none of the 4 items: 'test/b.jso', '9' \(did you mean 'test/b.json'\?\)"):
        select_items(items, ["test/b.jso", "7", "9"])


def test_a_task_may_grade_each_item_by_its_own_kind():
    task = load_task(TaskConfig(num_train=1))
    item = task.items("train")[0]
    assert task.grade_kind_of(item) == task.grade_kind == "arithmetic"
    task.grade_kind_of = lambda item: "gsm8k_lenient"
    assert task.grade(f"it is {item.gold}", item).score == 1.0


def test_another_way_of_cutting_steps_is_a_copy_with_the_same_items():
    task = load_task(TaskConfig(num_train=3))
    other = task.cut_by("sentence")
    assert (task.step_kind, other.step_kind) == ("newline", "sentence") and type(other) is type(task)
    assert other.items("train") is task.items("train") and other.config is task.config
