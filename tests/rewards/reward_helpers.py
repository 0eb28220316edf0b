"""Samples, tasks and process checks shared by the tests of rewards."""

import os
import threading
import time

from openrl_reason.rewards.base import RewardSample
from openrl_reason.tasks.base import TaskItem


def make_sample(response, gold="4", *, steps=None, num_tokens=5, stop_reason="stop", prompt="What is 2+2? ", **info):
    """A response of one step, unless ``steps`` are given."""
    steps = (response,) if steps is None else tuple(steps)
    return RewardSample(prompt, response, TaskItem(f"id-{gold}", "What is 2+2?", gold, None, info), num_tokens, stop_reason, steps)


def score_all(source, samples, timeout=60):
    """Submits, flushes and waits."""
    futures = [source.submit(sample) for sample in samples]
    source.flush()
    return [future.result(timeout=timeout) for future in futures]


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def reward_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reward")]
