"""What is learned is exactly the reply and its EOS, in the ids the policy would meet."""

import json
import random

import numpy as np
import pytest

from openrl_reason.data.sft import SFTDataConfig, load_sft_trajectories
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.tiny import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def load(tmp_path, rows, tokenizer, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_sft_trajectories(SFTDataConfig(path=str(path), **settings), tokenizer)


def learned(trajectory, tokenizer):
    """The replies, each as text."""
    ids, steps = trajectory.token_ids, trajectory.step_ids
    return [tokenizer.decode(ids[steps == turn]) for turn in range(steps.max() + 1)]


def test_prompt_and_completion(tmp_path, tokenizer):
    (trajectory,) = load(tmp_path, [{"prompt": "1+1=?\n", "completion": "#### 2"}], tokenizer).trajectories
    assert tokenizer.decode(trajectory.token_ids) == "1+1=?\n#### 2<|endoftext|>"
    assert learned(trajectory, tokenizer) == ["#### 2<|endoftext|>"]
    assert np.array_equal(trajectory.action_mask, trajectory.step_ids >= 0)
    assert np.isnan(trajectory.behaviour_logprobs).all() and trajectory.info["source"].endswith("rows.jsonl:1")


def test_any_two_columns_by_name(tmp_path, tokenizer):
    rows = [{"question": "q", "answer": "a"}]
    data = load(tmp_path, rows, tokenizer, prompt_key="question", completion_key="answer")
    assert learned(data.trajectories[0], tokenizer) == ["a<|endoftext|>"]
    with pytest.raises(DataError, match=r"rows.jsonl:1: neither 'messages' nor 'prompt' and 'completion'.*there are: question, answer"):
        load(tmp_path, rows, tokenizer)


def test_of_a_conversation_the_assistants_turns_are_learned_and_nothing_else(tmp_path, tokenizer):
    rng = random.Random(0)
    for turns in range(1, 5):
        messages, replies = [{"role": "system", "content": "be kind"}], []
        for _ in range(turns):
            replies.append("".join(rng.choice("ab \n<|>#") for _ in range(rng.randint(0, 8))))
            messages += [{"role": "user", "content": "u" * rng.randint(1, 5)}, {"role": "assistant", "content": replies[-1]}]
        for tail in ([], [{"role": "user", "content": "unanswered"}]):
            (trajectory,) = load(tmp_path, [{"messages": messages + tail}], tokenizer).trajectories
            assert learned(trajectory, tokenizer) == [reply + "<|endoftext|>" for reply in replies]
            assert tokenizer.decode(trajectory.token_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
            assert len(trajectory.rewards) == turns


def test_the_context_of_a_reply_is_the_generation_prompt_token_by_token(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (trajectory,) = load(tmp_path, [{"messages": messages}], tokenizer).trajectories
    prompt = tokenizer(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))["input_ids"]
    assert trajectory.token_ids[~trajectory.action_mask].tolist() == prompt


def test_what_a_template_writes_after_the_end_of_turn_is_context(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    (trajectory,) = load(tmp_path, [{"messages": messages}], tokenizer).trajectories
    assert learned(trajectory, tokenizer) == ["b<|endoftext|>", "d<|endoftext|>"]
    assert tokenizer.decode(trajectory.token_ids) == tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="one row per assistant turn"):
        load(tmp_path, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], tokenizer)


def test_prompt_and_completion_as_messages_or_through_the_template(tmp_path, tokenizer):
    user, early, reply = ({"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "e"), ("assistant", "r")))
    data = load(tmp_path, [{"prompt": [user, early, user], "completion": [reply]}], tokenizer)
    assert learned(data.trajectories[0], tokenizer) == ["r<|endoftext|>"], "replies inside the prompt are context"
    data = load(tmp_path, [{"prompt": "u", "completion": "r"}], tokenizer, apply_chat_template=True)
    assert tokenizer.decode(data.trajectories[0].token_ids) == "<|user|>u<|assistant|>r<|endoftext|>"
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        load(tmp_path, [{"messages": [user, reply]}], tokenizer)


def test_overlong_rows_are_skipped_or_cut_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "p" * 5, "completion": "c" * size} for size in (2, 10, 3, 20)] + [{"prompt": "p" * 50, "completion": "c"}]
    skipped = load(tmp_path, rows, tokenizer, max_length=10)
    assert (len(skipped.trajectories), skipped.num_overlong, skipped.num_truncated) == (2, 3, 0)
    cut = load(tmp_path, rows, tokenizer, max_length=10, overlong="truncate")
    assert (len(cut.trajectories), cut.num_overlong, cut.num_truncated) == (4, 1, 2)
    assert learned(cut.trajectories[1], tokenizer) == ["c" * 5], "no EOS is learned where the text was cut"
    with pytest.raises(DataError, match="all 5 rows are longer than max_length=3"):
        load(tmp_path, rows, tokenizer, max_length=3)
    with pytest.raises(ConfigError, match="did you mean 'truncate'"):
        SFTDataConfig(overlong="truncat")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "no reply to learn from"),
        ({"messages": []}, "expected text or a list of messages"),
        ({"messages": "hello"}, "expected text or a list of messages"),
        ({"messages": [{"role": "user"}]}, "'role' and 'content'"),
        ({"prompt": "x", "completion": None}, "column 'prompt'|column 'completion'"),
        ({"prompt": "x", "completoin": "y"}, r"no column 'completion' \(did you mean 'completoin'\?\)"),
    ],
)
def test_bad_rows_name_their_line(tmp_path, tokenizer, row, match):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*({match})"):
        load(tmp_path, [{"prompt": "x", "completion": "y"}, row], tokenizer)
