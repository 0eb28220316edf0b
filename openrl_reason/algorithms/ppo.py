"""PPO with a learned critic on Ray: collect, grade, credit, update, sync (Schulman et al. 2017, arXiv 1707.06347).

The credit is generalised advantage estimation over the action tokens, with values from a group of its own: a copy of the policy's start (or any
checkpoint with a scalar head) that is trained on the returns. Everything else is what the online algorithms share (``online.py``); VinePPO
(``vineppo.py``) is this file with Monte-Carlo values in place of the critic.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openrl_reason.algorithms.collect import Rollouts
from openrl_reason.algorithms.common import describe_model, estimate_memory, local_path, update_metrics
from openrl_reason.algorithms.online import OnlineTrainer
from openrl_reason.algorithms.online_config import OnlineConfig, PolicyUpdateConfig
from openrl_reason.algorithms.policy_gradient import CriticLoss
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.credit import gae, whiten
from openrl_reason.models.scalar_model import check_scalar_folder
from openrl_reason.workers.model_config import ScalarModelConfig
from openrl_reason.workers.placement import Placement, Role

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup

WHITENINGS = ("none", "center", "scale", "full")


@dataclass(frozen=True)
class PPOAlgoConfig(PolicyUpdateConfig):
    """What is learnt from the rollouts."""

    gamma: float = 1.0
    """Discount per token, at most 1."""
    lam: float = 1.0
    """Lambda of generalised advantage estimation: 1 trusts the rewards alone, 0 the critic alone."""
    whiten: str = "full"
    """Advantages over the whole collection: none, center (mean 0), scale (divided by their standard deviation, signs stay) or full (both)."""
    value_clip: float | None = 0.2
    """Hold the critic's outputs within this distance of what they were when the collection was scored. null: no clip."""


@dataclass(frozen=True)
class CriticConfig(ScalarModelConfig):
    """The critic: a language model with a scalar head, with an optimiser of its own."""

    lr: float = 9e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps at the start in which the critic alone is trained and the policy waits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "must not be negative")


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """PPO with a learned critic."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/ppo"))
    """The run as a whole."""
    algo: PPOAlgoConfig = field(default_factory=PPOAlgoConfig)
    """What is learnt."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic. path: a folder of a language model or of a model with a scalar head (reward model, process-reward model, critic of another
    run); empty: the policy's start."""

    def __post_init__(self) -> None:
        check_whitening(self.algo.whiten)
        require(0.0 <= self.algo.lam <= 1.0, "algo.lam", self.algo.lam, "must lie between 0 and 1")
        clip, warmup = self.algo.value_clip, self.critic.warmup_steps
        require(clip is None or clip > 0, "algo.value_clip", clip, "must be positive, or null for no clip")
        require(warmup < self.run.steps, "critic.warmup_steps", warmup, f"leaves no step for the policy: --run.steps is {self.run.steps}")
        super().__post_init__()


def check_whitening(kind: str) -> None:
    """Refuses an unknown kind."""
    require(kind in WHITENINGS, "algo.whiten", kind, f"use {', '.join(WHITENINGS)}")


