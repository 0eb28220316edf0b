"""What searches are about: problems, responses that grow step by step, and what became of a problem."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import stop_across
from openrl_reason.core.steps import StepSplitter, check_step_kind, stop_strings
from openrl_reason.core.trajectory import StopReason
from openrl_reason.evaluation.value_states import step_of_each_token
from openrl_reason.search.drive import TokenIds
from openrl_reason.workers.branching import Prefix
from openrl_reason.workers.rollout_config import Completion


class Finish(StrEnum):
    """Why a response ended."""

    EOS = "eos"
    """The model ended it."""
    STOP_STRING = "stop_string"
    """A stop string of whole responses appeared (not one that ends a step)."""
    LENGTH = "length"
    """No tokens are left, of the response's or of the engines' context. It is no answer."""
    STEP_CAP = "step_cap"
    """It had the most steps that are allowed, and was not finished. It is no answer."""
    EMPTY = "empty"
    """The engine wrote nothing, though there was room: nothing can come of it."""

    @property
    def is_answer(self) -> bool:
        """Whether the model has finished what it had to say."""
        return self in (Finish.EOS, Finish.STOP_STRING)


@dataclass(frozen=True)
class Problem:
    """A prompt to search from."""

    identity: str
    """Tells it from all other problems of a run; seeds are made of it."""
    prompt_ids: TokenIds
    """Token ids of the prompt."""
    budget: int
    """Tokens of the whole response, over all of its steps; 0 if the prompt leaves no room for one."""

    @classmethod
    def fitting(cls, identity: str, prompt_ids: Sequence[int], max_new_tokens: int, max_model_len: int) -> Problem:
        """The problem with the budget that the engines' context leaves it."""
        return cls(identity, tuple(prompt_ids), max(0, min(max_new_tokens, max_model_len - len(prompt_ids))))

    def prefix(self, response: TokenIds, name: str, limit: int = 0) -> Prefix:
        """The state after ``response``, to be continued by what is left of the budget, at most ``limit`` tokens (0: no other limit)."""
        left = self.budget - len(response)
        budget = min(left, limit) if limit else left
        return Prefix((*self.prompt_ids, *response), budget, identity=f"{self.identity}/{name}", group=self.identity)


@dataclass(frozen=True)
class Candidate:
    """A response, or the steps so far of one. The ids are those that were sampled, never tokenised again."""

    response: TokenIds = ()
    """Token ids, EOS and stop strings included."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each."""
    finish: Finish | None = None
    """None: it goes on."""
    states: tuple[TokenIds, ...] = ()
    """What is valued of it."""
    value: float = math.nan
    """Value that it is ranked by; NaN where it was not valued."""
    step_values: tuple[float, ...] = ()
    """Values that made it: after each step."""
    is_open: bool = False
    """The last step was cut by the limit of its tokens, so the next one goes on with it."""
    num_discarded: int = 0
    """Tokens that were generated beyond the end of its last step."""


@dataclass
class Outcome:
    """What a search found."""

    finished: list[Candidate] = field(default_factory=list)
    """Answers, in the order in which they were found."""
    unfinished: list[Candidate] = field(default_factory=list)
    """Responses that ended without one."""
    counts: Counter[str] = field(default_factory=Counter)
    """``candidates`` (sampled continuations), of those ``merged``, ``pruned``, ``open_steps`` (cut by the limit of a step's tokens), and one count
    for each ``Finish``; ``generated_tokens``, of those ``discarded_tokens``."""

    def count(self, candidate: Candidate, num_new: int) -> None:
        """Notes a continuation of ``num_new`` tokens that were kept."""
        self.counts["candidates"] += 1
        self.counts["open_steps"] += candidate.is_open
        self.counts["generated_tokens"] += num_new + candidate.num_discarded
        self.counts["discarded_tokens"] += candidate.num_discarded

    def end(self, candidate: Candidate) -> None:
        """Puts an ended response where it belongs."""
        assert candidate.finish is not None
        self.counts[candidate.finish] += 1
        (self.finished if candidate.finish.is_answer else self.unfinished).append(candidate)

    @property
    def reason(self) -> Finish | None:
        """Why there is no answer, of several reasons the one that came furthest; None if there is one."""
        if self.finished:
            return None
        return next((reason for reason in (Finish.STEP_CAP, Finish.LENGTH, Finish.EMPTY) if self.counts[reason]), Finish.EMPTY)


