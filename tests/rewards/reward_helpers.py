"""Samples, tasks and process checks shared by the tests of rewards."""

import threading

from openrl_reason.rewards.base import RewardSample
from openrl_reason.tasks.base import TaskItem
from tests.processes import alive, wait_until  # noqa: F401 - the tests take them from here


def make_sample(response, gold="4", *, steps=None, num_tokens=5, stop_reason="stop", prompt="What is 2+2? ", **info):
    """A response of one step, unless ``steps`` are given."""
    steps = (response,) if steps is None else tuple(steps)
    return RewardSample(prompt, response, TaskItem(f"id-{gold}", "What is 2+2?", gold, None, info), num_tokens, stop_reason, steps)


def score_all(source, samples, timeout=60):
    """Submits, flushes and waits."""
    futures = [source.submit(sample) for sample in samples]
    source.flush()
    return [future.result(timeout=timeout) for future in futures]


def reward_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reward")]
