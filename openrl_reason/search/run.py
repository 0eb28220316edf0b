"""A search on an evaluation set: its problems, what each method finds, and what that cost."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openrl_reason.evaluation.sets import EvalSet
from openrl_reason.search.beam import BeamSettings, beam_search
from openrl_reason.search.candidates import Candidate, Outcome, Problem, StepReader
from openrl_reason.search.drive import Search, run_searches
from openrl_reason.search.sampling import ResponseValue, outcome_of, sample_responses
from openrl_reason.search.serving import BatchedValuer, PolledPool, PoolSampler
from openrl_reason.workers.rollout_config import SamplingConfig

PROGRESS_SECONDS = 30.0


@dataclass(frozen=True)
class Cost:
    """What was spent on a set."""

    generated_tokens: int
    """Of all that was sampled, what was discarded or pruned included."""
    tokens_per_second: float
    """By the engines, while this was sampled; NaN where a search that was cut short had left everything. Numbers of samples of one run share it."""
    seconds: float
    """Those of ``tokens_per_second``."""
    value_calls: int = 0
    """Calls of the critic."""
    states_valued: int = 0
    """States that it valued."""
    value_tokens: int = 0
    """Their tokens, prompts included."""


@dataclass(frozen=True)
class Found:
    """Outcomes [I] of a set's problems, and their cost."""

    outcomes: list[Outcome]
    cost: Cost
    num_samples: int = 0
    """Plain samples of each problem, where there are any."""


class SearchRun:
    """Searches one set on one pool. ``config`` is a ``SearchConfig``; ``valuer`` None: no method asks for values."""

    def __init__(self, config: Any, eval_set: EvalSet, tokenizer: Any, pool: PolledPool, valuer: BatchedValuer | None) -> None:
        self.config, self.set, self.tokenizer, self.pool, self.valuer = config, eval_set, tokenizer, pool, valuer
        self.problems = problems_of(eval_set, tokenizer, config.rollout.max_model_len)
        self._plain: list[list[Candidate]] = [[] for _ in self.problems]
        self._plain_costs: list[Cost] = []

    def beam(self, settings: BeamSettings) -> Found:
        """Beam search."""
        reader = step_reader(self.config, self.set, self.tokenizer)
        searches = [beam_search(problem, settings, reader) for problem in self.problems]
        sampling = replace(self.set.sampling, stop=reader.stop)
        outcomes, cost = self._run(searches, sampling, f"beam-{settings.beams}")
        return Found(outcomes, replace(cost, generated_tokens=sum(outcome.counts["generated_tokens"] for outcome in outcomes)))

    def samples(self, count: int) -> Found:
        """``count`` plain samples of each problem; further ones are sampled, those that are there are kept."""
        known = len(self._plain[0])
        if count > known:
            worth = None
            if self.config.method == "best_of_n":
                worth = ResponseValue(self.tokenizer, self.set.task.step_kind, self.config.aggregate, self.config.value_after_eos)
            more, cost = self._run_plain(range(known, count), self.set.sampling, "plain", worth)
            self._plain_costs.append(cost)
            for own, new in zip(self._plain, more, strict=True):
                own += new
        outcomes = [outcome_of(own[:count]) for own in self._plain]
        seconds = math.fsum(cost.seconds for cost in self._plain_costs)
        tokens = math.fsum(cost.tokens_per_second * cost.seconds for cost in self._plain_costs)
        cost = Cost(
            sum(outcome.counts["generated_tokens"] for outcome in outcomes), _rate(tokens, seconds), seconds,
            sum(cost.value_calls for cost in self._plain_costs), sum(cost.states_valued for cost in self._plain_costs),
            sum(cost.value_tokens for cost in self._plain_costs),
        )  # fmt: skip
        return Found(outcomes, cost, count)

    def matching(self, tokens: int) -> Found:
        """Plain samples of about ``tokens`` tokens in all, the same number n for each problem: the n that comes nearest (of two the smaller)."""
        most = 1 if self.set.sampling.temperature == 0 else None  # further ones would be the same
        totals = self._totals(1)
        while totals[-1] < tokens and (most is None or len(totals) < most) and totals[-1]:
            mean = totals[-1] / len(totals)
            totals = self._totals(len(totals) + max(1, math.ceil((tokens - totals[-1]) / mean)))
        return self.samples(nearest(totals, tokens))

    def greedy(self) -> Found:
        """One greedy response to each problem."""
        sampling = replace(self.set.sampling, temperature=0.0, top_p=1.0, top_k=-1)
        samples, cost = self._run_plain(range(1), sampling, "greedy", None)
        outcomes = [outcome_of(own) for own in samples]
        return Found(outcomes, replace(cost, generated_tokens=sum(outcome.counts["generated_tokens"] for outcome in outcomes)), 1)

    def _totals(self, count: int) -> list[int]:
        """Tokens of the first 1, 2, ... samples of all problems, at least ``count`` of them."""
        self.samples(count)
        rounds = zip(*self._plain, strict=True)
        totals, total = [], 0
        for one in rounds:
            total += sum(len(sample.response) for sample in one)
            totals.append(total)
        return totals

    def _run_plain(self, numbers: range, sampling: SamplingConfig, label: str, worth: ResponseValue | None) -> tuple[list[list[Candidate]], Cost]:
        reader = StepReader(self.tokenizer, "response", stop=sampling.stop)
        searches = [sample_responses(problem, numbers, reader, worth) for problem in self.problems]
        return self._run(searches, sampling, label)

    def _run(self, searches: Sequence[Search], sampling: SamplingConfig, label: str) -> tuple[list[Any], Cost]:
        before = Counter(self.valuer.counts) if self.valuer is not None else Counter()
        tokens, started = self.pool.stats()["generated_tokens"], time.perf_counter()
        sampler = PoolSampler(self.pool, sampling, (self.config.seed, "search", label))
        tell = _progress(label, len(searches))
        results = run_searches(searches, sampler, self.valuer, concurrent=self.config.concurrent, tell=tell)
        seconds = time.perf_counter() - started
        used = Counter(self.valuer.counts if self.valuer is not None else {})
        used.subtract(before)
        rate = _rate(self.pool.stats()["generated_tokens"] - tokens, seconds)
        return results, Cost(0, rate, seconds, used["calls"], used["states"], used["tokens"])


