"""Trajectories: what is refused, and that what is written is what is read."""

import numpy as np
import pytest

from openrl_reason.core.trajectory import (
    SCHEMA_VERSION,
    StopReason,
    Trajectory,
    iter_jsonl,
    read_jsonl,
    read_parquet,
    write_jsonl,
    write_parquet,
)
from openrl_reason.errors import DataError

ARRAYS = ("token_ids", "action_mask", "step_ids", "behaviour_logprobs", "rewards")


def example(seed: int = 0, **changes) -> Trajectory:
    rng = np.random.default_rng(seed)
    num_prompt, num_completion = int(rng.integers(1, 6)), int(rng.integers(0, 9))
    logprobs = -rng.exponential(size=num_completion).astype(np.float32)
    logprobs[rng.random(num_completion) < 0.2] = np.nan
    settings = dict(
        task_id=f"task-{seed}",
        group_id=f"group-{seed}",
        sample_index=seed,
        step_ids=np.sort(rng.integers(0, 4, num_completion)),
        reward=float(np.float32(rng.normal())),
        policy_version=seed,
        stop_reason=StopReason.STOP_STRING,
        info={"gold": "½ \u2028 \r\n", "nested": {"list": [1, 2.5, None, True]}, "surrogate": "\ud800"},
    )
    return Trajectory.from_completion(
        rng.integers(0, 100, num_prompt), rng.integers(0, 100, num_completion), logprobs, **settings | changes
    )


def assert_equal(left: Trajectory, right: Trajectory) -> None:
    for name in Trajectory.__dataclass_fields__:
        if name in ARRAYS:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
            assert getattr(left, name).dtype == getattr(right, name).dtype
        else:
            assert getattr(left, name) == getattr(right, name), name


@pytest.mark.parametrize(("write", "read"), [(write_jsonl, read_jsonl), (write_parquet, read_parquet)])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, write, read):
    trajectories = [example(seed) for seed in range(50)]
    write(tmp_path / "folder" / "file", trajectories)
    back = read(tmp_path / "folder" / "file")
    assert len(back) == len(trajectories)
    for left, right in zip(trajectories, back, strict=True):
        assert_equal(left, right)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]  # no temporary file stays


def test_jsonl_appends_and_streams(tmp_path):
    for seed in range(3):
        write_jsonl(tmp_path / "t.jsonl", [example(seed)], append=True)
    assert next(iter_jsonl(tmp_path / "t.jsonl")).task_id == "task-0"
    assert [trajectory.policy_version for trajectory in read_jsonl(tmp_path / "t.jsonl")] == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [example(1)])
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_jsonl(tmp_path / "t.jsonl", [example(2), example(3, info={"what": object()})])
    assert read_jsonl(tmp_path / "t.jsonl")[0].task_id == "task-1"


def test_unknown_logprobs_are_null_in_json_and_floats_are_short():
    trajectory = Trajectory.from_completion([1], [2, 3], [-0.1, float("nan")], task_id="a", group_id="a", sample_index=0)
    assert trajectory.to_record()["behaviour_logprobs"] == [None, -0.1, None]
    assert trajectory.to_record()["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "2: not a trajectory"),
        ("[1, 2]", "expected an object"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ('{"schema_version": 1, "token_ids": [], "tokenids": []}', "unknown fields: .'tokenids'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, complaint):
    write_jsonl(tmp_path / "t.jsonl", [example(1)])
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        read_jsonl(tmp_path / "t.jsonl")
    assert "t.jsonl:2" in str(caught.value)


def test_a_missing_or_foreign_file_is_a_data_error(tmp_path):
    (tmp_path / "foreign").write_bytes(b"PAR1 no")
    for read, path in [(read_jsonl, "absent"), (read_parquet, "absent"), (read_parquet, "foreign"), (read_jsonl, "foreign")]:
        with pytest.raises(DataError, match=path):
            read(tmp_path / path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(action_mask=[True]), "action_mask has 1 entries"),
        (dict(step_ids=[-1, 0, -1]), "at least 0 on them"),
        (dict(step_ids=[0, 0, 0]), "-1 outside the actions"),
        (dict(step_ids=[-1, 1, 0], rewards=[0.0, 0.0]), "decrease"),
        (dict(step_ids=[-1, 0, 1]), "last step is number 1"),
        (dict(rewards=[float("nan")]), "rewards are not finite"),
        (dict(behaviour_logprobs=[0.0, -np.inf, 0.0]), "infinite behaviour log-prob"),
        (dict(token_ids=[1, -2, 3]), "negative token id"),
        (dict(token_ids=[1.5, 2.0, 3.0]), "must hold integers"),
        (dict(token_ids=[[1, 2, 3]]), "one-dimensional"),
        (dict(stop_reason="bored"), "bored"),
    ],
)
def test_inconsistent_trajectories_are_refused(changes, complaint):
    fields = dict(
        trajectory_id="x", task_id="t", group_id="g", token_ids=[1, 2, 3], action_mask=[False, True, True], step_ids=[-1, 0, 0],
        behaviour_logprobs=[np.nan, -0.5, -0.5], rewards=[1.0],
    )  # fmt: skip
    Trajectory(**fields)
    with pytest.raises(ValueError, match=complaint):
        Trajectory(**fields | changes)


def test_a_completion_with_an_outcome_reward_has_it_on_the_last_step():
    trajectory = Trajectory.from_completion(
        [1, 2], [3, 4, 5], [-1, -2, -3], task_id="t", group_id="g", sample_index=0, step_ids=[0, 1, 1], reward=2
    )
    assert trajectory.rewards.tolist() == [0.0, 2.0] and trajectory.reward == 2.0
    assert trajectory.prompt_ids.tolist() == [1, 2] and trajectory.response_ids.tolist() == [3, 4, 5]
    assert (trajectory.num_tokens, trajectory.num_actions, trajectory.num_steps) == (5, 3, 2)
    assert trajectory.step_ids.tolist() == [-1, -1, 0, 1, 1]


def test_an_empty_completion_keeps_its_reward():
    trajectory = Trajectory.from_completion([1, 2], [], [], task_id="t", group_id="g", sample_index=0, reward=-1.0)
    assert trajectory.reward == -1.0 and trajectory.num_actions == 0 and trajectory.prompt_ids.tolist() == [1, 2]


def test_the_identity_is_made_of_the_content():
    settings = dict(task_id="t", group_id="g", sample_index=0)
    first = Trajectory.from_completion([1], [2], None, **settings)
    assert first.trajectory_id == Trajectory.from_completion([1], [2], None, **settings).trajectory_id
    others = [
        Trajectory.from_completion([1], [3], None, **settings),
        Trajectory.from_completion([1], [2], None, **settings | {"sample_index": 1}),
    ]
    assert len({first.trajectory_id, *(other.trajectory_id for other in others)}) == 3
    assert np.isnan(first.behaviour_logprobs).all()


def test_a_trajectory_owns_its_arrays():
    tokens = np.array([1, 2, 3], np.int32)
    trajectory = Trajectory("x", "t", "g", tokens, [False, True, True], [-1, 0, 0], [np.nan, -1, -1], [0.0])
    tokens[0] = 99
    assert trajectory.token_ids[0] == 1