def whitened(advantages: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """[N] -> [N]: ``advantages`` whitened over the global batch as ``kind`` says; 0 outside ``mask``."""
    if kind in ("none", "center"):
        mean = advantages[mask].mean() if kind == "center" else 0.0
        return torch.where(mask, advantages - mean, 0.0)
    return whiten(advantages, mask, shift_mean=kind == "full")


class PPOTrainer(OnlineTrainer):
    """Trains a policy by PPO, and its critic. Arguments: see ``OnlineTrainer``."""

    headline = (*OnlineTrainer.headline, "critic/vf_explained_var")
    curves = (*OnlineTrainer.curves, "critic/vf_explained_var", "critic/value_loss")

    def describe(self) -> str:
        algo = self.config.algo
        return f"PPO, lambda {algo.lam:g}, advantages whitened: {algo.whiten}"

    # ---- the algorithm -------------------------------------------------------------------------------------------------------

    def credit(self, rollouts: Rollouts) -> tuple[TokenBatch, dict[str, float]]:
        """Advantages and returns [N] of the whole collection, from the critic's values before this step's updates."""
        started, algo = time.perf_counter(), self.config.algo
        batch, metrics = self.scored_batch(rollouts)
        scoring = time.perf_counter()
        with self._critic_here() as critic:
            values = critic.values(batch)
        rewards, mask = batch.tokens["rewards"], batch.action_mask
        metrics["timing/values"] = time.perf_counter() - scoring
        if algo.kl.where == "reward":
            kl = self.kl_in_reward(batch)
            rewards = rewards - self.kl.coefficient * kl
            metrics["train/kl"] = float(kl.sum() / batch.num_actions)
        advantages, returns = gae(rewards, values, mask, batch.cu_seqlens, gamma=algo.gamma, lam=algo.lam)
        metrics |= value_metrics(values[mask], returns[mask]) | advantage_metrics(advantages[mask])
        batch = batch.with_tokens(advantages=whitened(advantages, mask, algo.whiten), returns=returns, values=values)
        metrics["timing/credit"] = time.perf_counter() - started
        return batch, metrics

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """The critic's and the policy's optimiser steps. Neither needs the other's result: side by side, where they have bundles of their own."""
        if self.done < self.config.critic.warmup_steps:
            return self.update_critic(batch) | {"train/critic_warmup": 1.0}
        if self.config.placement.colocate:
            return self.update_critic(batch) | self.update_policy(batch)
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as thread:
            critic = thread.submit(self.update_critic, batch)
            metrics = self.update_policy(batch)
            metrics = critic.result() | metrics
        both = metrics["timing/update"] + metrics["timing/critic_update"]
        return metrics | {"timing/update_overlap": both - (time.perf_counter() - started)}

    def update_critic(self, batch: TokenBatch) -> dict[str, float]:
        """The critic's part: the same epochs and minibatches as the policy's."""
        started, algo, history = time.perf_counter(), self.config.algo, []
        with self._critic_here() as critic:
            for part in self.parts(batch.without_tokens("ref_hidden"), critic):
                history.append(critic.update(part, CriticLoss(algo.value_clip), {"tokens": float(part.num_actions)}))
        metrics = update_metrics(history)
        metrics["timing/update"] = time.perf_counter() - started
        return {name.replace("train/", "critic/").replace("timing/", "timing/critic_"): value for name, value in metrics.items()}

    def skip_updates(self) -> None:
        self.critic.skip_updates(self._updates_per_step)
        if self.done >= self.config.critic.warmup_steps:  # before that the policy's schedule has not begun
            super().skip_updates()

    # ---- the run -------------------------------------------------------------------------------------------------------------

    @property
    def policy_updates(self) -> int:
        return (self.run.steps - self.config.critic.warmup_steps) * self._updates_per_step

    def roles(self) -> list[Role]:
        return [*super().roles(), Role("critic", self.config.critic.num_ranks)]

    def plan(self) -> list[tuple[str, str]]:
        critic = self.critic_config()
        warmup = f"; alone for the first {critic.warmup_steps} steps" if critic.warmup_steps else ""
        memory = ("memory of the critic's weights", estimate_memory(critic, name="critic"))
        return [*super().plan(), ("critic", describe_model(critic) + warmup), memory]

    def critic_config(self) -> CriticConfig:
        """The critic's settings with its path resolved."""
        path = self.config.critic.path or self.config.policy.path
        return replace(self.config.critic, path=local_path(path))

    def prepare(self) -> None:
        super().prepare()
        critic = self.critic_config()
        length = self.config.rollout.max_model_len
        check_scalar_folder(critic.path, self.tokenizer, length, flag="critic.path", trust_remote_code=critic.trust_remote_code)

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup

        def start(wait: bool) -> None:
            config, total = self.critic_config(), self.run.steps * self._updates_per_step
            self.critic = ModelGroup.start(
                config, role="critic", placement=placement, seed=self.run.seed, total_steps=total, timeout_s=config.timeout_s, wait=wait
            )
            stack.callback(self.critic.close)

        take_turns = placement.gpu and self.config.placement.colocate
        if not take_turns:
            start(wait=False)  # it loads while the others do
        super().build(placement, stack)
        if take_turns:
            start(wait=True)
            self.critic.offload()
        self.critic.ready()

    @contextlib.contextmanager
    def _critic_here(self) -> Iterator[ModelGroup]:
        """The critic. On shared GPUs it has its memory only within the block, which must lie in the models' turn."""
        if self._take_turns:
            self.critic.reload()
        yield self.critic
        if self._take_turns:
            self.critic.offload()

    def export_models(self, folder: Path) -> None:
        """The policy into ``folder``, and the critic beside it into ``critic``, head included: a start for another run's ``critic.path``."""
        super().export_models(folder)
        with self._critic_here() as critic:
            critic.export_hf(folder.parent / "critic")

    def save_models(self, folder: Path) -> None:
        super().save_models(folder)
        with self._critic_here() as critic:
            critic.save_state(folder / "critic")
            critic.export_hf(folder / "critic_model")

    def load_models(self, folder: Path) -> None:
        super().load_models(folder)
        with self._critic_here() as critic:
            critic.load_state(folder / "critic")


def advantage_metrics(advantages: torch.Tensor) -> dict[str, float]:
    """Of the action tokens [n], before whitening."""
    return {"train/advantage_mean": float(advantages.mean()), "train/advantage_std": float(advantages.std(unbiased=False))}


def value_metrics(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """How well the critic knew the returns before it was trained on them; both [n], action tokens alone. NaN where the returns do not vary."""
    values, returns = values.double(), returns.double()
    variance = float(returns.var(unbiased=False))
    unexplained = float((returns - values).var(unbiased=False))
    return {
        "critic/vf_explained_var": 1.0 - unexplained / variance if variance > 1e-12 else float("nan"),
        "critic/value_mean": float(values.mean()),
        "critic/value_std": float(values.std(unbiased=False)),
        "critic/return_mean": float(returns.mean()),
        "critic/value_error": float((returns - values).abs().mean()),
    }
