"""Answers graded and chosen, in the form of an evaluation's results, with what the search adds to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import Rollouts
from openrl_reason.core.seeds import content_id
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.metrics import CORRECT, GRADED
from openrl_reason.evaluation.sets import EvalSet, SetResult, graded_samples
from openrl_reason.rewards.base import Rewarder, RewardResult, RewardSample
from openrl_reason.search.candidates import Candidate, Finish, Outcome
from openrl_reason.search.choose import choose
from openrl_reason.search.run import Found
from openrl_reason.tasks.base import TaskItem

UNANSWERED = RewardResult(0.0, "no_answer")
"""Of a problem for which nothing finished: wrong, and counted as without an answer."""


@dataclass(frozen=True)
class Answer:
    """What a problem came to."""

    candidate: Candidate
    """The chosen response; of an unanswered problem what came furthest, for the reader."""
    result: RewardResult
    found_right: bool
    """Whether some finished response was right, chosen or not."""


@dataclass
class SearchResult(SetResult):
    """A set's result with the search behind it: one answer to each item."""

    found: Found
    answers: list[Answer]

    @property
    def metrics(self) -> dict[str, float]:
        """The evaluation's numbers, and ``search/<set>/...``."""
        numbers = {name: value for name, value in self.search_numbers.items() if isinstance(value, (int, float))}
        return super().metrics | {f"search/{self.eval_set.name}/{name}": value for name, value in numbers.items()}

    @property
    def search_numbers(self) -> dict[str, Any]:
        """Tokens, speed, values, and why items have no answer."""
        outcomes, cost, total = self.found.outcomes, self.found.cost, len(self.answers)
        counts = sum((outcome.counts for outcome in outcomes), Counter())
        unanswered = Counter(str(outcome.reason) for outcome in outcomes if outcome.reason is not None)
        return {
            "tokens_per_problem": cost.generated_tokens / total, "generated_tokens": cost.generated_tokens,
            "tokens_per_second": cost.tokens_per_second, "seconds": cost.seconds,
            "value_calls": cost.value_calls, "states_valued": cost.states_valued, "value_tokens": cost.value_tokens,
            "num_samples": self.found.num_samples, "finished_per_problem": sum(len(outcome.finished) for outcome in outcomes) / total,
            "found_right_rate": sum(answer.found_right for answer in self.answers) / total,
            "unanswered": sum(unanswered.values()), "unanswered_rate": sum(unanswered.values()) / total,
            "unanswered_by_reason": dict(unanswered),
            "finish_reasons": {str(reason): counts[reason] for reason in Finish},
            "candidates": {
                name: counts[name] for name in ("candidates", "merged", "pruned", "open_steps", "discarded_tokens")
            },
        }  # fmt: skip

    def records(self, *, step: int = 0, limit: int = -1, tokenizer: Any = None) -> list[dict[str, Any]]:
        """As an evaluation's, with ``search``: values, steps, and what else was found."""
        records = super().records(step=step, limit=limit, tokenizer=tokenizer)
        if limit < 0:
            for record, outcome, answer in zip(records, self.found.outcomes, self.answers, strict=True):
                one = answer.candidate
                record["search"] = {
                    "value": _plain(one.value), "step_values": [_plain(value) for value in one.step_values],
                    "finish": None if one.finish is None else str(one.finish), "num_finished": len(outcome.finished),
                    "unanswered": None if outcome.reason is None else str(outcome.reason), "found_right": answer.found_right,
                    "generated_tokens": outcome.counts["generated_tokens"],
                }  # fmt: skip
        return records

    def as_json(self, group_by: Sequence[str]) -> dict[str, Any]:
        """As an evaluation's, with ``search``."""
        numbers = {name: None if value != value else value for name, value in self.search_numbers.items()}
        return super().as_json(group_by) | {"search": numbers}


