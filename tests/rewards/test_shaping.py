"""Shaped rewards: a table, the order of the operations, running statistics against numpy, and that rollouts see the same map."""

import json
import math

import numpy as np
import pytest

from openrl_reason.algorithms.collect import Rollouts, readable
from openrl_reason.algorithms.dpo_config import DPOConfig
from openrl_reason.algorithms.ppo import PPOConfig, PPOTrainer
from openrl_reason.algorithms.reinforce import ReinforceTrainer
from openrl_reason.algorithms.reinforce_config import ReinforceConfig
from openrl_reason.algorithms.restem_config import RestEMConfig
from openrl_reason.algorithms.vineppo import VinePPOConfig
from openrl_reason.config import flag_names, parse_config
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import CheckpointError, ConfigError
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.rewards.shaping import RewardShaping, ShapedRewardConfig
from tests.algorithms.toy_chain import ToyRewarder, toy_vineppo

SCORES = [0.0, 1.0, 1.0, -2.0, float("nan"), 5.0]


def shaping(**settings):
    return RewardShaping(ShapedRewardConfig(**settings))


def collected(scores, steps=None):
    """A collection of responses of three tokens; ``steps``: {place: its rewards per step}."""
    trajectories, results = [], []
    for place, score in enumerate(scores):
        own = (steps or {}).get(place)
        trajectory = Trajectory.from_completion([1], [2, 3, 4], -np.ones(3), task_id="t", group_id="g", sample_index=place,
                                                reward=0.0 if math.isnan(score) else score)  # fmt: skip
        trajectory.info.update(prompt="p", response="r", gold="g", parsed=None)
        if own is not None:
            trajectory.step_ids[trajectory.action_mask], trajectory.rewards = np.arange(3), np.asarray(own, np.float32)
        trajectories.append(trajectory)
        status = "error" if math.isnan(score) else "ok"
        results.append(RewardResult(score, status, step_scores=None if own is None else tuple(own), terms={"task": score}))
    return Rollouts(trajectories, [None] * len(scores), results, metrics={"train/reward": float(np.nanmean(scores))})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 1, -2, 5]),
        ({"scale": 2.0}, [0, 2, 2, -4, 10]),
        ({"shift": -1.0}, [-1, 0, 0, -3, 4]),
        ({"scale": 2.0, "shift": 1.0}, [1, 3, 3, -3, 11]),
        ({"clip": (-1.0, 1.5)}, [0, 1, 1, -1, 1.5]),
        ({"scale": 2.0, "shift": 1.0, "clip": (0.0, 3.0)}, [1, 3, 3, 0, 3]),
        ({"scale": -1.0, "clip": (-math.inf, 0.0)}, [0, -1, -1, 0, -5]),
        ({"normalize": "running"}, np.array([0, 1, 1, -2, 5]) / np.std([0, 1, 1, -2, 5])),
        ({"scale": 2.0, "shift": 1.0, "clip": (0.0, 3.0), "normalize": "running"}, np.array([1, 3, 3, 0, 3]) / np.std([1, 3, 3, 0, 3])),
    ],
)
def test_scaled_then_shifted_then_clipped_then_divided(settings, expected):
    rollouts = collected(SCORES)
    rollouts.shape(shaping(**settings))
    assert rollouts.rewards.tolist() == pytest.approx([*expected[:4], math.nan, expected[4]], nan_ok=True)
    assert [t.reward for t in rollouts.trajectories] == pytest.approx([*expected[:4], 0.0, expected[4]], rel=1e-6), "no reward stays none"
    np.testing.assert_equal([result.score for result in rollouts.results], SCORES)  # what was given is still there
    assert rollouts.metrics["train/reward"] == 1.0, "and still logged"
    records = readable(rollouts, 0, -1)
    assert [record["reward"] for record in records] == [None if math.isnan(score) else score for score in SCORES]
    if settings:
        assert rollouts.metrics["reward/shaped_mean"] == pytest.approx(np.mean(expected))
        assert rollouts.metrics["reward/shaped_std"] == pytest.approx(np.std(expected))
        assert records[4]["shaped_reward"] is None and records[5]["shaped_reward"] == pytest.approx(expected[4], rel=1e-3)
        assert ("reward/running_std" in rollouts.metrics) == ("normalize" in settings)
    else:
        assert rollouts.shaped is None and "shaped_reward" not in records[0] and rollouts.metrics.keys() == {"train/reward"}
    assert rollouts.take([5]).rewards.tolist() == pytest.approx([expected[4]])


