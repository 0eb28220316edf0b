"""Rollouts: task items in, graded trajectories out. Grading and reference log-probs start while other prompts still generate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.tasks.base import Task, TaskItem
from openrl_reason.workers.grading import GradeResult, GraderPool
from openrl_reason.workers.rollout_config import Completion, Request, SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.workers.rollout import RolloutPool

GRADED = ("ok", "no_answer")
"""Statuses with a reward. Any other means that the grader failed: the sample has no reward, is counted, and does not train."""

RewardFunction = Callable[..., Any]
"""``reward_function(queries, prompts, labels, items=...)`` -> list of floats, or a dict with "rewards"; ``queries`` are prompt + response texts."""


@dataclass
class Rollouts:
    """Graded trajectories in prompt-major order (``num_samples`` siblings in a row), and how they came about."""

    trajectories: list[Trajectory]
    items: list[TaskItem]
    statuses: list[str]
    chunks: list[Any] = field(default_factory=list)
    """What ``on_chunk`` returned, in order."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rewards(self) -> np.ndarray:
        """Outcome reward of each trajectory [B]; NaN where grading failed."""
        return np.array(
            [t.reward if status in GRADED else np.nan for t, status in zip(self.trajectories, self.statuses, strict=True)], dtype=np.float64
        )


class Collector:
    """Generates and grades. One per run; ``collect`` per step.

    Args:
        reward_function: replaces the task's grader when given; called once per collection, when all responses are there.
    """

    def __init__(
        self, task: Task, tokenizer: Any, pool: RolloutPool, grader: GraderPool, reward_function: RewardFunction | None = None
    ) -> None:
        self.task, self.tokenizer, self.pool, self.grader, self.reward_function = task, tokenizer, pool, grader, reward_function

    def collect(
        self,
        items: Sequence[TaskItem],
        *,
        num_samples: int,
        sampling: SamplingConfig,
        seed: tuple[int | str, ...],
        on_chunk: Callable[[list[Trajectory]], Any] | None = None,
        prompts_per_chunk: int = 8,
    ) -> Rollouts:
        """``num_samples`` graded responses to each item.

        Args:
            seed: identity of this collection, for instance ``(run_seed, "train", step)``; each sample adds its place and task id.
            on_chunk: called with the ungraded trajectories of ``prompts_per_chunk`` consecutive prompts as soon as all of them and of the
                chunks before are generated. Chunks are cut by position, never by arrival, so that what is computed on them is
                reproducible to the bit.
        """
        before, started = Counter(self.pool.stats()), time.perf_counter()
        requests = self._requests(items, num_samples, sampling, seed)
        index_of = {request.request_id: index for index, request in enumerate(requests)}
        trajectories: list[Trajectory | None] = [None] * len(requests)
        grades: list[Future[GradeResult] | None] = [None] * len(requests)
        missing, chunks = [num_samples] * len(items), []

        def next_chunk_is_complete() -> bool:
            first = len(chunks) * prompts_per_chunk
            return first < len(items) and not any(missing[first : first + prompts_per_chunk])

        for completion in self.pool.generate(requests):
            index = index_of[completion.request_id]
            place, sample = divmod(index, num_samples)
            trajectory = self._trajectory(items[place], requests[index], completion, place, sample)
            trajectories[index] = trajectory
            missing[place] -= 1
            if self.reward_function is None:
                grades[index] = self.grader.submit(trajectory.info["response"], items[place].gold, self.task.grade_kind)
            while on_chunk and next_chunk_is_complete():
                first, size = len(chunks) * prompts_per_chunk * num_samples, prompts_per_chunk * num_samples
                chunks.append(on_chunk(trajectories[first : first + size]))
        assert all(t is not None for t in trajectories), "the pool returned fewer completions than requests"
        generated = time.perf_counter()
        finished = [item for item in items for _ in range(num_samples)]
        results = self._reward_by_function(trajectories, finished) if self.reward_function else [future.result() for future in grades]
        for trajectory, result in zip(trajectories, results, strict=True):
            trajectory.rewards[-1] = result.score
            trajectory.info.update(grade_status=str(result.status), parsed=result.parsed)
        rollouts = Rollouts(trajectories, finished, [str(result.status) for result in results], chunks)
        used = Counter(self.pool.stats())
        used.subtract(before)
        rollouts.metrics = rollout_metrics(rollouts, num_samples) | {
            "timing/generate": generated - started,
            "timing/generate_busy": max(seconds for name, seconds in used.items() if name.startswith("seconds_busy/")),
            "timing/grade": time.perf_counter() - generated,
            "perf/generated_tokens_per_second": used["generated_tokens"] / (generated - started),
            "rollout/prefix_cache_hit": used["cached_prompt_tokens"] / max(1, used["prompt_tokens"]),
            "rollout/engine_restarts": used["restarts"],
            "rollout/resubmitted": used["resubmitted"],
        }
        return rollouts

    def _requests(self, items: Sequence[TaskItem], num_samples: int, sampling: SamplingConfig, seed: tuple[int | str, ...]) -> list[Request]:
        """Prompt-major; siblings form a group, which one engine serves."""
        prefix = "/".join(map(str, seed))
        requests = []
        for place, item in enumerate(items):
            prompt_ids = self.task.encode_prompt(item, self.tokenizer)
            for sample in range(num_samples):
                name, sample_seed = f"{prefix}/{place}/{sample}", derive_seed(*seed, place, item.task_id, sample)
                requests.append(Request(request_id=name, prompt_ids=prompt_ids, seed=sample_seed, sampling=sampling, group=f"{prefix}/{place}"))
        return requests

    def _trajectory(self, item: TaskItem, request: Request, completion: Completion, place: int, sample: int) -> Trajectory:
        response = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return Trajectory.from_completion(
            request.prompt_ids, completion.token_ids, completion.logprobs,
            task_id=item.task_id, group_id=content_id(request.group, item.task_id), sample_index=sample,
            policy_version=completion.policy_version, stop_reason=completion.stop_reason,
            info={**item.info, "response": response, "gold": item.gold, "prompt": self.task.prompt_text(item, self.tokenizer)},
        )  # fmt: skip

    def _reward_by_function(self, trajectories: Sequence[Trajectory], items: Sequence[TaskItem]) -> list[GradeResult]:
        prompts = [t.info["prompt"] for t in trajectories]
        queries = [prompt + t.info["response"] for prompt, t in zip(prompts, trajectories, strict=True)]
        try:
            answer = self.reward_function(queries, prompts, [item.gold for item in items], items=list(items))
            rewards = [float(reward) for reward in (answer["rewards"] if isinstance(answer, Mapping) else answer)]
        except Exception as error:
            raise WorkerError(
                f"the reward function failed: {type(error).__name__}: {error}. It is called as f(queries, prompts, labels, items=...) and returns"
                " one float per response, or a dict with them under 'rewards'"
            ) from error
        if len(rewards) != len(queries):
            raise ConfigError(
                f"the reward function returned {len(rewards)} rewards for {len(queries)} responses: it must return one for each"
            )
        return [
            GradeResult(score=value if finite else 0.0, parsed=None, status="ok" if finite else "error")
            for value in rewards
            for finite in [np.isfinite(value)]
        ]


