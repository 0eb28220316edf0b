"""Settings of ``openrl-reason collect``, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from openrl_reason.algorithms.rounds import FixedCount, SampleRule, UntilBalanced
from openrl_reason.config import require
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

MODES = ("all", "balanced", "rejection")
FORMATS = ("jsonl", "parquet")


@dataclass(frozen=True)
class CollectConfig:
    """Rewarded samples of a model to a task's training questions, as offline data."""

    model: str = ""
    """Model folder."""
    output: str = "runs/collect"
    """Folder for the samples and what is made of them. A collection that was stopped goes on when the same command is given again."""
    overwrite: bool = False
    """Start anew: a collection that is in the folder is deleted."""
    mode: str = "all"
    """What is kept: all (every graded sample), balanced (of a question at most max_per_side right and as many wrong ones, never more right than
    wrong, but one right if there is any) or rejection (right ones alone)."""
    num_samples: int = 10
    """all, rejection: samples to each question."""
    rounds: int = 16
    """balanced: a question is sampled until it has max_per_side right and max_per_side wrong samples, at most in so many rounds."""
    samples_per_round: int = 1
    """balanced: samples of a question in one round."""
    max_per_side: int = 4
    """balanced: right samples to keep of a question, and wrong ones, at most."""
    threshold: float = 1.0
    """Samples with at least this reward are right, others wrong; those whose grading failed are neither."""
    max_per_question: int = 10
    """rejection: right samples to keep of a question, at most."""
    choice: str = "first"
    """rejection: which ones, if there are more: first (in the order of their seeds) or random (by the seed and the question)."""
    dedup: bool = False
    """rejection: of responses to a question that are equal, token by token, keep one."""
    keep_truncated: bool = False
    """rejection: keep a right response that the length limit cut off, too. It would teach a policy not to end."""
    format: str = "jsonl"
    """Of the trajectories that are kept (token ids, log-probs, rewards): jsonl (to read) or parquet (smaller)."""
    rows: bool = False
    """Write what is kept also as text, {prompt, response, reward}: OREO's format."""
    pairs_per_question: int = 0
    """Write pairs of kept right and wrong responses as text, {prompt, chosen, rejected}: of a question at most so many, drawn without replacement
    by the seed and the question. 0: none."""
    num_items: int = 0
    """The first so many training questions (0: all)."""
    questions_per_block: int = 256
    """Questions whose samples are written together. A collection that is killed samples again the blocks that were not complete."""
    questions_in_flight: int = 0
    """Questions under way at a time. 0: as many as keep the engines twice as busy as they can be. Results do not depend on it."""
    seed: int = 0
    """Seed of the samples and choices."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade; then its process is killed and the sample counted as timed out."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved; its training questions are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response earns; by default what the task's grader says."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        positive = ("num_samples", "rounds", "samples_per_round", "max_per_side", "max_per_question", "questions_per_block", "grader_processes")
        for name in positive:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("pairs_per_question", "num_items", "questions_in_flight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.mode in MODES, "mode", self.mode, f"use {', '.join(MODES)}")
        require(self.choice in ("first", "random"), "choice", self.choice, "use first or random")
        require(self.format in FORMATS, "format", self.format, f"use {' or '.join(FORMATS)}")
        require(bool(np.isfinite(self.threshold)), "threshold", self.threshold, "use a finite reward")
        require(self.grader_deadline_s > 0, "grader_deadline_s", self.grader_deadline_s, "must be positive")
        for name in ("dedup", "keep_truncated"):
            require(self.mode == "rejection" or not getattr(self, name), name, True, f"is for --mode rejection, and mode is {self.mode}")
        most = self.rule.certain(0, 0, 0) if self.mode != "balanced" else self.rounds * self.samples_per_round
        enough = self.mode != "balanced" or most > 1
        require(enough, "rounds", self.rounds, "a right and a wrong response need two samples: use 2 or more, or --samples_per_round 2")
        require(most == 1 or self.sampling.temperature > 0, "sampling.temperature", 0, "greedy responses to a question are all alike: use > 0")
        no_pairs = self.mode == "rejection" and self.pairs_per_question
        require(not no_pairs, "pairs_per_question", self.pairs_per_question, "with --mode rejection nothing wrong is kept: use all or balanced")
        require(not self.reward.judges, "reward.terms", "judge", "this command starts no engines for judges: use the task's grader or a function")

    def check_room(self, prefix: str = "") -> None:
        """Refuses engines in which no prompt would fit before a full response; apart, since another command may bring the engines."""
        budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
        remedy = f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}"
        require(budget < limit, f"{prefix}sampling.max_new_tokens", budget, remedy)

    @property
    def rule(self) -> SampleRule:
        """How many samples a question gets."""
        return UntilBalanced(self.max_per_side, self.rounds, self.samples_per_round) if self.mode == "balanced" else FixedCount(self.num_samples)

    @property
    def in_flight(self) -> int:
        """Questions under way at a time."""
        at_once = self.rule.certain(0, 0, 0)
        return self.questions_in_flight or max(1, -(-2 * self.rollout.num_engines * self.rollout.max_num_seqs // at_once))
