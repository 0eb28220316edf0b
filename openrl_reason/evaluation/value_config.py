"""Settings of ``openrl-reason analyze-values``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from openrl_reason.config import require
from openrl_reason.core.steps import check_step_kind
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.config import check_intervals
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import SPLITS, TaskConfig
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

MIN_DISTINCT = 3
"""Distinct next steps that a state needs to be ranked, as published."""


@dataclass(frozen=True)
class ScoringConfig:
    """How critics, policy and reference are run when they score. One after the other, when the engines have finished."""

    dtype: str = "bfloat16"
    """float32 or bfloat16."""
    num_ranks: int = 1
    """Ranks of each model."""
    tokens_per_micro_batch: int = 4096
    """Sequences are packed into micro-batches of at most this many tokens."""
    attention: str = "auto"
    """auto, packed or flash_attention_2."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    timeout_s: float = 1800.0
    """A call that no rank finishes within this many seconds counts as hung, and the command stops."""


@dataclass(frozen=True)
class AnalyzeValuesConfig:
    """Accuracy of estimated values of states between reasoning steps, against many rollouts."""

    model: str = ""
    """Folder of the policy whose states are valued."""
    output: str = ""
    """Folder for states.csv, ranking.csv, summary.json, plots and values.html (empty: only print)."""
    overwrite: bool = False
    """Replace an earlier analysis at output."""
    resume: bool = True
    """Go on with the rollouts that an analysis cut short left beside output (.partial.json): nothing is sampled twice. false: start anew."""
    split: str = "test"
    """test or train."""
    num_items: int = 128
    """The first so many items (0: all)."""
    samples_per_prompt: int = 2
    """Responses to each item, from which states are drawn."""
    step_kind: str = ""
    """How responses are cut into steps (docs/steps.md). Empty: as the task says."""
    num_states: int = 256
    """States to value, spread over relative positions: of all states before a step, equal ones once."""
    truth_rollouts: int = 256
    """Rollouts of each state that make its true value."""
    mc: tuple[int, ...] = (1, 3, 9)
    """Monte-Carlo estimates of so many rollouts each, none of them among the truth's. Empty: none."""
    critic: str = ""
    """Folder of a critic: a model with a scalar head, for instance what PPO leaves in critic/. Empty: none."""
    oreo_critic: str = ""
    """Folder of a critic trained by OREO, whose values are soft. Empty: none."""
    oreo_affine: tuple[float, float] = (1.0, 0.0)
    """[a, b]: the OREO critic's value V is reported as a V + b. [1, 0]: as it is."""
    reference: str = ""
    """Folder of the model that the policy was trained from: next steps are also ranked by the policy's implicit advantages against it."""
    beta: float = 0.03
    """Factor of the implicit advantages (OREO's KL coefficient); the ranking does not depend on it."""
    delta: float = 0.1
    """An error of at most this counts as accurate."""
    position_bins: int = 4
    """Groups of states by relative position."""
    calibration_bins: int = 10
    """Groups of states by prediction."""
    ranking_states: int = 64
    """States at which next steps are ranked. 0: no ranking."""
    ranking_actions: int = 5
    """Next steps sampled at each of them; equal ones count once, and 3 distinct ones are needed."""
    ranking_truth_rollouts: int = 128
    """Rollouts after each next step that make its true value."""
    seed: int = 0
    """Seed of everything sampled."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence intervals: bootstrap over problems."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses and rollouts are sampled; a state's rollouts may use what its response has left of max_new_tokens."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """The models that score states."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        check_config(self)


def check_config(config: AnalyzeValuesConfig) -> None:
    """Refuses settings that cannot work."""
    require(config.split in SPLITS, "split", config.split, "use train or test")
    require(config.num_items >= 0, "num_items", config.num_items, "use 0 for all items")
    for name in ("samples_per_prompt", "num_states", "grader_processes", "position_bins", "calibration_bins"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    require(config.truth_rollouts >= 2, "truth_rollouts", config.truth_rollouts, "at least 2, and many more for a truth (published: 256)")
    require(all(k >= 1 for k in config.mc), "mc", list(config.mc), "every K must be at least 1, as in '[1, 3, 9]'")
    require(len(set(config.mc)) == len(config.mc), "mc", list(config.mc), "name every K once")
    require(0 < config.delta <= 1, "delta", config.delta, "must be above 0 and at most 1, for instance 0.1")
    require(0 < config.beta < math.inf, "beta", config.beta, "must be positive and finite")
    affine = config.oreo_affine
    require(affine[0] != 0 and all(map(math.isfinite, affine)), "oreo_affine", list(affine), "[a, b] with a finite a that is not 0 and a finite b")
    idle = not config.oreo_critic and tuple(affine) != (1.0, 0.0)
    require(not idle, "oreo_affine", list(affine), "it maps the values of an OREO critic: name one with --oreo_critic, or leave it out")
    require(config.ranking_states >= 0, "ranking_states", config.ranking_states, "use 0 for no ranking, or a number of states")
    if config.ranking_states:
        enough = config.ranking_actions >= MIN_DISTINCT
        require(enough, "ranking_actions", config.ranking_actions, f"at least {MIN_DISTINCT}, or --ranking_states 0")
        require(config.ranking_truth_rollouts >= 2, "ranking_truth_rollouts", config.ranking_truth_rollouts, "at least 2, and many more for a truth")
    useless = bool(config.reference) and not config.ranking_states
    require(not useless, "reference", config.reference, "it serves the ranking of next steps alone: use --ranking_states 1 or more, or leave it out")
    require(config.sampling.temperature > 0, "sampling.temperature", config.sampling.temperature, "rollouts would be all alike: use more than 0")
    budget, limit = config.sampling.max_new_tokens, config.rollout.max_model_len
    require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
    require(config.grader_deadline_s > 0, "grader_deadline_s", config.grader_deadline_s, "must be positive")
    require(not config.reward.judges, "reward.terms", [term.source for term in config.reward.judges], "judges are not started here: use their server")
    check_intervals(config.intervals, "intervals")
    try:
        ModelConfig(**vars(config.scoring))
    except ConfigError as error:  # at once: the models start when hours of rollouts are done
        raise ConfigError(f"--scoring: {error}") from None
    if config.step_kind:
        try:
            check_step_kind(config.step_kind)
        except ConfigError as error:
            raise ConfigError(f"--step_kind: {error}") from None
