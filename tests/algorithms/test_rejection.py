"""Rejection sampling on given data: what is learned is what the filter says, everything else is counted, and other files read as before."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from openrl_reason.algorithms.rejection import choose_rows, describe, has_rewards, offline_data
from openrl_reason.algorithms.sft import SFTConfig, SFTTrainer
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.core.trajectory import StopReason, Trajectory, write_jsonl
from openrl_reason.data.offline import build_store
from openrl_reason.data.sft import SFTDataConfig
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.workers.model_config import TrainedModelConfig
from tests.helpers_models import write_tiny_model

ROWS = [
    {"prompt": prompt, "response": response, "reward": reward}
    for prompt, response, reward in (
        ("1+1=?", "2", 1.0), ("2+2=?", "5", 0.0), ("1+1=?", "3", 0.0), ("1+1=?", "2", 1.0), ("2+2=?", "4", 1), ("1+1=?", "1+1=2", 0.5),
        ("3+3=?", "7", 0.25), ("2+2=?", "4" * 80, 1.0),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write(tmp_path, rows, name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def choose(tmp_path, model, path, seed=0, **settings):
    config = SFTDataConfig(path=path, max_length=64, **settings)
    store = build_store(offline_data(config), model, tmp_path / "store")
    rows, counts = choose_rows(store, config, seed)
    return rows.tolist(), counts, store


def test_right_responses_are_kept_and_the_others_counted(tmp_path, model):
    rows, counts, store = choose(tmp_path, model, write(tmp_path, ROWS), min_reward=1.0)
    assert rows == [0, 3, 4] and len(store) == 7, "the row that is too long is not in the store"
    assert counts == {
        "samples": 7,
        "kept": 3,
        "wrong": 4,
        "questions": 3,
        "none_right": 1,
        "ungraded": 0,
        "truncated": 0,
        "repeated": 0,
        "over_limit": 0,
    }
    assert describe(counts) == "7 samples, 3 questions, 3 kept, 4 wrong; 1 questions without a right one"
    assert choose(tmp_path, model, write(tmp_path, ROWS), min_reward=0.5)[0] == [0, 3, 4, 5]
    assert choose(tmp_path, model, write(tmp_path, ROWS))[0] == list(range(7)), "no filter"
    rows, counts, _ = choose(tmp_path, model, write(tmp_path, ROWS), min_reward=0.5, dedup=True)
    assert rows == [0, 4, 5] and counts["repeated"] == 1
    assert choose(tmp_path, model, write(tmp_path, ROWS), min_reward=1.0, num_rows=4)[0] == [0, 3]


def test_a_cap_draws_by_the_seed(tmp_path, model):
    rows = [{"prompt": f"{a}+1=?", "response": str(n), "reward": 1} for n in range(10, 30) for a in range(2)]
    drawn = {tuple(choose(tmp_path, model, write(tmp_path, rows), seed, min_reward=1.0, max_per_question=3)[0]) for seed in (0, 0, 1, 2)}
    assert len(drawn) == 3
    for chosen in drawn:
        assert len(chosen) == 6 and sum(row % 2 for row in chosen) == 3


def test_of_this_librarys_samples_those_that_were_cut_off_or_not_graded_are_left_out(tmp_path, model):
    def sample(number, stop=StopReason.EOS, **info):
        about = dict(task_id="q", group_id="q", sample_index=number, reward=1.0, stop_reason=stop, info=info)
        return Trajectory.from_completion([5, 6], [7, number], None, **about)

    samples = [sample(10), sample(11, StopReason.LENGTH), sample(12, has_reward=False), sample(13, grade_status="timeout"), sample(14)]
    folder = tmp_path / "samples"
    write_jsonl(folder / "samples-00000.jsonl", samples)
    rows, counts, _ = choose(tmp_path, model, str(folder), min_reward=1.0)
    assert rows == [0, 4] and counts["truncated"] == 1 and counts["ungraded"] == 2
    rows, _, store = choose(tmp_path, model, str(folder), min_reward=1.0, keep_truncated=True)
    assert rows == [0, 1, 4] and store.trajectory(1).token_ids.tolist() == [5, 6, 7, 11], "token by token, as sampled"
    assert has_rewards(SFTDataConfig(path=str(folder))) and has_rewards(SFTDataConfig(path=str(folder / "samples-00000.jsonl")))


@pytest.mark.parametrize(
    ("row", "settings", "rewarded"),
    [
        ({"prompt": "A", "completion": "B"}, {}, False),
        ({"prompt": "A", "completion": "B", "reward": 1}, {}, False),
        ({"prompt": "A", "completion": "B", "reward": 1}, {"min_reward": 0.5}, True),
        ({"messages": [{"role": "user", "content": "A"}]}, {}, False),
        ({"question": "A", "answer": "B"}, {"prompt_key": "question", "completion_key": "answer"}, False),
        ({"question": "A", "answer": "B"}, {}, False),
        ({"prompt": "A", "response": "B", "reward": 1}, {}, True),
        ({"conversations": [{"role": "user", "content": "A"}], "reward": 1}, {}, True),
    ],
)
def test_files_that_were_read_before_still_are_read_that_way(tmp_path, row, settings, rewarded):
    assert has_rewards(SFTDataConfig(path=write(tmp_path, [row]), **settings)) is rewarded


def test_what_cannot_be_filtered_is_an_error_that_says_so(tmp_path, model):
    with pytest.raises(
        DataError, match=r"nothing is left to learn from \(7 samples, 3 questions, 7 wrong; .*rewards from 0 to 1\).*--data.min_reward"
    ):
        choose(tmp_path, model, write(tmp_path, ROWS), min_reward=2.0)
    with pytest.raises(DataError, match="no rewards to filter by .*'sft'"):
        choose(tmp_path, model, write(tmp_path, [{"prompt": "A", "completion": "B"}]), min_reward=1.0)
    with pytest.raises(ConfigError, match="--data.max_per_question is -1"):
        SFTDataConfig(max_per_question=-1)
    with pytest.raises(ConfigError, match="--data.min_reward is nan"):
        SFTDataConfig(min_reward=float("nan"))


# ---- the driver ------------------------------------------------------------------------------------------------------------------------------


def trained_on(tmp_path, model, **settings):
    """The sequences of every step of a run whose policy only looks at them, as ids."""
    run = RunConfig(output_dir=str(tmp_path / "run"), steps=settings.pop("steps", 5))
    trainer = SFTTrainer(SFTConfig(run=run, policy=TrainedModelConfig(path=model), max_length=64, **settings))
    trainer.prepare()
    seen = []
    trainer.policy = SimpleNamespace(update=lambda batch, loss, denominators: seen.append(batch) or {"lr": 0.0})
    for number in range(trainer.run.steps):
        trainer.done = number
        trainer.step()
    return trainer, [[ids.tolist() for ids in batch.token_ids.split(batch.lengths.tolist())] for batch in seen]


@pytest.mark.parametrize("column", ["response", "completion"])
def test_epochs_are_whole_from_a_store_and_from_a_list(tmp_path, model, column, capsys):
    rows = [{"prompt": "AB", column: f"{n}", **({"reward": n % 2} if column == "response" else {})} for n in range(10, 30)]
    data = SFTDataConfig(path=write(tmp_path, rows), min_reward=1.0 if column == "response" else None)
    trainer, steps = trained_on(tmp_path, model, data=data, batch_size=4, epochs=2)
    count = 10 if column == "response" else 20
    assert trainer.run.steps == count // 2 and [len(step) for step in steps] == [4] * (count // 2)
    flat = [tuple(ids) for step in steps for ids in step]
    assert len(set(flat)) == count and all(flat.count(ids) == 2 for ids in flat) and set(flat[:count]) == set(flat)
    if column == "response":
        assert "rewarded responses: 20 samples, 1 questions, 10 kept, 10 wrong" in capsys.readouterr().out
        trainer.sampler.close()


def test_without_epochs_steps_go_on_and_a_last_step_may_be_smaller_with_them(tmp_path, model):
    data = SFTDataConfig(path=write(tmp_path, ROWS), min_reward=1.0)
    assert [len(step) for step in trained_on(tmp_path, model, data=data, batch_size=2, steps=4)[1]] == [2, 2, 2, 2]
    assert [len(step) for step in trained_on(tmp_path, model, data=data, batch_size=2, epochs=1)[1]] == [2, 1]


def test_imitating_wrong_responses_is_said(tmp_path, model, capsys):
    trained_on(tmp_path, model, data=SFTDataConfig(path=write(tmp_path, ROWS)), batch_size=2, steps=1)
    assert "all are imitated, whatever their reward: --data.min_reward" in capsys.readouterr().out


def test_the_learned_tokens_are_the_response_and_its_end(tmp_path, model):
    trainer, _ = trained_on(tmp_path, model, data=SFTDataConfig(path=write(tmp_path, ROWS), min_reward=1.0), batch_size=3, steps=1)
    for trajectory in trainer.sampler.trajectories(0):
        assert np.flatnonzero(trajectory.action_mask).tolist() == [5, 6] and trajectory.token_ids[-1] == 1
