"""Monte-Carlo values of the states between reasoning steps (VinePPO, Kazemnejad et al. 2024, arXiv 2410.01679, section 4).

The value of a state is the mean return of K continuations of it under the same policy, the same token limit and the same reward as the
trajectories. A trajectory's states are sampled as soon as it is generated, while others still generate: the engines that would idle
until the longest response has ended are filled. No sample is dropped: a response that nothing cuts is one step, a state whose rollouts
all failed has no value and its step shares the credit of the step before it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import FAILED, MAX_REWARD, continued_sample
from openrl_reason.config import require
from openrl_reason.core.steps import check_step_kind, split_steps
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.token_text import token_pieces, token_steps
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.intervals import wilson
from openrl_reason.rewards.base import Rewarder, RewardResult
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.branching import Branch, BranchCall, Prefix
from openrl_reason.workers.rollout_config import Completion


@dataclass(frozen=True)
class VineConfig:
    """Monte-Carlo values of the states between steps."""

    num_rollouts: int = 9
    """Continuations of each state (K); with interval_width the fewest."""
    max_steps: int | None = None
    """Sample the state before the first step and those after at most so many steps; the step after them takes all the credit that is left,
    later ones none. null: all states but the one after the last step."""
    step_kind: str = ""
    """How responses are cut into steps (docs/steps.md). Empty: as the task says."""
    root_from_siblings: bool = False
    """Value the prompt by the other responses to it (leave-one-out), without rollouts of its own; needs 2 samples_per_prompt or more."""
    interval_width: float | None = None
    """Adaptive K: sample on until the 95 % Wilson interval of a state's value is at most this wide (rewards must lie in 0 .. 1,
    before --reward.scale and the like). null: K is fixed."""
    max_rollouts: int = 64
    """Most continuations of a state, with interval_width."""


def check_vine(vine: VineConfig, samples_per_prompt: int) -> None:
    """Refuses settings that cannot work."""
    require(vine.num_rollouts >= 1, "vine.num_rollouts", vine.num_rollouts, "at least 1 (published: 9)")
    require(vine.max_steps is None or vine.max_steps >= 1, "vine.max_steps", vine.max_steps, "at least 1 (published: 25 for GSM8K), or null for all")
    enough = not vine.root_from_siblings or samples_per_prompt >= 2
    require(enough, "vine.root_from_siblings", vine.root_from_siblings, "responses are compared with siblings: use --samples_per_prompt 2 or more")
    width = vine.interval_width
    require(width is None or 0 < width < 1, "vine.interval_width", width, "must lie between 0 and 1, or be null for a fixed K")
    low = width is None or vine.max_rollouts >= vine.num_rollouts
    require(low, "vine.max_rollouts", vine.max_rollouts, f"at least --vine.num_rollouts {vine.num_rollouts}")
    if vine.step_kind:
        try:
            check_step_kind(vine.step_kind)
        except ConfigError as error:
            raise ConfigError(f"--vine.step_kind: {error}") from None


@dataclass
class _Rollout:
    """One continuation: its reward, and where in its text the steps end."""

    future: Future[RewardResult]
    step_ends: np.ndarray
    truncated: bool


@dataclass
class _State:
    """A distinct prefix and what was sampled from it."""

    response_ids: list[int]
    item: TaskItem
    prompt: str
    num_wanted: int
    rollouts: dict[int, _Rollout] = field(default_factory=dict)

    def results(self) -> list[RewardResult]:
        """In the order of the samples' numbers, so that sums do not depend on the order of arrival."""
        return [self.rollouts[sample].future.result() for sample in sorted(self.rollouts)]


@dataclass
class _Place:
    """Where a state stands in a trajectory."""

    step: int
    offset: int
    """Characters of the response before it."""
    key: str | None
    """Of the state that was sampled; None for a root whose value its siblings give."""


