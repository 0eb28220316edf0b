"""Whatever the messages are, the policy's tokens decode to what the assistant said, and the rest to what stands around it."""

import numpy as np
import pytest

from openrl_reason.data.templates import MARKUPS, template_turns
from openrl_reason.errors import ConfigError, DataError
from tests.data.offline_helpers import byte_tokenizer, encode, metaspace_tokenizer, one

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MINICPM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<用户>' + m['content'].strip() + '<AI>' }}"
    "{% else %}{{ m['content'].strip() }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # drops the thoughts of earlier turns, as templates of thinking models do
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN = {"chatml": CHATML, "llama3": LLAMA3, "minicpm": MINICPM}
WORDS = ["a", " ", "\n", "\n\n", "Thought: x", "é", "数", "🙂", "{{ m }}", "<b>", "  b  ", "2.$ ", "'", "\\n", "<|im_start|>", "ok"]


@pytest.fixture(scope="module", params=["bytes", "merges"])
def tokenizer(request):
    return byte_tokenizer(merges=request.param == "merges")


def conversations(seed, count, first=("user", "assistant", "system")):
    """Any roles in any order, with at least one message of the assistant; texts with blanks, line feeds and markup in them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        roles = [str(role) for role in rng.choice(["user", "assistant", "system"], rng.integers(1, 7), p=[0.45, 0.45, 0.1])]
        roles[0] = str(rng.choice(first))
        roles += ["assistant"] * ("assistant" not in roles)
        yield [{"role": role, "content": "".join(rng.choice(WORDS, rng.integers(1, 6)))} for role in roles]


def said(messages, template):
    texts = [message["content"] for message in messages if message["role"] == "assistant"]
    return [text.strip() for text in texts] if template != "tokenizer" and MARKUPS[template].strip else texts


@pytest.mark.parametrize("template", list(MARKUPS))
@pytest.mark.parametrize("train_turn_end", [True, False])
def test_the_policys_tokens_decode_to_what_the_assistant_said(template, train_turn_end, tokenizer):
    end = MARKUPS[template].turn_end.replace("{eos}", "</s>") if train_turn_end else ""
    for messages in conversations(0, 60):
        texts = said(messages, template)
        if not any(texts) and not end:  # nothing is the policy's
            continue
        settings = {"template": template, "train_turn_end": train_turn_end, "eos": "none", "empty": "keep", "max_length": 9999}
        (encoded,), _ = encode({"messages": messages, "reward": 1}, tokenizer, **settings)
        decoded = tokenizer.decode(encoded.token_ids[encoded.step_ids >= 0])
        assert decoded == "".join(text + end for text in texts), messages
        turns = [tokenizer.decode(encoded.token_ids[encoded.step_ids == turn]) for turn in range(len(texts))]
        assert turns == [text + end for text in texts], "each message is a step"


@pytest.mark.parametrize("template", ["chatml", "llama3", "minicpm"])
def test_a_built_in_template_writes_what_the_published_one_does(template, tokenizer):
    """Token by token, up to the last reply; the published one is a tokenizer's own, which brings its BOS token with it where it has one."""
    tokenizer.chat_template = OWN[template]
    for messages in conversations(1, 40, first=("user", "system")):
        row = {"messages": messages, "reward": 1}
        if any("<|im_start|>" in message["content"] for message in messages):
            continue
        if not all(message["content"].strip() for message in messages):
            continue
        mine, theirs = (one(row, tokenizer, template=name, eos="none", max_length=9999) for name in (template, "tokenizer"))
        own_bos = len(mine.token_ids) - len(theirs.token_ids)
        assert own_bos == (template == "chatml"), "a tokenizer that puts BOS in front of texts, and a template of its own without one"
        assert mine.token_ids[own_bos:].tolist() == theirs.token_ids.tolist(), messages
        assert mine.action_mask[own_bos:].tolist() == theirs.action_mask.tolist(), messages


