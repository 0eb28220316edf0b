"""Rollouts: task items in, graded trajectories out. Rewards and reference log-probs start while other prompts still generate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.steps import split_steps
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.token_text import token_pieces, token_steps
from openrl_reason.errors import WorkerError
from openrl_reason.rewards.base import Rewarder, RewardResult, RewardSample
from openrl_reason.rewards.shaping import RewardShaping
from openrl_reason.tasks.base import Task, TaskItem
from openrl_reason.tasks.graders import STATUSES
from openrl_reason.workers.rollout_config import Completion, Request, SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.workers.rollout import RolloutPool

FAILED = tuple(status for status in STATUSES if status not in ("ok", "no_answer"))
"""Statuses that mean that the grader or reward function failed, not the answer."""
MAX_REWARD = 1e30
"""Rewards and their differences are float32."""


class SideRollouts(Protocol):
    """What is sampled in the same engines while a collection generates: Monte-Carlo values of its states, for instance (``vine.py``)."""

    def start(self, index: int, trajectory: Trajectory, item: TaskItem, group: str) -> None:
        """Trajectory number ``index`` is generated, by a request of that ``group``; it has no reward yet. May submit requests to the pool."""
        ...

    def take(self, completion: Completion) -> None:
        """A completion that is none of the collection's own."""
        ...

    def drain(self) -> None:
        """All trajectories are generated: return when everything that was asked for is there."""
        ...

    def shape(self, shaping: RewardShaping) -> None:
        """The trajectories' rewards have been mapped by ``shaping``, and so must be those of what was sampled here."""
        ...


@dataclass
class Rollouts:
    """Rewarded trajectories in prompt-major order (``num_samples`` siblings in a row), and how they came about."""

    trajectories: list[Trajectory]
    items: list[TaskItem]
    results: list[RewardResult]
    chunks: list[Any] = field(default_factory=list)
    """What ``on_chunk`` returned, in order."""
    metrics: dict[str, float] = field(default_factory=dict)
    beside: Any = None
    """What was sampled beside them."""
    shaped: list[RewardResult] | None = None
    """What the results are worth to the update, where that is something else (``shape``)."""

    @property
    def rewards(self) -> np.ndarray:
        """Total reward of each trajectory [B], as the update sees it; NaN where it has none."""
        return np.array([result.score for result in self.shaped or self.results], dtype=np.float64)

    def shape(self, shaping: RewardShaping) -> None:
        """Maps the rewards, those on the trajectories too, as ``shaping`` says once it has seen them; ``results`` stay what was given."""
        if not shaping.changes:
            return
        scores = self.rewards
        shaping.observe(scores)
        self.shaped = [shaping(result) for result in self.results]
        for trajectory, result in zip(self.trajectories, self.shaped, strict=True):
            if np.isfinite(result.score):
                trajectory.rewards = np.asarray(shaping.paid(trajectory.rewards, result.score), np.float32)
        self.metrics |= shaping.metrics(scores)
        if self.beside is not None:
            self.beside.shape(shaping)

    @property
    def statuses(self) -> list[str]:
        """Status of each trajectory's reward [B]."""
        return [result.status for result in self.results]

    def take(self, places: Sequence[int]) -> Rollouts:
        """Those at ``places`` alone; metrics, which are of all, are left out."""
        columns = (self.trajectories, self.items, self.results)
        taken = Rollouts(*([column[place] for place in places] for column in columns))
        taken.shaped = self.shaped and [self.shaped[place] for place in places]
        return taken


