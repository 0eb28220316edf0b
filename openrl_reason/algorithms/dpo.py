"""Direct preference optimisation, DPO-Positive and IPO on pairs of responses (``core.losses_preference.dpo_loss`` has the formulas).

Pairs come from a file, from rewarded samples on disk, or from responses that this command samples first (its engines are closed before
training). The reference is the policy at its start, or a model of its own: the log-probs of all responses under it are computed once, before
the first step, and kept in the run's folder, so that no second model is there while the policy trains. Prompt tokens are not scored.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from openrl_reason.algorithms.collect import Collector, logged_places, readable
from openrl_reason.algorithms.common import (
    ItemSampler,
    check_reference,
    checked_tokenizer,
    describe_model,
    estimate_memory,
    local_path,
    update_metrics,
)
from openrl_reason.algorithms.dpo_config import DPOConfig, DPOLossConfig
from openrl_reason.algorithms.reference_scores import SEQUENCES_PER_CALL, in_parts, kept_scores, reference_model, response_logprobs, score_responses
from openrl_reason.algorithms.samples import BLOCKS, SampleBlocks
from openrl_reason.algorithms.sampling import rewarded_engines, with_stops_of
from openrl_reason.algorithms.trainer import Callback, Trainer
from openrl_reason.atomic import write_json
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.losses import dpo_loss
from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline import build_store
from openrl_reason.data.pair_store import pair_store
from openrl_reason.data.pairs import Pair, PairBuilder, PairData, pair_samples, read_pairs
from openrl_reason.errors import DataError
from openrl_reason.evaluation.identity import model_identity, weights_identity
from openrl_reason.rewards.build import check_sources
from openrl_reason.rewards.config import describe_rewards
from openrl_reason.tasks.base import Task, load_task
from openrl_reason.workers.placement import Placement, Role

SHORT_RESPONSE = 8
"""Tokens. If not even so short a response fits behind any prompt, sampling would be for nothing."""


# ---- the loss ----------------------------------------------------------------------------------------------------------------------------


def pair_batch(pairs: Sequence[Pair], reference: Mapping[str, float]) -> TokenBatch:
    """The pairs as sequences: chosen, rejected, chosen, rejected, ... with ``sequences["ref_logprobs"]`` [2P] from ``reference``."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    ref_logprobs = torch.tensor([reference[side.trajectory_id] for side in sides], dtype=torch.float32)
    return TokenBatch.from_trajectories(sides).with_sequences(ref_logprobs=ref_logprobs)


def check_room(prompt_lengths: Sequence[int], max_length: int, max_new_tokens: int) -> None:
    """Says how many prompts leave less than ``max_new_tokens`` within ``max_length``. Refuses, before hours of sampling, what can give no pair."""
    short, least = min(SHORT_RESPONSE, max_new_tokens), min(prompt_lengths)
    remedy = (
        f"the shortest of {len(prompt_lengths)} training prompts has {least} tokens, so no response of even {short} tokens would fit, and no pair:"
        f" use {least + max_new_tokens} or more (the longest prompt and a full response take {max(prompt_lengths) + max_new_tokens})"
    )
    require(least + short <= max_length, "max_length", max_length, remedy)
    tight = sum(length + max_new_tokens > max_length for length in prompt_lengths)
    if tight:
        print(
            f"{tight} of {len(prompt_lengths)} training prompts leave less than --sampling.max_new_tokens {max_new_tokens} tokens within"
            f" --max_length {max_length}: longer responses to them will be left out as too long"
        )


@dataclass(frozen=True)
class PairLoss:
    """``dpo_loss`` of one micro-batch, whose sequences are chosen, rejected, chosen, rejected, ...; ``denominators["pairs"]``: of the step."""

    loss: DPOLossConfig

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, Any]]:
        num_pairs = batch.num_sequences // 2  # none in a dummy, which is one sequence without actions
        logprobs_B = response_logprobs(outputs.logprobs, batch, mean=self.loss.mean_logprobs)
        pairs = logprobs_B[: 2 * num_pairs].view(num_pairs, 2)
        ref_pairs = batch.sequences["ref_logprobs"][: 2 * num_pairs].view(num_pairs, 2)
        loss, metrics = dpo_loss(
            pairs[:, 0], pairs[:, 1], ref_pairs[:, 0], ref_pairs[:, 1], beta=self.loss.beta, label_smoothing=self.loss.label_smoothing,
            kind=self.loss.kind, positive_weight=self.loss.positive_weight, denominator=denominators["pairs"],
        )  # fmt: skip
        return loss, {"train/loss" if name == "dpo_loss" else name: value for name, value in metrics.items()}


