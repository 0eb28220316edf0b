"""Another scale for rewards: what a response earned, and what the update sees of it.

A response that earned r in all is worth

    clip(scale * r + shift, low, high) / s

with s the standard deviation of what all responses of the run so far came to before this division (``normalize: running``; 1 otherwise). Rewards of
steps are multiplied; the shift, and what the clip takes or gives, is paid on the last step, once a response. Responses without a reward stay so.

The division is by the spread of returns, without a mean being taken off, as in the published PPO codes for control (Engstrom et al. 2020,
arXiv 2005.12729, section 3). A return is that of a whole response, undiscounted, and those of the present step are in s already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openrl_reason.config import require
from openrl_reason.errors import CheckpointError
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.config import RewardConfig

NORMALIZATIONS = ("none", "running")


@dataclass(frozen=True)
class ShapedRewardConfig(RewardConfig):
    """What a response is worth, and how the update sees it."""

    scale: float = 1.0
    """Factor of the reward, for the update alone: metrics and rollouts show what graders and functions gave."""
    shift: float = 0.0
    """Added to the scaled reward of a response, once: on its last step."""
    clip: tuple[float, float] | None = None
    """Bounds [low, high] of a response's scaled and shifted reward. null: none."""
    normalize: str = "none"
    """running: divide by the standard deviation of the rewards (scaled, shifted, clipped) of all responses of the run so far. none: do not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.scale) and self.scale != 0, "reward.scale", self.scale, "use a finite number other than 0, at which all are alike")
        require(math.isfinite(self.shift), "reward.shift", self.shift, "use a finite number (0: none)")
        clip = self.clip
        require(clip is None or clip[0] < clip[1], "reward.clip", clip, "use [low, high] with low below high, or null")
        require(self.normalize in NORMALIZATIONS, "reward.normalize", self.normalize, f"use {' or '.join(NORMALIZATIONS)}")


def with_shaping(config: RewardConfig) -> ShapedRewardConfig:
    """The same rewards with the settings of their shape, which are those that change nothing if ``config`` has none."""
    return config if isinstance(config, ShapedRewardConfig) else ShapedRewardConfig(**vars(config))


class RewardShaping:
    """The map of the module's docstring. ``observe`` each step's rewards, then call it with each result of the step."""

    def __init__(self, config: ShapedRewardConfig) -> None:
        self.config = config
        self._count, self._mean, self._squares = 0, 0.0, 0.0  # squares: sum of squared distances from the mean

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        config = self.config
        return (config.scale, config.shift, config.clip, config.normalize) != (1.0, 0.0, None, "none")

    def describe(self) -> str:
        """The map in words, for the plan; empty if it does nothing."""
        config = self.config
        parts = [
            *([f"x {config.scale:g}"] if config.scale != 1 else []),
            *([f"{config.shift:+g}"] if config.shift else []),
            *([f"clipped to {config.clip[0]:g} .. {config.clip[1]:g}"] if config.clip else []),
            *(["divided by the running standard deviation"] if config.normalize == "running" else []),
        ]
        return f"; all of it {', '.join(parts)}" if parts else ""

    def observe(self, scores: np.ndarray) -> None:
        """Takes the rewards [B] of a step's responses, before shaping (NaN: none), into the running standard deviation."""
        if self.config.normalize == "none":
            return
        values = [self._bounded(score) for score in scores[np.isfinite(scores)].tolist()]
        if not values:
            return
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        # Two samples' moments as one's (Chan et al. 1979): without the cancellation of a sum of squares.
        total, distance = self._count + len(values), mean - self._mean
        self._squares += squares + distance**2 * self._count * len(values) / total
        self._mean += distance * len(values) / total
        self._count = total

    @property
    def divisor(self) -> float:
        """s: 1 without ``normalize``, and as long as all rewards have been the same."""
        variance = self._squares / self._count if self._count else 0.0
        return math.sqrt(variance) if variance > 1e-12 * self._mean**2 else 1.0

    def __call__(self, result: RewardResult) -> RewardResult:
        """What a result is worth to the update. One without a score is returned as it is."""
        if not math.isfinite(result.score):
            return result
        total = self._bounded(result.score) / self.divisor
        steps = tuple(self.paid(result.step_scores, total)) if result.step_scores else result.step_scores
        return replace(result, score=total, step_scores=steps)

    def paid(self, rewards: Sequence[float], total: float) -> list[float]:
        """Rewards per step [S], S > 0: each multiplied, and on the last one what is left of the response's shaped ``total``."""
        before = [self.config.scale * float(reward) / self.divisor for reward in rewards[:-1]]
        return [*before, total - math.fsum(before)]

    def metrics(self, scores: np.ndarray) -> dict[str, float]:
        """Of a step's responses, given their rewards [B] before shaping: ``reward/shaped_{mean,std}`` and what was done to them."""
        scores = scores[np.isfinite(scores)]
        shaped = np.array([self._bounded(score) for score in scores.tolist()]) / self.divisor
        numbers = {
            "reward/shaped_mean": float(shaped.mean()) if len(shaped) else math.nan,
            "reward/shaped_std": float(shaped.std()) if len(shaped) else math.nan,
        }
        if self.config.clip:
            low, high = self.config.clip
            mapped = self.config.scale * scores + self.config.shift
            numbers["reward/clipped_rate"] = float(((mapped < low) | (mapped > high)).mean()) if len(scores) else math.nan
        if self.config.normalize == "running":
            numbers["reward/running_std"] = self.divisor
        return numbers

    def _bounded(self, score: float) -> float:
        value = self.config.scale * score + self.config.shift
        return value if self.config.clip is None else min(max(value, self.config.clip[0]), self.config.clip[1])

    @property
    def _map(self) -> list[Any]:
        return [self.config.scale, self.config.shift, self.config.clip and list(self.config.clip)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; read back, every bit is the same."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares, "map": self._map}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave. Raises CheckpointError if it is of rewards that were mapped otherwise."""
        if self.config.normalize == "none":
            return
        if state["count"] and state["map"] != self._map:
            flags = "--reward.scale, --reward.shift and --reward.clip"
            raise CheckpointError(f"cannot resume: rewards were normalized with {flags} {state['map']}, which are {self._map} now: use the same")
        self._count, self._mean, self._squares = int(state["count"]), float(state["mean"]), float(state["squares"])
