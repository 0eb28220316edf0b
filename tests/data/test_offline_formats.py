"""Every format becomes sequences with the rewards of the file, every bad row is named or counted, and everything adds up."""

import csv
import json

import numpy as np
import pytest

from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.offline import OfflineDataConfig
from openrl_reason.data.offline_formats import detect_layout, find_columns
from openrl_reason.data.offline_rows import RowEncoder
from openrl_reason.data.readers import Row, iter_rows
from openrl_reason.errors import ConfigError, DataError
from tests.data.offline_helpers import byte_tokenizer, encode, one


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def turn(role, content):
    return {"role": role, "content": content}


USER, GOOD, BAD = [turn("user", "1?")], [turn("assistant", "ab")], [turn("assistant", "c")]
TRAJECTORY = Trajectory.from_completion(
    [10, 11], [20, 21, 22], [-0.5, -0.25, -1.0], task_id="q", group_id="q/3", sample_index=0, step_ids=[0, 0, 2], rewards=[0.0, 0.5, 1.0],
    policy_version=7, stop_reason=StopReason.EOS, info={"gold": "4", "has_reward": True},
).to_record()  # fmt: skip


@pytest.mark.parametrize(
    ("row", "format", "kind"),
    [
        ({"prompt": "1?", "response": "ab", "reward": 1}, "responses", "responses"),
        ({"prompt": "1?", "completion": "ab", "reward": 1.5}, "responses", "responses"),
        ({"prompt": USER, "completion": GOOD, "reward": 1}, "responses", "responses"),
        ({"conversations": [*USER, turn("assistant", "OK"), *USER, *GOOD], "reward": True}, "conversations", "responses"),
        ({"messages": [*USER, *GOOD], "reward": 0}, "conversations", "responses"),
        (TRAJECTORY, "trajectories", "responses"),
        ({"prompt": "1?", "response": "ab"}, "sft", "sft"),
        ({"prompt": USER, "completion": GOOD}, "sft", "sft"),
        ({"messages": [*USER, *GOOD]}, "sft", "sft"),
        ({"prompt": "1?", "chosen": "ab", "rejected": "c"}, "pairs", "pairs"),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, "pairs", "pairs"),
        ({"chosen": USER + GOOD, "rejected": USER + BAD}, "pairs", "pairs"),
        ({"chosen": "1? ab", "rejected": "1? c"}, "pairs", "pairs"),
        ({"prompt": "1?", "completion": "ab", "label": True}, "labels", "labels"),
        ({"prompt": USER, "completion": GOOD, "label": False}, "labels", "labels"),
        ({"prompt": "1?", "completions": ["a", "b"], "labels": [True, False]}, "stepwise", "steps"),
    ],
)
def test_a_format_is_known_by_its_columns(row, format, kind, tokenizer):
    layout = detect_layout(list(row), OfflineDataConfig(), "x")
    assert (layout.format, layout.kind) == (format, kind)
    sides, encoder = encode(row, tokenizer, template="chatml" if "messages" in row or not isinstance(row.get("prompt"), str) else "auto")
    assert len(sides) == (2 if kind == "pairs" else 1) and encoder.counts["kept"] == 1
    for side in sides:
        assert 0 < side.num_prompt_tokens < len(side.token_ids) and len({side.question for side in sides}) == 1


def test_the_same_content_is_the_same_sequence_in_every_format(tokenizer):
    rows = [
        {"prompt": "1?", "response": "ab", "reward": 1}, {"prompt": "1?", "completion": "ab", "label": 1}, {"prompt": "1?", "response": "ab"},
        {"prompt": "1?", "chosen": "ab", "rejected": "c"},
    ]  # fmt: skip
    found = [encode(row, tokenizer)[0][0] for row in rows]
    for side in found:
        assert side.token_ids.tolist() == found[0].token_ids.tolist() and side.question == found[0].question
    assert [float(side.rewards.sum()) for side in found] == [1, 1, 0, 1] and [side.has_reward for side in found] == [True, True, False, True]


