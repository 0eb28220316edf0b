"""The losses of the online algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from openrl_reason.algorithms.online_config import PolicyUpdateConfig
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.kl import kl_penalty
from openrl_reason.core.losses import policy_loss, value_loss


@dataclass(frozen=True)
class PolicyGradientLoss:
    """The loss of one micro-batch, called on each rank. Token weights and denominators are the global batch's (``loss_weights``)."""

    algo: PolicyUpdateConfig
    kl_coef: float

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, Any]]:
        logprobs, mask, weights = outputs.logprobs, batch.action_mask, batch.tokens["loss_weights"]
        old_logprobs = batch.tokens["old_logprobs"] if "old_logprobs" in batch.tokens else logprobs.detach()
        loss, metrics = policy_loss(
            logprobs, old_logprobs, batch.tokens["advantages"], mask,
            clip_low=self.algo.clip_low, clip_high=self.algo.clip_high, dual_clip=self.algo.dual_clip, ratio_level=self.algo.ratio_level,
            cu_seqlens=batch.cu_seqlens, token_weights=weights, behaviour_logprobs=batch.behaviour_logprobs,
            importance_correction=None if self.algo.importance_correction == "none" else self.algo.importance_correction,
            importance_cap=self.algo.importance_cap, denominator=denominators["loss"],
        )  # fmt: skip
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        tokens = denominators["tokens"]
        if self.algo.kl.where == "loss":
            full = self.algo.kl.kind == "full"
            kl = outputs.kl if full else kl_penalty(logprobs, batch.tokens["ref_logprobs"], kind=self.algo.kl.kind, mask=mask)
            loss = loss + self.kl_coef * (kl * weights).sum() / denominators["loss"]
            metrics["train/kl"] = kl.detach().sum() / tokens
        entropy = torch.where(mask, outputs.entropy, 0.0)
        if self.algo.entropy_coef:
            loss = loss - self.algo.entropy_coef * (entropy * weights).sum() / denominators["loss"]
        metrics["train/entropy"] = entropy.detach().sum() / tokens
        # Before the update, so that it is the engine's distance from the trainer and not the policy's drift over minibatches.
        difference = torch.where(mask, (old_logprobs.detach() - batch.behaviour_logprobs).abs(), 0.0)
        metrics["sampling/logprob_difference/mean"] = difference.sum() / tokens
        metrics["sampling/logprob_difference/max"] = difference.max()
        return loss, metrics


@dataclass(frozen=True)
class CriticLoss:
    """Half the squared distance from the returns, clipped; a mean over the global minibatch's action tokens."""

    clip: float | None

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, metrics = value_loss(
            outputs.values, batch.tokens["values"], batch.tokens["returns"], batch.action_mask, clip=self.clip, denominator=denominators["tokens"]
        )
        return loss, {f"critic/{name}": metrics[name] for name in ("value_loss", "value_clip_fraction") if name in metrics}
