"""Kahneman-Tversky optimisation on single responses that are labelled desirable or undesirable (``core.losses_preference.kto_loss``).

The labels come from rewards, so the file that OREO learns from serves as it is. The reference is the policy at its start, or a model of its
own: its log-probs are computed once, before the first step, and kept in the run's folder. The reference point z0 is one number for the whole
batch of a step, found before its update, so the gradient does not depend on how the batch is cut. Prompt tokens are not scored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from openrl_reason.algorithms.common import check_reference, checked_tokenizer, describe_model, estimate_memory, local_path, update_metrics
from openrl_reason.algorithms.kto_config import KTOConfig, KTOLossConfig
from openrl_reason.algorithms.reference_scores import in_parts, kept_scores, reference_model, response_logprobs, score_responses
from openrl_reason.algorithms.trainer import Callback, Trainer
from openrl_reason.atomic import write_json
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.losses import kto_loss, kto_reference_point
from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.segments import segment_count
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline import OfflineLoader, build_store, split_held_out
from openrl_reason.data.token_store import TokenStore
from openrl_reason.errors import DataError
from openrl_reason.evaluation.identity import model_identity, weights_identity
from openrl_reason.workers.placement import Placement, Role

_Parts = Iterable[Sequence[Trajectory]]
BALANCE = (1.0, 4.0 / 3.0)
"""Range of (lambda_D x desirable) / (lambda_U x undesirable) that the paper recommends."""


# ---- the loss ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelLoss:
    """``kto_loss`` of one micro-batch with ``sequences["ref_logprobs"]`` and ``["desirable"]`` (0 or 1). ``denominators``: the step's "responses",
    and of them the "desirable" and "undesirable" ones, over which the two rewards are averaged."""

    loss: KTOLossConfig
    reference_point: float
    """z0 of the whole batch."""

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, Any]]:
        real = segment_count(batch.cu_seqlens, batch.action_mask) > 0  # a dummy, which is no response, would count as an undesirable one
        logprobs_B = response_logprobs(outputs.logprobs, batch)[real]
        loss, metrics = kto_loss(
            logprobs_B, batch.sequences["ref_logprobs"][real], batch.sequences["desirable"][real] > 0, beta=self.loss.beta,
            reference_point=self.reference_point, desirable_weight=self.loss.desirable_weight,
            undesirable_weight=self.loss.undesirable_weight, denominator=denominators["responses"],
        )  # fmt: skip
        metrics["train/loss"] = metrics.pop("kto_loss")
        return loss, per_label(metrics, denominators)


def per_label(metrics: Mapping[str, Any], denominators: Mapping[str, float]) -> dict[str, Any]:
    """``kto_loss``'s metrics with each reward as a mean over the responses of its label; NaN where there are none."""
    found = dict(metrics)
    for label in ("desirable", "undesirable"):
        found[f"kto/reward_{label}"] = metrics[f"kto/reward_{label}"] * denominators["responses"] / (denominators[label] or float("nan"))
    return found


def counts_of(desirable: np.ndarray) -> dict[str, float]:
    """The denominators of a batch, from its labels (bool [B])."""
    return {"responses": float(len(desirable)), "desirable": float(desirable.sum()), "undesirable": float((~desirable).sum())}


def describe_balance(num_desirable: int, num_undesirable: int, loss: KTOLossConfig) -> str:
    """One line on (lambda_D n_D) / (lambda_U n_U), and outside of the paper's range which weight would bring it there."""
    low, high = BALANCE
    desirable, undesirable = loss.desirable_weight * num_desirable, loss.undesirable_weight * num_undesirable
    ratio = desirable / undesirable if undesirable else float("inf")
    line = f"labels: {num_desirable} desirable, {num_undesirable} undesirable; weighted by lambda they are {ratio:.3g} to 1"
    if low - 1e-9 <= ratio <= high + 1e-9:
        return line
    if ratio < low:
        name, ends = "desirable_weight", [undesirable * edge / num_desirable for edge in BALANCE]
    else:
        name, ends = "undesirable_weight", [desirable / (edge * num_undesirable) for edge in reversed(BALANCE)]
    return f"{line}. WARNING: the paper recommends 1 to 1.33: use --loss.{name} between {ends[0]:.3g} and {ends[1]:.3g}"