class StepReader:
    """Tells where a sampled step ends, and whether the response does.

    Steps that a string ends are cut by the engine: the token that completes the string is the step's last. Of other kinds (``stop_strings`` says
    None) more is sampled than a step, up to ``step_tokens``, and cut at the first boundary; what is beyond it is discarded and counted.

    Args:
        kind: how responses are cut into steps (``core.steps``).
        stop: strings that end a response.
        step_tokens: longest step. A step that reaches it is cut there, and the search goes on with it. 0: what the response has left.
        value_eos: value a finished response after its EOS token instead of before it. A critic has learnt values of states in which a token is
            yet to be chosen, and there is none after EOS; a reward model may have been trained to speak there.
    """

    def __init__(
        self, tokenizer: Any, kind: str | StepSplitter, *, stop: tuple[str, ...] = (), step_tokens: int = 0, value_eos: bool = False
    ) -> None:
        check_step_kind(kind)
        self.tokenizer, self.kind, self.response_stop, self.step_tokens, self.value_eos = tokenizer, kind, stop, step_tokens, value_eos
        self._ends = stop_strings(kind)
        # The limit of a step's tokens may cut such a delimiter in two, or the token that ends a step begin it; then the engine does not see it.
        self._ends_can_be_cut = any(len(end) > 1 for end in self._ends or ())

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that the engines stop at; those of whole responses first, because an engine names the first one that it finds."""
        return tuple(dict.fromkeys((*self.response_stop, *(self._ends or ()))))

    def read(self, problem: Problem, parent: Candidate, completion: Completion) -> Candidate:
        """The parent with a further step. It has finished, or has ended without (``Finish.LENGTH``, ``EMPTY``), or goes on."""
        ids, (finish, is_open) = completion.token_ids, self._ended_by(completion)
        count = stop_across(parent.response, ids, self._decode, self.response_stop)
        if count is not None:
            finish, is_open = Finish.STOP_STRING, False
        elif self._ends is None or self._ends_can_be_cut:
            count = first_boundary(self.tokenizer, parent.response, ids, self.kind)
            finish, is_open = (finish, is_open) if count is None else (None, False)
        count = len(ids) if count is None else count
        response = (*parent.response, *ids[:count])
        if finish is None and len(response) >= problem.budget:
            finish = Finish.LENGTH
        elif finish is None and not count:
            finish = Finish.EMPTY
        known = finish is None or finish.is_answer
        return Candidate(
            response, (*parent.logprobs, *completion.logprobs[:count]), finish, (self.state(problem, response, finish),) if known else (),
            parent.value, parent.step_values, is_open and finish is None, len(ids) - count,
        )  # fmt: skip

    def state(self, problem: Problem, response: TokenIds, finish: Finish | None) -> TokenIds:
        """What is valued: everything up to the last token, which is that of a stop string where one ended the step."""
        return (*problem.prompt_ids, *(response[:-1] if finish is Finish.EOS and not self.value_eos else response))

    def _ended_by(self, completion: Completion) -> tuple[Finish | None, bool]:
        if completion.stop_reason == StopReason.EOS:
            return Finish.EOS, False
        if completion.stop_reason == StopReason.STOP_STRING:
            return Finish.STOP_STRING if completion.stop_string in self.response_stop else None, False
        assert completion.stop_reason == StopReason.LENGTH, completion.stop_reason
        return None, True  # of the step, or of the response: ``read`` counts its tokens

    def _decode(self, ids: Any) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def first_boundary(tokenizer: Any, before: TokenIds, ids: Any, kind: str | StepSplitter) -> int | None:
    """How many of ``ids`` belong to the step that the first of them belongs to, in the text of both; None if all of them do."""
    steps_T = step_of_each_token(tokenizer, [*before, *ids], kind) if len(ids) else None
    if steps_T is None:
        return None
    later = np.flatnonzero(steps_T[len(before) :] > steps_T[len(before)])
    return int(later[0]) if len(later) else None