class Collector:
    """Generates and rewards. One per run; ``collect`` per step."""

    def __init__(self, task: Task, tokenizer: Any, pool: RolloutPool, rewarder: Rewarder) -> None:
        self.task, self.tokenizer, self.pool, self.rewarder = task, tokenizer, pool, rewarder

    def collect(
        self,
        items: Sequence[TaskItem],
        *,
        num_samples: int,
        sampling: SamplingConfig,
        seed: tuple[int | str, ...],
        on_chunk: Callable[[list[Trajectory]], Any] | None = None,
        prompts_per_chunk: int = 8,
        beside: SideRollouts | None = None,
    ) -> Rollouts:
        """``num_samples`` rewarded responses to each item.

        Args:
            seed: identity of this collection, for instance ``(run_seed, "train", step)``; each sample adds its place and task id.
            on_chunk: called with the trajectories (no rewards yet) of ``prompts_per_chunk`` consecutive prompts as soon as all of them and of
                the chunks before are generated. Chunks are cut by position, never by arrival, so that what is computed on them is
                reproducible to the bit.
            beside: told of each trajectory as soon as it is generated, so that what it samples fills the engines that the slowest leave idle.
        """
        before, started = Counter(self.pool.stats()), time.perf_counter()
        requests = self._requests(items, num_samples, sampling, seed)
        index_of = {request.request_id: index for index, request in enumerate(requests)}
        trajectories: list[Trajectory | None] = [None] * len(requests)
        pending: list[Future[RewardResult] | None] = [None] * len(requests)
        missing, chunks = [num_samples] * len(items), []

        def next_chunk_is_complete() -> bool:
            first = len(chunks) * prompts_per_chunk
            return first < len(items) and not any(missing[first : first + prompts_per_chunk])

        num_left, generated = len(requests), started
        for completion in self.pool.generate(requests):
            index = index_of.get(completion.request_id)
            if index is None:
                beside.take(completion)
                continue
            place, sample = divmod(index, num_samples)
            trajectory, pending[index] = self.begin(items[place], requests[index], completion, sample)
            trajectories[index] = trajectory
            missing[place] -= 1
            while on_chunk and next_chunk_is_complete():
                first, size = len(chunks) * prompts_per_chunk * num_samples, prompts_per_chunk * num_samples
                chunks.append(on_chunk(trajectories[first : first + size]))
            num_left -= 1
            if beside is not None:
                beside.start(index, trajectory, items[place], requests[index].group)
            generated = time.perf_counter()
        assert not num_left, "the pool returned fewer completions than requests"
        self.rewarder.flush()  # the pool is idle: a policy that judges its own responses does so now
        ended = generated
        if beside is not None:
            beside.drain()
            ended = time.perf_counter()
        results = [future.result() for future in pending]
        results = [self.rewarded(trajectory, result) for trajectory, result in zip(trajectories, results, strict=True)]
        rollouts = Rollouts(trajectories, [item for item in items for _ in range(num_samples)], results, chunks, beside=beside)
        used = Counter(self.pool.stats())
        used.subtract(before)
        rollouts.metrics = (
            self.rewarder.metrics()
            | rollout_metrics(rollouts, num_samples)
            | {
                "timing/generate": generated - started,
                "timing/generate_busy": max(seconds for name, seconds in used.items() if name.startswith("seconds_busy/")),
                **({} if beside is None else {"timing/branch": ended - generated}),
                "timing/grade": time.perf_counter() - ended,
                "perf/generated_tokens_per_second": used["generated_tokens"] / (ended - started),
                "rollout/prefix_cache_hit": used["cached_prompt_tokens"] / max(1, used["prompt_tokens"]),
                "rollout/engine_restarts": used["restarts"],
                "rollout/resubmitted": used["resubmitted"],
            }
        )
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

    def begin(self, item: TaskItem, request: Request, completion: Completion, sample: int) -> tuple[Trajectory, Future[RewardResult]]:
        """A completion as a trajectory, and its reward to come, which ``rewarded`` takes."""
        trajectory = self._trajectory(item, request, completion, sample)
        return trajectory, self.rewarder.submit(self._reward_sample(trajectory, item))

    def _trajectory(self, item: TaskItem, request: Request, completion: Completion, sample: int) -> Trajectory:
        response = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return Trajectory.from_completion(
            request.prompt_ids, completion.token_ids, completion.logprobs,
            task_id=item.task_id, group_id=content_id(request.group, item.task_id), sample_index=sample,
            policy_version=completion.policy_version, stop_reason=completion.stop_reason,
            info={**item.info, "response": response, "gold": item.gold, "prompt": self.task.prompt_text(item, self.tokenizer)},
        )  # fmt: skip

    def _reward_sample(self, trajectory: Trajectory, item: TaskItem) -> RewardSample:
        response = trajectory.info["response"]
        return RewardSample(
            prompt=trajectory.info["prompt"], response=response, item=item, num_tokens=trajectory.num_actions,
            stop_reason=str(trajectory.stop_reason), steps=tuple(split_steps(response, self.task.step_kind)),
        )  # fmt: skip

    def rewarded(self, trajectory: Trajectory, result: RewardResult) -> RewardResult:
        """Puts the reward onto the trajectory: on its last step, or one on each step. Without a reward it is 0 there, and NaN in the result."""
        trajectory.info.update(grade_status=result.status, parsed=result.parsed)
        if np.isfinite(result.score) and abs(result.score) > MAX_REWARD:
            detail = f"the reward {result.score:g} is beyond what float32 holds"
            result = replace(result, score=float("nan"), status="error", detail=detail, step_scores=None)
        if not result.step_scores or not np.isfinite(result.score):  # () is a response without text: no steps, but other terms may have paid
            trajectory.rewards[-1] = result.score if np.isfinite(result.score) else 0.0
            return result
        response = trajectory.info["response"]
        pieces = token_pieces(self.tokenizer, trajectory.response_ids.tolist(), response)
        if pieces is None:
            detail = "rewards per step need to know which tokens a step has, and this tokenizer's decoder does not say"
            return replace(result, score=float("nan"), status="error", detail=detail, step_scores=None)
        steps = split_steps(response, self.task.step_kind)
        trajectory.step_ids[trajectory.action_mask] = token_steps(steps, pieces)
        trajectory.rewards = np.asarray(result.step_scores, np.float32)
        return result