def step_reader(config: Any, eval_set: EvalSet, tokenizer: Any) -> StepReader:
    """What reads the steps of a beam search."""
    return StepReader(
        tokenizer, eval_set.task.step_kind, stop=eval_set.sampling.stop, step_tokens=config.step_tokens, value_eos=config.value_after_eos
    )


def problems_of(eval_set: EvalSet, tokenizer: Any, max_model_len: int) -> list[Problem]:
    """The set's items as problems. An item that is there twice is two problems."""
    encode, budget = eval_set.task.encode_prompt, eval_set.sampling.max_new_tokens
    return [
        Problem.fitting(f"{eval_set.name}/{place}/{item.task_id}", encode(item, tokenizer), budget, max_model_len)
        for place, item in enumerate(eval_set.items)
    ]


def nearest(totals: Sequence[int], wanted: int) -> int:
    """How many samples make a total nearest to ``wanted``, given the totals of 1, 2, ... of them; of two equally near the smaller number."""
    return min(range(1, len(totals) + 1), key=lambda count: (abs(totals[count - 1] - wanted), count))


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if tokens else math.nan


def _progress(label: str, total: int) -> Callable[[int], None]:
    """A line now and then."""
    told = [time.monotonic()]

    def tell(num_done: int) -> None:
        if time.monotonic() - told[0] > PROGRESS_SECONDS:
            told[0] = time.monotonic()
            print(f"{label}: {num_done} of {total} items", flush=True)

    return tell
