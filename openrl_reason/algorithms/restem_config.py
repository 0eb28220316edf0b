"""Settings of RestEM, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from openrl_reason.algorithms.trainer import NO_LIMIT, RunConfig
from openrl_reason.config import require
from openrl_reason.evaluation.config import EvalConfig
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

SELECTIONS = ("paper", "best")


@dataclass(frozen=True)
class RestEMConfig:
    """RestEM and rejection sampling: fine-tuning on the policy's own right responses."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/restem", steps=NO_LIMIT, eval_every=500))
    """The run as a whole. steps is only a limit here: iterations and epochs decide. eval_every: optimiser steps between candidates."""
    iterations: int = 10
    """EM iterations, at most: the first one that does not improve ends the run. 1: plain rejection sampling."""
    samples_per_prompt: int = 8
    """E: responses to each training question."""
    threshold: float = 1.0
    """E: keep responses with at least this reward."""
    max_per_prompt: int = 10
    """E: keep at most so many responses to a question."""
    choice: str = "first"
    """E: which ones, if there are more: first (in the order of their seeds) or random (by the run's seed and the question)."""
    dedup: bool = False
    """E: of responses to a question that are equal, token by token, keep one."""
    keep_truncated: bool = False
    """E: keep a right response that the length limit cut off, too. It would teach the policy not to end."""
    prompts_per_block: int = 256
    """E: questions whose samples are written together; a run that is killed loses the block in work at most."""
    restart: str = "base"
    """M: each iteration trains from base (the start of the run) or previous (the best model so far)."""
    epochs: int = 8
    """M: passes over the kept responses."""
    batch_size: int = 64
    """M: responses of one optimiser step, over all ranks."""
    temperature: float = 1.0
    """M: log-probs are those of logits / temperature. (VinePPO's RestEM trained at its sampling temperature, 0.6.)"""
    selection: str = "paper"
    """Which candidate of an iteration is kept: paper (the last before the first that does not improve on its predecessor; the iteration
    ends there) or best (the best of all)."""
    validation_items: int = 128
    """Training questions, drawn by the run's seed, that are held out to choose among candidates. 0: the first evaluation set chooses, and its
    accuracy is then no longer that of questions the choice has not seen."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade; then its process is killed and the sample counted as timed out."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response earns; by default what the task's grader says."""
    policy: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    """The model that learns."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.9))
    """E: how responses are sampled."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Test items: evaluated before training and, on the chosen model, at the end."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        positive = ("iterations", "samples_per_prompt", "max_per_prompt", "prompts_per_block", "epochs", "batch_size", "grader_processes")
        for name in positive:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(bool(np.isfinite(self.threshold)), "threshold", self.threshold, "use a finite reward")
        require(self.grader_deadline_s > 0, "grader_deadline_s", self.grader_deadline_s, "must be positive")
        require(self.choice in ("first", "random"), "choice", self.choice, "use first or random")
        require(self.restart in ("base", "previous"), "restart", self.restart, "use base or previous")
        require(self.selection in SELECTIONS, "selection", self.selection, f"use {' or '.join(SELECTIONS)}")
        require(self.validation_items >= 0, "validation_items", self.validation_items, "use 0 (the first evaluation set) or a number of questions")
        chooses = self.validation_items or self.eval.sets or self.eval.num_items
        require(bool(chooses), "validation_items", 0, "candidates need questions to be compared on: hold some out, or set --eval.num_items")
        greedy = self.samples_per_prompt > 1 and self.sampling.temperature == 0
        require(not greedy, "sampling.temperature", 0, "greedy responses to a question are all alike: use > 0, or --samples_per_prompt 1")
        budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
        require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
        require(not self.reward.judges, "reward.terms", "judge", "this command starts no engines for judges: use the task's grader or a function")
        transport = self.rollout.weight_transport
        apart = not self.placement.colocate and self.placement.device != "cpu"
        require(transport != "nccl" or apart, "rollout.weight_transport", transport, "needs GPUs and --placement.colocate false; use auto")
