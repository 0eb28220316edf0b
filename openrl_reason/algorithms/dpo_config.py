"""Settings of DPO, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrl_reason.algorithms.trainer import NO_LIMIT, RunConfig
from openrl_reason.config import require
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.pairs import PairsConfig
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


@dataclass(frozen=True)
class DPOLossConfig:
    """The loss on pairs."""

    kind: str = "sigmoid"
    """sigmoid (DPO) or ipo."""
    beta: float = 0.1
    """Inverse temperature of the implied reward. (VinePPO's DPO-Positive: 0.1 on MATH, 0.3 on GSM8K.)"""
    positive_weight: float = 0.0
    """DPO-Positive's lambda, inside of beta: penalty on what a chosen response lost against the reference. 0: plain DPO. (Published: 50.)"""
    label_smoothing: float = 0.0
    """sigmoid: assumed share of pairs that are the wrong way round, below 0.5."""
    mean_logprobs: bool = False
    """Use each response's mean log-prob per token in place of the sum."""
    temperature: float = 1.0
    """Log-probs, the reference's too, are those of logits / temperature. (VinePPO: its sampling temperature, 0.6.)"""

    def __post_init__(self) -> None:
        sigmoid = self.kind == "sigmoid"
        require(self.kind in ("sigmoid", "ipo"), "loss.kind", self.kind, "use sigmoid or ipo")
        require(self.beta > 0, "loss.beta", self.beta, "must be positive")
        require(self.positive_weight >= 0, "loss.positive_weight", self.positive_weight, "must not be negative")
        require(sigmoid or not self.positive_weight, "loss.positive_weight", self.positive_weight, "is for --loss.kind sigmoid only: use 0")
        require(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "must be at least 0 and below 0.5")
        require(sigmoid or not self.label_smoothing, "loss.label_smoothing", self.label_smoothing, "is for --loss.kind sigmoid only: use 0")
        require(self.temperature > 0, "loss.temperature", self.temperature, "must be positive")


@dataclass(frozen=True)
class DPOConfig:
    """DPO, DPO-Positive and IPO on preference pairs."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/dpo", steps=NO_LIMIT))
    """The run as a whole. steps is only a limit here: epochs decide."""
    epochs: int = 3
    """Passes over the training pairs."""
    batch_size: int = 64
    """Pairs of one optimiser step, over all ranks."""
    max_length: int = 1024
    """Longest sequence in tokens, prompt and response; pairs with a longer one are counted and left out."""
    eval_fraction: float = 0.05
    """Share of the questions whose pairs are held out for evaluation (0: none)."""
    eval_path: str = ""
    """A file of held-out pairs, in the layout of pairs.path; instead of eval_fraction."""
    loss: DPOLossConfig = field(default_factory=DPOLossConfig)
    """The loss on pairs."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Where pairs come from, unless they are sampled, and how rewarded samples are paired."""
    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    """Instead of pairs.path and pairs.trajectories: the data that oreo and kto learn from, in any of their formats. Rewarded responses and labels are
    paired as pairs.trajectories are. (Sequences are limited by max_length.)"""
    sample: bool = False
    """Sample responses to the task's training questions from the policy first, and pair them. The settings below, but for policy and
    placement, are for this alone."""
    samples_per_prompt: int = 64
    """sample: responses to each training question."""
    prompts_per_block: int = 256
    """sample: questions whose samples are written together; a run that is killed loses the block in work at most."""
    grader_processes: int = 1
    """sample: processes that grade."""
    grader_deadline_s: float = 5.0
    """sample: seconds one answer may take to grade; then its process is killed and the sample counted as timed out."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """sample: what is being solved."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """sample: what a response earns; by default what the task's grader says."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """sample: the engines."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.9))
    """sample: how responses are sampled."""
    policy: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    """The model that learns."""
    reference_path: str = ""
    """Model folder of the reference; empty: the policy's start. It is there before the first step alone, on as many ranks as the policy."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "prompts_per_block", "grader_processes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")
        agrees = self.data.max_length in (OfflineDataConfig.max_length, self.max_length)
        require(agrees, "data.max_length", self.data.max_length, f"--max_length (here {self.max_length}) limits sequences in this command: set that")
        require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "must be at least 0 and below 1")
        given = self.pairs.path or self.pairs.trajectories
        require(
            not (self.data.path and given), "data.path", self.data.path, "with --pairs.path or --pairs.trajectories there are two sources: use one"
        )
        named = "--pairs.path, --pairs.trajectories or --data.path"
        require(not (self.sample and (given or self.data.path)), "sample", True, f"with {named} there are two sources of pairs: use one")
        if self.sample:
            require(self.samples_per_prompt >= 2, "samples_per_prompt", self.samples_per_prompt, "a pair needs 2 or more")
            require(self.sampling.temperature > 0, "sampling.temperature", 0, "greedy responses to a question are all alike: use > 0")
            require(self.grader_deadline_s > 0, "grader_deadline_s", self.grader_deadline_s, "must be positive")
            budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
            remedy = f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}"
            require(budget < limit, "sampling.max_new_tokens", budget, remedy)
            require(not self.reward.judges, "reward.terms", "judge", "this command starts no engines for judges: use the task's grader or a function")
