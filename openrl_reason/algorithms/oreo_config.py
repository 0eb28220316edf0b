"""Settings of OREO, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from openrl_reason.algorithms.trainer import NO_LIMIT, RunConfig
from openrl_reason.config import require
from openrl_reason.core.losses_offline import OREO_AVERAGES, OREO_LEVELS
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.workers.model_config import ScalarModelConfig, TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig

KL_KINDS = ("exact", "forward", "k3", "none")
CACHES = ("auto", "all", "logprobs", "none")


@dataclass(frozen=True)
class OREOKLConfig:
    """The regulariser that keeps the policy near the reference where the data say nothing."""

    kind: str = "exact"
    """exact: KL(policy || reference) over the whole vocabulary; forward: KL(reference || policy), likewise; k3: an estimate from the tokens of the
    data, biased since the policy did not write them; none."""
    coef: float = 0.01
    """Its weight. (Published: 0.01 at the level of tokens, 0.1 of steps, 0.3 of responses.)"""
    target: float = 0.0
    """Adapt the weight so that the KL comes to this, in nats per token (0: the weight stays)."""
    target_lr: float = 1e-3
    """Size of the steps of the weight's logarithm, with a target."""


@dataclass(frozen=True)
class OREOAlgoConfig:
    """What is learnt from the data."""

    level: str = "token"
    """What an action is: token, step, or response (the whole). Also no_stop_gradient (DQO: the gradient goes through every sum of log-ratios) and
    one_step (the next state's value in place of what follows)."""
    beta: float = 0.03
    """Temperature: weight of the log-ratios in the soft Bellman equation."""
    average: str = "sequence"
    """sequence: each sequence is the mean over its states, and all sequences weigh the same (published); state: all states weigh the same."""
    importance: bool = False
    """Weigh each sequence by policy over reference probability of the whole response."""
    importance_clip: float = 1.0
    """importance: upper bound of the log of that weight."""
    clip_log_ratio: float | None = None
    """Hold the summed log-ratios in the critic's target within this distance of 0. null: no bound."""
    right_threshold: float | None = None
    """Responses of at least this reward (as the loader maps it) are right: for the hinge and what is told of right and wrong ones. null: those of
    a positive reward in the file."""
    hinge: float = 0.0
    """Weight of a penalty on right responses that became less likely than the reference has them."""
    ema_decay: float = 0.0
    """The critic's targets come from a moving average of the policy's weights with this decay (published: 0.995). 0: from the policy itself."""
    freeze_ratio: float = 0.0
    """Share of the optimiser steps, at the start, in which the critic alone is trained."""
    critic_only: bool = False
    """Train the critic alone: the value of the policy as it is."""
    kl: OREOKLConfig = field(default_factory=OREOKLConfig)
    """The regulariser."""

    def __post_init__(self) -> None:
        kl = self.kl
        require(self.level in OREO_LEVELS, "algo.level", self.level, f"use {', '.join(OREO_LEVELS)}")
        require(self.beta > 0, "algo.beta", self.beta, "must be positive")
        require(self.average in OREO_AVERAGES, "algo.average", self.average, f"use {', '.join(OREO_AVERAGES)}")
        clip = self.clip_log_ratio
        require(clip is None or clip > 0, "algo.clip_log_ratio", clip, "must be positive, or null for no bound")
        threshold = self.right_threshold
        require(threshold is None or isfinite(threshold), "algo.right_threshold", threshold, "use a finite reward, or null")
        require(self.hinge >= 0, "algo.hinge", self.hinge, "must not be negative")
        require(0 <= self.ema_decay < 1, "algo.ema_decay", self.ema_decay, "must be at least 0 (no average) and below 1")
        remedy = "must be at least 0 and below 1; --algo.critic_only trains no policy"
        require(0 <= self.freeze_ratio < 1, "algo.freeze_ratio", self.freeze_ratio, remedy)
        require(kl.kind in KL_KINDS, "algo.kl.kind", kl.kind, f"use {', '.join(KL_KINDS)}")
        require(kl.coef >= 0, "algo.kl.coef", kl.coef, "must not be negative")
        require(kl.target >= 0, "algo.kl.target", kl.target, "must not be negative (0: the weight stays)")
        require(kl.target_lr > 0, "algo.kl.target_lr", kl.target_lr, "must be positive")
        fits = not kl.target or (kl.kind != "none" and kl.coef > 0)
        remedy = "adapts a weight: it needs a --algo.kl.kind other than none and a --algo.kl.coef above 0 to start with"
        require(fits, "algo.kl.target", kl.target, remedy)

    @property
    def exact_kl(self) -> bool:
        """Whether whole distributions of the reference are needed."""
        return self.kl.kind in ("exact", "forward") and self.kl.coef > 0


