"""Settings that all algorithms with a rollout engine share, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite

from openrl_reason.algorithms.reduction import REDUCTIONS
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.config import require, require_divisible
from openrl_reason.core.kl import KL_KINDS
from openrl_reason.evaluation.config import EvalConfig
from openrl_reason.rewards.shaping import ShapedRewardConfig, with_shaping
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


@dataclass(frozen=True)
class KLConfig:
    """KL to the reference model."""

    where: str = "none"
    """"none" (no reference model is started), "reward" (detached, paid token by token) or "loss"."""
    coef: float = 0.001
    """Weight of the KL."""
    kind: str = "k3"
    """Estimator: k1 = log(pi/ref), k2 = k1^2/2, k3 = ref/pi - 1 + k1, abs = |k1|. In the reward use k1 (unbiased); in the loss k2 or k3, or full:
    the exact KL over the whole vocabulary, for which the reference's hidden states travel with the batch."""
    target: float = 0.0
    """Adapt the coefficient so that the KL per response comes to this (0: the coefficient stays)."""
    horizon: float = 10000.0
    """Responses over which the adaptive coefficient moves."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference model: a group of its own, started only when the KL is used."""

    path: str = ""
    """Model folder; empty: the policy's start."""
    num_ranks: int = 1
    """Number of ranks."""
    zero_stage: int = 0
    """0: a full copy on each rank; 3: partitioned."""
    tokens_per_micro_batch: int = 8192
    """Tokens of one forward on a rank."""
    prompts_per_chunk: int = 8
    """Its log-probs are computed for this many prompts at a time while the others still generate."""
    refresh_every: int = 0
    """Copy the policy into the reference every so many steps (0: never)."""


