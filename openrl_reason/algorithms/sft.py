"""Supervised fine-tuning: maximise the log-probability of reference solutions; prompt tokens are never scored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from openrl_reason.algorithms.common import (
    ItemSampler,
    checked_tokenizer,
    describe_model,
    estimate_memory,
    local_path,
    update_metrics,
    within_limit,
)
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.rejection import choose_rows, describe, has_rewards, offline_data
from openrl_reason.algorithms.trainer import NO_LIMIT, Callback, RunConfig, Trainer
from openrl_reason.atomic import write_json
from openrl_reason.config import require
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.losses import sft_loss
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.offline import OfflineLoader, build_store
from openrl_reason.data.sft import SFTDataConfig, load_sft_trajectories
from openrl_reason.errors import DataError
from openrl_reason.tasks.base import Task, TaskConfig, load_task
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import Placement, PlacementConfig, Role


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on a task's solutions or on a file."""

    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/sft"))
    """The run as a whole."""
    batch_size: int = 64
    """Sequences of one optimiser step, over all ranks."""
    epochs: int = 0
    """Passes over the training sequences, in place of run.steps (0: run.steps decides). The last step may be smaller."""
    max_length: int = 1024
    """Longest sequence in tokens, prompt and solution; longer ones are counted and left out."""
    loss_reduction: str = "token"
    """token (global token mean), sequence (mean of each sequence, then over the batch) or batch (sum of tokens / number of sequences)."""
    eval_items: int = 128
    """Held-out items for the evaluation loss (0: none)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Solutions come from this task's training split, unless data.path is set."""
    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    """Rows of a file instead of a task; of rewarded responses the right ones (rejection sampling)."""
    policy: TrainedModelConfig = field(default_factory=lambda: TrainedModelConfig(lr=1e-5))
    """The model that learns."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 0, "epochs", self.epochs, "0 for run.steps steps, or a number of passes")
        require(self.loss_reduction in ("token", "sequence", "batch"), "loss_reduction", self.loss_reduction, "use token, sequence or batch")
        require(self.eval_items >= 0, "eval_items", self.eval_items, "use 0 for none, or a number of items")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")
        agrees = self.data.max_length in (SFTDataConfig.max_length, self.max_length)
        require(agrees, "data.max_length", self.data.max_length, f"--max_length (here {self.max_length}) limits sequences in this command: set that")
        require(
            self.batch_size >= self.policy.num_ranks,
            "batch_size",
            self.batch_size,
            f"at least one sequence for each of policy.num_ranks {self.policy.num_ranks}",
        )


@dataclass(frozen=True)
class SupervisedLoss:
    """Negative log-likelihood of one micro-batch under the global batch's weights and denominator."""

    def __call__(self, outputs: Any, batch: TokenBatch, denominators: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, metrics = sft_loss(outputs.logprobs, batch.action_mask, token_weights=batch.tokens["loss_weights"], denominator=denominators["loss"])
        return loss, {f"train/{name}": value for name, value in metrics.items()} | {"train/loss": loss.detach()}


class SFTTrainer(Trainer):
    """Fine-tunes a policy on solutions. ``trajectories`` replaces the task and file: any token-id records with an action mask."""

    headline: ClassVar = ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_second", "timing/step")
    curves: ClassVar = ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_second")

    def __init__(
        self,
        config: SFTConfig,
        *,
        task: Task | None = None,
        trajectories: Sequence[Trajectory] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, callbacks)
        self._task, self._given = task, trajectories
        if config.epochs:
            self.run = replace(self.run, steps=NO_LIMIT)  # until the data are read

    def step(self) -> dict[str, float]:
        """One optimiser step on the next ``batch_size`` sequences."""
        started = time.perf_counter()
        batch = TokenBatch.from_trajectories(self._next_sequences())
        weights, denominator = loss_weights(batch, self.config.loss_reduction)
        metrics = update_metrics([self.policy.update(batch.with_tokens(loss_weights=weights), SupervisedLoss(), {"loss": denominator})])
        metrics["perf/tokens_per_second"] = batch.num_tokens / (time.perf_counter() - started)
        metrics["train/tokens"] = float(batch.num_tokens)
        return metrics

    def _next_sequences(self) -> list[Trajectory]:
        if isinstance(self.sampler, OfflineLoader):
            return self.sampler.trajectories(self.done)
        size = self.config.batch_size
        left = self.config.epochs * self._num_sequences - self.done * size if self.config.epochs else size
        return self.sampler.items(self.done, size)[:left]

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood per solution token on held-out items."""
        if not self.held_out:
            return {}
        batch = TokenBatch.from_trajectories(self.held_out)
        logprobs = self.policy.logprobs(batch)["logprobs"]
        return {"eval/loss": -float(logprobs[batch.action_mask].double().mean())}

    def roles(self) -> list[Role]:
        return [Role("policy", self.config.policy.num_ranks)]

    def plan(self) -> list[tuple[str, str]]:
        config = self.config
        duration = f"{config.epochs} epochs in steps" if config.epochs else f"{self.run.steps} steps"
        return [
            (
                "optimiser steps",
                f"{duration} of {config.batch_size} sequences of <= {config.max_length} tokens; {config.loss_reduction} mean",
            ),
            ("policy", describe_model(config.policy)),
            ("memory of the weights", estimate_memory(config.policy)),
        ]

    def prepare(self) -> None:
        policy = self.config.policy
        self.model_path = local_path(policy.path)
        tokenizer = checked_tokenizer(self.model_path, self.config.max_length, flag="max_length", trust_remote_code=policy.trust_remote_code)
        if self._given is None and self.config.data.path and has_rewards(self.config.data):
            self.sampler, self.held_out = self._right_responses(), []
            self._num_sequences = self.sampler.num_units
        else:
            train, self.held_out, overlong = self._read(tokenizer)
            if overlong:
                print(f"{overlong} sequences have more than --max_length {self.config.max_length} tokens: left out")
            if not train:
                raise DataError(f"no training sequences are left: all {overlong} have more than --max_length {self.config.max_length} tokens")
            self.sampler, self._num_sequences = ItemSampler(train, self.run.seed), len(train)
        if self.config.epochs:
            self.run = replace(self.run, steps=-(-self.config.epochs * self._num_sequences // self.config.batch_size))

    def _right_responses(self) -> OfflineLoader:
        """Rejection sampling: the rows of a token store that ``data`` keeps."""
        config, trust = self.config, self.config.policy.trust_remote_code
        data = replace(config.data, max_length=config.max_length)
        store = build_store(offline_data(data), self.model_path, self.folder / "data", trust_remote_code=trust)
        rows, counts = choose_rows(store, data, self.run.seed)
        print(f"rewarded responses: {describe(counts)}")
        if data.min_reward is None and store.rewards.min() < store.rewards.max():
            print("all are imitated, whatever their reward: --data.min_reward keeps the right ones")
        self._counts = dict(counts)
        return OfflineLoader(store, config.batch_size, seed=self.run.seed, rows=rows, epochs=config.epochs or None)

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup

        policy = replace(self.config.policy, path=self.model_path)
        self.policy = ModelGroup.start(
            policy, role="policy", placement=placement, seed=self.run.seed, total_steps=self.run.steps, timeout_s=policy.timeout_s
        )
        stack.callback(self.policy.close)
        if isinstance(self.sampler, OfflineLoader):
            write_json(self.folder / "rejection.json", self._counts)
            stack.callback(self.sampler.close)

    def _read(self, tokenizer: Any) -> tuple[list[Trajectory], list[Trajectory], int]:
        """(training sequences, held-out sequences, number of training sequences that were too long)."""
        config = self.config
        if self._given is not None:
            kept = [t for t in self._given if t.num_tokens <= config.max_length]
            return kept, [], len(self._given) - len(kept)
        if config.data.path:
            data = load_sft_trajectories(replace(config.data, max_length=config.max_length), tokenizer)
            if data.num_truncated:
                print(f"{data.num_truncated} sequences were cut to --max_length {config.max_length} tokens (--data.overlong truncate)")
            if data.num_bad:
                print(f"{data.num_bad} rows cannot be used: left out (--data.bad_rows skip)")
            return data.trajectories, [], data.num_overlong
        task = self._task or load_task(config.task)
        train = [solution_trajectory(task, item, tokenizer) for item in task.items("train")]
        held_out: list[Trajectory] = []
        if config.eval_items:
            items, _ = within_limit(task, "test", tokenizer, config.max_length, first=config.eval_items)
            held_out = [solution_trajectory(task, item, tokenizer) for item in items]
        kept = [t for t in train if t.num_tokens <= config.max_length]
        return kept, [t for t in held_out if t.num_tokens <= config.max_length], len(train) - len(kept)

    def order(self) -> dict[str, Any]:
        return {"run.seed": self.run.seed, "batch_size": self.config.batch_size, "training items": self.sampler.identity}

    def export(self, folder: Path) -> None:
        self.policy.export_hf(folder)

    def save_workers(self, folder: Path) -> None:
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")

    def load_workers(self, folder: Path) -> None:
        self.policy.load_state(folder / "policy")


def solution_trajectory(task: Task, item: Any, tokenizer: Any) -> Trajectory:
    """The item's reference solution as an offline trajectory.

    Raises:
        DataError: the item has no solution.
    """
    if item.solution is None:
        raise DataError(f"item {item.task_id} of task {task.name!r} has no reference solution to learn from")
    return Trajectory.from_completion(
        task.encode_prompt(item, tokenizer), task.encode_solution(item, tokenizer), None,
        task_id=item.task_id, group_id=item.task_id, sample_index=0, stop_reason=StopReason.OFFLINE, info=dict(item.info),
    )  # fmt: skip