def test_the_tokenizers_own_template_marks_what_the_assistant_said_and_the_end_of_its_turn(tokenizer):
    tokenizer.chat_template = CHATML
    for messages in conversations(2, 40, first=("user", "system")):
        texts = said(messages, "tokenizer")
        for train_turn_end, end in ((True, "<|im_end|>"), (False, "")):
            if not any(texts) and not end:
                continue
            trajectory = one({"messages": messages, "reward": 1}, tokenizer, train_turn_end=train_turn_end, empty="keep", max_length=9999)
            assert tokenizer.decode(trajectory.token_ids[trajectory.action_mask]) == "".join(text + end for text in texts), messages


def test_every_token_is_of_the_rendered_conversation(tokenizer):
    """Context and replies join to the text up to the last reply: nothing is lost between the pieces."""
    tokenizer.chat_template = CHATML
    for messages in conversations(3, 40, first=("user", "system")):
        trajectory = one({"messages": messages, "reward": 1}, tokenizer, empty="keep", max_length=9999)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.startswith(tokenizer.decode(trajectory.token_ids)), messages


def test_a_template_that_forgets_is_refused_with_the_number_of_the_turn(tokenizer):
    tokenizer.chat_template = FORGETFUL
    messages = [
        {"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>a</think>1"},
        {"role": "user", "content": "2?"}, {"role": "assistant", "content": "<think>b</think>2"},
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"x\.jsonl:1: message 3: the chat template writes earlier turns differently"):
        encode({"messages": messages, "reward": 1}, tokenizer)
    assert one({"messages": messages[:2], "reward": 1}, tokenizer).num_actions
    (), encoder = encode({"messages": messages, "reward": 1}, tokenizer, bad_rows="skip")
    assert encoder.counts["bad/template"] == 1


def test_a_template_that_changes_what_is_said_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(DataError, match=r"x\.jsonl:1: message 1: the chat template changes what the assistant says"):
        encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "reward": 1}, tokenizer)


def test_a_conversation_that_the_assistant_begins_needs_a_built_in_template(tokenizer):
    tokenizer.chat_template = CHATML
    row = {"messages": [{"role": "assistant", "content": "b"}], "reward": 1}
    with pytest.raises(DataError, match="message 0: the conversation begins with the assistant"):
        encode(row, tokenizer)
    assert tokenizer.decode(one(row, tokenizer, template="chatml").response_ids) == "b<|im_end|>"


def test_chats_without_any_template_say_which_there_are():
    with pytest.raises(ConfigError, match="--data.template is 'auto'.*chatml, llama3, minicpm, plain"):
        encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "reward": 1}, byte_tokenizer())


def test_text_goes_through_a_template_that_is_named(tokenizer):
    row = {"prompt": "1?", "response": "2", "reward": 1}
    chat = {"prompt": [{"role": "user", "content": "1?"}], "response": [{"role": "assistant", "content": "2"}], "reward": 1}
    text, named, messages = (one(value, tokenizer, template=template) for value, template in ((row, "auto"), (row, "chatml"), (chat, "chatml")))
    assert tokenizer.decode(text.token_ids) == "<s>1?2</s>"
    assert tokenizer.decode(named.token_ids) == "<s><|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert np.array_equal(named.token_ids, messages.token_ids)


def test_the_turns_of_a_sentencepiece_tokenizer_decode_to_what_was_said():
    tokenizer = metaspace_tokenizer()
    texts = ["the answer", "So: the answer is", "think", "clips"]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    trajectory = one({"messages": messages, "reward": 1}, tokenizer, template="minicpm", eos="none")
    assert trajectory.token_ids.tolist() == tokenizer("<用户>the answer<AI>So: the answer is<用户>think<AI>clips")["input_ids"]


def test_what_follows_the_last_reply_is_left_out(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (turn,) = template_turns(messages, 0, "chatml", tokenizer, "x")
    assert turn.context.endswith("assistant\n") and (turn.reply, turn.end) == ("b", "<|im_end|>")
