"""VinePPO on Ray: PPO whose values are Monte-Carlo rollouts from every step boundary (Kazemnejad et al. 2024, arXiv 2410.01679).

Against ``ppo.py``: no critic is started, trained or saved, and ``credit`` takes each token's advantage from its step,

    A_i = r_i + gamma V(s_{i+1}) - V(s_i),     V(s) = mean return of K rollouts from s,     0 after the last step,

with the values that ``vine.py`` samples while the collection still generates. Rollouts are never trained on. They earn the reward alone, so the KL
to the reference belongs into the loss.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from openrl_reason.algorithms.collect import Rollouts, check_failure_rate
from openrl_reason.algorithms.online import OnlineTrainer
from openrl_reason.algorithms.online_config import OnlineConfig, PolicyUpdateConfig
from openrl_reason.algorithms.ppo import advantage_metrics, check_whitening, whitened
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.algorithms.vine import StepValues, VineConfig, check_vine
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.credit import vine_step_advantages
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.rewards.config import FAILURES
from openrl_reason.workers.branching import BranchCall


@dataclass(frozen=True)
class VinePPOAlgoConfig(PolicyUpdateConfig):
    """What is learnt from the rollouts."""

    gamma: float = 1.0
    """Discount per step, at most 1."""
    whiten: str = "full"
    """Advantages over the whole collection: none, center (mean 0), scale (divided by their standard deviation, signs stay) or full (both)."""


@dataclass(frozen=True)
class VinePPOConfig(OnlineConfig):
    """VinePPO: PPO with Monte-Carlo values of the states between reasoning steps, without a critic."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/vineppo"))
    """The run as a whole."""
    algo: VinePPOAlgoConfig = field(default_factory=VinePPOAlgoConfig)
    """What is learnt."""
    vine: VineConfig = field(default_factory=VineConfig)
    """Monte-Carlo values."""

    def __post_init__(self) -> None:
        check_whitening(self.algo.whiten)
        check_vine(self.vine, self.samples_per_prompt)
        where = self.algo.kl.where
        require(where != "reward", "algo.kl.where", where, "Monte-Carlo values see the reward of a rollout and not its KL: use loss (or none)")
        if self.vine.interval_width is not None:
            remedy = "--vine.interval_width is for rewards within 0 .. 1: use such a worth, or a fixed K (null)"
            for name in ("no_answer", "truncated", *FAILURES):
                worth = getattr(self.reward, name)
                require(worth is None or 0 <= worth <= 1, f"reward.{name}", worth, remedy)
        super().__post_init__()


class VinePPOTrainer(OnlineTrainer):
    """Trains a policy by VinePPO. Arguments: see ``OnlineTrainer``."""

    headline = (*OnlineTrainer.headline, "credit/value_mean")
    curves = (*OnlineTrainer.curves, "credit/value_mean", "credit/mc_tokens_per_training_token")

    def describe(self) -> str:
        vine = self.config.vine
        count = f"K = {vine.num_rollouts}" if vine.interval_width is None else f"K = {vine.num_rollouts} .. {vine.max_rollouts}"
        return f"VinePPO, {count}, advantages whitened: {self.config.algo.whiten}"

    def plan(self) -> list[tuple[str, str]]:
        config, vine = self.config, self.config.vine
        most = vine.num_rollouts if vine.interval_width is None else vine.max_rollouts
        responses = config.prompts_per_step * config.samples_per_prompt
        cap = "" if vine.max_steps is None else f", of at most {vine.max_steps + 1} states"
        amount = f"<= {most} a state; {responses} responses{cap}: <= {most * responses} a step for each of their steps"
        return [*super().plan(), ("rollouts for values", amount)]

    def prepare(self) -> None:
        super().prepare()
        if self.config.vine.step_kind:  # trajectories, rollouts and rewards per step must be cut alike
            self.task = self.task.cut_by(self.config.vine.step_kind)

    def beside(self) -> StepValues:
        """Rollouts of the states, sampled while the collection generates."""
        call = BranchCall(self.pool, sampling=self.sampling, seed=(self.run.seed, "branch", self.done))
        return StepValues(
            self.config.vine, call, self.rewarder.with_own_numbers(), self.tokenizer,
            step_kind=self.task.step_kind, gamma=self.config.algo.gamma, max_new_tokens=self.sampling.max_new_tokens,
        )  # fmt: skip

    def credit(self, rollouts: Rollouts) -> tuple[TokenBatch, dict[str, float]]:
        """Advantages [N] of the whole collection: each token has that of its step."""
        started, algo, step_values = time.perf_counter(), self.config.algo, rollouts.beside
        rate = self.config.reward.max_failed_rate
        check_failure_rate(step_values.failures, step_values.num_rollouts, rate, what="rewards of rollouts")
        batch, metrics = self.scored_batch(rollouts)
        advantages, values, without_siblings = vine_credit(rollouts, batch, gamma=algo.gamma, samples_per_prompt=self.config.samples_per_prompt)
        mask = batch.action_mask
        metrics |= step_values.metrics(batch.num_actions)
        metrics["credit/states_without_value"] += without_siblings
        metrics |= advantage_metrics(advantages[mask])
        batch = batch.with_tokens(advantages=whitened(advantages, mask, algo.whiten), values=values)
        metrics["timing/credit"] = time.perf_counter() - started
        return batch, metrics


def vine_credit(rollouts: Rollouts, batch: TokenBatch, *, gamma: float, samples_per_prompt: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(advantages [N], values [N], roots without siblings to value them) from the step values that were sampled beside the rollouts.

    ``batch``: those of the rollouts that have a reward; ``sequences["places"]`` says which. Values are NaN outside the responses.
    """
    step_values: StepValues = rollouts.beside
    returns = np.array([_discounted(t, gamma) for t in rollouts.trajectories])
    returns[~np.isfinite(rollouts.rewards)] = math.nan
    advantages, values = torch.zeros(batch.num_tokens), torch.full((batch.num_tokens,), math.nan)
    without_siblings = 0
    for row, place in enumerate(batch.sequences["places"].tolist()):
        first = place // samples_per_prompt * samples_per_prompt
        siblings = np.delete(returns[first : first + samples_per_prompt], place - first)
        trajectory = rollouts.trajectories[place]
        tokens = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        own = step_values.step_values(place, trajectory.rewards.tolist(), siblings.tolist())
        without_siblings += step_values.vine.root_from_siblings and math.isnan(own[0])
        advantages[tokens], values[tokens] = (torch.from_numpy(found) for found in token_credit(trajectory, own, gamma))
    return advantages, values, without_siblings


def token_credit(trajectory: Trajectory, step_values: list[float], gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, values) float32 [T]: of the step that a token belongs to, and of the state before that step.

    A step without tokens has no state of its own; what it earns belongs to the step before it, discounted as it is in the rollouts.
    """
    steps_T = trajectory.step_ids[trajectory.action_mask]
    advantages_S = np.array(vine_step_advantages(step_values, trajectory.rewards.tolist(), gamma=gamma))
    advantages, values = np.zeros(trajectory.num_tokens, np.float32), np.full(trajectory.num_tokens, np.nan, np.float32)
    advantages[trajectory.action_mask], values[trajectory.action_mask] = advantages_S[steps_T], np.array(step_values)[steps_T]
    return advantages, values


def _discounted(trajectory: Trajectory, gamma: float) -> float:
    """Return of a trajectory from its prompt on, discounted per step."""
    return math.fsum(gamma**step * float(reward) for step, reward in enumerate(trajectory.rewards))