def continued_sample(
    prefix_ids: Sequence[int], completion: Completion, *, prompt: str, item: TaskItem, tokenizer: Any, step_kind: Any, stop: Sequence[str]
) -> RewardSample:
    """The response that a branch makes of a prefix of response tokens, as a reward source sees it."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    ids, stop_reason = [*prefix_ids, *completion.token_ids], completion.stop_reason
    count = stop_across(prefix_ids, completion.token_ids, decode, stop)
    if count is not None:
        ids, stop_reason = ids[: len(prefix_ids) + count], StopReason.STOP_STRING
    text = decode(ids)
    return RewardSample(
        prompt=prompt, response=text, item=item, num_tokens=len(ids), stop_reason=str(stop_reason), steps=tuple(split_steps(text, step_kind))
    )


def stop_across(prefix_ids: Sequence[int], ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> int | None:
    """How many of the ``ids`` after a prefix it takes to complete a stop string that the prefix began; None where there is none.

    An engine looks for stop strings in what it writes: one that the prefix began (a trajectory that ended by it may have a step boundary in it) it
    does not see, and writes on.
    """
    if not stop:
        return None
    whole, start = [*prefix_ids, *ids], len(decode(prefix_ids))
    text = decode(whole)
    begun = [(text.find(string, max(0, start - len(string) + 1)), string) for string in stop]
    ends = [place + len(string) for place, string in begun if 0 <= place < start]
    if not ends:
        return None
    return next(count for count in range(len(ids) + 1) if len(decode(whole[: len(prefix_ids) + count])) >= min(ends))


def rollout_metrics(rollouts: Rollouts, num_samples: int) -> dict[str, float]:
    """Rewards, lengths, groups and failures of a collection, under the field's names."""
    rewards, trajectories = rollouts.rewards, rollouts.trajectories
    lengths = np.array([t.num_actions for t in trajectories])
    truncated = np.array([t.stop_reason == StopReason.LENGTH for t in trajectories])
    statuses, total = Counter(rollouts.statuses), len(trajectories)
    groups = rewards.reshape(-1, num_samples)
    graded = np.isfinite(rewards)
    spread = np.array([np.nanmax(group) - np.nanmin(group) for group in groups if np.isfinite(group).any()])
    return {
        "train/reward": float(rewards[graded].mean()) if graded.any() else float("nan"),
        "train/reward_std": float(rewards[graded].std()) if graded.any() else float("nan"),
        "train/zero_variance_groups": float((spread == 0).mean()) if len(spread) else float("nan"),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/min": float(lengths.min()),
        "response_length/clip_ratio": float(truncated.mean()),
        "prompt_length/mean": float(np.mean([len(t.token_ids) - t.num_actions for t in trajectories])),
        **{f"reward/{status}_rate": statuses[status] / total for status in STATUSES if status != "ok"},
    }


def check_failures(rollouts: Rollouts, max_failed_rate: float) -> None:
    """Raises WorkerError, with counts and the first causes, when more than this share of the rewards failed."""
    failed = [result for result in rollouts.results if result.status in FAILED]
    check_failure_rate(failed, len(rollouts.results), max_failed_rate, counts=Counter(rollouts.statuses))