class StepValues:
    """Values of the states of trajectories, sampled beside their collection (a ``collect.SideRollouts``). One per collection.

    Args:
        call: the branch call.
        rewarder: the reward of the trajectories, with numbers of its own (``CombinedRewards.with_own_numbers``).
        step_kind: how responses are cut.
        gamma: discount per step.
        max_new_tokens: longest response; a state's rollouts may use what its prefix has left of it.
    """

    def __init__(
        self, vine: VineConfig, call: BranchCall, rewarder: Rewarder, tokenizer: Any, *, step_kind: Any, gamma: float, max_new_tokens: int
    ) -> None:
        self.vine, self.call, self.rewarder, self.tokenizer = vine, call, rewarder, tokenizer
        self.step_kind, self.gamma, self.max_new_tokens = step_kind, gamma, max_new_tokens
        self._shape: Callable[[RewardResult], RewardResult] = lambda result: result
        self._states: dict[str, _State] = {}
        self._places: dict[int, list[_Place]] = {}
        self._settled: deque[str] = deque()  # appended to by the threads in which rewards finish
        self._counts: Counter[str] = Counter()
        self._hidden_tokens = 0
        self._valued: dict[str, list[float]] = {}
        """Returns of the rollouts of states that ``step_values`` was asked about, as they were for the first trajectory."""

    # ---- while the collection runs -------------------------------------------------------------------------------------------

    def start(self, index: int, trajectory: Trajectory, item: TaskItem, group: str) -> None:
        """Cuts a trajectory into steps and asks for rollouts of the states before them."""
        self._hidden_tokens = self.call.counts["generated_tokens"]  # what is there when the last trajectory is
        self._more_where_needed()
        steps = self._cut(trajectory)
        first, tokens = trajectory.num_prompt_tokens, trajectory.token_ids.tolist()
        # A step that owns no token begins where the next one does, so it has no state of its own.
        owned, starts = np.unique(trajectory.step_ids[trajectory.action_mask], return_index=True)
        self._counts["steps"] += len(owned)
        last = len(owned) if self.vine.max_steps is None else self.vine.max_steps + 1
        ends = np.cumsum([0, *map(len, steps)])
        places = []
        for step, start in zip(owned.tolist()[:last], starts.tolist(), strict=False):
            key = None
            if step != owned[0] or not self.vine.root_from_siblings:
                prefix = Prefix(tuple(tokens[: first + start]), self.max_new_tokens - start, identity=item.task_id, group=group)
                key = self._ask(prefix, tokens[first : first + start], item, trajectory.info["prompt"])
            places.append(_Place(step, int(ends[min(step, len(steps))]), key))
        self._places[index] = places

    def _cut(self, trajectory: Trajectory) -> list[str]:
        """The steps of a response, put into ``trajectory.step_ids``; a response that cannot be cut is one step."""
        response = trajectory.info["response"]
        steps = split_steps(response, self.step_kind)
        pieces = token_pieces(self.tokenizer, trajectory.response_ids.tolist(), response) if len(steps) > 1 else None
        if pieces is None:
            self._counts["unsplit"] += len(steps) > 1
            return steps if len(steps) <= 1 else [response]
        trajectory.step_ids[trajectory.action_mask] = token_steps(steps, pieces)
        trajectory.rewards = np.zeros(len(steps), np.float32)
        return steps

    def _ask(self, prefix: Prefix, response_ids: list[int], item: TaskItem, prompt: str) -> str:
        key = self.call.ask(prefix, self.vine.num_rollouts)
        if key not in self._states:
            self._states[key] = _State(response_ids, item, prompt, self.vine.num_rollouts)
        for branch in self.call.take_exhausted():
            self._grade(branch)
        return key

    def take(self, completion: Completion) -> None:
        """A branch has ended: its reward is asked for."""
        branch = self.call.take(completion)
        assert branch is not None, f"completion {completion.request_id!r} is nobody's"
        self._grade(branch)
        self._more_where_needed()

    def _grade(self, branch: Branch) -> None:
        state = self._states[branch.key]
        sample = continued_sample(
            state.response_ids, branch.completion, prompt=state.prompt, item=state.item, tokenizer=self.tokenizer, step_kind=self.step_kind,
            stop=self.call.sampling.stop,
        )  # fmt: skip
        future = self.rewarder.submit(sample)
        ends = np.cumsum([len(step) for step in sample.steps] or [0])
        state.rollouts[branch.sample] = _Rollout(future, ends, sample.stop_reason == StopReason.LENGTH)
        if self.vine.interval_width is not None:
            future.add_done_callback(lambda _: self._settled.append(branch.key))

    def _more_where_needed(self) -> None:
        while self._settled:
            self._consider(self._settled.popleft())

    def _consider(self, key: str) -> bool:
        """Adaptive K: asks for further rollouts of a state whose rewards are all there and whose interval is still too wide; whether it did."""
        state = self._states[key]
        complete = len(state.rollouts) == state.num_wanted and all(rollout.future.done() for rollout in state.rollouts.values())
        if not complete or state.num_wanted >= self.vine.max_rollouts or not self._too_wide(state):
            return False
        state.num_wanted = min(state.num_wanted + self.vine.num_rollouts, self.vine.max_rollouts)
        self.call.more(key, state.num_wanted)
        for branch in self.call.take_exhausted():
            self._grade(branch)
        return True

    def _too_wide(self, state: _State) -> bool:
        scores = [result.score for result in state.results() if _counts(result)]
        if not scores or min(scores) < 0 or max(scores) > 1:
            self._counts["outside"] += bool(scores)
            return True
        interval = wilson(math.fsum(scores), len(scores))
        return interval.high - interval.low > self.vine.interval_width

    def drain(self) -> None:
        """Returns when every rollout is there and graded."""
        while True:
            for completion in self.call.pool.generate():
                self.take(completion)
            self.rewarder.flush()
            wait([rollout.future for state in self._states.values() for rollout in state.rollouts.values()])
            if self.vine.interval_width is None:
                return
            if not sum(map(self._consider, self._states)):  # not by the callbacks alone: they may come a moment after the result
                return

    def shape(self, shaping: Callable[[RewardResult], RewardResult]) -> None:
        """From now on returns are of rewards that are mapped as those of the trajectories are."""
        self._shape = shaping

    # ---- afterwards ----------------------------------------------------------------------------------------------------------

    def step_values(self, index: int, rewards: Sequence[float], siblings: Sequence[float]) -> list[float]:
        """Values of the states before the steps of trajectory ``index``, by step; NaN where there is none (a step without tokens of its
        own, a state beyond ``max_steps``, or one whose rollouts all failed).

        Args:
            rewards: of the trajectory's steps [S], which may have been earned before a state.
            siblings: discounted returns of the other responses to the prompt, NaN where they have none.
        """
        values = [math.nan] * len(rewards)
        for place in self._places[index]:
            if place.key is None:
                values[place.step] = _mean(siblings)
            else:
                returns = self._returns(place.key, place.offset, math.fsum(rewards[: place.step]))
                values[place.step] = _mean(returns)
                self._valued.setdefault(place.key, returns)
        return values

    def _returns(self, key: str, offset: int, earned: float) -> list[float]:
        state = self._states[key]
        ends = [state.rollouts[sample].step_ends for sample in sorted(state.rollouts)]
        return [
            rollout_return(self._shape(result), ends_S, offset, earned, self.gamma)
            for result, ends_S in zip(state.results(), ends, strict=True)
            if _counts(result)
        ]  # fmt: skip

    @property
    def failures(self) -> list[RewardResult]:
        """Results of rollouts whose reward failed."""
        return [result for state in self._states.values() for result in state.results() if result.status in FAILED or abs(result.score) > MAX_REWARD]

    @property
    def num_rollouts(self) -> int:
        """Rollouts of all states."""
        return sum(len(state.rollouts) for state in self._states.values())

    def metrics(self, num_actions: int) -> dict[str, float]:
        """``credit/...``, once ``step_values`` has been asked; ``num_actions``: response tokens of the collection."""
        counts, states = self.call.counts, list(self._states.values())
        valued = [returns for returns in self._valued.values() if returns]
        means = [_mean(returns) for returns in valued]
        rollouts = [rollout for state in states for rollout in state.rollouts.values()]
        num_rollouts, num_trajectories = max(1, len(rollouts)), max(1, len(self._places))
        return {
            "credit/rollouts_per_trajectory": len(rollouts) / num_trajectories,
            "credit/rollouts_per_state": len(rollouts) / max(1, len(states)),
            "credit/steps_per_trajectory": self._counts["steps"] / num_trajectories,
            "credit/states_per_trajectory": sum(map(len, self._places.values())) / num_trajectories,
            "credit/unique_prefix_share": 1.0 - counts["shared"] / max(1, counts["asked"]),
            "credit/prefix_cache_hit": counts["cached_prompt_tokens"] / max(1, counts["prompt_tokens"]),
            "credit/mc_tokens_per_training_token": counts["generated_tokens"] / max(1, num_actions),
            "credit/value_mean": _mean(means),
            "credit/value_std": float(np.std(means)) if means else math.nan,
            "credit/rollout_std": _mean([float(np.std(returns)) for returns in valued]),
            "credit/truncated_rate": sum(rollout.truncated for rollout in rollouts) / num_rollouts,
            "credit/failed_rate": len(self.failures) / num_rollouts,
            "credit/states_without_value": float(sum(not any(map(_counts, state.results())) for state in states)),
            "credit/exhausted_states": float(counts["exhausted"]),
            "credit/unsplit_rate": self._counts["unsplit"] / num_trajectories,
            **({} if self.vine.interval_width is None else {"credit/states_outside_unit": float(self._counts["outside"])}),
            "perf/branch_hidden_share": self._hidden_tokens / max(1, counts["generated_tokens"]),
        }


def rollout_return(result: RewardResult, step_ends: np.ndarray, offset: int, earned: float, gamma: float) -> float:
    """Discounted return of a rollout from a state on: sum_k gamma^k r_k over the steps of the whole response that end behind the state.

    Args:
        step_ends: [S] characters of the response up to the end of each of its steps.
        offset: characters before the state.
        earned: what the trajectory's steps before the state earned; what the rollout's earned beyond that (another last step, for instance, if
            it ended right here) is paid at once.
    """
    scores = [0.0] * (len(step_ends) - 1) + [result.score] if result.step_scores is None or not result.step_scores else list(result.step_scores)
    before = int(np.searchsorted(step_ends, offset, side="right"))
    later = math.fsum(gamma**power * score for power, score in enumerate(scores[before:]))
    return math.fsum(scores[:before]) - earned + later


def _counts(result: RewardResult) -> bool:
    """Whether it is a reward that a trajectory would train with (a failure may have a worth, and an answer that is missing none)."""
    return abs(result.score) <= MAX_REWARD  # not of NaN


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