def test_other_column_names(tokenizer):
    settings = {"prompt_key": "input", "response_key": "output", "label_key": "good"}
    row = {"input": "1?", "output": "ab", "good": 1, "prompt": "no", "label": 0}
    assert detect_layout(list(row), OfflineDataConfig(**settings), "x").format == "labels"
    (side,), _ = encode(row, tokenizer, **settings)
    assert side.label and tokenizer.decode(side.token_ids) == "<s>1?ab</s>"
    assert find_columns(["reward", "r"], OfflineDataConfig(reward_key="r")).reward == "r"
    (side,), _ = encode({"prompt": "1?", "response": "a", "score": 2}, tokenizer, reward_key="score")
    assert side.rewards.tolist() == [2]


def test_unknown_columns_are_told_with_what_is_known():
    with pytest.raises(DataError, match="x: no format has the columns question, answer. Known: prompt, response .*--data.prompt_key"):
        detect_layout(["question", "answer"], OfflineDataConfig(), "x")


# ---- trajectories and steps --------------------------------------------------------------------------------------------------------------


def test_a_trajectory_is_taken_as_it_is(tokenizer):
    (side,), _ = encode(TRAJECTORY, tokenizer, step_kind="whole")
    assert side.token_ids.tolist() == [10, 11, 20, 21, 22] and side.step_ids.tolist() == [-1, -1, 0, 0, 2]
    assert side.rewards.tolist() == [0.0, 0.5, 1.0] and side.behaviour_logprobs[2:].tolist() == [-0.5, -0.25, -1.0]
    assert side.ids[1:] == ("q", "q/3") and side.policy_version == 7 and side.stop_reason == "eos" and side.info["gold"] == "4"


@pytest.mark.parametrize("step_kind", ["newline", "oreo", "whole"])
def test_a_sampled_response_that_is_one_step_is_cut_as_its_text_would_be(tokenizer, step_kind):
    text = one({"prompt": "1?", "response": "a b\n\nc\nd\n", "reward": 0.5}, tokenizer, step_kind=step_kind)
    actions = text.action_mask
    sampled = Trajectory.from_completion(
        text.prompt_ids, text.response_ids, [-1.0] * int(actions.sum()), task_id="q", group_id="q", sample_index=0, reward=0.5,
    )  # fmt: skip
    (side,), encoder = encode(sampled.to_record(), tokenizer, step_kind=step_kind)
    assert side.step_ids.tolist() == text.step_ids.tolist() and side.rewards.tolist() == text.rewards.tolist()
    assert not encoder.counts["steps_not_told"]


def test_a_trajectory_of_another_tokenizer_is_refused(tokenizer):
    row = TRAJECTORY | {"token_ids": [10, 11, 20, 21, 9999]}
    with pytest.raises(DataError, match=r"x\.jsonl:1: token 9999 is beyond the tokenizer's \d+; were these samples made with another"):
        encode(row, tokenizer)


def test_a_trajectory_whose_grading_failed_has_no_reward(tokenizer):
    (side,), encoder = encode(TRAJECTORY | {"info": {"grade_status": "timeout"}}, tokenizer, reward_shift=3.0)
    assert not side.has_reward and side.rewards.sum() == 0 and encoder.counts["reward_unknown"] == 1


def test_stepwise_rows_are_steps_with_a_label_each(tokenizer):
    row = {"prompt": "1?\n", "completions": ["a b", "", "c\nd"], "labels": [True, False, True]}
    trajectory = one(row, tokenizer)
    texts = [tokenizer.decode(trajectory.token_ids[trajectory.step_ids == step]) for step in range(3)]
    assert texts == ["a b\n", "\n", "c\nd</s>"] and trajectory.rewards.tolist() == [1, 0, 1]
    assert one(row, tokenizer, reward_scale=2, reward_shift=-1).rewards.tolist() == [1, -1, 1]
    chat = one(row, tokenizer, template="llama3")
    assert [tokenizer.decode(chat.token_ids[chat.step_ids == step]) for step in range(3)] == ["a b\n", "\n", "c\nd<|eot_id|>"]
    cut = one(row, tokenizer, max_length=9, overlong="truncate")
    assert cut.rewards.tolist() == [1, 0], "a step that is gone takes its label along"


