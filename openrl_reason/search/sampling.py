"""Whole responses, sampled independently: best-of-N by value, and the plain samples that a search is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openrl_reason.config import require
from openrl_reason.core.steps import StepSplitter
from openrl_reason.evaluation.value_states import step_of_each_token
from openrl_reason.search.candidates import Candidate, Finish, Outcome, Problem, StepReader
from openrl_reason.search.drive import Expand, Search
from openrl_reason.workers.rollout_config import Completion

AGGREGATES = ("last", "min", "mean", "advantage")


@dataclass(frozen=True)
class ResponseValue:
    """What a finished response is worth, from values of states between its steps."""

    tokenizer: Any
    kind: str | StepSplitter
    """How responses are cut into steps."""
    aggregate: str = "last"
    """``last``: the value at the end of the response. ``min``, ``mean``: over the ends of its steps. ``advantage``: the sum of its steps' advantages,
    V(after) - V(before); without discount and rewards between steps that is the last value minus the prompt's, so that the responses to one prompt
    are ranked as by ``last``."""
    value_eos: bool = False
    """See ``StepReader``."""

    def __post_init__(self) -> None:
        require(self.aggregate in AGGREGATES, "aggregate", self.aggregate, f"use one of {', '.join(AGGREGATES)}")

    def states(self, problem: Problem, response: tuple[int, ...], finish: Finish) -> tuple[tuple[int, ...], ...]:
        """The states to value, in order; the prompt first for ``advantage``."""
        end = len(response) - (finish is Finish.EOS and not self.value_eos)
        ends = [end]
        if self.aggregate != "last":
            steps_T = step_of_each_token(self.tokenizer, response, self.kind)
            starts = [] if steps_T is None else np.unique(steps_T, return_index=True)[1].tolist()
            ends = [*(start for start in starts[1:] if start < end), end]
        if self.aggregate == "advantage":
            ends = [0, *ends]
        return tuple((*problem.prompt_ids, *response[:end]) for end in ends)

    def combine(self, values: Sequence[float]) -> float:
        """One number from the values of ``states``."""
        if self.aggregate == "min":
            return min(values)
        if self.aggregate == "mean":
            return math.fsum(values) / len(values)
        if self.aggregate == "advantage":
            return math.fsum(after - before for before, after in zip(values, values[1:], strict=False))
        return values[-1]


def sample_responses(problem: Problem, numbers: range, reader: StepReader, worth: ResponseValue | None) -> Search:
    """Returns a list of one ended ``Candidate`` for each sample number, valued by ``worth`` if it has finished (None: not at all).

    ``reader`` has one step for a whole response. A sample depends on the problem and its number, not on how many there are.
    """

    def read(place: int, completion: Completion) -> Candidate:
        one = reader.read(problem, Candidate(), completion)
        wanted = worth is not None and one.finish is not None and one.finish.is_answer
        return replace(one, states=worth.states(problem, one.response, one.finish) if wanted else ())

    expanded = yield Expand([problem.prefix((), f"sample/{number}") for number in numbers], 1, read)
    return [_valued(one, expanded.values, worth) for (one,) in expanded.found]


def _valued(candidate: Candidate, known: Mapping[tuple[int, ...], float], worth: ResponseValue | None) -> Candidate:
    if worth is None or not candidate.states:
        return candidate
    values = tuple(known[state] for state in candidate.states)
    return replace(candidate, value=worth.combine(values), step_values=values, states=())


def outcome_of(samples: Sequence[Candidate]) -> Outcome:
    """Independent samples as what a search found."""
    outcome = Outcome()
    for one in samples:
        outcome.count(one, len(one.response))
        outcome.end(one)
    return outcome