@dataclass(frozen=True)
class PolicyUpdateConfig:
    """How advantages become updates of the policy."""

    loss_reduction: str = "token"
    """token, sequence, batch or constant: what the loss is averaged over."""
    gamma: float = 1.0
    """Discount, at most 1."""
    clip_low: float = 0.2
    """PPO clip below 1."""
    clip_high: float = 0.2
    """PPO clip above 1 (DAPO's clip-higher: 0.28)."""
    dual_clip: float | None = None
    """Bound on the loss of negative advantages at large ratios, > 1 (for instance 3)."""
    ratio_level: str = "token"
    """token, or sequence (GSPO)."""
    importance_correction: str = "none"
    """Weigh tokens by trainer over engine probability: none, truncate (at the cap) or mask (leave out those beyond the cap)."""
    importance_cap: float = 2.0
    """Cap of the importance weight."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    epochs: int = 1
    """Passes over each collection."""
    minibatches: int = 1
    """Optimiser steps per pass."""
    kl: KLConfig = field(default_factory=KLConfig)
    """KL to the reference."""


@dataclass(frozen=True)
class OnlineConfig:
    """Training on the policy's own responses."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run as a whole."""
    prompts_per_step: int = 32
    """Prompts of each step."""
    samples_per_prompt: int = 8
    """Responses to each prompt."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade; then its process is killed and the sample counted as timed out."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    reward: ShapedRewardConfig = field(default_factory=ShapedRewardConfig)
    """What a response earns; by default what the task's grader says."""
    policy: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    """The model that learns."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model it is held to."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    max_logprob_difference: float = 0.0
    """Stop the run when the mean |engine - trainer| log-prob of a step exceeds this (0: only report it)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""
    algo: PolicyUpdateConfig = field(default_factory=PolicyUpdateConfig)
    """What is learnt."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation while training."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", with_shaping(self.reward))  # in Python, a plain RewardConfig will do
        check_online(self)


def check_online(config: OnlineConfig) -> None:
    """Refuses settings that cannot work, naming flag, value and remedy."""
    require(config.prompts_per_step >= 1, "prompts_per_step", config.prompts_per_step, "at least 1")
    require(config.samples_per_prompt >= 1, "samples_per_prompt", config.samples_per_prompt, "at least 1")
    require(config.grader_processes >= 1, "grader_processes", config.grader_processes, "at least 1")
    require(config.grader_deadline_s > 0, "grader_deadline_s", config.grader_deadline_s, "must be positive")
    _check_update(config.algo)
    _check_kl(config)
    _check_sampling(config)
    require_divisible("prompts_per_step", config.prompts_per_step, "algo.minibatches", config.algo.minibatches)
    transport = config.rollout.weight_transport
    apart = not config.placement.colocate and config.placement.device != "cpu"
    require(transport != "nccl" or apart, "rollout.weight_transport", transport, "needs GPUs and --placement.colocate false; use auto")


def _check_update(algo: PolicyUpdateConfig) -> None:
    auto = ("auto",) if type(algo).loss_reduction == "auto" else ()  # the family with a choice of its own for each advantage
    known = (*auto, *REDUCTIONS)
    require(algo.loss_reduction in known, "algo.loss_reduction", algo.loss_reduction, f"use one of {', '.join(known)}")
    require(0.0 < algo.gamma <= 1.0, "algo.gamma", algo.gamma, "must be above 0 and at most 1")
    require(0.0 <= algo.clip_low <= 1.0, "algo.clip_low", algo.clip_low, "must lie between 0 and 1")
    require(algo.clip_high >= 0.0, "algo.clip_high", algo.clip_high, "must not be negative")
    require(algo.dual_clip is None or algo.dual_clip > 1.0, "algo.dual_clip", algo.dual_clip, "must exceed 1 (for instance 3), or null")
    require(algo.ratio_level in ("token", "sequence"), "algo.ratio_level", algo.ratio_level, "use token or sequence")
    corrections = ("none", "truncate", "mask")
    require(algo.importance_correction in corrections, "algo.importance_correction", algo.importance_correction, "use none, truncate or mask")
    require(algo.importance_cap > 0, "algo.importance_cap", algo.importance_cap, "must be positive")
    require(isfinite(algo.entropy_coef), "algo.entropy_coef", algo.entropy_coef, "use a finite number (0: no bonus)")
    require(algo.epochs >= 1, "algo.epochs", algo.epochs, "at least 1")
    require(algo.minibatches >= 1, "algo.minibatches", algo.minibatches, "at least 1")


def _check_kl(config: OnlineConfig) -> None:
    kl, reference = config.algo.kl, config.reference
    require(kl.where in ("none", "reward", "loss"), "algo.kl.where", kl.where, "use none, reward or loss")
    require(kl.kind in (*KL_KINDS, "full"), "algo.kl.kind", kl.kind, f"use one of {', '.join(KL_KINDS)}, full")
    full = kl.kind == "full" and kl.where != "none"
    require(not full or kl.where == "loss", "algo.kl.kind", kl.kind, "is for --algo.kl.where loss; in the reward use k1")
    remedy = "replaces the model whose output head --algo.kl.kind full uses: use k3, or 0"
    require(not (full and reference.refresh_every), "reference.refresh_every", reference.refresh_every, remedy)
    idle = kl.where == "loss" and kl.kind == "k1"
    require(not idle, "algo.kl.kind", kl.kind, "as a loss its expected gradient is zero: use k2 or k3, or --algo.kl.where reward")
    require(0 <= kl.coef < inf, "algo.kl.coef", kl.coef, "must be finite and not negative")
    require(kl.target >= 0, "algo.kl.target", kl.target, "use 0 (the coefficient stays) or a positive KL per response")
    require(not kl.target or kl.coef > 0, "algo.kl.coef", kl.coef, "an adaptive coefficient (--algo.kl.target) must start above 0")
    require(not (kl.target and kl.where == "none"), "algo.kl.target", kl.target, "there is no KL: set --algo.kl.where reward or loss")
    require(kl.horizon > 0, "algo.kl.horizon", kl.horizon, "must be positive")
    for name in ("num_ranks", "tokens_per_micro_batch", "prompts_per_chunk"):
        require(getattr(reference, name) >= 1, f"reference.{name}", getattr(reference, name), "at least 1")
    require(reference.refresh_every >= 0, "reference.refresh_every", reference.refresh_every, "use 0 for never, or a number of steps")
    missing = reference.refresh_every and kl.where == "none"
    require(not missing, "reference.refresh_every", reference.refresh_every, "there is no reference without a KL: set --algo.kl.where reward or loss")
    idle = reference.path and kl.where == "none"
    require(not idle, "reference.path", reference.path, "there is no reference without a KL: set --algo.kl.where reward or loss")
    require(reference.zero_stage in (0, 3), "reference.zero_stage", reference.zero_stage, "use 0 (a copy on each rank) or 3 (partitioned)")


def _check_sampling(config: OnlineConfig) -> None:
    sampling = config.sampling
    require(sampling.temperature > 0, "sampling.temperature", sampling.temperature, "greedy responses to a prompt are all alike: use > 0")
    budget, limit = sampling.max_new_tokens, config.rollout.max_model_len
    require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
    require(config.max_logprob_difference >= 0, "max_logprob_difference", config.max_logprob_difference, "use 0 (only report) or a bound")
    if sampling.top_p < 1 or sampling.top_k != -1:
        remedy = "with --sampling.top_p or top_k the engine's log-probs are of a truncated distribution and differ by design: use {}"
        require(not config.max_logprob_difference, "max_logprob_difference", config.max_logprob_difference, remedy.format("0"))
        correction = config.algo.importance_correction
        require(correction == "none", "algo.importance_correction", correction, remedy.format("none"))