class Grader:
    """Grades and chooses. The answers of a problem are graded once, whatever method finds them."""

    def __init__(self, eval_set: EvalSet, tokenizer: Any, rewarder: Rewarder, intervals: IntervalConfig) -> None:
        self.set, self.tokenizer, self.rewarder, self.intervals = eval_set, tokenizer, rewarder, intervals
        self._graded: dict[tuple[int, str], Future[RewardResult]] = {}

    def result(self, name: str, found: Found, rule: str, **sampling: Any) -> SearchResult:
        """The result of ``found`` under the name ``<set>/<name>``, one answer to each item by ``rule`` (``choose``)."""
        pending = [[self._grade(place, one) for one in outcome.finished] for place, outcome in enumerate(found.outcomes)]
        answers = [answer(outcome, [future.result() for future in futures], rule) for outcome, futures in zip(found.outcomes, pending, strict=True)]
        own = replace(self.set, name=f"{self.set.name}/{name}", num_samples=1, ks=(1,), sampling=replace(self.set.sampling, **sampling))
        rollouts = self._rollouts(own, answers)
        graded = graded_samples(rollouts, rollouts.results, 1)
        return SearchResult(own, rollouts, {"": graded}, {}, self.intervals, found, answers)

    def _grade(self, place: int, candidate: Candidate) -> Future[RewardResult]:
        text = self._text(candidate)
        if (place, text) not in self._graded:
            item = self.set.items[place]
            sample = RewardSample(
                prompt=self._prompt(item), response=text, item=item, num_tokens=len(candidate.response), stop_reason=str(candidate.finish)
            )
            self._graded[place, text] = self.rewarder.submit(sample)
        return self._graded[place, text]

    def _rollouts(self, own: EvalSet, answers: Sequence[Answer]) -> Rollouts:
        trajectories = [self._trajectory(own.name, place, one) for place, one in enumerate(answers)]
        return Rollouts(trajectories, list(own.items), [one.result for one in answers])

    def _trajectory(self, name: str, place: int, answer: Answer) -> Trajectory:
        item, one = self.set.items[place], answer.candidate
        finished = one.finish is not None and one.finish.is_answer
        return Trajectory.from_completion(
            self.set.task.encode_prompt(item, self.tokenizer), one.response, one.logprobs,
            task_id=item.task_id, group_id=content_id(name, str(place), item.task_id), sample_index=0,
            reward=answer.result.score if math.isfinite(answer.result.score) else 0.0,
            stop_reason=StopReason(str(one.finish)) if finished else StopReason.LENGTH,
            info={
                **item.info, "response": self._text(one), "gold": item.gold, "prompt": self._prompt(item),
                "grade_status": answer.result.status, "parsed": answer.result.parsed,
            },
        )  # fmt: skip

    def _text(self, candidate: Candidate) -> str:
        return self.tokenizer.decode(list(candidate.response), skip_special_tokens=True)

    def _prompt(self, item: TaskItem) -> str:
        return self.set.task.prompt_text(item, self.tokenizer)


def answer(outcome: Outcome, results: Sequence[RewardResult], rule: str) -> Answer:
    """The answer to one problem, given the grades of its finished responses."""
    right = any(result.status in GRADED and result.score >= CORRECT for result in results)
    if not outcome.finished:
        return Answer(furthest(outcome), UNANSWERED, False)
    place = choose(outcome.finished, rule, [result.parsed if result.status in GRADED else None for result in results])
    return Answer(outcome.finished[place], results[place], right)


def furthest(outcome: Outcome) -> Candidate:
    """Of an unanswered problem, the unfinished response of highest value; where values are missing or equal, the one that was there first."""
    worth = [-math.inf if one.value != one.value else one.value for one in outcome.unfinished]
    return outcome.unfinished[int(np.argmax(worth))] if worth else Candidate(finish=Finish.EMPTY)


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def search_rows(results: Sequence[SearchResult], flat: Mapping[str, float]) -> list[dict[str, str]]:
    """The table of costs: a row for each set."""
    rows = []
    for one in results:
        numbers = one.search_numbers
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(numbers["unanswered_by_reason"].items()))
        speed = numbers["tokens_per_second"]
        rows.append({
            "set": one.eval_set.name, "correct": f"{100 * flat[f'eval/{one.eval_set.name}/pass@1']:.1f}",
            "unanswered": f"{numbers['unanswered']}{f' ({reasons})' if reasons else ''}",
            "some right": f"{100 * numbers['found_right_rate']:.1f}", "finished": f"{numbers['finished_per_problem']:.1f}",
            "samples": str(numbers["num_samples"] or ""), "tokens / item": f"{numbers['tokens_per_problem']:.0f}",
            "tokens / s": "" if speed != speed else f"{speed:.0f}", "states valued": str(numbers["states_valued"]),
            "critic calls": str(numbers["value_calls"]),
        })  # fmt: skip
    return rows