@dataclass(frozen=True)
class OfflineReferenceConfig:
    """The reference: a model that is only run. What it says of the data is computed once and kept on disk, as far as that fits."""

    path: str = ""
    """Model folder; empty: the policy's start."""
    cache: str = "auto"
    """What is kept: logprobs (4 bytes a token), all (hidden states, too, from which the exact KL is taken: hidden size x 2 or 4 bytes for a token of
    a response), none, or auto: all where that takes at most cache_gib, else logprobs where they are enough, else nothing."""
    cache_gib: float = 20.0
    """auto: most disk that hidden states may take."""
    cache_dir: str = ""
    """Folder for it, which several runs may share; empty: in the folder of the run. Another model or other data get another subfolder."""
    num_ranks: int = 1
    """Ranks, where the reference is a group of its own: with another path, or without a cache."""
    zero_stage: int = 0
    """0: a full copy on each rank; 3: partitioned."""
    tokens_per_micro_batch: int = 8192
    """Tokens of one forward on a rank."""

    def __post_init__(self) -> None:
        require(self.cache in CACHES, "reference.cache", self.cache, f"use {', '.join(CACHES)}")
        require(self.cache_gib >= 0, "reference.cache_gib", self.cache_gib, "must not be negative")
        require(self.num_ranks >= 1, "reference.num_ranks", self.num_ranks, "at least 1")
        require(self.zero_stage in (0, 3), "reference.zero_stage", self.zero_stage, "use 0 or 3: there is no optimiser state to partition")


@dataclass(frozen=True)
class OREOConfig:
    """Offline reinforcement learning on rewarded responses: a policy and a critic learn the soft Bellman equation together."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/oreo", steps=NO_LIMIT))
    """The run as a whole. steps is only a limit here: epochs decide."""
    epochs: int = 1
    """Passes over the training rows."""
    batch_size: int = 128
    """Sequences of one optimiser step, over all ranks."""
    eval_fraction: float = 0.02
    """Share of the questions whose rows are held out for evaluation (0: none)."""
    eval_rows: int = 512
    """Most held-out rows to evaluate on."""
    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    """Rewarded responses, conversations or trajectories."""
    algo: OREOAlgoConfig = field(default_factory=OREOAlgoConfig)
    """What is learnt."""
    policy: TrainedModelConfig = field(default_factory=lambda: TrainedModelConfig(lr=5e-6))
    """The model that learns."""
    critic: ScalarModelConfig = field(default_factory=lambda: ScalarModelConfig(lr=5e-6))
    """The value model. path: a folder of a language model or of a model with a scalar head (the critic of another run); empty: the policy's start,
    with a head of zeros."""
    reference: OfflineReferenceConfig = field(default_factory=OfflineReferenceConfig)
    """The model whose log-probs the log-ratios are taken against."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "must be at least 0 and below 1")
        require(self.eval_rows >= 0, "eval_rows", self.eval_rows, "must not be negative")
        stage, exact = self.policy.zero_stage, self.algo.exact_kl
        remedy = f"keeps no hidden states, from which --algo.kl.kind {self.algo.kl.kind} is taken: use all, none or auto"
        require(not exact or self.reference.cache != "logprobs", "reference.cache", "logprobs", remedy)
        remedy = f"needs --policy.zero_stage 0, 1 or 2, not {stage}: no rank has the weights whole"
        require(not self.algo.ema_decay or stage < 3, "algo.ema_decay", self.algo.ema_decay, remedy)
