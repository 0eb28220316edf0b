"""OREO: offline reinforcement learning for multi-step reasoning (arXiv 2412.16145). A policy and a critic learn the soft Bellman equation

    V(s_t) = R_t - beta sum_{i >= t} log pi(a_i | s_i) / ref(a_i | s_i)

from rewarded responses that somebody else may have written: no rollout engine. One step, on the next rows of the data:

1. the reference's log-probs (and hidden states, for the exact KL) come from disk, or from a group of ranks;
2. both losses see policy and critic as they are before this step. The critic's residual needs the policy's log-probs, the policy's the
   critic's values. Where they share devices, both come from the forward passes of the updates themselves, a micro-batch at a time: the
   critic runs forward and waits, the policy runs forward and backward, the critic backward. Where policy and critic have ranks of their
   own, both are asked first, and update side by side;
3. the policy's loss: residual + coefficient x KL to the reference; the critic's: residual. Each takes one optimiser step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from openrl_reason.algorithms.collect import Rollouts, logged_places, readable
from openrl_reason.algorithms.common import check_reference, checked_tokenizer, describe_model, estimate_memory, local_path, update_metrics
from openrl_reason.algorithms.offline_reference import OfflineReference
from openrl_reason.algorithms.oreo_config import OfflineReferenceConfig, OREOAlgoConfig, OREOConfig, OREOKLConfig
from openrl_reason.algorithms.oreo_losses import (
    OREOPolicyLoss,
    OREOValueLoss,
    explicit_advantages,
    offline_metrics,
    oreo_batch,
    oreo_denominators,
)
from openrl_reason.algorithms.trainer import Callback, Trainer
from openrl_reason.atomic import write_json
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch, unsplit_tokens
from openrl_reason.core.kl import DualKL, FixedKL
from openrl_reason.core.losses import oreo_policy_loss, oreo_value_loss
from openrl_reason.core.losses_offline import importance_weights
from openrl_reason.data.offline import OfflineLoader, build_store, split_held_out
from openrl_reason.data.token_store import TokenStore
from openrl_reason.errors import DataError
from openrl_reason.evaluation.identity import weights_identity
from openrl_reason.folders import VALUE_NOTE
from openrl_reason.rewards.base import RewardResult
from openrl_reason.workers.placement import Placement, Role


class OREOTrainer(Trainer):
    """Trains a policy and a critic on rewarded responses.

    Args:
        config: all settings.
        store: replaces the data that ``config.data`` names.
        callbacks: called after each step with (finished steps, metrics).
    """

    headline: ClassVar = (
        "train/policy_loss", "critic/value_loss", "train/kl", "offline/value_auc", "offline/advantage_correlation", "train/grad_norm",
        "timing/step",
    )  # fmt: skip
    curves: ClassVar = (
        "train/policy_loss", "critic/value_loss", "train/kl", "offline/value_auc", "offline/value_mean", "offline/log_ratio_median_right",
        "offline/log_ratio_median_wrong", "train/grad_norm",
    )  # fmt: skip

    def __init__(self, config: OREOConfig, *, store: TokenStore | None = None, callbacks: Sequence[Callback] = ()) -> None:
        super().__init__(config, callbacks)
        require(store is not None or bool(config.data.path), "data.path", "", "there are no responses: name a file of them")
        self._given = store
        algo, kl = config.algo, config.algo.kl
        self.kl = DualKL(kl.coef, kl.target, kl.target_lr) if kl.target else FixedKL(kl.coef)
        direction = "forward" if kl.kind == "forward" else "reverse"
        exact = algo.exact_kl and not algo.critic_only  # the critic alone needs no distributions
        self.reference = OfflineReference(config.reference, config.policy, exact=exact, direction=direction)
        self._reference_identity = weights_identity(self.reference.path)  # at the start: what lies there may be gone when a checkpoint is written
        # Dropout in an update would make its log-probs and values others than those that the other model is to learn from.
        self._needs_own_forward = bool(algo.ema_decay) or config.policy.lora.dropout > 0 or config.critic.lora.dropout > 0

    # ---- the step ------------------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One optimiser step of the critic and, after the frozen ones, of the policy."""
        started = time.perf_counter()
        batch = self.next_batch(self.loader.rows(self.done), self.loader.trajectories(self.done))
        reading = time.perf_counter() - started
        metrics, logprobs, values = self.update(batch)
        metrics |= offline_metrics(batch, logprobs, values, self.config.algo.beta)
        if "train/kl" in metrics:
            metrics["train/kl_coef"] = self.kl.coefficient
            self.kl.update(metrics["train/kl"], batch.num_sequences)
        metrics |= {"timing/read": reading, "train/tokens": float(batch.num_tokens), "offline/reward": float(batch.sequences["rewards"].mean())}
        metrics["perf/tokens_per_second"] = batch.num_tokens / (time.perf_counter() - started)
        return metrics

    def right(self, rows: np.ndarray) -> np.ndarray:
        """bool [len(rows)]: which responses of the store are right (``algo.right_threshold``)."""
        threshold = self.config.algo.right_threshold
        return np.asarray(self.store.labels[rows] if threshold is None else self.store.rewards[rows] >= np.float32(threshold), bool)

    def next_batch(self, rows: Sequence[int], trajectories: Sequence[Any]) -> TokenBatch:
        """The batch of ``rows`` with states, returns and the reference's scores."""
        positive = torch.from_numpy(self.right(np.asarray(rows)).astype(np.float32))
        batch = oreo_batch(TokenBatch.from_trajectories(trajectories), positive, self.config.algo.level)
        return self.reference.attach(rows, batch)

    def update(self, batch: TokenBatch) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """The optimiser steps. Returns metrics, and the log-probs and values [N] from before them."""
        frozen = self.config.algo.critic_only or self.done < self._frozen_steps
        metrics: dict[str, float] = {}
        if not frozen and not self._needs_own_forward and self.config.placement.colocate:
            return self.update_both(batch)
        pending = self.policy.logprobs_async(batch), self.critic.values_async(batch)
        logprobs, values = pending[0].result()["logprobs"], pending[1].result()["values"]
        averaged = self.config.algo.ema_decay and not self.config.algo.critic_only  # a policy that stays as it is is its own average
        target = self.policy.logprobs(batch, average=True)["logprobs"] if averaged else logprobs
        if frozen:
            return self.update_critic(batch, target) | {"train/policy_frozen": 1.0}, logprobs, values
        if self.config.placement.colocate:
            return self.update_policy(batch, values) | self.update_critic(batch, target), logprobs, values
        with ThreadPoolExecutor(1) as thread:
            critic = thread.submit(self.update_critic, batch, target)
            metrics = self.update_policy(batch, values)
            return metrics | critic.result(), logprobs, values

    def update_both(self, batch: TokenBatch) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """``update`` without a forward pass beyond those of the two updates: critic forward, policy forward and backward, critic backward, for
        one micro-batch of every rank at a time, and then both optimiser steps."""
        algo, started = self.config.algo, time.perf_counter()
        policy_loss, value_loss = OREOPolicyLoss(algo, self.kl.coefficient), OREOValueLoss(algo)
        denominators = oreo_denominators(batch, algo.average, algo.level)
        rounds, logprobs, values = self.critic.rounds(batch), [], []
        for number, (places, units) in enumerate(rounds, 1):
            part, last = batch.select(places), number == len(rounds)
            values.append(self.critic.values(part, units=units, for_update=True))
            with_values = part.with_tokens(values=values[-1])
            found, kept = self.policy.update_keeping(with_values, policy_loss, denominators, with_entropy=True, keep=("logprobs",), last=last)
            logprobs.append(kept["logprobs"])
            bare = part.without_tokens("ref_hidden").with_tokens(logprobs=logprobs[-1])
            critic_found, _ = self.critic.update_keeping(bare, value_loss, denominators, units=units, last=last)
        metrics = update_metrics([found]) | _of_critic(update_metrics([critic_found])) | {"timing/update": time.perf_counter() - started}
        order = [places for places, _ in rounds]
        return metrics, unsplit_tokens(logprobs, order, batch), unsplit_tokens(values, order, batch)

    def update_policy(self, batch: TokenBatch, values: torch.Tensor) -> dict[str, float]:
        """One optimiser step of the policy against ``values`` [N]."""
        started, algo = time.perf_counter(), self.config.algo
        loss, denominators = OREOPolicyLoss(algo, self.kl.coefficient), oreo_denominators(batch, algo.average, algo.level)
        found = self.policy.update(batch.with_tokens(values=values), loss, denominators, with_entropy=True)
        return update_metrics([found]) | {"timing/update": time.perf_counter() - started}

    def update_critic(self, batch: TokenBatch, logprobs: torch.Tensor) -> dict[str, float]:
        """One optimiser step of the critic against the policy's ``logprobs`` [N]."""
        started, algo = time.perf_counter(), self.config.algo
        bare = batch.without_tokens("ref_hidden").with_tokens(logprobs=logprobs)
        metrics = update_metrics([self.critic.update(bare, OREOValueLoss(algo), oreo_denominators(batch, algo.average, algo.level))])
        return _of_critic(metrics | {"timing/update": time.perf_counter() - started})

    def evaluate(self) -> dict[str, float]:
        """Losses and diagnostics of policy and critic as they are, on held-out rows."""
        if not len(self.held_out):
            return {}
        algo, parts = self.config.algo, []
        for first in range(0, len(self.held_out), self.config.batch_size):
            rows = self.held_out[first : first + self.config.batch_size]
            batch = self.next_batch(rows, self.store.trajectories(rows))
            pending = self.policy.logprobs_async(batch), self.critic.values_async(batch)
            batch = batch.without_tokens("ref_hidden")
            parts.append(batch.with_tokens(logprobs=pending[0].result()["logprobs"], values=pending[1].result()["values"]))
        batch = TokenBatch.concat(parts)
        self._log_responses(batch)
        tokens, rewards = batch.tokens, batch.sequences["rewards"]
        shared = (rewards, batch.action_mask, tokens["states"], batch.cu_seqlens)
        settings = {"beta": algo.beta, "returns": tokens["returns"], "average": algo.average}
        if algo.importance:
            ratio = tokens["logprobs"], tokens["ref_logprobs"], batch.action_mask, batch.cu_seqlens
            settings["sequence_weights"] = importance_weights(*ratio, clip=algo.importance_clip)
        policy, _ = oreo_policy_loss(tokens["logprobs"], tokens["ref_logprobs"], tokens["values"], *shared, level=algo.level, **settings)
        settings["clip_log_ratio"] = algo.clip_log_ratio
        value, _ = oreo_value_loss(tokens["values"], tokens["logprobs"], tokens["ref_logprobs"], *shared, **settings)
        found = {"eval/policy_loss": float(policy), "eval/value_loss": float(value)}
        diagnostics = offline_metrics(batch, tokens["logprobs"], tokens["values"], algo.beta)
        return found | {name.replace("offline/", "eval/"): number for name, number in diagnostics.items()}

    def _log_responses(self, batch: TokenBatch) -> None:
        """Writes ``run.log_rollouts`` of the held-out rows to rollouts.jsonl, with the critic's values and advantages at each token."""
        places = logged_places([str(question) for question in self.store.questions[self.held_out]], self.run.log_rollouts)
        if not places:
            return
        trajectories = self.store.trajectories([int(self.held_out[place]) for place in places])
        for t in trajectories:
            prompt, response = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (t.prompt_ids, t.response_ids))
            t.info = {"gold": None, "parsed": None, **t.info, "prompt": prompt, "response": response}
        results = [RewardResult(score, "ok") for score in batch.sequences["rewards"][places].tolist()]
        shown = batch.select(places).with_sequences(places=torch.arange(len(places)))
        shown = shown.with_tokens(advantages=explicit_advantages(shown, shown.tokens["values"]))
        tokenizer = self.tokenizer if self.run.log_rollout_tokens else None
        rollouts = Rollouts(trajectories, [None] * len(places), results)
        self.log.rollouts(readable(rollouts, self.done, -1, source="eval/held_out", tokenizer=tokenizer, batch=shown))

    # ---- data ----------------------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from openrl_reason.models.scalar_model import check_scalar_folder

        config = self.config
        length, trust = config.data.max_length if self._given is None else int(self._given.lengths.max(initial=1)), config.policy.trust_remote_code
        self.model_path = local_path(config.policy.path)
        self.tokenizer = checked_tokenizer(self.model_path, length, flag="data.max_length", trust_remote_code=trust)
        if config.reference.path:
            check_reference(self.reference.path, self.tokenizer, length, flag="reference.path", trust_remote_code=trust)
        if self.reference.exact:
            head = self.reference.path
            require(Path(head).is_dir(), "reference.path" if config.reference.path else "policy.path", head,
                    "the exact KL reads the reference's output head from a local folder: download the model, or use --algo.kl.kind k3")  # fmt: skip
        critic = self.critic_config()
        check_scalar_folder(critic.path, self.tokenizer, length, flag="critic.path", trust_remote_code=critic.trust_remote_code)
        self.store = self._given
        if self.store is None:
            self.store = build_store(config.data, self.model_path, self.folder / "data", trust_remote_code=trust)
        if self.store.kind not in ("responses", "steps"):
            remedy = {"pairs": "`dpo` learns from pairs", "labels": "`kto` learns from labels"}.get(self.store.kind, "see --data.format responses")
            raise DataError(f"the data are of the kind {self.store.kind!r}: OREO needs responses with a reward; {remedy}")
        known = np.asarray(self.store.has_reward, bool)
        rows, held_out = (part[known[part]] for part in split_held_out(self.store, config.eval_fraction, self.run.seed))
        self.held_out = held_out[np.linspace(0, len(held_out) - 1, min(len(held_out), config.eval_rows), dtype=int)]  # from all files alike
        right = int(self.right(rows).sum())
        counts = {"rows": len(self.store), "without_reward": int((~known).sum()), "training": len(rows), "held_out": len(held_out)}
        self._counts = counts | {"right": right, "wrong": len(rows) - right, "held_out_used": len(self.held_out)}
        if not len(rows):
            raise DataError(f"there are no responses to learn from: {self._counts}")
        print("responses: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self._counts.items()))
        if not right or right == len(rows):
            print(f"WARNING: all training responses are {'right' if right else 'wrong'}: OREO learns from the difference")
        self.loader = OfflineLoader(self.store, config.batch_size, seed=self.run.seed, rows=rows, epochs=config.epochs)
        self.run = replace(self.run, steps=min(self.run.steps, self.loader.num_steps(config.epochs)))
        self._frozen_steps = ceil(config.algo.freeze_ratio * self.run.steps)
        self._used_rows = np.sort(np.concatenate([rows, self.held_out]))

    def critic_config(self) -> Any:
        """The critic's settings with its path resolved."""
        return replace(self.config.critic, path=local_path(self.config.critic.path or self.config.policy.path))

    # ---- actors and state ----------------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        return [Role("policy", self.config.policy.num_ranks), Role("critic", self.config.critic.num_ranks), *self.reference.roles()]

    def plan(self) -> list[tuple[str, str]]:
        config, algo, critic = self.config, self.config.algo, self.critic_config()
        kl = f"{algo.kl.kind} x {algo.kl.coef:g}" + (f", adapted to {algo.kl.target:g}" if algo.kl.target else "")
        return [
            ("optimiser steps", f"{config.epochs} epochs over the responses, {config.batch_size} a step"),
            ("loss", f"OREO, level {algo.level}, beta {algo.beta:g}, KL {kl}"),
            ("policy", describe_model(config.policy) + ("; not trained" if algo.critic_only else "")),
            ("critic", describe_model(critic)),
            ("reference", self.reference.describe()),
            ("memory of the weights", f"{estimate_memory(config.policy, trained=not algo.critic_only)}, {estimate_memory(critic, name='critic')}"),
        ]

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup

        stack.callback(self.loader.close)
        policy, critic, seed = replace(self.config.policy, path=self.model_path), self.critic_config(), self.run.seed
        trained = max(self.run.steps - self._frozen_steps, 1)
        self.policy, self.critic = (
            ModelGroup.start(config, role=role, placement=placement, seed=seed, total_steps=steps, timeout_s=config.timeout_s, wait=False)
            for config, role, steps in ((policy, "policy", None if self.config.algo.critic_only else trained), (critic, "critic", self.run.steps))
        )
        for group in (self.policy, self.critic):
            stack.callback(group.close)
        if self.config.algo.ema_decay and not self.config.algo.critic_only:
            self.policy.start_average(self.config.algo.ema_decay)
        self.reference.prepare(self.store, self._used_rows, self.folder / "reference")
        self.reference.build(self.policy, self._used_rows, placement, stack, seed=seed)
        self.critic.ready()
        write_json(self.folder / "data.json", self._counts)

    def order(self) -> dict[str, Any]:
        config = self.config
        return {"run.seed": self.run.seed, "batch_size": config.batch_size, "training responses": self.loader.identity,
                "reference.path": config.reference.path, "reference": self._reference_identity}  # fmt: skip

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl": self.kl.state_dict(), "frozen_steps": self._frozen_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if self.config.algo.kl.target and "log_coefficient" in state["kl"]:  # a fixed coefficient is what the flag says now
            self.kl.load_state_dict(state["kl"])
        if self.config.algo.freeze_ratio:  # of the steps that were planned at first: more epochs do not freeze the policy again
            self._frozen_steps = int(state.get("frozen_steps", self._frozen_steps))

    def export(self, folder: Path) -> None:
        """The policy into ``folder``, and the critic beside it into ``critic``, head included."""
        self.policy.export_hf(folder)
        self.critic.export_hf(folder.parent / "critic")
        write_json(folder.parent / "critic" / VALUE_NOTE, {"algorithm": "oreo", "level": self.config.algo.level})

    def save_workers(self, folder: Path) -> None:
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")
        self.critic.save_state(folder / "critic")
        self.critic.export_hf(folder / "critic_model")

    def load_workers(self, folder: Path) -> None:
        taken = self.policy.load_state(folder / "policy")
        if not self.config.algo.critic_only:
            self.policy.set_schedule(max(taken + self.run.steps - max(self.done, self._frozen_steps), 1), taken)
        self.critic.load_state(folder / "critic")


def _of_critic(metrics: Mapping[str, float]) -> dict[str, float]:
    """An update's metrics under the critic's names."""
    return {name.replace("train/", "critic/").replace("timing/", "timing/critic_"): value for name, value in metrics.items()}


__all__ = ["OREOAlgoConfig", "OREOConfig", "OREOKLConfig", "OREOTrainer", "OfflineReferenceConfig"]
