"""Several rewards in one: the weighted sum, the worth of failures, and the numbers about each."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import Any

from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import WorkerError
from openrl_reason.rewards.answers import failure, is_skipped
from openrl_reason.rewards.base import Rewarder, RewardResult, RewardSample
from openrl_reason.rewards.config import FAILURES, RewardConfig, RewardTermConfig
from openrl_reason.tasks.graders import STATUSES


class CombinedRewards:
    """The weighted sum of its terms.

    A term without an answer, or one that failed, counts with the worth of its status; where that is null the sample has no reward. The
    sample's status is that of its first failed required term, else no_answer if a required term found none, else ok. A failed term with
    ``required=False`` is left out of the sum, as is one that does not apply. Step rewards are added step by step; a term that gives one
    number adds it to the last step.
    """

    def __init__(self, config: RewardConfig, terms: Sequence[tuple[RewardTermConfig, Rewarder]]) -> None:
        self.config, self._terms = config, list(terms)
        self._lock = threading.Lock()
        self._tally = _Tally()

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response at every term."""
        combined: Future[RewardResult] = Future()
        if self.config.truncated is not None and sample.stop_reason == StopReason.LENGTH:
            unfinished = RewardResult(self.config.truncated, "no_answer", detail="cut off by the length limit")
            with self._lock:
                self._tally.add(unfinished, {})
            combined.set_result(unfinished)
            return combined
        parts = [source.submit(sample) for _, source in self._terms]
        left, lock = len(parts), threading.Lock()

        def one_is_done(_: Future[RewardResult]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = not left
            if last:
                self._finish(parts, sample, combined)

        for part in parts:
            part.add_done_callback(one_is_done)
        return combined

    def _finish(self, parts: list[Future[RewardResult]], sample: RewardSample, combined: Future[RewardResult]) -> None:
        try:
            results = [part.result() for part in parts]
            result = combine(self.config, [term for term, _ in self._terms], results, len(sample.steps))
            with self._lock:
                self._tally.add(result, {term.label: part.status for (term, _), part in zip(self._terms, results, strict=True)})
        except BaseException as error:  # noqa: B036 - it belongs to whoever waits for the future, a cancellation included
            with contextlib.suppress(InvalidStateError):
                combined.set_exception(error if isinstance(error, Exception) else WorkerError(f"a reward was cancelled: {error!r}"))
            return
        with contextlib.suppress(InvalidStateError):
            combined.set_result(result)

    def with_own_numbers(self) -> CombinedRewards:
        """The same rewards for another kind of responses (the Monte-Carlo rollouts beside the trajectories): same sources, numbers apart.

        What the sources themselves count (calls, seconds, restarts) stays in the metrics of this one, which also closes them.
        """
        return _Shared(self.config, self._terms)

    def flush(self) -> None:
        """Start every term's last batch."""
        for _, source in self._terms:
            source.flush()

    def metrics(self) -> dict[str, Any]:
        """Rates of statuses, and each term's mean, standard deviation, rate of failures and own numbers, since the last time."""
        with self._lock:
            tally, self._tally = self._tally, _Tally()
        numbers = tally.metrics([term.label for term, _ in self._terms])
        for term, source in self._terms:
            own = source.metrics()
            numbers |= {name if name.startswith("reward/") else f"reward/{term.label}/{name}": value for name, value in own.items()}
        return numbers

    def close(self) -> None:
        """Close every term."""
        for _, source in self._terms:
            source.close()


class _Shared(CombinedRewards):
    def metrics(self) -> dict[str, Any]:
        with self._lock:
            tally, self._tally = self._tally, _Tally()
        return tally.metrics([term.label for term, _ in self._terms])

    def close(self) -> None:
        """The sources are their owner's to close."""


def combine(config: RewardConfig, terms: Sequence[RewardTermConfig], results: Sequence[RewardResult], num_steps: int) -> RewardResult:
    """One result out of the terms' results."""
    verdict, total, by_step = None, [], [[] for _ in range(num_steps)]
    scores: dict[str, float] = {}
    logs: dict[str, float] = {}
    parsed, applies, gives_steps = None, False, False
    for term, result in zip(terms, results, strict=True):
        score = result.score if result.status == "ok" else config.worth(result.status)
        score = math.nan if score is None else score
        scores[term.label] = math.nan if result.status in FAILURES else score
        logs |= {f"{term.label}/{name}": value for name, value in result.logs.items()}
        parsed = result.parsed if parsed is None else parsed
        if is_skipped(result) or (not term.required and (result.status in FAILURES or math.isnan(score))):
            continue
        applies = True
        if result.status in FAILURES and (verdict is None or verdict[1].status == "no_answer"):
            verdict = term, result
        elif result.status == "no_answer" and term.required:
            verdict = verdict or (term, result)
        total.append(term.weight * score)
        gives_steps = gives_steps or (result.status == "ok" and result.step_scores is not None)
        if result.status == "ok" and result.step_scores is not None:
            for step, value in zip(by_step, result.step_scores, strict=True):
                step.append(term.weight * value)
        elif by_step:
            by_step[-1].append(term.weight * score)
    if not applies:
        nothing = failure("error", "no term of the reward applies to this response")
        left_out = next((result for result in results if result.status in FAILURES), nothing)
        return replace(left_out, score=_or_nan(config.worth(left_out.status)), parsed=parsed, terms=scores, logs=logs)
    status, detail = ("ok", "") if verdict is None else (verdict[1].status, verdict[1].detail)
    if detail and len(terms) > 1:
        detail = f"{verdict[0].label}: {detail}"
    score = math.fsum(total)
    steps = tuple(math.fsum(step) for step in by_step) if gives_steps and math.isfinite(score) else None
    return RewardResult(score, status, parsed, detail, steps, scores, logs)


def _or_nan(worth: float | None) -> float:
    return math.nan if worth is None else worth


class _Tally:
    """Numbers since the last report. Sums are exact, so that they do not depend on the order in which results arrive."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, result: RewardResult, statuses: dict[str, str]) -> None:
        self.statuses[result.status] += 1
        self.failed.update(name for name, status in statuses.items() if status in FAILURES)
        for name, score in result.terms.items():
            if math.isfinite(score):
                self.values[f"reward/{name}"].append(score)
        for name, value in result.logs.items():
            label, _, rest = name.partition("/")
            self.values[f"reward/{label}/log/{rest}"].append(value)

    def metrics(self, labels: Sequence[str]) -> dict[str, float]:
        total = self.statuses.total()
        if not total:
            return {}
        numbers = {f"reward/{status}_rate": self.statuses[status] / total for status in STATUSES if status != "ok"}
        numbers["reward/failed_rate"] = sum(self.statuses[status] for status in FAILURES) / total
        for label in labels:
            scores = self.values.pop(f"reward/{label}", [])
            mean = math.fsum(scores) / len(scores) if scores else math.nan
            numbers[f"reward/{label}/mean"] = mean
            numbers[f"reward/{label}/std"] = math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / len(scores)) if scores else math.nan
            numbers[f"reward/{label}/failed_rate"] = self.failed[label] / total
        return numbers | {name: math.fsum(values) / len(values) for name, values in self.values.items()}