def labels_of(store: TokenStore, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(whether a label is known, whether it is desirable), bool [rows]. Raises DataError for rows that have neither rewards nor labels."""
    if store.kind in ("pairs", "labels"):
        known = np.ones(len(store), bool) if store.kind == "pairs" else np.asarray(store.has_reward, bool)
        return known, np.asarray(store.labels, bool)
    if store.kind != "responses":
        raise DataError(f"the data are of the kind {store.kind!r}: KTO needs rewarded responses, labels or pairs (--data.format)")
    return np.asarray(store.has_reward, bool), np.asarray(store.rewards, np.float32) >= np.float32(threshold)


# ---- responses to other questions, from which z0 is estimated ----------------------------------------------------------------------------


def other_questions(rows: np.ndarray, candidates: np.ndarray, questions: np.ndarray, seed: int) -> np.ndarray:
    """For each of ``rows`` one of ``candidates``, drawn evenly from those of other questions. ``questions``: of all rows of the store.

    Fixed for a run, so that the reference scores each mixture once. Raises ConfigError if there is no other question.
    """
    order = candidates[np.argsort(questions[candidates], kind="stable")]
    sorted_questions = questions[order]
    starts = np.searchsorted(sorted_questions, questions[rows], side="left")
    ends = np.searchsorted(sorted_questions, questions[rows], side="right")
    choices = len(order) - (ends - starts)
    remedy = "needs responses to two questions at least, and all are to one: use batch or zero"
    require(bool((choices > 0).all()), "loss.z0", "mismatched", remedy)
    drawn = np.random.default_rng(derive_seed(seed, "kto mismatched")).integers(0, choices)
    return order[(ends + drawn) % len(order)]


def mismatched(row: Trajectory, other: Trajectory, max_length: int) -> Trajectory:
    """The prompt of ``row`` with the response of ``other``, whose end is cut off at ``max_length`` tokens."""
    start = other.num_prompt_tokens
    prompt, room = row.prompt_ids, max_length - row.num_prompt_tokens
    outside = np.zeros(len(prompt), bool)
    return replace(
        other, trajectory_id=content_id("mismatched", row.trajectory_id, other.trajectory_id), task_id=row.task_id, group_id=row.group_id, info={},
        token_ids=np.concatenate([prompt, other.response_ids[:room]]),
        action_mask=np.concatenate([outside, other.action_mask[start:][:room]]),
        step_ids=np.concatenate([np.full(len(prompt), -1), other.step_ids[start:][:room]]),
        behaviour_logprobs=np.full(len(prompt) + len(other.response_ids[:room]), np.nan),
    )  # fmt: skip


# ---- the run -----------------------------------------------------------------------------------------------------------------------------


class KTOTrainer(Trainer):
    """Trains a policy on labelled responses.

    Args:
        config: all settings.
        store: replaces the data that ``config.data`` names (its sequences must be no longer than ``config.data.max_length``).
        callbacks: called after each step with (finished steps, metrics).
    """

    headline: ClassVar = ("train/loss", "kto/reward_margin", "kto/kl", "train/grad_norm", "train/lr", "timing/step")
    curves: ClassVar = ("train/loss", "kto/reward_desirable", "kto/reward_undesirable", "kto/kl", "train/grad_norm", "train/lr")

    def __init__(self, config: KTOConfig, *, store: TokenStore | None = None, callbacks: Sequence[Callback] = ()) -> None:
        super().__init__(config, callbacks)
        require(store is not None or bool(config.data.path), "data.path", "", "there are no responses: name a file of them")
        self._given = store

    def step(self) -> dict[str, float]:
        """One optimiser step on the next ``batch_size`` responses."""
        started, rows = time.perf_counter(), np.asarray(self.loader.rows(self.done))
        trajectories = self.loader.trajectories(self.done)
        batch = TokenBatch.from_trajectories(trajectories).with_sequences(
            ref_logprobs=self.reference["logprobs"][rows], desirable=torch.from_numpy(self.desirable[rows].astype(np.float32))
        )
        reading = time.perf_counter() - started
        kl = self._kl(rows, [trajectories])
        waiting = time.perf_counter() - started - reading
        loss = LabelLoss(self.config.loss, kl or 0.0)
        update = self.policy.update(batch, loss, counts_of(self.desirable[rows]), temperature=self.config.loss.temperature)
        metrics = update_metrics([update])
        metrics["kto/reward_margin"] = metrics["kto/reward_desirable"] - metrics["kto/reward_undesirable"]
        if kl is not None:
            metrics |= {"kto/kl": kl, "timing/reference_point": waiting}
        metrics["perf/tokens_per_second"] = batch.num_tokens / (time.perf_counter() - started)
        metrics["train/tokens"] = float(batch.num_tokens)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """The loss and its metrics on the held-out responses, with their own reference point."""
        rows, loss = self.held_out, self.config.loss
        if not len(rows):
            return {}
        logprobs = self._score(self._read(rows))
        kl = self._kl(rows, self._read(rows), logprobs)
        value, metrics = kto_loss(
            logprobs, self.reference["logprobs"][rows], torch.from_numpy(self.desirable[rows]), beta=loss.beta, reference_point=kl or 0.0,
            desirable_weight=loss.desirable_weight, undesirable_weight=loss.undesirable_weight,
        )  # fmt: skip
        found = {name.replace("kto/", "eval/"): float(value) for name, value in per_label(metrics, counts_of(self.desirable[rows])).items()}
        found["eval/reward_margin"] = found["eval/reward_desirable"] - found["eval/reward_undesirable"]
        found["eval/loss"] = found.pop("kto_loss")
        return found if kl is None else found | {"eval/kl": kl}

    def _kl(self, rows: np.ndarray, parts: _Parts, logprobs: torch.Tensor | None = None) -> float | None:
        """The estimate of KL(policy || reference) for these rows, whose trajectories are ``parts``; None without one (z0 is 0)."""
        if self.config.loss.z0 == "zero":
            return None
        if self.config.loss.z0 == "batch":
            own = self._score(parts) if logprobs is None else logprobs
            return float(kto_reference_point(own, self.reference["logprobs"][rows]))
        mixed = self._score(self._mismatched_parts(rows, parts))
        return float(kto_reference_point(mixed, self.reference["mismatched"][rows]))

    def _score(self, parts: _Parts, *, group: Any = None, adapters: bool = True) -> torch.Tensor:
        return score_responses(group or self.policy, parts, temperature=self.config.loss.temperature, adapters=adapters)

    def _read(self, rows: np.ndarray) -> _Parts:
        return (self.store.trajectories(part) for part in in_parts(rows))

    def _mismatched_parts(self, rows: np.ndarray, parts: _Parts) -> Iterator[list[Trajectory]]:
        """The mixtures of ``rows``, whose trajectories are ``parts``, with the responses of their partners."""
        first = 0
        for part in parts:
            others = self.store.trajectories(self.partners[rows[first : first + len(part)]])
            yield [mismatched(row, other, self.config.data.max_length) for row, other in zip(part, others, strict=True)]
            first += len(part)

    # ---- data and reference --------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        config = self.config
        self.model_path = local_path(config.policy.path)
        self._reference_identity = weights_identity(local_path(config.reference_path) if config.reference_path else self.model_path)
        trust = config.policy.trust_remote_code
        tokenizer = checked_tokenizer(self.model_path, config.data.max_length, flag="data.max_length", trust_remote_code=trust)
        if config.reference_path:
            check_reference(local_path(config.reference_path), tokenizer, config.data.max_length, flag="reference_path", trust_remote_code=trust)
        self.store = self._given
        if self.store is None:
            self.store = build_store(config.data, self.model_path, self.folder / "data", trust_remote_code=trust)
        longest = int(self.store.lengths.max(initial=0))
        require(longest <= config.data.max_length, "data.max_length", config.data.max_length, f"the longest response given has {longest} tokens")
        known, self.desirable = labels_of(self.store, config.label_threshold)
        self.rows, self.held_out = (part[known[part]] for part in split_held_out(self.store, config.eval_fraction, self.run.seed))
        self._count(int((~known).sum()))
        self.partners = np.full(len(self.store), -1)
        if config.loss.z0 == "mismatched":
            self._draw_partners()
        self.loader = OfflineLoader(self.store, config.batch_size, seed=self.run.seed, rows=self.rows, epochs=config.epochs)
        self.run = replace(self.run, steps=min(self.run.steps, self.loader.num_steps(config.epochs)))

    def _count(self, num_unknown: int) -> None:
        """Says what the labels are. Raises DataError if they are all alike, which a threshold at the wrong place makes them."""
        config, labels, rewards = self.config, self.desirable[self.rows], self.store.rewards[self.rows]
        good, bad = int(labels.sum()), int((~labels).sum())
        self._counts = {
            "rows": len(self.store), "without_reward": num_unknown, "training": len(self.rows), "held_out": len(self.held_out),
            "desirable": good, "undesirable": bad,
        }  # fmt: skip
        if num_unknown:
            print(f"{num_unknown} of {len(self.store)} responses have no reward (see --data.truncated_reward): left out")
        if not good or not bad:
            which = f"{'un' if good == 0 else ''}desirable" if good + bad else "left out"
            span = f" (rewards from {rewards.min():g} to {rewards.max():g}, --label_threshold {config.label_threshold:g})" if len(rewards) else ""
            raise DataError(f"all {good + bad} training responses are {which}{span}: KTO learns from both labels")
        print(describe_balance(good, bad, config.loss))

    def _draw_partners(self) -> None:
        """Which training response stands in for each row's own in the estimate of z0, and how many of these are cut."""
        store, limit = self.store, self.config.data.max_length
        for part in (self.rows, self.held_out):
            self.partners[part] = other_questions(part, self.rows, store.questions, self.run.seed)
        rows = np.concatenate([self.rows, self.held_out])
        others = self.partners[rows]
        num_cut = int((store.prompt_lengths[rows] + store.lengths[others] - store.prompt_lengths[others] > limit).sum())
        self._counts["mixtures_cut"] = num_cut
        if num_cut:
            print(f"{num_cut} of {len(rows)} responses are cut to --data.max_length {limit} behind another question's prompt (for z0 alone)")

    def read_or_score_reference(self, placement: Placement | None = None) -> dict[str, torch.Tensor]:
        """float32 [rows of the store], NaN for unused rows: "logprobs" of the responses under the reference and, with z0 mismatched,
        "mismatched" of the mixtures. Computed before the first step, and kept on disk."""
        rows, path = np.sort(np.concatenate([self.rows, self.held_out])), self.config.reference_path and local_path(self.config.reference_path)

        def compute() -> dict[str, torch.Tensor]:
            with reference_model(self.policy, self.config.policy, path, placement, self.run.seed) as (group, adapters):
                found = {"logprobs": self._score(self._read(rows), group=group, adapters=adapters)}
                if self.config.loss.z0 == "mismatched":
                    found["mismatched"] = self._score(self._mismatched_parts(rows, self._read(rows)), group=group, adapters=adapters)
            return found

        about = (str(self.config.loss.temperature), str(self.config.data.max_length), rows.tobytes().hex(), self.partners.tobytes().hex())
        model = model_identity(path or self.model_path, whole=True)
        identity = content_id(str(model), self.config.policy.dtype, self.store.identity, *about)
        kept = kept_scores(self.folder / "reference.safetensors", identity, compute, reuse=self.run.resume)
        scattered = {name: torch.full((len(self.store),), float("nan")) for name in kept}
        for name, scores in kept.items():
            scattered[name][rows] = scores
        return scattered

    # ---- actors and state ----------------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        ranks = self.config.policy.num_ranks
        return [Role("policy", ranks), *([Role("reference", ranks)] if self.config.reference_path else [])]

    def plan(self) -> list[tuple[str, str]]:
        config, loss = self.config, self.config.loss
        return [
            ("optimiser steps", f"{config.epochs} epochs over the responses, {config.batch_size} a step"),
            ("loss", f"KTO, beta {loss.beta:g}, lambda {loss.desirable_weight:g} and {loss.undesirable_weight:g}, z0 {loss.z0}"),
            ("reference", config.reference_path or "the start of the policy"),
            ("policy", describe_model(config.policy)),
            ("memory of the weights", estimate_memory(config.policy)),
        ]

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup

        stack.callback(self.loader.close)
        policy = replace(self.config.policy, path=self.model_path)
        self.policy = ModelGroup.start(
            policy, role="policy", placement=placement, seed=self.run.seed, total_steps=self.run.steps, timeout_s=policy.timeout_s
        )
        stack.callback(self.policy.close)
        self.reference = self.read_or_score_reference(placement)  # before a checkpoint is loaded: the policy is at its start
        write_json(self.folder / "labels.json", self._counts)

    def order(self) -> dict[str, Any]:
        own = {"run.seed": self.run.seed, "batch_size": self.config.batch_size, "training responses": self.loader.identity}
        return own | {
            "loss.temperature": self.config.loss.temperature,
            "loss.z0": self.config.loss.z0,
            "label_threshold": self.config.label_threshold,
            "reference_path": self.config.reference_path,
            "reference": self._reference_identity,
        }

    def export(self, folder: Path) -> None:
        self.policy.export_hf(folder)

    def save_workers(self, folder: Path) -> None:
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")

    def load_workers(self, folder: Path) -> None:
        self.policy.load_state(folder / "policy")


__all__ = ["KTOConfig", "KTOLossConfig", "KTOTrainer", "LabelLoss"]
