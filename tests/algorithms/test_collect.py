"""How rewards get onto trajectories, without engines."""

import numpy as np
import pytest

from openrl_reason.algorithms.collect import Collector
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import load_task
from openrl_reason.tasks.config import TaskConfig


@pytest.fixture(scope="module")
def collector():
    return Collector(load_task(TaskConfig(num_train=1)), make_tokenizer(), pool=None, rewarder=None)


def rewarded(collector, response, result):
    ids = [*collector.tokenizer(response, add_special_tokens=False)["input_ids"], collector.tokenizer.eos_token_id]
    trajectory = Trajectory.from_completion([1, 2], ids, -np.ones(len(ids)), task_id="t", group_id="g", sample_index=0, info={"response": response})
    return trajectory, collector.rewarded(trajectory, result)


def test_step_rewards_stand_on_the_last_tokens_of_their_steps(collector):
    trajectory, _ = rewarded(collector, "ab\nc\n", RewardResult(1.5, step_scores=(0.5, 1.0)))
    placed = TokenBatch.from_trajectories([trajectory]).tokens["rewards"].tolist()
    assert placed == [0, 0, 0, 0, 0.5, 0, 0, 1.0], "the end-of-sequence token belongs to the last step"


def test_a_response_without_any_step_keeps_its_reward(collector):
    """Nothing but the end token: a term that rewards steps gives none, and the other terms' sum must reach the trajectory all the same."""
    trajectory, result = rewarded(collector, "", RewardResult(-1.0, "no_answer", step_scores=()))
    assert trajectory.reward == result.score == -1.0
    assert TokenBatch.from_trajectories([trajectory]).tokens["rewards"].tolist() == [0, 0, -1.0]
