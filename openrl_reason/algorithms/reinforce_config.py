"""Settings of the REINFORCE family."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrl_reason.algorithms.online_config import KLConfig, OnlineConfig, PolicyUpdateConfig, ReferenceConfig
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.config import require

__all__ = ["ADVANTAGES", "KLConfig", "ReferenceConfig", "ReinforceAlgoConfig", "ReinforceConfig"]

ADVANTAGES = {
    "baseline": ("none", "running", False, "token"),
    "rloo": ("rloo", "", False, "token"),
    "grpo": ("grpo", "", False, "sequence"),
    "dr_grpo": ("mean", "", False, "constant"),
    "reinforce++": ("none", "", True, "token"),
    "reinforce++_baseline": ("mean", "", True, "token"),
    "none": ("none", "", False, "token"),
}
"""name -> (group_advantages kind, other baseline, whiten over the global batch, default loss reduction)."""


@dataclass(frozen=True)
class ReinforceAlgoConfig(PolicyUpdateConfig):
    """What is learnt from the rollouts."""

    loss_reduction: str = "auto"
    """token, sequence, batch, constant, or auto (what the advantage's paper uses)."""
    gamma: float = 1.0
    """Discount per token, at most 1."""
    advantage: str = "rloo"
    """baseline (running mean), rloo, grpo, dr_grpo, reinforce++, reinforce++_baseline, or none."""
    return_clamp: tuple[float, float] | None = None
    """Clamp returns to [low, high] before the baseline."""
    baseline_decay: float = 0.9
    """Decay of the running baseline."""


@dataclass(frozen=True)
class ReinforceConfig(OnlineConfig):
    """REINFORCE, RLOO, GRPO, Dr. GRPO and REINFORCE++ with a rollout engine."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/reinforce"))
    """The run as a whole."""
    algo: ReinforceAlgoConfig = field(default_factory=ReinforceAlgoConfig)
    """What is learnt."""

    def __post_init__(self) -> None:
        algo = self.algo
        require(algo.advantage in ADVANTAGES, "algo.advantage", algo.advantage, f"use one of {', '.join(ADVANTAGES)}")
        if ADVANTAGES[algo.advantage][0] != "none":
            remedy = f"{algo.advantage} compares siblings: use 2 or more"
            require(self.samples_per_prompt >= 2 or self.samples_per_prompt < 1, "samples_per_prompt", self.samples_per_prompt, remedy)
        require(0.0 <= algo.baseline_decay < 1.0, "algo.baseline_decay", algo.baseline_decay, "must be at least 0 and below 1")
        clamp = algo.return_clamp
        require(clamp is None or clamp[0] < clamp[1], "algo.return_clamp", clamp, "use [low, high] with low below high, or null")
        super().__post_init__()