def check_failure_rate(
    failed: Sequence[RewardResult], total: int, max_failed_rate: float, *, counts: Counter[str] | None = None, what: str = "rewards"
) -> None:
    """The same for the ``failed`` results among any ``total``."""
    if len(failed) <= max_failed_rate * total:
        return
    numbers = ", ".join(f"{status} {count}" for status, count in (counts or Counter(result.status for result in failed)).most_common())
    causes = dict.fromkeys(result.detail for result in failed if result.detail)
    reason = f"; for instance: {' | '.join(list(causes)[:3])[:600]}" if causes else ""
    raise WorkerError(f"{len(failed)} of {total} {what} failed ({numbers}); --reward.max_failed_rate is {max_failed_rate:g}{reason}")


def readable(rollouts: Rollouts, step: int, limit: int, *, source: str = "train", tokenizer: Any = None, batch: Any = None) -> list[dict[str, Any]]:
    """Records for ``rollouts.jsonl``: whole groups of siblings, evenly spaced, as far as ``limit`` goes; all with -1.

    With a ``tokenizer`` they hold the text of each token, and with the ``batch`` that ``credit`` made of them (its ``sequences["places"]``
    says which is which) advantages, values and log-prob ratios beside them.
    """
    rows = {} if batch is None else {int(place): row for row, place in enumerate(batch.sequences["places"])}
    records = []
    for index in logged_places([t.group_id for t in rollouts.trajectories], limit):
        t, result = rollouts.trajectories[index], rollouts.results[index]
        record = {
            "step": step, "source": source, "trajectory_id": t.trajectory_id, "task_id": t.task_id, "prompt": t.info["prompt"],
            "response": t.info["response"], "gold": t.info["gold"], "parsed": t.info["parsed"], "status": result.status, "detail": result.detail,
            "reward": _rounded(result.score), "reward_terms": {name: _rounded(score) for name, score in result.terms.items()},
            "stop_reason": str(t.stop_reason), "num_tokens": t.num_actions, "policy_version": t.policy_version,
        }  # fmt: skip
        if rollouts.shaped is not None:
            record["shaped_reward"] = _rounded(rollouts.shaped[index].score)
        if tokenizer is not None:
            record |= _per_token(t, result, tokenizer, batch, rows.get(index))
        records.append(record)
    return records


def logged_places(group_ids: Sequence[str], limit: int) -> list[int]:
    """Places of at most ``limit`` samples (-1: all): whole groups where they fit, since siblings are read side by side, else single samples."""
    total = len(group_ids)
    count = total if limit < 0 else min(limit, total)
    size = total // max(1, len(set(group_ids)))
    groups = count // size if size else 0
    if not groups:
        return [number * total // count for number in range(count)]
    firsts = [number * (total // size) // groups * size for number in range(groups)]
    return [first + sibling for first in firsts for sibling in range(size)]


def _per_token(trajectory: Trajectory, result: RewardResult, tokenizer: Any, batch: Any, row: int | None) -> dict[str, Any]:
    """What is known about each response token, and where its steps begin (where a reward or a credit per step has cut it)."""
    pieces = token_pieces(tokenizer, trajectory.response_ids.tolist(), trajectory.info["response"])
    if pieces is None:
        return {}
    data = {"logprob": trajectory.behaviour_logprobs[trajectory.action_mask]}
    if row is not None:
        first, last = int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])
        mask = batch.action_mask[first:last]
        known = {name: batch.tokens[name][first:last][mask].numpy() for name in ("advantages", "values", "old_logprobs") if name in batch.tokens}
        if "old_logprobs" in known:
            data["logprob_ratio"] = known["old_logprobs"] - data["logprob"]
        data |= {short: known[name] for name, short in (("advantages", "advantage"), ("values", "value")) if name in known}
    record = {"tokens": pieces, "token_data": {name: [_rounded(value) for value in values] for name, values in data.items()}}
    if trajectory.num_steps > 1 or result.step_scores is not None:
        steps = trajectory.step_ids[trajectory.action_mask]
        record["step_starts"] = np.flatnonzero(np.diff(steps, prepend=-1)).tolist()
    if result.step_scores is not None:
        record["step_rewards"] = [_rounded(score) for score in result.step_scores]
    return record


def _rounded(value: float) -> float | None:
    """Four significant digits, enough to read; None for NaN, which JSON does not have."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