def test_the_share_that_the_clip_changed_is_counted():
    rollouts = collected(SCORES)
    rollouts.shape(shaping(shift=1.0, clip=(0.0, 2.0)))
    assert rollouts.metrics["reward/clipped_rate"] == 2 / 5


@pytest.mark.parametrize("settings", [{"shift": 1.0}, {"scale": 3.0, "shift": -1.0, "clip": (0.0, 2.0), "normalize": "running"}])
@pytest.mark.parametrize("seed", range(5))
def test_steps_are_scaled_and_the_last_one_pays_the_rest_once(settings, seed):
    rng = np.random.default_rng(seed)
    steps = {place: rng.normal(size=3).tolist() for place in (0, 2)}
    scores = [sum(steps[0]), 1.0, sum(steps[2]), 0.0]
    rollouts, shape = collected(scores, steps), shaping(**settings)
    rollouts.shape(shape)
    assert [t.reward for t in rollouts.trajectories] == pytest.approx(rollouts.rewards.tolist(), rel=1e-5, abs=1e-6)
    for place, given in steps.items():
        paid, result = rollouts.trajectories[place].rewards, rollouts.shaped[place]
        factor = settings.get("scale", 1.0) / shape.divisor
        assert paid[:2] == pytest.approx([factor * reward for reward in given[:2]], rel=1e-5)
        assert result.step_scores == pytest.approx(paid.tolist(), rel=1e-5, abs=1e-6) and math.fsum(result.step_scores) == pytest.approx(result.score)
        if settings == {"shift": 1.0}:
            assert paid[2] == pytest.approx(given[2] + 1.0, rel=1e-5)
    assert rollouts.trajectories[1].rewards.tolist() == pytest.approx([rollouts.rewards[1]])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_running_deviation_is_that_of_everything_seen_also_after_a_resume(offset):
    rng, straight, seen = np.random.default_rng(0), shaping(normalize="running", scale=0.5), []
    resumed = shaping(normalize="running", scale=0.5)
    for step in range(20):
        scores = rng.normal(offset, 3.0, rng.integers(1, 9))
        scores[rng.random(len(scores)) < 0.2] = np.nan
        seen += (0.5 * scores[np.isfinite(scores)]).tolist()
        straight.observe(scores)
        resumed.observe(scores)
        if step % 3 == 0:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = shaping(normalize="running", scale=0.5)
            resumed.load_state_dict(state)
        assert straight.divisor == (pytest.approx(np.std(seen), rel=1e-9) if len(set(seen)) > 1 else 1.0)
        assert resumed.divisor == straight.divisor and resumed.state_dict() == straight.state_dict()


def test_rewards_that_are_all_alike_are_not_divided_by_nothing():
    shape = shaping(normalize="running")
    for scores in ([], [math.nan], [0.1] * 7, [0.1] * 3):
        shape.observe(np.array(scores))
        assert shape.divisor == 1.0
    shape.observe(np.array([0.2]))
    assert shape.divisor == pytest.approx(np.std([0.1] * 10 + [0.2]))


def test_the_statistics_are_in_the_drivers_checkpoint_and_belong_to_their_map():
    first = PPOTrainer(PPOConfig(reward=ShapedRewardConfig(normalize="running", scale=2.0)))
    first.shaping.observe(np.array([1.0, 4.0, 2.5]))
    first.order = dict
    state = json.loads(json.dumps(first.state()))
    again = PPOTrainer(PPOConfig(reward=ShapedRewardConfig(normalize="running", scale=2.0)))
    again.order = dict
    again.load_state(state)
    assert again.shaping.divisor == first.shaping.divisor != 1.0
    other = PPOTrainer(PPOConfig(reward=ShapedRewardConfig(normalize="running", scale=3.0)))
    other.order = dict
    with pytest.raises(CheckpointError, match="--reward.scale, .*2.0.*3.0"):
        other.load_state(state)


