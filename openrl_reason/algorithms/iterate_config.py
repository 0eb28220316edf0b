"""Settings of ``openrl-reason iterate``, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.algorithms.dpo_config import DPOConfig
from openrl_reason.algorithms.iterate_algorithms import ALGORITHMS
from openrl_reason.algorithms.kto_config import KTOConfig
from openrl_reason.algorithms.oreo_config import OREOConfig
from openrl_reason.algorithms.sft import SFTConfig
from openrl_reason.config import require
from openrl_reason.errors import did_you_mean
from openrl_reason.evaluation.config import EvalConfig
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig

SHARED = ("model", "output", "seed", "task", "rollout", "placement", "dry_run")
"""Settings of collect that are iterate's own."""


@dataclass(frozen=True)
class IterateConfig:
    """Rounds of three stages: collect samples of the newest policy, train on them, evaluate what came of it."""

    model: str = ""
    """Model folder to begin with, usually after supervised fine-tuning."""
    output: str = "runs/iterate"
    """Folder for the rounds, manifest.json, summary.json and accuracy.png. A run that was stopped goes on when the same command is given again."""
    rounds: int = 3
    """Rounds. May be raised when a run goes on."""
    algorithm: str = "rejection"
    """What each round trains with: rejection (imitates the right samples), sft (imitates all that collect keeps), dpo, kto or oreo."""
    policy: str = "previous"
    """Training starts from the policy of the round before (previous) or from the model to begin with, each time (sft)."""
    reference: str = "previous"
    """dpo, kto, oreo: the reference is the policy of the round before (previous) or the model to begin with (sft)."""
    critic: str = "fresh"
    """oreo: the critic starts as the policy does, with a head of zeros (fresh), or from the critic of the round before (warm)."""
    data: str = "latest"
    """A round trains on its own samples (latest) or on those of all rounds so far (union)."""
    evaluate_start: bool = True
    """Evaluate the model to begin with, too."""
    seed: int = 0
    """Seed of samples and training, from which each round derives its own, and of evaluations, which share it."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved: its training questions are sampled, its held-out ones evaluated."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines of collections and evaluations."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement of all stages."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """How samples are collected. model, output, seed, task, rollout and placement are this command's own."""
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(epochs=1, eval_items=0))
    """algorithm sft or rejection: how it trains. What is right is what collect.threshold says."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """algorithm dpo: how it trains. Pairs are made of the samples; what is right is what collect.threshold says."""
    kto: KTOConfig = field(default_factory=KTOConfig)
    """algorithm kto: how it trains. What is desirable is what collect.threshold says."""
    oreo: OREOConfig = field(default_factory=OREOConfig)
    """algorithm oreo: how it trains."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation of the model to begin with and of each round's policy, always on the same items with the same seeds."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        known = f"use {', '.join(ALGORITHMS)}{did_you_mean(self.algorithm, ALGORITHMS)}"
        require(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, known)
        for name, values in (("policy", ("previous", "sft")), ("reference", ("previous", "sft")), ("critic", ("fresh", "warm")),
                             ("data", ("latest", "union"))):  # fmt: skip
            require(getattr(self, name) in values, name, getattr(self, name), f"use {' or '.join(values)}")
        self._check_choices()
        for name in SHARED:
            self._check_untouched("collect", name, f"is the whole run's: use --{name}")
        self._check_untouched("collect", "overwrite", "a run goes on where it was: leave it out")
        settings = ALGORITHMS[self.algorithm].settings
        for name in ALGORITHMS[self.algorithm].made:
            self._check_untouched(settings, name, "iterate sets it for each round: leave it out")
        replace(self.collect, rollout=self.rollout).check_room("collect.")
        require(bool(self.eval.sets or self.eval.num_items), "eval.num_items", 0, "rounds are told apart by an evaluation: use some items")

    def _check_choices(self) -> None:
        algorithm = ALGORITHMS[self.algorithm]
        fits = algorithm.has_reference or self.reference == "previous"
        require(fits, "reference", self.reference, f"{self.algorithm} has no reference: leave it out")
        require(algorithm.has_critic or self.critic == "fresh", "critic", self.critic, f"{self.algorithm} has no critic: leave it out")
        nothing = self.algorithm in ("dpo", "kto") and self.collect.mode == "rejection"
        require(not nothing, "collect.mode", self.collect.mode, f"{self.algorithm} learns from right and wrong samples: use all or balanced")

    def _check_untouched(self, group: str, name: str, remedy: str) -> None:
        field_ = next(one for one in self.__dataclass_fields__.values() if one.name == group)
        value, default = getattr(self, group), field_.default_factory()
        for part in name.split("."):
            value, default = getattr(value, part), getattr(default, part)
        shown: Any = value if isinstance(value, str | int | float | tuple) else "..."
        require(value == default, f"{group}.{name}", shown, remedy)
