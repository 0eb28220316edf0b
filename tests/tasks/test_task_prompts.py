"""The published prompts, byte for byte, and what may not be combined with them."""

import json

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.tasks import TaskConfig, load_task

ROW = {"question": "What is $1+1$?", "answer": "so\n#### 2"}
MATH_ROW = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Prealgebra"}
LOGIQA_ROW = {"id": 1, "answer": 1, "text": "It rains.", "question": "Is it wet?", "options": ["No.", "Yes.", "So so.", "Who knows."], "type": {}}
RECLOR_ROW = {"id_string": "1", "label": 1, "context": "It rains.", "question": "Is it wet?", "answers": LOGIQA_ROW["options"]}
ROWS = {"gsm8k": ROW, "file": ROW, "math": MATH_ROW, "logiqa2": LOGIQA_ROW, "reclor": RECLOR_ROW, "multiple_choice": LOGIQA_ROW}


def task_and_item(tmp_path, name, **config):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    extra = {"context_key": "text"} if name == "multiple_choice" else {}
    task = load_task(TaskConfig(name=name, test_path=str(path), **extra, **config))
    return task, task.items("test")[0]


DEEPSEEK = b"User: What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:"
VINEPPO = b"[MATH_TASK] Problem:\nWhat is $1+1$?\n\nSolution:"
REACT = (
    b"Solve a question answering task by having a Thought, then Finish with your answer. Thought can reason about the current situation. "
    b"Finish[answer] returns the answer and finishes the task. You will be given context that you should use to help you answer the question.\n\n"
    b"Context:\nIt rains.\n\nQuestion:\nIs it wet?\n\nOptions:\nA. No.\nB. Yes.\nC. So so.\nD. Who knows.\n\nThought 1:"
)
CHOICE = b"Context:\nIt rains.\n\nQuestion:\nIs it wet?\n\nOptions:\nA. No.\nB. Yes.\nC. So so.\nD. Who knows.\n\nAnswer:\n"


@pytest.mark.parametrize(
    ("name", "style", "expected"),
    [
        ("gsm8k", "", b"Question: What is $1+1$?\nAnswer:\n"),
        ("math", "", b"Problem: What is $1+1$?\nSolution:\n"),
        ("logiqa2", "", CHOICE),
        ("reclor", "", CHOICE),
        ("gsm8k", "deepseek_math", DEEPSEEK),
        ("math", "deepseek_math", DEEPSEEK),
        ("file", "deepseek_math", DEEPSEEK),
        ("gsm8k", "vineppo", VINEPPO),
        ("math", "vineppo", VINEPPO),
        ("file", "vineppo", VINEPPO),
        ("logiqa2", "react_v2", REACT),
        ("reclor", "react_v2", REACT),
        ("multiple_choice", "react_v2", REACT),
    ],
)
def test_plain_prompts_have_the_published_bytes(tmp_path, name, style, expected):
    task, item = task_and_item(tmp_path, name, prompt_style=style)
    assert task.prompt_text(item).encode() == expected
    tokenizer = make_tokenizer()
    assert task.prompt_text(item, tokenizer).encode() == expected
    assert task.encode_prompt(item, tokenizer) == tokenizer(expected.decode())["input_ids"], "one text, tokenised at once"


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("gsm8k", "Please reason step by step, and produce a final answer following 4 '#', like '#### 0'"),
        ("math", "Please reason step by step, and put your final answer within \\boxed{}."),
    ],
)
def test_oreos_prompts_are_chats_by_themselves(tmp_path, name, system):
    for flag in (False, True):
        task, item = task_and_item(tmp_path, name, prompt_style="oreo_qwen", apply_chat_template=flag)
        assert task.chat and task.stop == ()
        assert task.messages(item) == [{"role": "system", "content": system}, {"role": "user", "content": "What is $1+1$?"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (  # the form of Qwen's template
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    expected = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    assert task.prompt_text(item, tokenizer) == expected
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        task.encode_prompt(item, tokenizer)


def test_every_task_has_a_chat_mode_that_says_how_to_answer(tmp_path):
    for name, said in (("gsm8k", "'#### <number>'"), ("math", "\\boxed{}"), ("logiqa2", "'The answer is X.'"), ("reclor", "'The answer is X.'")):
        task, item = task_and_item(tmp_path, name, apply_chat_template=True)
        (message,) = task.messages(item)
        assert message["role"] == "user" and said in message["content"]


def test_a_style_brings_its_stop_strings_its_grader_and_its_steps(tmp_path):
    assert task_and_item(tmp_path, "math", prompt_style="vineppo")[0].stop == ("\n\n\nProblem:",)
    assert task_and_item(tmp_path, "reclor", prompt_style="react_v2")[0].stop == ("\n\n\n\n", "Context:\n")
    assert task_and_item(tmp_path, "gsm8k")[0].stop == ()
    assert task_and_item(tmp_path, "logiqa2", prompt_style="react_v2")[0].step_kind == "react"
    boxed, item = task_and_item(tmp_path, "gsm8k", prompt_style="deepseek_math")
    assert boxed.grade_kind == "math" and item.gold == "2"
    assert boxed.grade(" It is $\\boxed{2}$.", item).score == 1.0
    assert task_and_item(tmp_path, "gsm8k", prompt_style="vineppo")[0].grade_kind == "gsm8k"
    assert task_and_item(tmp_path, "gsm8k", prompt_style="deepseek_math", grader="gsm8k_lenient")[0].grade_kind == "gsm8k_lenient"
    task, item = task_and_item(tmp_path, "logiqa2", prompt_style="react_v2")
    assert task.grade(" It rains, so it is.\nAction 1: Finish[The answer is B.]", item).score == 1.0


def test_a_solution_goes_on_in_the_line_that_the_prompt_began(tmp_path):
    tokenizer = make_tokenizer()
    for style, start in (("vineppo", " It"), ("deepseek_math", " It"), ("", "It")):
        task, item = task_and_item(tmp_path, "math", prompt_style=style)
        assert tokenizer.decode(task.encode_solution(item, tokenizer)).startswith(start)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"name": "gsm8k", "prompt_style": "vinepo"}, r"--task.prompt_style 'vinepo': task gsm8k has no such style.*did you mean 'vineppo'"),
        ({"name": "math", "prompt_style": "react_v2"}, "it has oreo_qwen, deepseek_math, vineppo"),
        ({"name": "arithmetic", "prompt_style": "vineppo"}, "it has none: use --task.prompt_template"),
        ({"name": "math", "prompt_style": "vineppo", "prompt_template": "{question}!"}, "both set"),
        ({"name": "math", "prompt_style": "vineppo", "apply_chat_template": True}, "is plain text; drop --task.apply_chat_template"),
        ({"name": "math", "prompt_style": "deepseek_math", "system_prompt": "x"}, "plain text without a system prompt"),
        ({"name": "math", "prompt_style": "oreo_qwen", "system_prompt": "x"}, "has its own system prompt"),
        ({"name": "math", "num_few_shot": -1}, "--task.num_few_shot is -1"),
        ({"name": "math", "option_order": "BA"}, "--task.option_order is 'BA', but task math has no options"),
        ({"name": "logiqa"}, "did you mean 'logiqa2'"),
        ({"name": "mahts"}, "did you mean 'math'"),
    ],
)
def test_contradictions_and_unknown_names_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        load_task(TaskConfig(**config))