# ---- what learns from them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"scale": 3.0, "shift": -1.0}, {"scale": 3.0, "normalize": "running"}, {"clip": (0.25, 0.5), "shift": 0.1}])
@pytest.mark.parametrize("siblings", [False, True])
def test_values_of_rollouts_see_the_map_of_their_trajectories(settings, siblings):
    """Rewards here are 0 or 1, so that any map of them is affine: advantages are multiplied by its slope, values are mapped."""
    plain, shaped = (toy_vineppo(prompts="bcd", samples=4, root_from_siblings=siblings) for _ in range(2))
    shaped.shaping = shaping(**settings)
    (one, _), (two, _) = ((trainer.credit(trainer.collect())) for trainer in (plain, shaped))
    zero, full = (shaped.shaping(RewardResult(score)).score for score in (0.0, 1.0))
    mask, known = one.action_mask, one.tokens["values"].isfinite()
    assert full != zero and mask.any() and (one.tokens["advantages"][mask] != 0).any()
    expected = one.tokens["advantages"] * (full - zero)
    assert two.tokens["advantages"][mask].tolist() == pytest.approx(expected[mask].tolist(), abs=1e-5)
    mapped = one.tokens["values"] * (full - zero) + zero
    assert two.tokens["values"][known].tolist() == pytest.approx(mapped[known].tolist(), abs=1e-5)


def test_step_rewards_of_rollouts_and_trajectories_are_mapped_alike():
    """Every step earns 0.5: what is left to earn at a state is scaled, and the shift lies behind every state."""

    def half_a_step(sample):
        return RewardResult(0.5 * len(sample.steps), step_scores=(0.5,) * len(sample.steps))

    plain, shaped = (toy_vineppo(prompts="bcd", samples=3, rewarder=ToyRewarder(half_a_step)) for _ in range(2))
    shaped.shaping = shaping(scale=2.0, shift=7.0)
    (one, _), (two, _) = ((trainer.credit(trainer.collect())) for trainer in (plain, shaped))
    known = one.tokens["values"].isfinite()
    assert two.tokens["values"][known].tolist() == pytest.approx((one.tokens["values"][known] * 2 + 7).tolist(), abs=1e-4)
    assert two.tokens["advantages"].tolist() == pytest.approx((one.tokens["advantages"] * 2).tolist(), abs=1e-4)


def test_adaptive_k_looks_at_rewards_before_they_are_shaped():
    settings = dict(prompts="bcd", samples=2, num_rollouts=3, interval_width=0.7, max_rollouts=9)
    plain, shaped = toy_vineppo(**settings), toy_vineppo(**settings)
    shaped.shaping = shaping(scale=100.0, shift=-3.0)
    for trainer in (plain, shaped):
        trainer.collect()
    assert len(plain.pool.branches()) == len(shaped.pool.branches()) > 0


# ---- settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [ReinforceConfig, PPOConfig, VinePPOConfig])
def test_the_flags_are_there_for_the_online_algorithms(config_class):
    words = ["--reward.scale", "2", "--reward.shift", "-1", "--reward.clip", "[-1, .inf]", "--reward.normalize", "running"]
    config = parse_config(config_class, words, prog="x")
    assert (config.reward.scale, config.reward.shift, config.reward.clip, config.reward.normalize) == (2.0, -1.0, (-1.0, math.inf), "running")
    assert not RewardShaping(config_class().reward).changes and config_class().reward.no_answer == 0.0
    plain = config_class(reward=RewardConfig(no_answer=-0.5))  # in Python
    assert plain.reward == ShapedRewardConfig(no_answer=-0.5)


@pytest.mark.parametrize("config_class", [DPOConfig, RestEMConfig])
def test_commands_that_choose_by_reward_have_no_such_flags(config_class):
    assert not {"reward.scale", "reward.shift", "reward.clip", "reward.normalize"} & flag_names(config_class).keys()


def test_the_plan_says_what_happens_to_rewards():
    settings = ShapedRewardConfig(scale=2.0, shift=-1.0, clip=(-1.0, 1.0), normalize="running")
    rows = dict(ReinforceTrainer(ReinforceConfig(reward=settings)).plan())
    assert rows["reward"].endswith("all of it x 2, -1, clipped to -1 .. 1, divided by the running standard deviation")
    assert "all of it" not in dict(ReinforceTrainer(ReinforceConfig()).plan())["reward"]


@pytest.mark.parametrize(
    ("flag", "settings"),
    [("scale", {"scale": 0.0}), ("scale", {"scale": math.inf}), ("shift", {"shift": math.nan}), ("clip", {"clip": (1.0, 1.0)}),
     ("clip", {"clip": (math.nan, 1.0)}), ("normalize", {"normalize": "batch"}), ("processes", {"processes": 0})],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(flag, settings):
    with pytest.raises(ConfigError, match=f"--reward.{flag}"):
        ShapedRewardConfig(**settings)
