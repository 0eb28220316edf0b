"""Settings of ``openrl-reason analyze-policy``."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrl_reason.algorithms.ppo import WHITENINGS
from openrl_reason.algorithms.reduction import REDUCTIONS
from openrl_reason.algorithms.vine import VineConfig, check_vine
from openrl_reason.config import require
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.config import check_intervals
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.value_config import ScoringConfig
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import SPLITS, TaskConfig
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

ANALYSES = ("weights", "kl", "gradient")
CREDITS = ("group", "critic", "vine")


@dataclass(frozen=True)
class KLAnalysisConfig:
    """KL divergence between policy and reference, on sampled responses."""

    samples_per_prompt: int = 4
    """Responses to each item."""
    reverse: bool = False
    """Let the reference sample as well: KL(reference || policy) beside KL(policy || reference)."""


@dataclass(frozen=True)
class GradientConfig:
    """Variance of the policy gradient while the policy stays as it is."""

    num_batches: int = 32
    """Independent batches, each with a gradient of its own."""
    prompts_per_batch: int = 16
    """Items of a batch, drawn anew for each."""
    samples_per_prompt: int = 8
    """Responses to each of them."""
    credits: tuple[str, ...] = ("group",)
    """Who says how good a token was, all about the same responses: group (reward minus the mean of the siblings' rewards, RLOO), critic
    (reward minus a critic's value, GAE with lambda 1), vine (differences of Monte-Carlo values between steps, VinePPO)."""
    critic: str = ""
    """Folder of the critic, for the credit critic: a model with a scalar head, for instance what PPO leaves in critic/."""
    vine: VineConfig = field(default_factory=VineConfig)
    """Monte-Carlo values, for the credit vine."""
    loss_reduction: str = "token"
    """token, sequence, batch or constant: what the loss is averaged over."""
    whiten: str = "none"
    """Advantages over each batch: none, center (mean 0), scale (divided by their standard deviation) or full (both). Variances of credits can be
    compared with none; ratios of noise to signal always."""
    sketch_size: int = 1 << 20
    """Numbers kept of each gradient. Exact for a model with at most so many parameters; else inner products of two gradients are off by about
    1 / sqrt(sketch_size) of the product of their norms."""


@dataclass(frozen=True)
class PolicyScoringConfig(ScoringConfig):
    """How policy, reference and critic are run, one after the other, when the engines have finished."""

    dtype: str = "float32"
    """float32 or bfloat16, whose rounding is about as large as the KL of a checkpoint that has hardly moved."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory for gradients, a third more time."""


@dataclass(frozen=True)
class AnalyzePolicyConfig:
    """What training has changed: distance of the weights, KL to the reference, noise of the policy gradient."""

    models: tuple[str, ...] = ()
    """Folders of the policies to analyze, for instance checkpoints of one run."""
    reference: str = ""
    """Folder of the model they are compared with, for weights and kl."""
    analyses: tuple[str, ...] = ("weights",)
    """weights (reads files alone), kl (samples responses; models score them), gradient (samples batches; the policy's gradients of them)."""
    output: str = ""
    """Folder for summary.json, weights.csv, kl.csv and gradients.csv (empty: only print)."""
    overwrite: bool = False
    """Replace an earlier analysis at output."""
    split: str = "test"
    """test or train."""
    num_items: int = 128
    """The first so many items (0: all). kl: responses to each of them. gradient: batches are drawn from them."""
    kl: KLAnalysisConfig = field(default_factory=KLAnalysisConfig)
    """KL divergence."""
    gradient: GradientConfig = field(default_factory=GradientConfig)
    """Policy gradients."""
    seed: int = 0
    """Seed of everything sampled."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence intervals of the KL: bootstrap over problems."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled; log-probs are taken at the same temperature."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    scoring: PolicyScoringConfig = field(default_factory=PolicyScoringConfig)
    """The models."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def samples(self) -> bool:
        """Whether engines are needed."""
        return "kl" in self.analyses or "gradient" in self.analyses


def check_config(config: AnalyzePolicyConfig) -> None:
    """Refuses settings that cannot work."""
    unknown = [name for name in config.analyses if name not in ANALYSES]
    require(bool(config.analyses) and not unknown, "analyses", list(config.analyses), f"name one or more of {', '.join(ANALYSES)}")
    require(len(set(config.analyses)) == len(config.analyses), "analyses", list(config.analyses), "name each once")
    require(len(set(config.models)) == len(config.models), "models", list(config.models), "name each once")
    require(config.split in SPLITS, "split", config.split, "use train or test")
    require(config.num_items >= 0, "num_items", config.num_items, "use 0 for all items")
    require(config.grader_processes >= 1, "grader_processes", config.grader_processes, "at least 1")
    require(config.grader_deadline_s > 0, "grader_deadline_s", config.grader_deadline_s, "must be positive")
    check_intervals(config.intervals, "intervals")
    try:
        ModelConfig(**vars(config.scoring))
    except ConfigError as error:  # at once: the models start when the rollouts are done
        raise ConfigError(f"--scoring: {error}") from None
    if config.samples:
        _check_sampling(config)
    if "kl" in config.analyses:
        require(config.kl.samples_per_prompt >= 1, "kl.samples_per_prompt", config.kl.samples_per_prompt, "at least 1")
    if "gradient" in config.analyses:
        _check_gradient(config)


def _check_sampling(config: AnalyzePolicyConfig) -> None:
    sampling, limit = config.sampling, config.rollout.max_model_len
    require(sampling.temperature > 0, "sampling.temperature", sampling.temperature, "greedy responses say nothing of a distribution: use more than 0")
    whole = "kl" not in config.analyses or (sampling.top_p == 1 and sampling.top_k == -1)
    flag, value = ("sampling.top_p", sampling.top_p) if sampling.top_p < 1 else ("sampling.top_k", sampling.top_k)
    require(whole, flag, value, "responses must come from the whole distribution, or the KL would be that of no model: leave it out")
    budget = sampling.max_new_tokens
    require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
    judges = [term.source for term in config.reward.judges]
    require(not judges, "reward.terms", judges, "judges are not started here: use their server")


def _check_gradient(config: AnalyzePolicyConfig) -> None:
    own = config.gradient
    require(own.num_batches >= 2, "gradient.num_batches", own.num_batches, "a variance needs 2 batches, and a standard error many more")
    for name in ("prompts_per_batch", "samples_per_prompt"):
        require(getattr(own, name) >= 1, f"gradient.{name}", getattr(own, name), "at least 1")
    known = bool(own.credits) and all(name in CREDITS for name in own.credits) and len(set(own.credits)) == len(own.credits)
    require(known, "gradient.credits", list(own.credits), f"name one or more of {', '.join(CREDITS)}, each once")
    lonely = "group" in own.credits and own.samples_per_prompt < 2
    require(not lonely, "gradient.samples_per_prompt", own.samples_per_prompt, "the credit group compares siblings: use 2 or more")
    wants_critic = "critic" in own.credits
    require(bool(own.critic) or not wants_critic, "gradient.critic", own.critic, "name the folder of the critic, or leave the credit critic out")
    require(wants_critic or not own.critic, "gradient.critic", own.critic, "add the credit critic to --gradient.credits, or leave it out")
    alone = not wants_critic or len(config.models) <= 1
    require(alone, "models", list(config.models), "a critic is of one policy: name one model, or leave the credit critic out")
    require(own.loss_reduction in REDUCTIONS, "gradient.loss_reduction", own.loss_reduction, f"use {', '.join(REDUCTIONS)}")
    require(own.whiten in WHITENINGS, "gradient.whiten", own.whiten, f"use {', '.join(WHITENINGS)}")
    require(own.sketch_size >= 1024, "gradient.sketch_size", own.sketch_size, "at least 1024, and as large as memory allows")
    if "vine" in own.credits:
        try:
            check_vine(own.vine, own.samples_per_prompt)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--vine.", "--gradient.vine.").replace("--samples_", "--gradient.samples_")) from None