def test_turns_are_steps_unless_they_are_to_be_cut(tokenizer):
    row = {"messages": [*USER, turn("assistant", "a\nb"), *USER, turn("assistant", "c\nd")], "reward": 1}
    assert one(row, tokenizer, template="minicpm").num_steps == 2
    cut = one(row, tokenizer, template="minicpm", split_turns=True)
    assert [tokenizer.decode(cut.token_ids[cut.step_ids == step]) for step in range(4)] == ["a\n", "b", "c\n", "d</s>"]
    assert cut.rewards.tolist() == [0, 0, 0, 1]


# ---- rewards -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1?", "response": "a\nb", "reward": 1}, [1.0]),
        ({"prompt": "1?", "response": "a\nb", "reward": 0}, [-1.0]),
        ({"messages": [*USER, *GOOD], "reward": False}, [-1.0]),
        (TRAJECTORY, [2.0]),
        ({"prompt": "1?", "chosen": "ab", "rejected": "c"}, [1.0, -1.0]),
        ({"prompt": "1?", "completion": "ab", "label": False}, [-1.0]),
        ({"prompt": "1?", "completions": ["a", "b"], "labels": [True, False]}, [0.0]),
        ({"prompt": "1?", "response": "ab"}, [0.0]),
    ],
)
def test_the_affine_map_holds_for_every_format(row, expected, tokenizer):
    """Twice the reward minus one; of steps each label, of rows without a reward nothing."""
    sides, _ = encode(row, tokenizer, template="auto" if "prompt" in row else "chatml", reward_scale=2.0, reward_shift=-1.0)
    assert [float(side.rewards.sum()) for side in sides] == expected


@pytest.mark.parametrize("reward", [1, 0.5, -3, True])
def test_numbers_are_rewards(reward, tokenizer):
    (side,), _ = encode({"prompt": "1?", "response": "a", "reward": reward}, tokenizer)
    assert float(side.rewards.sum()) == float(reward) and side.label == (reward > 0)


def test_a_reward_that_the_affine_map_takes_out_of_range_is_a_bad_row(tokenizer):
    with pytest.raises(DataError, match=r"--data.reward_scale 1e\+10 and --data.reward_shift 0 the reward is beyond 1e\+30"):
        encode({"prompt": "1?", "response": "a", "reward": 1e25}, tokenizer, reward_scale=1e10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": None}, "info must be an object"),
        ({"task_id": 7}, "task_id must be text, not '7'"),
        ({"policy_version": 2**40}, "policy_version must be a whole number of 32 bits"),
        ({"token_ids": [2**32 + 5, 6, 7]}, "token_ids holds 4294967301, beyond 32 bits"),
        ({"action_mask": ["false", "true", "true"]}, "action_mask must hold true and false, not 'false'"),
        ({"action_mask": [1, 1, 1], "step_ids": [0, 0, 0]}, "the first token is the policy's, and nothing stands before it"),
    ],
)
def test_a_trajectory_with_a_wrong_field_is_a_bad_row(tokenizer, change, message):
    good = Trajectory(
        token_ids=[5, 6, 7], action_mask=[False, True, True], step_ids=[-1, 0, 0], behaviour_logprobs=[0.0, 0.0, 0.0], rewards=[0.0, 0.0, 1.0],
        trajectory_id="t", task_id="q", group_id="q", stop_reason=StopReason.EOS,
    )  # fmt: skip
    record = good.to_record() | change
    for bad_rows in ("error", "skip"):
        config = OfflineDataConfig(bad_rows=bad_rows)
        encoder = RowEncoder(config, tokenizer, detect_layout(list(record), config, "x"))
        if bad_rows == "error":
            with pytest.raises(DataError, match=rf"f\.jsonl:1: .*{message}"):
                list(encoder.records([Row("f.jsonl:1", record)]))
        else:
            assert list(encoder.records([Row("f.jsonl:1", record)])) == [] and encoder.counts["bad"] == 1


def test_csv_files_hold_numbers_as_text(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["prompt", "response", "reward"], ["1?", "a", "0.5"], ["1?", "b", "true"], ["1?", "c", "many"]])
    config = OfflineDataConfig(bad_rows="skip")
    encoder = RowEncoder(config, tokenizer, detect_layout(["prompt", "response", "reward"], config, "x"))
    kept = [side for (side,) in encoder.records(iter_rows(path, on_bad=encoder.unread))]
    assert [float(side.rewards.sum()) for side in kept] == [0.5, 1.0] and encoder.counts["bad/reward_not_a_number"] == 1


