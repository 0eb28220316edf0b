"""REINFORCE and its family on Ray: collect, grade, credit, update, sync.

One driver for the algorithms that need no critic. They differ by the baseline that is subtracted from the reward, by what is whitened, and
by how the loss is averaged (``ADVANTAGES``). What they share with the other online algorithms is in ``online.py``; with one update per
collection the ratio is one and the clip never acts, which is plain REINFORCE.

"Stable REINFORCE" (LLM_RL) is ``advantage none``, ``loss_reduction sequence``, ``kl.where reward``, ``return_clamp`` and
``reference.refresh_every``; its published code leaves the KL term undetached, which is not a KL penalty, and is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from openrl_reason.algorithms.collect import Rollouts
from openrl_reason.algorithms.common import last_actions
from openrl_reason.algorithms.online import OnlineTrainer
from openrl_reason.algorithms.reinforce_config import ADVANTAGES, ReinforceAlgoConfig, ReinforceConfig
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.credit import RunningBaseline, discounted_returns, group_advantages, whiten

__all__ = ["ReinforceAlgoConfig", "ReinforceConfig", "ReinforceTrainer"]


class ReinforceTrainer(OnlineTrainer):
    """Trains a policy by REINFORCE with the configured baseline. Arguments: see ``OnlineTrainer``."""

    def __init__(self, config: ReinforceConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._group_kind, other, self._whiten, reduction = ADVANTAGES[config.algo.advantage]
        self._reduction = reduction if config.algo.loss_reduction == "auto" else config.algo.loss_reduction
        self.baseline = RunningBaseline(decay=config.algo.baseline_decay) if other == "running" else None

    def describe(self) -> str:
        return self.config.algo.advantage

    def credit(self, rollouts: Rollouts) -> tuple[TokenBatch, dict[str, float]]:
        """Advantages [N] of the whole collection. Samples without a reward (their grading failed) are counted and left out."""
        started, algo = time.perf_counter(), self.config.algo
        batch, metrics = self.scored_batch(rollouts)
        rewards_B = batch.sequences["rewards"]
        if self.baseline is not None:
            value = self.baseline.value  # of earlier steps: it must not depend on the samples it is subtracted from
            metrics["train/baseline"] = value
            self.baseline.update(rewards_B)
        advantages = group_credit(batch, kind=self._group_kind, gamma=algo.gamma)
        if algo.return_clamp:
            advantages = advantages.clamp(*algo.return_clamp)
        if self.baseline is not None:
            advantages = advantages - value
        if algo.kl.where == "reward":
            kl = self.kl_in_reward(batch)
            advantages = advantages - self.kl.coefficient * discounted_returns(kl, batch.action_mask, batch.cu_seqlens, gamma=algo.gamma)
            metrics["train/kl"] = float(kl.sum() / batch.num_actions)
        if self._whiten:
            advantages = whiten(advantages, batch.action_mask)
        advantages = torch.where(batch.action_mask, advantages, 0.0)
        metrics["train/return"] = float(advantages[batch.action_mask].mean())
        metrics["timing/credit"] = time.perf_counter() - started
        return batch.with_tokens(advantages=advantages), metrics

    def state(self) -> dict[str, Any]:
        baseline = {"baseline": self.baseline.state_dict()} if self.baseline is not None else {}
        return super().state() | baseline

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if self.baseline is not None and "baseline" in state:
            self.baseline.load_state_dict(state["baseline"])


def group_credit(batch: TokenBatch, *, kind: str, gamma: float) -> torch.Tensor:
    """Advantages [N] of responses against their siblings (``sequences["group_ids"]``), by ``group_advantages``; 0 outside the actions.

    The advantage of the total is paid at the end; a reward that a step earned before is taken off it, so that a token's advantage is the group's
    verdict less what had been earned already (for outcome rewards: the advantage itself, at every token).
    """
    rewards_B, rewards, last = batch.sequences["rewards"], batch.tokens["rewards"].clone(), last_actions(batch)
    earned_before = rewards_B - rewards[last]
    rewards[last] = group_advantages(rewards_B, batch.sequences["group_ids"], kind=kind) - earned_before
    return discounted_returns(rewards, batch.action_mask, batch.cu_seqlens, gamma=gamma)