# ---- the run -----------------------------------------------------------------------------------------------------------------------------


class DPOTrainer(Trainer):
    """Trains a policy on preference pairs.

    Args:
        config: all settings.
        pairs: replaces the sources that ``config`` names.
        task: replaces the task that ``config.task`` names (with ``config.sample``).
        reward_function: replaces ``config.reward`` (with ``config.sample``).
        callbacks: called after each step with (finished steps, metrics).
    """

    headline: ClassVar = ("train/loss", "dpo/accuracy", "dpo/reward_margin", "train/grad_norm", "train/lr", "timing/step")
    curves: ClassVar = ("train/loss", "dpo/accuracy", "dpo/reward_margin", "dpo/chosen_shortfall", "train/grad_norm", "train/lr")
    traces: ClassVar = (*Trainer.traces, f"samples/{BLOCKS}")

    def __init__(
        self,
        config: DPOConfig,
        *,
        pairs: Sequence[Pair] | None = None,
        task: Task | None = None,
        reward_function: Callable[..., Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, callbacks)
        self._given, self._task, self._reward_function = pairs, task, reward_function
        source = pairs is not None or config.pairs.path or config.pairs.trajectories or config.data.path or config.sample
        remedy = "there are no pairs: name a file, rewarded samples (--pairs.trajectories, --data.path), or use --sample true"
        require(bool(source), "pairs.path", "", remedy)

    def step(self) -> dict[str, float]:
        """One optimiser step on the next ``batch_size`` pairs."""
        started, size = time.perf_counter(), self.config.batch_size
        left = self.config.epochs * len(self.train_pairs) - self.done * size  # the last batch of all may be smaller
        pairs = self.sampler.items(self.done, size)[:left]
        batch = pair_batch(pairs, self.reference)
        update = self.policy.update(
            batch, PairLoss(self.config.loss), {"pairs": float(len(pairs))}, temperature=self.config.loss.temperature, units=[2] * len(pairs)
        )
        metrics = update_metrics([update])
        metrics["perf/tokens_per_second"] = batch.num_tokens / (time.perf_counter() - started)
        metrics["train/tokens"] = float(batch.num_tokens)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """The loss and its metrics on the held-out pairs."""
        if not self.held_out:
            return {}
        sides = {side.trajectory_id: side for pair in self.held_out for side in (pair.chosen, pair.rejected)}
        logprobs, loss = self._score(list(sides.values())), self.config.loss
        columns = [
            torch.tensor([source[getattr(pair, side).trajectory_id] for pair in self.held_out])
            for source in (logprobs, self.reference) for side in ("chosen", "rejected")
        ]  # fmt: skip
        value, metrics = dpo_loss(
            *columns, beta=loss.beta, label_smoothing=loss.label_smoothing, kind=loss.kind, positive_weight=loss.positive_weight
        )
        return {"eval/loss": float(value)} | {name.replace("dpo/", "eval/"): float(found) for name, found in metrics.items() if "/" in name}

    def _score(self, trajectories: Sequence[Trajectory], *, group: Any = None, adapters: bool = True) -> dict[str, float]:
        """Summed (or mean) log-prob of each response under the present weights (of another ``group``, if one is given), by trajectory id."""
        loss, parts = self.config.loss, in_parts(trajectories)
        scores = score_responses(group or self.policy, parts, temperature=loss.temperature, mean=loss.mean_logprobs, adapters=adapters)
        return dict(zip((t.trajectory_id for t in trajectories), scores.tolist(), strict=True))

    # ---- pairs ---------------------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        config = self.config
        self.model_path = local_path(config.policy.path)
        self._reference_identity = weights_identity(local_path(config.reference_path) if config.reference_path else self.model_path)
        length, flag = (config.rollout.max_model_len, "rollout.max_model_len") if config.sample else (config.max_length, "max_length")
        self.tokenizer = checked_tokenizer(self.model_path, length, flag=flag, trust_remote_code=config.policy.trust_remote_code)
        if config.reference_path:
            reference, trust = local_path(config.reference_path), config.policy.trust_remote_code
            check_reference(reference, self.tokenizer, length, flag="reference_path", trust_remote_code=trust)
        if config.sample and self._given is None:
            self.task = self._task or load_task(config.task)
            if self.run.dry_run and not self._reward_function:
                check_sources(config.reward)
            self.sampling = with_stops_of(self.task, config.sampling)
            limit = config.rollout.max_model_len - config.sampling.max_new_tokens
            prompts = self.task.encode_prompts(self.task.items("train"), self.tokenizer, limit)
            self.items = prompts.items
            if prompts.num_too_long:
                print(f"{prompts.num_too_long} training prompts leave no room for a full response within --rollout.max_model_len: left out")
            check_room([len(ids) for ids in prompts.prompt_ids], config.max_length, config.sampling.max_new_tokens)
        elif self._given is not None:
            kept = [pair for pair in self._given if max(pair.chosen.num_tokens, pair.rejected.num_tokens) <= config.max_length]
            self._use(PairData(kept, Counter(given=len(self._given), pairs=len(kept), too_long=len(self._given) - len(kept))))
        elif config.pairs.path:
            self._use(read_pairs(config.pairs, self.tokenizer, max_length=config.max_length))
        elif config.data.path:
            data = replace(config.data, max_length=config.max_length)
            store = build_store(data, self.model_path, self.folder / "data", trust_remote_code=config.policy.trust_remote_code)
            self._use(pair_store(store, self._builder()))
        else:
            self._use(pair_samples(config.pairs.trajectories, self._builder()))

    def _builder(self) -> PairBuilder:
        own = self.config.pairs
        return PairBuilder(
            threshold=own.threshold, max_per_question=own.max_pairs_per_question, seed=self.run.seed, max_length=self.config.max_length,
            accept_truncated=own.accept_truncated, dedup=own.dedup,
        )  # fmt: skip

    def _use(self, data: PairData) -> None:
        """Splits the pairs into training and held-out ones, tells what was left out, and fixes the number of steps."""
        config = self.config
        print(f"pairs: {data.describe() or 'none'}")
        if not data.pairs:
            raise DataError(
                f"there are no pairs to learn from ({data.describe()}): see --pairs.threshold {config.pairs.threshold:g}, --max_length"
                f" {config.max_length}, or sample more responses to a question"
            )
        self.train_pairs, self.held_out = list(data.pairs), []
        if config.eval_path:
            held_out = read_pairs(replace(config.pairs, path=config.eval_path, trajectories=()), self.tokenizer, max_length=config.max_length)
            print(f"held-out pairs: {held_out.describe()}")
            self.held_out = held_out.pairs
        elif config.eval_fraction:
            names = list(dict.fromkeys(pair.task_id for pair in data.pairs))
            count = min(round(config.eval_fraction * len(names)), len(names) - 1)
            order = np.random.default_rng(derive_seed(self.run.seed, "held-out questions")).permutation(len(names))
            chosen = {names[place] for place in order[:count]}
            self.train_pairs = [pair for pair in data.pairs if pair.task_id not in chosen]
            self.held_out = [pair for pair in data.pairs if pair.task_id in chosen]
            print(f"held out: {len(self.held_out)} pairs of {count} of {len(names)} questions")
        self._counts = dict(data.counts) | {"training_pairs": len(self.train_pairs), "held_out_pairs": len(self.held_out)}
        names_of_pairs = [pair.pair_id for pair in self.train_pairs]
        self._pairs_identity = f"{len(names_of_pairs)} pairs ({content_id(*names_of_pairs)})"
        self.sampler = ItemSampler(self.train_pairs, self.run.seed)
        self.run = replace(self.run, steps=min(self.run.steps, -(-config.epochs * len(self.train_pairs) // config.batch_size)))

    def sample_pairs(self, placement: Placement) -> None:
        """Responses of the policy to the training questions, from disk as far as they are there; then their pairs."""
        config = self.config
        blocks = SampleBlocks(
            self.folder / "samples", self.items, config.samples_per_prompt, self.sampling, (self.run.seed, "dpo"), config.prompts_per_block,
            content_id(self.model_path, *(item.task_id for item in self.items)),
        )  # fmt: skip
        blocks.begin(keep=self.run.resume)
        if blocks.missing:
            with rewarded_engines(
                config, self.model_path, task=self.task, tokenizer=self.tokenizer, placement=placement, seed=self.run.seed,
                reward_function=self._reward_function,
            ) as (pool, rewarder):  # fmt: skip
                blocks.sample(Collector(self.task, self.tokenizer, pool, rewarder), config.reward.max_failed_rate)
        builder, spanning = self._builder(), blocks.spanning()
        for block in blocks.read_blocks():
            builder.add(block.trajectories)
            builder.close(spanning)
        self._use(builder.finish())
        self._blocks = blocks

    # ---- the reference -------------------------------------------------------------------------------------------------------------------

    def read_or_score_reference(self, placement: Placement | None = None) -> dict[str, float]:
        """Log-prob of every response under the reference, by trajectory id. Computed before the first step, and kept on disk."""
        everything = [side for pair in (*self.train_pairs, *self.held_out) for side in (pair.chosen, pair.rejected)]
        sides = {side.trajectory_id: side for side in everything}
        loss, policy, path = self.config.loss, self.config.policy, self.config.reference_path and local_path(self.config.reference_path)
        model = str(model_identity(path or self.model_path, whole=True))
        identity = content_id(model, policy.dtype, str(loss.temperature), str(loss.mean_logprobs), *sides)

        def compute() -> dict[str, torch.Tensor]:
            with reference_model(self.policy, policy, path, placement, self.run.seed) as (group, adapters):
                scores = self._score(list(sides.values()), group=group, adapters=adapters)
            return {"logprobs": torch.tensor(list(scores.values()), dtype=torch.float32)}

        kept = kept_scores(self.folder / "reference.safetensors", identity, compute, reuse=self.run.resume)
        return dict(zip(sides, kept["logprobs"].tolist(), strict=True))

    # ---- actors and state ----------------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        config = self.config
        engines = [Role("engine", config.rollout.num_engines, gpus_per_actor=config.rollout.tensor_parallel)] if config.sample else []
        reference = [Role("reference", config.policy.num_ranks)] if config.reference_path else []
        return [Role("policy", config.policy.num_ranks), *reference, *engines]

    def plan(self) -> list[tuple[str, str]]:
        config, loss, engines = self.config, self.config.loss, self.config.rollout
        positive = f", positive weight {loss.positive_weight:g}" if loss.positive_weight else ""
        rows = [
            ("optimiser steps", f"{config.epochs} epochs over the pairs, {config.batch_size} pairs a step"),
            ("loss", f"{loss.kind}, beta {loss.beta:g}{positive}"),
            ("reference", config.reference_path or "the start of the policy"),
            ("policy", describe_model(config.policy)),
            ("memory of the weights", estimate_memory(config.policy, engines=engines if config.sample else None)),
        ]
        if config.sample:
            rows[:0] = [
                ("samples", f"{config.samples_per_prompt} to each training question, of <= {config.sampling.max_new_tokens} tokens"),
                ("reward", "a Python function" if self._reward_function else describe_rewards(config.reward)),
                ("engines", f"{engines.num_engines} x {engines.dtype}, closed before training"),
            ]
        return rows

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup

        self._blocks = None
        if self.config.sample and self._given is None:
            self.sample_pairs(placement)
        write_json(self.folder / "pairs.json", self._counts)
        policy = replace(self.config.policy, path=self.model_path)
        self.policy = ModelGroup.start(
            policy, role="policy", placement=placement, seed=self.run.seed, total_steps=self.run.steps, timeout_s=policy.timeout_s
        )
        stack.callback(self.policy.close)
        self.reference = self.read_or_score_reference(placement)  # before a checkpoint is loaded: the policy is at its start

    def start(self) -> None:
        super().start()
        if self._blocks is not None and self.done == 0:
            self._log_samples(self._blocks)
        self._blocks = None

    def _log_samples(self, blocks: SampleBlocks) -> None:
        """Writes ``run.log_rollouts`` of the samples to the log, reading again the blocks that they are in."""
        size = blocks.num_samples
        groups = [str(place) for place in range(len(blocks.items)) for _ in range(size)]  # siblings by item: ids need not be read for this
        wanted, tokenizer = logged_places(groups, self.run.log_rollouts), self.tokenizer if self.run.log_rollout_tokens else None
        records: list[dict[str, Any]] = []
        for number in range(len(blocks.files)):
            first = number * blocks.items_per_block * size
            own = [place - first for place in wanted if first <= place < first + len(blocks.block_items(number)) * size]
            if own:
                records += readable(blocks.read_block(number).take(own), 0, -1, tokenizer=tokenizer)
            if len(records) >= SEQUENCES_PER_CALL:
                self.log.rollouts(records)
                records = []
        self.log.rollouts(records)  # all at once if they are few: a tracker makes a table of each call, and the last one stands

    def order(self) -> dict[str, Any]:
        own = {
            "run.seed": self.run.seed,
            "batch_size": self.config.batch_size,
            "training pairs": self._pairs_identity,
            "reference_path": self.config.reference_path,
            "reference": self._reference_identity,
        }
        return own | {"loss.temperature": self.config.loss.temperature, "loss.mean_logprobs": self.config.loss.mean_logprobs}

    def export(self, folder: Path) -> None:
        self.policy.export_hf(folder)

    def save_workers(self, folder: Path) -> None:
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")

    def load_workers(self, folder: Path) -> None:
        self.policy.load_state(folder / "policy")