# ---- bad rows ----------------------------------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ({"prompt": "1?", "response": "a", "reward": "1"}, "reward_not_a_number", "column 'reward' holds '1'; expected a finite number"),
    ({"prompt": "1?", "response": "a", "reward": None}, "reward_not_a_number", "column 'reward' holds 'None'"),
    ({"prompt": "1?", "response": "a", "reward": float("nan")}, "reward_not_a_number", "column 'reward' holds 'nan'"),
    ({"prompt": "1?", "response": "a", "reward": float("inf")}, "reward_not_a_number", "holds 'inf'"),
    ({"prompt": "1?", "response": "a", "reward": 1e39}, "reward_not_a_number", r"holds '1e\+39'; expected a finite number of at most 1e\+30"),
    ({"prompt": "1?", "response": "a", "reward": 10**5000}, "reward_not_a_number", "holds an integer of more than 80 digits"),
    ({"prompt": "1?", "response": "cut \ud83d", "reward": 1}, "not_unicode", r"half of a character \(a lone surrogate\) at 4"),
    (
        {"prompt": USER, "response": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "reward": 1},
        "more_than_text",
        "column 'response', message 0: has tool_calls",
    ),
    ({"prompt": "1?", "response": "a", "reward": [1]}, "reward_not_a_number", r"holds '\[1\]'"),
    (
        {"prompt": "1?", "response": "a", "rewrad": 1},
        "missing_column",
        r"no column 'reward' \(did you mean 'rewrad'\?\); there are: prompt, response",
    ),
    ({"prompt": "1?", "reward": 1}, "missing_column", "no column 'response'"),
    ({"response": "a", "reward": 1}, "missing_column", "no column 'prompt'"),
    ({"prompt": None, "response": "a", "reward": 1}, "missing_value", r"column 'prompt' is empty \(null\)"),
    ({"prompt": 3, "response": "a", "reward": 1}, "not_text", "column 'prompt' holds '3'"),
    ({"prompt": "", "response": "a", "reward": 1}, "empty_prompt", "the prompt is empty"),
    ({"prompt": [], "response": "a", "reward": 1}, "not_messages", "expected text or a list of messages"),
    ({"prompt": [{"role": "user"}], "response": "a", "reward": 1}, "not_messages", "column 'prompt', message 0: a message needs"),
    ({"prompt": [turn("usr", "x")], "response": "a", "reward": 1}, "unknown_role", "unknown role 'usr'.*did you mean 'user'"),
    ({"prompt": USER, "response": USER, "reward": 1}, "no_reply", "column 'response' has no message of the assistant"),
]


