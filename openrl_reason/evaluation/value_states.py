"""States between reasoning steps, and what rollouts say about them: drawing states, continuing them, cutting next steps.

Engines are anything with the ``submit`` and ``generate`` of a ``RolloutPool``. Every sample is a function of the run's seed, the purpose it is
drawn for, the prefix and its number: rollouts of two purposes (the truth and an estimate, for instance) are independent.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import FAILED, Rollouts, continued_sample
from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.steps import split_steps
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.token_text import token_pieces, token_steps
from openrl_reason.evaluation.value_accuracy import position_bins
from openrl_reason.rewards.base import Rewarder, RewardResult
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.branching import Branch, BranchCall, Prefix, TakesRequests
from openrl_reason.workers.rollout_config import SamplingConfig

PROGRESS_SECONDS = 30.0


@dataclass(frozen=True)
class State:
    """The state before a reasoning step of a response."""

    item: TaskItem
    prompt: str
    """Text of the prompt."""
    prefix: Prefix
    """Token ids up to the state, and how many may follow: the longest response minus what the response has already."""
    num_prompt_tokens: int
    trajectory_id: str
    step: int
    """Steps of the response before the state."""
    num_steps: int
    """Steps of that response in all."""

    @property
    def position(self) -> float:
        """Share of the response's steps that lie before the state: 0 at the prompt, below 1."""
        return self.step / self.num_steps

    @property
    def response_ids(self) -> list[int]:
        """What the response has up to the state."""
        return list(self.prefix.token_ids[self.num_prompt_tokens :])


@dataclass(frozen=True)
class FoundStates:
    """The states of a collection."""

    states: list[State]
    """Each distinct prefix once, in the order of the trajectories (siblings share their prompt: it is the first one's)."""
    num_stepped: int
    """Responses with two steps or more."""
    num_unsplit: int
    """Responses taken as one step because the tokenizer does not say which token wrote what."""


def find_states(rollouts: Rollouts, tokenizer: Any, step_kind: Any, max_new_tokens: int) -> FoundStates:
    """The states before all steps of all responses: step boundaries, the prompt included, but for the one after the last step."""
    states: dict[str, State] = {}
    num_stepped = num_unsplit = 0
    for trajectory, item in zip(rollouts.trajectories, rollouts.items, strict=True):
        response_ids = trajectory.response_ids.tolist()
        steps_T = step_of_each_token(tokenizer, response_ids, step_kind)
        num_unsplit += steps_T is None
        # A step that owns no token begins where the next one does, so it has no state of its own.
        starts = [0] if steps_T is None else np.unique(steps_T, return_index=True)[1].tolist()
        num_stepped += len(starts) > 1
        for step, start in enumerate(starts):
            state = _state(trajectory, item, step, len(starts), start, max_new_tokens)
            states.setdefault(state.prefix.key, state)
    return FoundStates(list(states.values()), num_stepped, num_unsplit)


def _state(trajectory: Trajectory, item: TaskItem, step: int, num_steps: int, start: int, max_new_tokens: int) -> State:
    first = trajectory.num_prompt_tokens
    prefix = Prefix(tuple(trajectory.token_ids[: first + start].tolist()), max_new_tokens - start, identity=item.task_id)
    return State(item, trajectory.info["prompt"], prefix, first, trajectory.trajectory_id, step, num_steps)


def step_of_each_token(tokenizer: Any, response_ids: Sequence[int], step_kind: Any) -> np.ndarray | None:
    """int32 [T]: the step of each token of a response. None where it has several steps and the tokenizer cannot map them onto tokens."""
    response = tokenizer.decode(list(response_ids), skip_special_tokens=True)
    steps = split_steps(response, step_kind)
    if len(steps) < 2:
        return np.zeros(len(response_ids), np.int32)
    pieces = token_pieces(tokenizer, list(response_ids), response)
    return None if pieces is None else token_steps(steps, pieces)


def draw_states(candidates: Sequence[State], count: int, num_bins: int, seed: tuple[int | str, ...]) -> list[State]:
    """At most ``count`` of the states, as evenly over ``num_bins`` bins of the relative position as there are states.

    Within a bin the order is that of hashes of (seed, prefix), so a state is drawn or not whatever the order of the others. The drawn ones
    come back in their original order.
    """
    bins: list[list[tuple[int, int]]] = [[] for _ in range(num_bins)]
    places = position_bins(np.array([state.position for state in candidates]), num_bins)
    for place, (state, own) in enumerate(zip(candidates, places.tolist(), strict=True)):
        bins[own].append((derive_seed(*seed, state.prefix.key), place))
    # The n-th of every bin before the (n+1)-th of any; inside such a round, by hash again.
    ranked = sorted((rank, draw, place) for own in bins for rank, (draw, place) in enumerate(sorted(own)))
    return [candidates[place] for place in sorted(place for _, _, place in ranked[:count])]


# ---- rollouts ----------------------------------------------------------------------------------------------------------------------