def rollout_metrics(rollouts: Rollouts, num_samples: int) -> dict[str, float]:
    """Rewards, lengths, groups and failures of a collection, under the field's names."""
    rewards, trajectories = rollouts.rewards, rollouts.trajectories
    lengths = np.array([t.num_actions for t in trajectories])
    truncated = np.array([t.stop_reason == StopReason.LENGTH for t in trajectories])
    statuses, total = Counter(rollouts.statuses), len(trajectories)
    groups = rewards.reshape(-1, num_samples)
    graded = np.isfinite(rewards)
    spread = np.array([np.nanmax(group) - np.nanmin(group) if np.isfinite(group).any() else 0.0 for group in groups])
    return {
        "train/reward": float(rewards[graded].mean()) if graded.any() else float("nan"),
        "train/reward_std": float(rewards[graded].std()) if graded.any() else float("nan"),
        "train/zero_variance_groups": float((spread == 0).mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/min": float(lengths.min()),
        "response_length/clip_ratio": float(truncated.mean()),
        "prompt_length/mean": float(np.mean([len(t.token_ids) - t.num_actions for t in trajectories])),
        "reward/no_answer_rate": statuses["no_answer"] / total,
        "reward/timeout_rate": statuses["timeout"] / total,
        "reward/error_rate": sum(count for status, count in statuses.items() if status not in (*GRADED, "timeout")) / total,
    }


def readable(rollouts: Rollouts, step: int, limit: int) -> list[dict[str, Any]]:
    """Records for ``rollouts.jsonl``: evenly spaced samples, or all with ``limit`` -1."""
    total = len(rollouts.trajectories)
    count = total if limit < 0 else min(limit, total)
    return [
        {"step": step, "trajectory_id": t.trajectory_id, "task_id": t.task_id, "prompt": t.info["prompt"], "response": t.info["response"],
         "gold": t.info["gold"], "parsed": t.info["parsed"], "status": t.info["grade_status"], "reward": t.reward, "stop_reason": str(t.stop_reason),
         "num_tokens": t.num_actions, "policy_version": t.policy_version}
        for t in (rollouts.trajectories[index * total // count] for index in range(count))
    ]  # fmt: skip


def with_budget(sampling: SamplingConfig, **changes: Any) -> SamplingConfig:
    """A copy of the sampling settings with some changed, for instance ``temperature=0`` for greedy evaluation."""
    return replace(sampling, **changes)