@pytest.mark.parametrize(("row", "reason", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_counted(row, reason, message, tokenizer):
    settings = {"format": "responses", "template": "auto"}
    good = {"prompt": "1?", "response": "a", "reward": 1}
    for bad_rows in ("error", "skip"):
        config = OfflineDataConfig(bad_rows=bad_rows, **settings)
        encoder = RowEncoder(config, tokenizer, detect_layout(list(good), config, "x"))
        rows = [Row("f.jsonl:1", good), Row("f.jsonl:2", row), Row("f.jsonl:3", good)]
        if bad_rows == "error":
            with pytest.raises(DataError, match=rf"f\.jsonl:2: .*{message}"):
                list(encoder.records(rows))
        else:
            assert len(list(encoder.records(rows))) == 2
            assert +encoder.counts == {"rows": 3, "kept": 2, "bad": 1, f"bad/{reason}": 1}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"prompt": "1?", "chosen": "a"}, "missing_column", "no column 'rejected'"),
        ({"prompt": "1?", "chosen": "a", "rejected": 1}, "not_a_pair", "column 'rejected' holds '1'"),
        ({"prompt": "1?", "chosen": "a", "rejected": BAD}, "not_a_pair", "'chosen' is a str, 'rejected' a list"),
        ({"chosen": USER, "rejected": [turn("user", "2?")]}, "not_a_pair", "must begin with the same messages"),
        ({"chosen": "ab", "rejected": "cd"}, "not_a_pair", "without a prompt column 'chosen' and 'rejected' must begin with the same words"),
    ],
)
def test_what_is_no_pair(row, reason, message, tokenizer):
    with pytest.raises(DataError, match=message):
        encode(row, tokenizer, format="pairs")
    (), encoder = encode(row, tokenizer, format="pairs", bad_rows="skip")
    assert encoder.counts[f"bad/{reason}"] == 1


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"prompt": "1?", "completion": "a", "label": "yes"}, "labels", "label_not_true_or_false"),
        ({"prompt": "1?", "completion": "a", "label": 2}, "labels", "label_not_true_or_false"),
        ({"prompt": "1?", "completion": "a", "label": None}, "labels", "label_not_true_or_false"),
        ({"prompt": "1?", "completions": ["a"], "labels": [True, False]}, "stepwise", "not_steps"),
        ({"prompt": "1?", "completions": "a", "labels": [True]}, "stepwise", "not_steps"),
        ({"prompt": "1?", "completions": ["a"], "labels": [0.5]}, "stepwise", "label_not_true_or_false"),
        ({"conversations": "hello", "reward": 1}, "conversations", "not_messages"),
        ({"conversations": [{"from": "robot", "value": "x"}], "reward": 1}, "conversations", "unknown_role"),
        (TRAJECTORY | {"token_ids": [1]}, "trajectories", "not_a_trajectory"),
        (TRAJECTORY | {"schema_version": 99}, "trajectories", "not_a_trajectory"),
    ],
)
def test_what_other_formats_refuse(row, format, reason, tokenizer):
    (), encoder = encode(row, tokenizer, format=format, bad_rows="skip", template="chatml")
    assert encoder.counts[f"bad/{reason}"] == 1 and encoder.counts["bad"] == 1
    with pytest.raises(DataError, match=r"x\.jsonl:1"):
        encode(row, tokenizer, format=format, template="chatml")


# ---- lengths -----------------------------------------------------------------------------------------------------------------------------


LONG = {"prompt": "Q:", "response": "ab\ncd\nef", "reward": 1}  # 3 + 8 + 1 tokens


def test_a_long_response_is_left_out_cut_or_an_error(tokenizer):
    (), encoder = encode(LONG, tokenizer, max_length=9)
    assert +encoder.counts == {"rows": 1, "too_long": 1}
    (side,), encoder = encode(LONG, tokenizer, max_length=9, overlong="truncate")
    assert tokenizer.decode(side.token_ids) == "<s>Q:ab\ncd\n" and +encoder.counts == {"rows": 1, "kept": 1, "truncated": 1}
    assert side.stop_reason == "length" and side.rewards.tolist() == [0, 1] and side.has_reward
    for settings in ({}, {"bad_rows": "skip"}):
        with pytest.raises(DataError, match=r"x\.jsonl:1: 12 tokens, more than --data.max_length 9 \(--data.overlong error\)"):
            encode(LONG, tokenizer, max_length=9, overlong="error", **settings)
    assert encode(LONG, tokenizer, max_length=12)[1].counts["kept"] == 1


@pytest.mark.parametrize("step_kind", ["newline", "oreo", "whole"])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("max_length", [2, 3])
def test_a_prompt_without_room_behind_it_is_counted_and_never_crashes(step_kind, overlong, max_length, tokenizer):
    (), encoder = encode(LONG, tokenizer, max_length=max_length, overlong=overlong, step_kind=step_kind)
    assert +encoder.counts == {"rows": 1, "prompt_too_long": 1}
    with pytest.raises(DataError, match="its prompt alone has 3"):
        encode(LONG, tokenizer, max_length=max_length, overlong="error")


