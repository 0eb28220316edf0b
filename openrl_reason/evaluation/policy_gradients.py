"""Policy gradients of independent batches at a fixed policy: sampling the batches, their credits, their sketches.

All credits speak about the same responses, so that a difference between their gradients is a difference of the credits. Batches are drawn
independently of one another (an item may be in several), so what their gradients share is the gradient over all items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from openrl_reason.algorithms.collect import Collector, Rollouts, check_failure_rate, check_failures
from openrl_reason.algorithms.online_config import PolicyUpdateConfig
from openrl_reason.algorithms.policy_gradient import PolicyGradientLoss
from openrl_reason.algorithms.ppo import whitened
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.reinforce import group_credit
from openrl_reason.algorithms.vine import StepValues
from openrl_reason.algorithms.vineppo import vine_credit
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.credit import gae
from openrl_reason.core.seeds import derive_seed
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.sets import EvalSet
from openrl_reason.rewards.base import Rewarder
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.branching import BranchCall
from openrl_reason.workers.rollout_config import SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.evaluation.policy_config import AnalyzePolicyConfig, GradientConfig
    from openrl_reason.workers.gradients import GradientSketch
    from openrl_reason.workers.model_group import ModelGroup


@dataclass
class GradientBatch:
    """The rewarded responses of one batch."""

    batch: TokenBatch
    advantages: dict[str, torch.Tensor] = field(default_factory=dict)
    """Credit -> [N], not whitened."""


@dataclass
class GradientStudy:
    """What is known of the gradients of one policy."""

    batches: list[GradientBatch]
    counts: dict[str, float]
    """What was sampled, left out and failed."""
    sketches: dict[str, list[GradientSketch]] = field(default_factory=dict)
    """Credit -> one for each batch."""


def draw_batches(items: Sequence[TaskItem], num_batches: int, prompts_per_batch: int, seed: tuple[int | str, ...]) -> list[list[TaskItem]]:
    """Independent batches of different items.

    Raises:
        ConfigError: there are fewer items than a batch has.
    """
    if len(items) < prompts_per_batch:
        raise ConfigError(
            f"--gradient.prompts_per_batch is {prompts_per_batch}, but there are {len(items)} items: use at most that, or more --num_items"
        )
    rngs = [np.random.default_rng(derive_seed(*seed, "items", number)) for number in range(num_batches)]
    return [[items[place] for place in rng.choice(len(items), prompts_per_batch, replace=False)] for rng in rngs]


def sample_batches(config: AnalyzePolicyConfig, chosen: EvalSet, tokenizer: Any, pool: Any, rewarder: Rewarder) -> GradientStudy:
    """Responses, and the credits that need the engines or nothing.

    Raises:
        WorkerError: more rewards failed than ``reward.max_failed_rate``.
        DataError: no response of a batch has a reward.
    """
    own, seed = config.gradient, (config.seed, "policy", "gradient")
    collector = Collector(chosen.task, tokenizer, pool, rewarder)
    study = GradientStudy([], dict.fromkeys(("responses", "without_reward", "tokens", "rollouts", "states_without_value"), 0))
    rewards: list[float] = []
    for number, items in enumerate(draw_batches(chosen.items, own.num_batches, own.prompts_per_batch, seed)):
        beside = None
        if "vine" in own.credits:
            call = BranchCall(pool, sampling=chosen.sampling, seed=(*seed, "branch", number))
            beside = StepValues(
                own.vine, call, rewarder.with_own_numbers(), tokenizer, step_kind=chosen.task.step_kind, gamma=1.0,
                max_new_tokens=chosen.sampling.max_new_tokens,
            )  # fmt: skip
        rollouts = collector.collect(
            items, num_samples=own.samples_per_prompt, sampling=chosen.sampling, seed=(*seed, "responses", number), beside=beside
        )
        check_failures(rollouts, config.reward.max_failed_rate)
        graded = rollouts.rewards[np.isfinite(rollouts.rewards)]
        if not len(graded):
            raise DataError(f"not one of the {len(rollouts.results)} responses of batch {number} has a reward, so it has no gradient")
        study.batches.append(credited(rollouts, own, config.reward.max_failed_rate, study.counts))
        rewards += graded.tolist()
        tokens = study.batches[-1].batch.num_actions
        done = f"batch {number + 1}/{own.num_batches}: {len(rollouts.results)} responses, {tokens} tokens"
        print(f"{done}, mean reward {graded.mean():.3g}", flush=True)
        study.counts["responses"] += len(rollouts.results)
        study.counts["without_reward"] += len(rollouts.results) - len(graded)
        study.counts["tokens"] += tokens
    study.counts["mean_reward"] = math.fsum(rewards) / len(rewards)
    return study


def credited(rollouts: Rollouts, config: GradientConfig, max_failed_rate: float, counts: dict[str, float]) -> GradientBatch:
    """The responses that have a reward, with the advantages of ``group`` and ``vine`` where they are asked for; rollouts are counted."""
    batch = TokenBatch.from_trajectories(rollouts.trajectories)
    places = torch.arange(batch.num_sequences)
    batch = batch.with_sequences(
        rewards=torch.as_tensor(rollouts.rewards, dtype=torch.float32), group_ids=places // config.samples_per_prompt, places=places
    )
    batch = batch.select(batch.sequences["rewards"].isfinite().nonzero().flatten())
    found = GradientBatch(batch)
    for credit in config.credits:
        if credit == "group":
            found.advantages[credit] = group_credit(batch, kind="rloo", gamma=1.0)
        elif credit == "vine":
            values: StepValues = rollouts.beside
            check_failure_rate(values.failures, values.num_rollouts, max_failed_rate, what="rewards of rollouts")
            found.advantages[credit], _, without_siblings = vine_credit(rollouts, batch, gamma=1.0, samples_per_prompt=config.samples_per_prompt)
            counts["rollouts"] += values.num_rollouts
            counts["states_without_value"] += values.metrics(batch.num_actions)["credit/states_without_value"] + without_siblings
    return found


def add_critic(study: GradientStudy, critic: ModelGroup) -> None:
    """The advantages of ``critic``: rewards to come minus the critic's value (GAE with gamma and lambda 1)."""
    for one in study.batches:
        batch = one.batch
        one.advantages["critic"] = gae(batch.tokens["rewards"], critic.values(batch), batch.action_mask, batch.cu_seqlens)[0]


def add_sketches(study: GradientStudy, policy: ModelGroup, config: GradientConfig, sampling: SamplingConfig, seed: int) -> None:
    """The gradient of every batch under every credit: that of the loss with which the trainers begin a step (ratio 1, so no clip acts)."""
    loss = PolicyGradientLoss(PolicyUpdateConfig(loss_reduction=config.loss_reduction), kl_coef=0.0)
    for one in study.batches:
        batch = one.batch
        weights, denominator = loss_weights(batch, config.loss_reduction, max_response_tokens=sampling.max_new_tokens)
        denominators = {"loss": denominator, "tokens": float(batch.num_actions)}
        for credit in config.credits:
            advantages = whitened(one.advantages[credit], batch.action_mask, config.whiten)
            part = batch.with_tokens(advantages=advantages, loss_weights=weights)
            sketch = policy.gradient_sketch(part, loss, denominators, sampling.temperature, True, size=config.sketch_size, seed=seed)
            study.sketches.setdefault(credit, []).append(sketch)
