"""What algorithms with a rollout engine share: actors, the step's skeleton, the policy's update, sync, evaluation and checkpoints.

An algorithm adds its ``credit``: rewarded trajectories in, a batch with advantages out. All of them ascend the clipped policy-gradient
objective; with one update per collection the ratio is one and the clip never acts.

KL to the reference: in the reward, detached (``kl.where = "reward"``: -coef * log(pi/ref) is paid at each token), or as a term of the loss.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from openrl_reason.algorithms.collect import Collector, Rollouts, check_failures, readable
from openrl_reason.algorithms.common import (
    ItemSampler,
    checked_tokenizer,
    describe_model,
    estimate_memory,
    local_path,
    start_together,
    update_metrics,
    within_limit,
)
from openrl_reason.algorithms.online_config import OnlineConfig
from openrl_reason.algorithms.policy_gradient import PolicyGradientLoss
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.sampling import check_transport, start_grader, start_rewarder, training_evaluator, with_stops_of
from openrl_reason.algorithms.trainer import Callback, Trainer
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.kl import AdaptiveKL, FixedKL, kl_penalty
from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import GateError, WorkerError
from openrl_reason.evaluation.sets import refuse_overlap, training_sets
from openrl_reason.rewards.base import Rewarder
from openrl_reason.rewards.build import check_sources
from openrl_reason.rewards.config import describe_rewards
from openrl_reason.rewards.judge import judge_reward, judge_role, prepare_judge, start_judge
from openrl_reason.rewards.shaping import RewardShaping
from openrl_reason.tasks.base import Task, load_task
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.placement import Placement, Role

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup


class OnlineTrainer(Trainer):
    """Base of the trainers that learn from the policy's own responses.

    Args:
        config: all settings.
        task: replaces the task that ``config.task`` names.
        reward_function: replaces ``config.reward``: any form of docs/rewards.md as a Python callable, which runs in a thread of this process.
        callbacks: called after each step with (finished steps, metrics).
    """

    headline: ClassVar = (
        "train/reward", "train/policy_loss", "train/kl", "train/entropy", "response_length/mean", "sampling/logprob_difference/mean",
        "train/grad_norm", "timing/step",
    )  # fmt: skip
    curves: ClassVar = (
        "train/reward", "train/entropy", "response_length/mean", "train/kl", "train/grad_norm", "timing/step",
        "sampling/logprob_difference/mean", "train/zero_variance_groups",
    )  # fmt: skip

    def __init__(
        self,
        config: OnlineConfig,
        *,
        task: Task | None = None,
        reward_function: Callable[..., Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, callbacks)
        self._task, self._reward_function = task, reward_function
        self._judges = () if reward_function else config.reward.judges
        self._reduction = config.algo.loss_reduction
        kl = config.algo.kl
        self.kl = AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.target else FixedKL(kl.coef)
        self.shaping = RewardShaping(config.reward)
        self._updates_per_step = config.algo.epochs * config.algo.minibatches
        self._full_kl = kl.where == "loss" and kl.kind == "full"
        self._take_turns = False  # known when the actors are placed

    # ---- the step ------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Collect, credit, update, sync."""
        rollouts = self.collect()
        check_failures(rollouts, self.config.reward.max_failed_rate)
        self._models_turn()
        batch = None
        if np.isfinite(rollouts.rewards).any():
            batch, metrics = self.credit(rollouts)
            metrics |= self.update(batch)
        else:  # allowed by max_failed_rate: nothing to learn from this time
            self.skip_updates()
            metrics = {"rollout/ungraded": float(len(rollouts.results)), "train/skipped_update": 1.0}
        if self.reference and batch is not None and "train/kl" in metrics:
            metrics["train/kl_coef"] = self.kl.coefficient
            if "train/policy_loss" in metrics:  # not while a critic alone is trained: the KL is no answer to the coefficient then
                self.kl.update(metrics["train/kl"] * batch.num_actions / batch.num_sequences, batch.num_sequences)
        metrics |= self.sync(self.done + 1)
        self.log.rollouts(readable(rollouts, self.done, self.run.log_rollouts, tokenizer=self._token_texts, batch=batch))
        return rollouts.metrics | metrics

    def collect(self) -> Rollouts:
        """This step's graded responses; the reference scores each chunk of prompts while the next ones generate."""
        config = self.config
        items = self.sampler.items(self.done, config.prompts_per_step)
        rollouts = self.collector.collect(
            items, num_samples=config.samples_per_prompt, sampling=self.sampling, seed=(self.run.seed, "train", self.done),
            on_chunk=self._score_by_reference if self.reference else None, prompts_per_chunk=config.reference.prompts_per_chunk,
            beside=self.beside(),
        )  # fmt: skip
        rollouts.shape(self.shaping)
        return rollouts

    def beside(self) -> Any:
        """What else is sampled during the collection (``collect.SideRollouts``); None: nothing."""
        return None

    def _score_by_reference(self, trajectories: list[Trajectory]) -> Any:
        batch = TokenBatch.from_trajectories(trajectories)
        return self.reference.logprobs_async(batch, temperature=self.config.sampling.temperature, with_hidden=self._full_kl)

    def credit(self, rollouts: Rollouts) -> tuple[TokenBatch, dict[str, float]]:
        """The collection as a batch with ``advantages`` [N], and metrics."""
        raise NotImplementedError

    def scored_batch(self, rollouts: Rollouts) -> tuple[TokenBatch, dict[str, float]]:
        """The trajectories that have a reward, packed, with the reference's and (where they are needed) the policy's log-probs.

        Samples without a reward (their grading failed) are counted and left out. ``sequences["places"]`` are the places in ``rollouts``.
        """
        started, algo = time.perf_counter(), self.config.algo
        batch = TokenBatch.from_trajectories(rollouts.trajectories)
        places = torch.arange(batch.num_sequences)
        rewards = torch.as_tensor(rollouts.rewards, dtype=torch.float32)
        batch = batch.with_sequences(rewards=rewards, group_ids=places // self.config.samples_per_prompt, places=places)
        if rollouts.chunks:
            scores = [chunk.result() for chunk in rollouts.chunks]
            batch = batch.with_tokens(**{f"ref_{name}": torch.cat([score[name] for score in scores]) for name in scores[0]})
        graded = rewards.isfinite().nonzero().flatten().tolist()
        if not graded:
            raise WorkerError(f"not one of {batch.num_sequences} responses has a reward; statuses: {sorted(set(rollouts.statuses))}")
        batch = batch if len(graded) == batch.num_sequences else batch.select(graded)
        metrics = {"rollout/ungraded": float(len(rollouts.statuses) - len(graded)), "timing/reference_wait": time.perf_counter() - started}
        if self._updates_per_step > 1 or algo.kl.where == "reward":
            scoring = time.perf_counter()
            batch = batch.with_tokens(old_logprobs=self.policy.logprobs(batch, temperature=self.config.sampling.temperature)["logprobs"])
            metrics["timing/score"] = time.perf_counter() - scoring
        return batch, metrics

    def kl_in_reward(self, batch: TokenBatch) -> torch.Tensor:
        """[N]: the estimate of the KL at each action token, detached."""
        return kl_penalty(batch.tokens["old_logprobs"], batch.tokens["ref_logprobs"], kind=self.config.algo.kl.kind, mask=batch.action_mask)

    def update(self, batch: TokenBatch) -> dict[str, float]:
        """Optimiser steps on the batch that ``credit`` made."""
        return self.update_policy(batch)

    def update_policy(self, batch: TokenBatch) -> dict[str, float]:
        """``epochs`` x ``minibatches`` optimiser steps; a minibatch holds whole prompts. Metrics are means over the optimiser steps."""
        started, algo, history = time.perf_counter(), self.config.algo, []
        for part in self.parts(batch, self.policy):
            weights, denominator = loss_weights(part, self._reduction, max_response_tokens=self.config.sampling.max_new_tokens)
            part = part.with_tokens(loss_weights=weights)
            denominators = {"loss": denominator, "tokens": float(part.num_actions)}
            loss, temperature = PolicyGradientLoss(algo, self.kl.coefficient), self.config.sampling.temperature
            history.append(self.policy.update(part, loss, denominators, temperature=temperature, with_entropy=True))
        metrics = update_metrics(history)
        difference = metrics["sampling/logprob_difference/mean"]
        if self.config.max_logprob_difference and not difference <= self.config.max_logprob_difference:
            raise GateError(
                f"mean |engine - trainer log-prob| is {difference:.3g} at step {self.done}, above --max_logprob_difference"
                f" {self.config.max_logprob_difference:g}: the engine does not sample from the model that is trained"
                " (float32 for both tells rounding from a fault)"
            )
        metrics["timing/update"] = time.perf_counter() - started
        metrics["perf/trained_tokens_per_second"] = batch.num_tokens * algo.epochs / metrics["timing/update"]
        return metrics

    def parts(self, batch: TokenBatch, group: ModelGroup) -> Iterator[TokenBatch]:
        """The minibatches of all epochs, for ``group`` to learn from. Those without a single graded response are left out, and its learning rate
        goes on as if they had come first: so the last update of the run has the schedule's last rate."""
        minibatches = [indices for epoch in range(self.config.algo.epochs) for indices in self.minibatches(batch, epoch)]
        missing = self._updates_per_step - len(minibatches)
        if missing:
            group.skip_updates(missing)
        for indices in minibatches:
            yield batch if indices is None else batch.select(indices)

    def skip_updates(self) -> None:
        """Not one response of the step has a reward: learning rates go on as if its updates had been taken."""
        self.policy.skip_updates(self._updates_per_step)

    def minibatches(self, batch: TokenBatch, epoch: int) -> list[list[int] | None]:
        """Sequence indices of each minibatch: prompts are shuffled by (seed, step, epoch), siblings stay together."""
        if self.config.algo.minibatches == 1:
            return [None]
        groups = batch.sequences["group_ids"].numpy()
        order = np.random.default_rng(derive_seed(self.run.seed, "minibatches", self.done, epoch)).permutation(self.config.prompts_per_step)
        parts = [np.flatnonzero(np.isin(groups, part)).tolist() for part in np.array_split(order, self.config.algo.minibatches)]
        return [part for part in parts if part]  # of a minibatch whose grading failed altogether nothing is left

    def sync(self, version: int) -> dict[str, float]:
        """The engines get the policy's weights under ``version``; the reference too when its refresh is due."""
        started = time.perf_counter()
        every = self.config.reference.refresh_every
        if self.reference and every and version % every == 0:
            self.reference.copy_weights_from(self.policy)
        parts = self.pool.sync_weights(self.policy, version, between=self._engines_turn)
        return {f"timing/{name}": seconds for name, seconds in parts.items()} | {"timing/sync": time.perf_counter() - started}

    @property
    def _token_texts(self) -> Any:
        return self.tokenizer if self.run.log_rollout_tokens else None

    def evaluate(self) -> dict[str, float]:
        """Every evaluation set, always the same items with the same seeds; a share of the samples goes to rollouts.jsonl."""
        metrics: dict[str, float] = {}
        for eval_set in self.eval_sets:
            result = self.evaluator.run(eval_set, (self.run.seed, "eval"))
            metrics |= result.metrics
            self.log.rollouts(result.records(step=self.done, limit=self.run.log_rollouts, tokenizer=self._token_texts))
        return metrics

    @property
    def policy_updates(self) -> int:
        """Optimiser steps of the policy in the whole run, which its learning-rate schedule spans."""
        return self.run.steps * self._updates_per_step

    # ---- the run -------------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        config = self.config
        has_reference = config.algo.kl.where != "none"
        return [
            Role("policy", config.policy.num_ranks),
            Role("engine", config.rollout.num_engines, gpus_per_actor=config.rollout.tensor_parallel),
            Role("reference", config.reference.num_ranks if has_reference else 0),
            *([judge_role(config.reward.judge)] if self._judges and config.reward.judge.path else []),
        ]

    def describe(self) -> str:
        """The algorithm in a few words, for the plan."""
        raise NotImplementedError

    def plan(self) -> list[tuple[str, str]]:
        config, algo, engines, budget = self.config, self.config.algo, self.config.rollout, self.config.sampling.max_new_tokens
        prompts, samples, updates = config.prompts_per_step, config.samples_per_prompt, self._updates_per_step
        responses = prompts * samples
        reference = config.reference if algo.kl.where != "none" else None
        cut = f"{algo.epochs} epochs x {algo.minibatches} minibatches of {responses // algo.minibatches} responses"
        return [
            ("algorithm", f"{self.describe()}, {self._reduction} reduction, KL {algo.kl.where}, gamma {algo.gamma:g}"),
            ("rollouts of a step", f"{prompts} prompts x {samples} samples = {responses} responses of <= {budget} tokens"),
            ("reward", ("a Python function" if self._reward_function else describe_rewards(config.reward)) + self.shaping.describe()),
            ("optimiser steps", f"{cut} = {updates} of each step; {self.policy_updates} in all"),
            ("policy", describe_model(config.policy)),
            ("engines", f"{engines.num_engines} x {engines.dtype}, tensor parallel {engines.tensor_parallel}, context {engines.max_model_len}"),
            ("memory of the weights", estimate_memory(config.policy, engines=engines, reference=reference)),
        ]

    def prepare(self) -> None:
        config = self.config
        self.model_path = local_path(config.policy.path)
        self.tokenizer = checked_tokenizer(self.model_path, config.rollout.max_model_len, trust_remote_code=config.policy.trust_remote_code)
        self.task = self._task or load_task(config.task)
        if self.run.dry_run and not self._reward_function:
            check_sources(config.reward)
        if self._judges:
            self.judge_tokenizer = prepare_judge(config.reward.judge, [term.options for term in self._judges], self.tokenizer)
        self.sampling = with_stops_of(self.task, config.sampling)
        limit = config.rollout.max_model_len - config.sampling.max_new_tokens
        train_items, overlong = within_limit(self.task, "train", self.tokenizer, limit)
        self.sampler = ItemSampler(train_items, self.run.seed)
        self.eval_sets = training_sets(
            config.eval, task=self.task, tokenizer=self.tokenizer, sampling=self.sampling, max_model_len=config.rollout.max_model_len
        )
        if not self.task.config.allow_test_data_in_training:
            refuse_overlap(train_items, self.eval_sets, self.task.config.train_path or f"task {self.task.name}")
        for what, count in (("training", overlong), *((f"{one.name} evaluation", one.num_overlong) for one in self.eval_sets)):
            if count:
                print(f"{count} {what} prompts leave no room for a full response within --rollout.max_model_len: left out")

    def build(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        from openrl_reason.workers.model_group import ModelGroup
        from openrl_reason.workers.rollout import RolloutPool

        config, seed = self.config, self.run.seed
        # Colocated engines and ranks share their GPUs: each gives its memory back while the others work.
        self._take_turns = placement.gpu and config.placement.colocate
        check_transport(config.rollout, self._take_turns)
        grader = start_grader(config, stack)
        rewarder = None if self._judges else self._rewarder(grader, stack)  # before the actors: a function that does not import shows at once
        policy, has_reference = replace(config.policy, path=self.model_path), config.algo.kl.where != "none"
        updates, timeout_s = self.policy_updates, config.policy.timeout_s
        self.pool, self.policy, self.reference = start_together(
            stack,
            lambda: RolloutPool(config.rollout, self.model_path, placement=placement, seed=seed),
            lambda: ModelGroup.start(policy, role="policy", placement=placement, seed=seed, total_steps=updates, timeout_s=timeout_s),
            lambda: ModelGroup.start(self.reference_config(), role="reference", placement=placement, seed=seed) if has_reference else None,
            side_by_side=not self._take_turns,  # vLLM measures the GPU's free memory while it starts
        )
        if self._full_kl:
            self.policy.set_reference_head(self.reference_config().path, "reverse")
        self.judge = None
        if self._judges:
            self.judge = start_judge(config.reward.judge, self.judge_tokenizer, placement=placement, policy_pool=self.pool, seed=seed)
            stack.callback(self.judge.close)
            rewarder = self._rewarder(grader, stack)
        self.rewarder = rewarder
        self.collector = Collector(self.task, self.tokenizer, self.pool, rewarder)
        self.evaluator = training_evaluator(config, grader, rewarder, pool=self.pool, tokenizer=self.tokenizer, reward_function=self._reward_function)
        if self._take_turns:
            self.policy.offload()

    def _rewarder(self, grader: GraderPool, stack: contextlib.ExitStack) -> Rewarder:
        return start_rewarder(
            self.config, grader, stack, task=self.task, tokenizer=self.tokenizer, reward_function=self._reward_function,
            make_judge=lambda term: judge_reward(self.config.reward.judge, self.judge, term.options),
        )  # fmt: skip

    def _models_turn(self) -> None:
        """On shared GPUs: the engines sleep, the policy gets its memory back."""
        if self._take_turns:
            for engines in filter(None, (self.pool, self.judge)):
                engines.sleep()
            self.policy.reload()

    def _engines_turn(self) -> None:
        """The other way round; within a weight sync, after the trainer has packed its weights and before the engines load them."""
        if self._take_turns:
            self.policy.offload()
            for engines in filter(None, (self.pool, self.judge)):
                engines.wake()

    def reference_config(self) -> ModelConfig:
        """The reference group's model settings: its own path and ranks, everything else like the policy."""
        policy, reference = self.config.policy, self.config.reference
        return ModelConfig(
            path=local_path(reference.path) if reference.path else self.model_path, dtype=policy.dtype,
            num_ranks=reference.num_ranks, zero_stage=reference.zero_stage,
            attention=policy.attention, tokens_per_micro_batch=reference.tokens_per_micro_batch, head_chunk_tokens=policy.head_chunk_tokens,
            trust_remote_code=policy.trust_remote_code, threads_per_rank=policy.threads_per_rank, timeout_s=policy.timeout_s,
        )  # fmt: skip

    def export(self, folder: Path) -> None:
        self._models_turn()
        self.export_models(folder)
        self._engines_turn()

    def save_workers(self, folder: Path) -> None:
        self._models_turn()
        self.save_models(folder)
        self._engines_turn()

    def load_workers(self, folder: Path) -> None:
        self._models_turn()
        self.load_models(folder)
        self.pool.sync_weights(self.policy, self.done, between=self._engines_turn)

    def export_models(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, in the models' turn; as the next two do, which an algorithm with more models extends."""
        self.policy.export_hf(folder)

    def save_models(self, folder: Path) -> None:
        """Writes the models' state below ``folder``."""
        self.policy.save_state(folder / "policy")
        self.policy.export_hf(folder / "model")
        if self.reference and self.config.reference.refresh_every:
            self.reference.save_state(folder / "reference")

    def load_models(self, folder: Path) -> None:
        """Reads what ``save_models`` wrote."""
        self.policy.load_state(folder / "policy")
        if self.reference and self.config.reference.refresh_every:
            self.reference.load_state(folder / "reference")

    def order(self) -> dict[str, Any]:
        config = self.config
        return {"run.seed": self.run.seed, "prompts_per_step": config.prompts_per_step, "samples_per_prompt": config.samples_per_prompt,
                "training items": self.sampler.identity}  # fmt: skip

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl": self.kl.state_dict(), "reward_shaping": self.shaping.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if self.config.algo.kl.target:  # a fixed coefficient is what the flag says now
            self.kl.load_state_dict(state["kl"])
        if "reward_shaping" in state:
            self.shaping.load_state_dict(state["reward_shaping"])