def test_the_reward_of_a_response_that_was_cut_off(tokenizer):
    sampled = TRAJECTORY | {"stop_reason": "length"}
    for row, settings in ((LONG, {"max_length": 9, "overlong": "truncate"}), (sampled, {})):
        ((kept,), _), ((masked,), counted), ((), dropped) = (
            encode(row, tokenizer, truncated_reward=policy, reward_shift=1.0, **settings) for policy in ("keep", "mask", "drop")
        )
        assert kept.has_reward and float(kept.rewards.sum()) > 1
        assert not masked.has_reward and not masked.rewards.any() and counted.counts["reward_unknown"] == 1
        assert dropped.counts["truncated_left_out"] == 1 and not dropped.counts["kept"]


def test_a_cut_trajectory_keeps_its_whole_reward_and_its_logprobs(tokenizer):
    (side,), _ = encode(TRAJECTORY, tokenizer, max_length=4, overlong="truncate")
    assert side.token_ids.tolist() == [10, 11, 20, 21] and side.rewards.tolist() == [1.5] and len(side.behaviour_logprobs) == 4


def test_a_conversation_is_cut_behind_the_last_token_of_the_policy(tokenizer):
    row = {"messages": [*USER, *GOOD, turn("user", "observation"), *GOOD], "reward": 1}
    (side,), _ = encode(row, tokenizer, template="minicpm", max_length=12, overlong="truncate")
    assert tokenizer.decode(side.token_ids).endswith("<AI>ab") and side.rewards.tolist() == [1]


def test_empty_responses(tokenizer):
    for row in ({"prompt": "Q:", "response": " \n", "reward": 1}, {"prompt": "Q:", "chosen": "a", "rejected": ""}):
        (), encoder = encode(row, tokenizer)
        assert +encoder.counts == {"rows": 1, "empty": 1}
    kept = one({"prompt": "Q:", "response": "", "reward": 1}, tokenizer, empty="keep")
    assert tokenizer.decode(kept.response_ids) == "</s>" and kept.num_steps == 1
    (), encoder = encode({"prompt": "Q:", "response": "", "reward": 1}, tokenizer, empty="keep", eos="none")
    assert +encoder.counts == {"rows": 1, "empty": 1}, "not a single token is left"


def test_pairs_whose_sides_are_equal_are_left_out(tokenizer):
    (), encoder = encode({"prompt": "Q:", "chosen": "a", "rejected": "a"}, tokenizer)
    assert +encoder.counts == {"rows": 1, "identical": 1}


def test_everything_that_is_left_out_is_counted(tokenizer):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(600):
        values = {"prompt": "Q" * int(rng.integers(1, 12)), "response": "a\n" * int(rng.integers(0, 12)), "reward": rng.choice([0, 1, 2]).item()}
        if rng.random() < 0.1:
            values["reward"] = "x"
        if rng.random() < 0.1:
            del values[str(rng.choice(list(values)))]
        rows.append(Row(f"f:{number}", values))
    for overlong in ("drop", "truncate"):
        config = OfflineDataConfig(max_length=11, overlong=overlong, truncated_reward="drop", bad_rows="skip")
        encoder = RowEncoder(config, tokenizer, detect_layout(["prompt", "response", "reward"], config, "x"))
        kept = list(encoder.records(rows))
        counts = encoder.counts
        parts = ("kept", "bad", "empty", "prompt_too_long", "too_long", "truncated_left_out", "identical")
        assert counts["rows"] == len(rows) == sum(counts[name] for name in parts) and counts["kept"] == len(kept) > 30
        assert counts["bad"] == sum(count for name, count in counts.items() if name.startswith("bad/")) and counts["prompt_too_long"]
        assert counts["too_long" if overlong == "drop" else "truncated_left_out"]
        assert json.loads(json.dumps(counts)) == counts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "oreo"}, "--data.format is 'oreo': use auto, responses"), ({"template": "chat-ml"}, "--data.template is 'chat-ml'.*did you mean"),
        ({"eos": "yes"}, "--data.eos"), ({"overlong": "skip"}, "--data.overlong"), ({"step_kind": "newlines"}, "--data.step_kind.*or oreo"),
        ({"max_length": 1}, "--data.max_length is 1"), ({"reward_scale": 0.0}, "--data.reward_scale"), ({"bad_rows": "drop"}, "--data.bad_rows"),
        ({"reward_shift": float("nan")}, "--data.reward_shift"), ({"first_action_turn": -2}, "--data.first_action_turn"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OfflineDataConfig(**settings)