class StateRollouts:
    """Continues states and rewards what comes of it.

    Args:
        pool: the engines.
        rewarder: the reward of whole responses.
        sampling: as the responses were sampled; each state has a budget of its own in place of ``max_new_tokens``.
        seed: identity of all samples, to which each call adds its purpose.
    """

    def __init__(
        self, pool: TakesRequests, rewarder: Rewarder, tokenizer: Any, sampling: SamplingConfig, *, step_kind: Any, seed: tuple[int | str, ...]
    ) -> None:
        self.pool, self.rewarder, self.tokenizer = pool, rewarder, tokenizer
        self.sampling, self.step_kind, self.seed = sampling, step_kind, seed
        self.counts: Counter[str] = Counter(rollouts=0, truncated=0, without_reward=0, generated_tokens=0)
        """Rewarded rollouts; of those cut off by the length limit, and without a reward; tokens of all continuations."""
        self.failures: list[RewardResult] = []
        """Results of rollouts whose grading failed."""

    def rewards(self, states: Sequence[State], num_rollouts: int, purpose: str) -> list[np.ndarray]:
        """Rewards float64 [num_rollouts] of the continuations of each state, in the order of their numbers, so that the first k of them are
        a fair sample; NaN where the reward failed. Equal prefixes share their rollouts."""
        keys, by_key = self._keys(states), {}
        for key, state in zip(keys, states, strict=True):
            by_key.setdefault(key, state)
        pending: dict[str, dict[int, Future[RewardResult]]] = {key: {} for key in by_key}
        for branch in self._branches(states, num_rollouts, purpose):
            state = by_key[branch.key]
            sample = continued_sample(
                state.response_ids, branch.completion, prompt=state.prompt, item=state.item, tokenizer=self.tokenizer, step_kind=self.step_kind,
                stop=self.sampling.stop,
            )  # fmt: skip
            self.counts["rollouts"] += 1
            self.counts["truncated"] += sample.stop_reason == StopReason.LENGTH
            pending[branch.key][branch.sample] = self.rewarder.submit(sample)
        self.rewarder.flush()
        found = {key: np.array([self._score(futures[sample].result()) for sample in range(num_rollouts)]) for key, futures in pending.items()}
        return [found[key] for key in keys]

    def continuations(self, states: Sequence[State], num_rollouts: int, purpose: str) -> list[list[list[int]]]:
        """Token ids of the continuations of each state, in the order of their numbers."""
        found: dict[str, dict[int, list[int]]] = {}
        for branch in self._branches(states, num_rollouts, purpose):
            found.setdefault(branch.key, {})[branch.sample] = branch.completion.token_ids
        return [[found[key][sample] for sample in range(num_rollouts)] for key in self._keys(states)]

    def _keys(self, states: Sequence[State]) -> list[str]:
        return [state.prefix.key for state in states]

    def _branches(self, states: Sequence[State], num_rollouts: int, purpose: str) -> Iterator[Branch]:
        call = BranchCall(self.pool, sampling=self.sampling, seed=(*self.seed, purpose))
        for state in states:
            call.ask(state.prefix, num_rollouts)
        yield from call.take_exhausted()
        told = time.monotonic()
        for number, completion in enumerate(self.pool.generate(), start=1):
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                print(f"{purpose}: {number} of {call.counts['requests']} rollouts", flush=True)
            found = call.take(completion)
            if found is not None:
                yield found
        assert not call.num_open, "the pool returned fewer completions than requests"
        self.counts["generated_tokens"] += call.counts["generated_tokens"]

    def _score(self, result: RewardResult) -> float:
        if result.status in FAILED:
            self.failures.append(result)
        if result.status in FAILED or not math.isfinite(result.score):
            self.counts["without_reward"] += 1
            return math.nan
        return result.score


# ---- next steps --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextSteps:
    """Distinct next steps at a state."""

    state: State
    after: list[State]
    """The state after each of them."""
    texts: list[str]
    """Their texts."""
    num_last: int
    """Sampled steps that ended the response: there is no state after them, so they are left out."""


def next_steps(state: State, continuations: Sequence[Sequence[int]], tokenizer: Any, step_kind: Any) -> NextSteps:
    """Cuts continuations at the first step boundary after the state. The boundaries are those of prefix and continuation in one text, and a
    token belongs to the step of its first character, as everywhere. Steps of the same text are one."""
    prefix_ids, found, num_last = state.response_ids, {}, 0
    for continuation in continuations:
        ids = [*prefix_ids, *continuation]
        steps_T = step_of_each_token(tokenizer, ids, step_kind) if continuation else None
        later = np.flatnonzero(steps_T[len(prefix_ids) :] > steps_T[len(prefix_ids)]) if steps_T is not None else []
        if not len(later):
            num_last += 1
            continue
        own = [int(token) for token in continuation[: later[0]]]
        found.setdefault(tokenizer.decode(own, skip_special_tokens=True), own)
    after = []
    for own in found.values():
        prefix = replace(state.prefix, token_ids=(*state.prefix.token_ids, *own), budget=state.prefix.budget - len(own))
        after.append(replace(state, prefix=prefix, step=state.step + 1, num_steps=max(state.num_steps, state.step + 2)))
    return NextSteps(state, after, list(found), num_last)
