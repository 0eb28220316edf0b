"""What a response is worth: the task's grader, functions of yours, reward servers, judges and penalties, alone or weighted together."""

from __future__ import annotations

from openrl_reason.rewards.base import RewardResult, RewardSample, Rewarder

__all__ = ["RewardResult", "RewardSample", "Rewarder"]
