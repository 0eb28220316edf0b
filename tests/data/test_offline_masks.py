"""OREO's published masks, reproduced column by column, and what a policy's tokens are under every template."""

import numpy as np
import pytest

from openrl_reason.core.states import state_mask
from openrl_reason.core.steps import STEP_KINDS, split_steps
from openrl_reason.core.trajectory import StopReason
from openrl_reason.data.offline_steps import StepMap
from openrl_reason.errors import DataError
from openrl_reason.tasks.prompts import BOXED_INSTRUCTION
from tests.data.offline_helpers import as_trajectory, byte_tokenizer, encode, metaspace_tokenizer, one


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def merging():
    return byte_tokenizer(merges=True)


def bits(text):
    return [bool(int(bit)) for bit in text]


def published(trajectory, level):
    """OREO marks the token that ends a state: our mask, one place earlier; its last column is never a state."""
    assert not state_mask(trajectory, level)[0]
    return [*state_mask(trajectory, level).tolist()[1:], False]


OREO = {"eos": "space_eos", "step_kind": "oreo"}


@pytest.mark.parametrize(
    ("prompt", "response", "level", "states", "actions", "settings"),
    [
        ("Q:", "ab\ncd", "token", "0011111110", "0001111111", {}),
        ("Q:", "ab\ncd", "step", "0010010000", "0001111111", {}),
        ("Q:", "ab\ncd", "response", "0010000000", "0001111111", {}),
        ("Q:", "a\n\nb\n", "step", "0010110100", "0001111111", {}),
        ("Q:", "", "token", "00110", "00011", {"empty": "keep"}),
        ("Q:", "abcdefghij", "token", "00111110", "00011111", {"max_length": 8, "overlong": "truncate"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["oreo", "newline"])
def test_the_published_masks_of_prompts_and_responses(prompt, response, level, states, actions, settings, kind, tokenizer):
    row = {"prompt": prompt, "response": response, "reward": 1}
    trajectory = one(row, tokenizer, **OREO | settings | {"step_kind": kind})
    assert published(trajectory, level) == bits(states) and trajectory.action_mask.tolist() == bits(actions)
    assert trajectory.reward == 1 and trajectory.stop_reason == (StopReason.LENGTH if "max_length" in settings else StopReason.OFFLINE)


def test_the_published_masks_of_math_where_sentences_end_steps_too(tokenizer):
    row = {"prompt": f"1+1?\n{BOXED_INSTRUCTION}", "response": "A b. C=1.$ D\nE. F", "reward": 0}
    trajectory = one(row, tokenizer, **OREO)
    last = trajectory.num_prompt_tokens - 1
    assert published(trajectory, "step")[last:] == bits("10000100000101001000")
    assert trajectory.action_mask[last:].tolist() == bits("01111111111111111111")
    plain = one(row | {"prompt": "1+1?"}, tokenizer, **OREO)
    assert plain.num_steps == 2, "without the instruction lines alone are steps"
    assert one(row | {"response": "A.\n"}, tokenizer, **OREO).num_steps == 1, "in sentences nothing is cut off at the very end"


@pytest.mark.parametrize(("level", "states"), [("token", "0000000011000110"), ("step", "0000000010000100")])
def test_the_published_masks_of_a_conversation(level, states, tokenizer):
    said = [("user", "I"), ("assistant", "OK"), ("user", "t"), ("assistant", "a1"), ("user", "o"), ("assistant", "a2")]
    row = {"conversations": [{"role": role, "content": content} for role, content in said], "reward": 1}
    trajectory = one(row, tokenizer, template="minicpm", eos="none")
    assert tokenizer.decode(trajectory.token_ids) == "<s><用户>I<AI>OK<用户>t<AI>a1<用户>o<AI>a2"
    assert published(trajectory, level) == bits(states) and trajectory.action_mask.tolist() == bits("0000000001100011")
    eto = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in said], "reward": 1}
    assert np.array_equal(one(eto, tokenizer, template="minicpm", eos="none").token_ids, trajectory.token_ids)


def test_the_constant_ok_is_learned_only_if_asked_for(tokenizer):
    said = [("user", "I"), ("assistant", "OK"), ("user", "t"), ("assistant", "a1")]
    row = {"conversations": [{"role": role, "content": content} for role, content in said], "reward": 1}
    everything = one(row, tokenizer, template="minicpm", eos="none", first_action_turn=0)
    assert tokenizer.decode(everything.token_ids[everything.action_mask]) == "OKa1" and everything.num_steps == 2
    (published,), encoder = encode(row, tokenizer, template="minicpm", eos="none")
    assert tokenizer.decode(published.token_ids[published.step_ids >= 0]) == "a1" and encoder.counts["with_replies_read_only"] == 1
    (), encoder = encode(row | {"conversations": row["conversations"][:3]}, tokenizer, template="minicpm", bad_rows="skip")
    assert +encoder.counts == {"rows": 1, "bad": 1, "bad/no_reply": 1}
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*none of the assistant at index 3 or later \(--data.first_action_turn -1; 0 learns"):
        encode(row | {"conversations": row["conversations"][:3]}, tokenizer, template="minicpm")


@pytest.mark.parametrize("constant, known", [
    ("OK", True), ("Ok.", True), ("OK. I'll follow your instructions and try my best to solve the task.", True), ("OK, here is the code", False),
])  # fmt: skip
@pytest.mark.parametrize("system", [False, True])
def test_the_constant_that_agents_data_begin_with_is_known_in_its_published_forms(constant, known, system, tokenizer):
    said = [("system", "S")] * system + [("user", "I"), ("assistant", constant), ("user", "t"), ("assistant", "a1")]
    row = {"conversations": [{"role": role, "content": content} for role, content in said], "reward": 1}
    (encoded,), encoder = encode(row, tokenizer, template="chatml", train_turn_end=False)
    assert tokenizer.decode(encoded.token_ids[encoded.step_ids >= 0]) == ("a1" if known else constant + "a1")
    assert encoder.counts["with_replies_read_only"] == int(known)


@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("said", [
    [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")],
    [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")],
    [("user", "Q1"), ("assistant", "A1")],
])  # fmt: skip
def test_conversations_that_do_not_begin_as_published_lose_no_reply(column, said, tokenizer):
    row = {column: [{"role": role, "content": content} for role, content in said], "reward": 1}
    (encoded,), encoder = encode(row, tokenizer, template="chatml", train_turn_end=False)
    assert tokenizer.decode(encoded.token_ids[encoded.step_ids >= 0]) == "".join(content for role, content in said if role == "assistant")
    assert not encoder.counts["with_replies_read_only"]


# ---- steps on tokens of more than one character ------------------------------------------------------------------------------------------


def naive_steps(tokenizer, ids, steps, by_last):
    """By decoding every prefix: the step of the first (or last) byte of each token."""
    step_of_byte = [number for number, step in enumerate(steps) for _ in step.encode()]
    found, done = [], 0
    for token in ids:
        size = len(tokenizer.convert_ids_to_tokens(int(token)))  # a character of the byte alphabet for each byte
        place = done + (size - 1 if by_last else 0)
        found.append(step_of_byte[place] if place < len(step_of_byte) else len(steps) - 1)
        done += size
    return found


@pytest.mark.parametrize("kind", [*(kind for kind in STEP_KINDS if kind != "whole"), "fixed:7", "oreo"])
def test_steps_on_merged_tokens_are_those_of_their_bytes(kind, merging):
    rng, mapped = np.random.default_rng(0), StepMap(kind, merging)
    words = ["Let us think.", " ", "\n", "\n\n", "So: the answer is", "3.", "$ ", "Thought: go", "é", "数学", "\n#### 72", "1+2=3"]
    longest = 0
    for _ in range(200):
        text = "".join(rng.choice(words, rng.integers(1, 12)))
        ids = merging(text, add_special_tokens=False)["input_ids"]
        if kind == "oreo":
            lines = text.split("\n")
            steps = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
        else:
            steps = split_steps(text, kind)
        assert mapped.steps(ids, text, "").tolist() == naive_steps(merging, ids, steps, kind == "oreo"), text
        longest = max(longest, max(len(merging.convert_ids_to_tokens(token)) for token in ids))
    assert longest > 3, "the tokenizer merges nothing, so nothing was tested"


@pytest.mark.parametrize("kind", ["newline", "newline_sentence", "oreo"])
def test_bytes_and_decoding_tell_the_same_steps(kind, merging):
    rng, by_bytes, by_decoding = np.random.default_rng(1), StepMap(kind, merging), StepMap(kind, merging)
    by_decoding._bytes_of = None
    for _ in range(100):
        text = "".join(rng.choice(["think. ", "\n", "3.$ ", "é", "数", "answer"], rng.integers(1, 9)))
        for tail in ("", " ", "<|im_end|>"):
            ids = merging(text + tail, add_special_tokens=False)["input_ids"]
            assert by_bytes.steps(ids, text, tail).tolist() == by_decoding.steps(ids, text, tail).tolist(), (text, tail)


def test_a_published_step_begins_with_the_token_that_has_its_first_character(merging):
    """The library's own kinds give a token to the step of its first character: " the" of "3. the" belongs to the step before."""
    response = "So: 3. the answer is 3."
    row = {"prompt": f"1?{BOXED_INSTRUCTION}", "response": response, "reward": 1}
    trajectory, own = (one(row, merging, step_kind=kind, eos="space_eos") for kind in ("oreo", "newline_sentence"))
    pieces = [merging.decode([token]) for token in trajectory.token_ids]
    begins = [piece for piece, state in zip(pieces, state_mask(trajectory, "step").tolist(), strict=True) if state]
    assert begins[1].startswith(" the"), begins
    assert state_mask(own, "step").sum() == 2 and state_mask(own, "step").tolist() != state_mask(trajectory, "step").tolist()


# ---- ends --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eos", "end"), [("eos", "</s>"), ("space_eos", " </s>"), ("none", "")])
def test_what_ends_a_response(eos, end, tokenizer):
    row = {"prompt": "Q:", "response": "ab", "reward": 1}
    assert tokenizer.decode(one(row, tokenizer, eos=eos).response_ids) == "ab" + end
    closed = one(row | {"response": "ab</s>"}, tokenizer, eos=eos)
    assert tokenizer.decode(closed.response_ids) == "ab</s>", "it is closed already"


def test_a_prompt_that_has_its_bos_gets_no_second_one(tokenizer):
    assert tokenizer.decode(one({"prompt": "<s>Q:", "response": "a", "reward": 1}, tokenizer).token_ids) == "<s>Q:a</s>"
    assert tokenizer.decode(one({"prompt": "Q:", "response": "a", "reward": 1}, byte_tokenizer(bos=False)).token_ids) == "Q:a</s>"


def test_a_sentencepiece_response_continues_its_prompt():
    """Tokenised alone it would begin with a blank that nobody wrote."""
    tokenizer = metaspace_tokenizer()
    trajectory = one({"prompt": "So:", "response": "the answer", "reward": 1}, tokenizer, eos="none")
    whole = tokenizer("So:the answer")["input_ids"]
    assert trajectory.token_ids.tolist() == whole and tokenizer.decode(trajectory.token_ids, skip_special_tokens=True) == "So:the answer"
    assert tokenizer("the answer", add_special_tokens=False)["input_ids"] != trajectory.response_ids.tolist()


def test_both_sides_of_a_pair_come_in_order(tokenizer):
    sides, _ = encode({"prompt": "Q:", "chosen": "good", "rejected": "bad"}, tokenizer)
    assert [tokenizer.decode(as_trajectory(side).response_ids) for side in sides] == ["good</s>", "bad</s>"]
    assert [side.label for side in sides] == [True, False] and [side.rewards.tolist() for side in sides] == [[1.0], [0.0]]
