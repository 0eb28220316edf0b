"""States by the naive definition, on batches and on single trajectories."""

import numpy as np
import pytest
import torch

from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.states import STATE_LEVELS, state_mask
from openrl_reason.core.trajectory import Trajectory


def random_trajectory(rng):
    """Prompt, turns with observations between them, steps without tokens, and some sequences without any action."""
    steps, step = [-1] * int(rng.integers(0, 4)), -1
    for _ in range(int(rng.integers(0, 6))):
        step += int(rng.integers(1, 3))
        steps += [step] * int(rng.integers(0, 4)) + [-1] * int(rng.integers(0, 3)) + [step] * int(rng.integers(0, 2))
    steps = np.array(steps or [-1], np.int32)
    return Trajectory("t", "q", "q", np.arange(len(steps)), steps >= 0, steps, np.zeros(len(steps)), np.zeros(max(step, steps.max(), 0) + 1))


def naive(trajectory, level):
    mask, seen = [], set()
    for action, step in zip(trajectory.action_mask.tolist(), trajectory.step_ids.tolist(), strict=True):
        unit = {"token": len(mask), "step": step, "response": 0}[level]
        mask.append(action and unit not in seen)
        if action:
            seen.add(unit)
    return mask


@pytest.mark.parametrize("level", STATE_LEVELS)
def test_states_are_those_of_the_definition_alone_and_in_a_batch(level):
    rng = np.random.default_rng(0)
    for _ in range(100):
        trajectories = [random_trajectory(rng) for _ in range(int(rng.integers(1, 6)))]
        expected = [naive(trajectory, level) for trajectory in trajectories]
        assert [state_mask(trajectory, level).tolist() for trajectory in trajectories] == expected
        batch = TokenBatch.from_trajectories(trajectories)
        mask = state_mask(batch, level)
        assert mask.dtype == torch.bool and mask.tolist() == [entry for part in expected for entry in part]
        assert not (mask & ~batch.action_mask).any(), "a state stands before an action"


def test_the_mask_is_no_view_of_the_batch():
    batch = TokenBatch.from_trajectories([random_trajectory(np.random.default_rng(3)) for _ in range(3)])
    before = batch.action_mask.clone()
    state_mask(batch, "token").fill_(False)
    assert torch.equal(batch.action_mask, before)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="unknown level 'turn'; known: token, step, response"):
        state_mask(TokenBatch.dummy(), "turn")
    assert not any(state_mask(TokenBatch.dummy(), level).any() for level in STATE_LEVELS)
