"""What a response is worth: the task's grader, functions of yours, reward servers, judges and penalties, alone or weighted together."""

from __future__ import annotations

from openrl_reason.rewards.base import Rewarder, RewardResult, RewardSample

__all__ = ["RewardResult", "RewardSample", "Rewarder"]
