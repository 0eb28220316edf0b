"""Rewarded samples, question by question, each until it has enough: no question waits for another one's round.

How many samples a question gets may depend on their rewards. In rounds this would leave engines idle: each would end with its slowest response.
Here a question gets, at any time, all the samples that it will need whatever the outstanding ones turn out to be. That is at least one round
while it needs any, so what it ends with is, sample by sample, what rounds would have given it.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from openrl_reason.algorithms.collect import Collector, Rollouts
from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.rollout_config import Completion, Request, SamplingConfig


class SampleRule(Protocol):
    """How many samples a question gets."""

    samples_per_round: int
    """A sample's seed is made of its round and its place in it."""

    def certain(self, num_right: int, num_wrong: int, num_known: int) -> int:
        """So many samples the question will get at least, those of which ``num_known`` have been judged included. Equal to ``num_known`` when it
        has enough. ``num_right`` + ``num_wrong`` <= ``num_known``: a failed grading is neither."""
        ...


@dataclass(frozen=True)
class FixedCount:
    """The same number for every question, in one round."""

    samples_per_round: int

    def certain(self, num_right: int, num_wrong: int, num_known: int) -> int:
        return self.samples_per_round


@dataclass(frozen=True)
class UntilBalanced:
    """Rounds until a question has at least ``per_side`` right and ``per_side`` wrong samples, or ``rounds`` of them are over."""

    per_side: int
    rounds: int
    samples_per_round: int = 1

    def certain(self, num_right: int, num_wrong: int, num_known: int) -> int:
        missing = max(0, self.per_side - num_right) + max(0, self.per_side - num_wrong)
        return min(self.rounds, -(-(num_known + missing) // self.samples_per_round)) * self.samples_per_round


@dataclass
class _Question:
    """A question some of whose samples are under way."""

    item: TaskItem
    prompt_ids: list[int]
    requests: list[Request] = field(default_factory=list)
    trajectories: list[Trajectory | None] = field(default_factory=list)
    results: list[RewardResult | None] = field(default_factory=list)
    num_right: int = 0
    num_wrong: int = 0
    num_known: int = 0


@dataclass
class QuestionSampler:
    """Samples questions under a rule.

    Results depend neither on the number of engines, nor on the order in which responses or rewards arrive, nor on ``in_flight``: a sample's seed
    is made of ``seed``, the question's task id, its round and its place in it.
    """

    collector: Collector
    rule: SampleRule
    sampling: SamplingConfig
    seed: tuple[int | str, ...]
    threshold: float
    """A sample with at least this reward is right."""
    in_flight: int
    """Questions under way at a time: when one has enough, the next begins."""

    def run(self, items: Iterable[TaskItem]) -> Iterator[Rollouts]:
        """All samples of one item after the other, in the order in which they become complete; no two items may have the same task id.

        Ending the iteration early drops what is under way."""
        pool, waiting = self.collector.pool, iter(items)
        open_: dict[str, _Question] = {}
        samples: dict[str, tuple[_Question, int]] = {}
        judged: queue.SimpleQueue[tuple[_Question, int, Future[RewardResult]]] = queue.SimpleQueue()
        try:
            while True:
                requests: list[Request] = []
                while len(open_) < self.in_flight and (item := next(waiting, None)) is not None:
                    assert item.task_id not in open_, f"question {item.task_id} comes twice"
                    question = open_[item.task_id] = _Question(item, self.collector.task.encode_prompt(item, self.collector.tokenizer))
                    requests += self._ask(question, samples)
                if not open_:
                    return
                if requests:
                    pool.submit(requests)
                completions = pool.poll()
                for completion in completions:
                    self._submit_reward(completion, *samples.pop(completion.request_id), judged)
                idle = not pool.num_unfinished
                if idle or not completions:  # a partly filled batch of rewards is not to wait for the slowest response
                    self.collector.rewarder.flush()
                later: list[Request] = []
                for question in self._judge(judged, wait=idle):
                    later += self._ask(question, samples)
                    if question.num_known == len(question.requests):
                        del open_[question.item.task_id]
                        yield Rollouts(question.trajectories, [question.item] * len(question.results), question.results)
                if later:
                    pool.submit(later)
        finally:
            if pool.num_unfinished:
                pool.abort_all()

    def _ask(self, question: _Question, samples: dict[str, tuple[_Question, int]]) -> list[Request]:
        """Requests for what the question is now certain to need; ``samples`` learns whose they are."""
        certain = self.rule.certain(question.num_right, question.num_wrong, question.num_known)
        group = "/".join(map(str, (*self.seed, question.item.task_id)))
        new = []
        for number in range(len(question.requests), certain):
            samples[f"{group}/{number}"] = question, number
            seed = derive_seed(*self.seed, question.item.task_id, *divmod(number, self.rule.samples_per_round))
            new.append(Request(f"{group}/{number}", question.prompt_ids, seed, self.sampling, group))
        question.requests += new
        question.trajectories += [None] * len(new)
        question.results += [None] * len(new)
        return new

    def _submit_reward(self, completion: Completion, question: _Question, number: int, judged: queue.SimpleQueue) -> None:
        trajectory, future = self.collector.begin(question.item, question.requests[number], completion, number)
        question.trajectories[number] = trajectory
        future.add_done_callback(lambda done: judged.put((question, number, done)))

    def _judge(self, judged: queue.SimpleQueue, *, wait: bool) -> Sequence[_Question]:
        """Takes in the rewards that are there (with ``wait``: at least one); the questions that they are about."""
        about: dict[str, _Question] = {}
        while wait or not judged.empty():
            question, number, future = judged.get()
            wait = False
            result = self.collector.rewarded(question.trajectories[number], future.result())
            question.results[number] = result
            right = np.isfinite(result.score) and np.float32(result.score) >= np.float32(self.threshold)
            question.num_known += 1
            question.num_right += bool(right)
            question.num_wrong += bool(np.isfinite(result.score) and not right)
            about[question.item.task_id] = question
        return list(about.values())
