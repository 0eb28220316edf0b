"""Settings of KTO, and what is refused before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from openrl_reason.algorithms.trainer import NO_LIMIT, RunConfig
from openrl_reason.config import require
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.errors import did_you_mean
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig

REFERENCE_POINTS = ("mismatched", "batch", "zero")


@dataclass(frozen=True)
class KTOLossConfig:
    """The loss on labelled responses."""

    beta: float = 0.1
    """Inverse temperature of the implied reward."""
    desirable_weight: float = 1.0
    """lambda_D, the weight of a desirable response. The paper keeps (lambda_D x desirable) / (lambda_U x undesirable responses) within 1 .. 4/3; a
    run says what it is, and which weight would bring it there."""
    undesirable_weight: float = 1.0
    """lambda_U, the weight of an undesirable response."""
    z0: str = "mismatched"
    """The reference point, an estimate of KL(policy || reference) over the batch, never below 0: mismatched (from each prompt with the response
    to another question, as published; one more forward pass a step), batch (from the batch's own responses; the same) or zero (none)."""
    temperature: float = 1.0
    """Log-probs, the reference's too, are those of logits / temperature."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "loss.beta", self.beta, "must be positive")
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), f"loss.{name}", value, "a finite number, not negative")
        known = f"use {', '.join(REFERENCE_POINTS)}{did_you_mean(self.z0, REFERENCE_POINTS)}"
        require(self.z0 in REFERENCE_POINTS, "loss.z0", self.z0, known)
        require(self.temperature > 0, "loss.temperature", self.temperature, "must be positive")


@dataclass(frozen=True)
class KTOConfig:
    """KTO on responses that are labelled desirable or undesirable."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/kto", steps=NO_LIMIT))
    """The run as a whole. steps is only a limit here: epochs decide."""
    epochs: int = 1
    """Passes over the training responses."""
    batch_size: int = 128
    """Responses of one optimiser step, over all ranks (of pairs: so many pairs)."""
    label_threshold: float = 0.5
    """Responses with at least this reward (after data.reward_scale and data.reward_shift) are desirable, the others undesirable. Of pairs, and of
    rows with labels, the labels are taken as they are."""
    eval_fraction: float = 0.05
    """Share of the questions whose responses are held out for evaluation (0: none)."""
    loss: KTOLossConfig = field(default_factory=KTOLossConfig)
    """The loss on labelled responses."""
    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    """Where the responses come from: rewarded responses, this library's trajectories, labels, or pairs (each is a desirable and an undesirable
    response)."""
    policy: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    """The model that learns."""
    reference_path: str = ""
    """Model folder of the reference; empty: the policy's start. It is there before the first step alone, on as many ranks as the policy."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(math.isfinite(self.label_threshold), "label_threshold", self.label_threshold, "use a finite reward")
        require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "must be at least 0 and below 1")
