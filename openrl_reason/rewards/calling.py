"""How a reward function is called: its form is read off its parameters, and it gets what it asks for by name.

Runs in a function process, or in a thread for a Python callable. Imports the standard library and nothing heavy.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from openrl_reason.rewards.answers import failure, number, plain, read_batch, read_one
from openrl_reason.rewards.base import RewardResult, RewardSample

BATCH = ("queries", "prompts", "labels", "responses", "items", "steps", "num_tokens", "stop_reasons", "task_ids", "infos")
SAMPLE = ("prompt", "response", "query", "label", "gold", "item", "info", "steps", "num_tokens", "stop_reason", "task_id")
COLUMNS = ("prompts", "completions")
_GOLD_COLUMNS = ("gold", "labels", "label", "answer", "ground_truth", "solution")
"""Names under which a columns function finds the gold answer, where the item has no column of that name."""
_TELL_TALE = {"batch": {"queries", "prompts", "labels", "responses", "items", "infos"}, "sample": set(SAMPLE)}
Emit = Callable[[int, RewardResult], None]


class BoundFunction:
    """A reward function with its form and its fixed options. Raises ValueError when it cannot be called."""

    def __init__(self, function: Callable[..., Any], form: str = "auto", options: dict[str, Any] | None = None) -> None:
        self.function, self.options = function, dict(options or {})
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise ValueError("its parameters cannot be read; wrap it in a Python function") from None
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.names = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty and p.name not in self.options]
        self.form = self._find_form() if form == "auto" else form
        # OpenRLHF passes its three lists by position, so there they may have any names.
        self.by_position = self.form == "batch" and not set(BATCH) & set(self.names[:3]) and len(self.names) >= 3
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
        self._check()

    def _find_form(self) -> str:
        names = set(self.names)
        if "completions" in names:
            return "columns"
        for form, tell_tale in _TELL_TALE.items():
            if names & tell_tale:
                return form
        if len(self.needed) == 3:
            return "batch"
        shown = ", ".join(self.names) + (", **kwargs" if self.takes_all else "")
        raise ValueError(
            f"its parameters ({shown.strip(', ')}) do not tell how to call it; use (queries, prompts, labels, **kwargs) for a whole batch,"
            " some of prompt, response, gold, item, steps for one response, or set form"
        )

    def _check(self) -> None:
        unknown = [name for name in self.options if name not in self.names and not self.takes_all]
        if unknown:
            raise ValueError(f"it has no parameter {unknown[0]!r}, which options sets; it has {', '.join(self.names)}")
        if self.form == "columns" and "completion_ids" in self.needed:
            raise ValueError("it needs completion_ids; rewards here see text, not token ids")
        if self.form == "batch":
            missing = [name for name in self.needed[3 if self.by_position else 0 :] if name not in BATCH]
            if missing:
                raise ValueError(f"nothing fills its parameter {missing[0]!r}; a batched function can ask for {', '.join(BATCH)}")

    def _chosen(self, values: dict[str, Any], what: str) -> dict[str, Any]:
        """Of ``values`` those asked for, and the options."""
        values = values | self.options
        if missing := [name for name in self.needed if name not in values]:
            raise TypeError(f"nothing fills its parameter {missing[0]!r}: {what} has {', '.join(values)}")
        return values if self.takes_all else {name: values[name] for name in self.names if name in values}

    def call_sample(self, sample: RewardSample) -> Any:
        """One response."""
        item = sample.item
        values = {**item.info, **dict(zip(SAMPLE, (
            sample.prompt, sample.response, sample.query, item.gold, item.gold, item, item.info, list(sample.steps), sample.num_tokens,
            sample.stop_reason, item.task_id,
        ), strict=True))}  # fmt: skip
        return self.function(**self._chosen(values, "a response"))

    def call_batch(self, samples: Sequence[RewardSample]) -> Any:
        """OpenRLHF's form, and what else it asks for."""
        items = [sample.item for sample in samples]
        values = dict(zip(BATCH, (
            [s.query for s in samples], [s.prompt for s in samples], [item.gold for item in items], [s.response for s in samples], items,
            [list(s.steps) for s in samples], [s.num_tokens for s in samples], [s.stop_reason for s in samples],
            [item.task_id for item in items], [item.info for item in items],
        ), strict=True))  # fmt: skip
        if not self.by_position:
            return self.function(**self._chosen(values, "a batch"))
        first = [values.pop(name) for name in BATCH[:3]]
        rest = values | self.options
        return self.function(*first, **(rest if self.takes_all else {name: rest[name] for name in self.names[3:] if name in rest}))

    def call_columns(self, samples: Sequence[RewardSample], logs: dict[str, Any]) -> Any:
        """TRL's form: the columns of the items beside prompts and completions."""
        infos = [sample.item.info for sample in samples]
        gold = [sample.item.gold for sample in samples]
        values = {name: gold for name in _GOLD_COLUMNS if name != "solution" or "solution" in self.names}
        for name in dict.fromkeys(name for info in infos for name in info):
            values[name] = [info.get(name) for info in infos]
        values |= {"prompts": [s.prompt for s in samples], "completions": [s.response for s in samples]}
        values |= {"log_metric": logs.__setitem__, "log_extra": logs.__setitem__}
        return self.function(**self._chosen(values, "a batch"))


class Caller:
    """Calls a function for samples and reports each result as soon as there is one. Used by one thread."""

    def __init__(self, bound: BoundFunction, deadline_s: float, concurrency: int) -> None:
        self.bound, self.deadline_s, self.concurrency = bound, deadline_s, concurrency
        self._runner = asyncio.Runner()  # one event loop for all calls: a client that the user's module keeps belongs to its loop

    def run(self, samples: Sequence[RewardSample], emit: Emit) -> None:
        """One result for each of ``samples``; nothing that the function does escapes, except by ending the process."""
        if self.bound.form != "sample":
            for index, result in enumerate(self._batch(samples)):
                emit(index, result)
        elif self.bound.is_async:
            self._runner.run(self._together(samples, emit))
        else:
            for index, sample in enumerate(samples):
                emit(index, self._one(sample))

    def _finished(self, value: Any) -> Any:
        async def wait() -> Any:
            return await value

        return self._runner.run(wait()) if inspect.isawaitable(value) else value

    def _batch(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        logs: dict[str, Any] = {}
        steps = [len(sample.steps) for sample in samples]
        try:
            if self.bound.form == "batch":
                return read_batch(self._finished(self.bound.call_batch(samples)), steps)
            returned = self._finished(self.bound.call_columns(samples, logs))
            return read_batch({"rewards": returned, "extra_logs": logs}, steps, none_skips=True)
        except BaseException as error:  # noqa: B036 - the function may raise anything, SystemExit included
            return [as_failure(error) for _ in samples]

    def _one(self, sample: RewardSample) -> RewardResult:
        try:
            return read_one(self._finished(self.bound.call_sample(sample)), len(sample.steps))
        except BaseException as error:  # noqa: B036 - as above
            return as_failure(error)

    async def _together(self, samples: Sequence[RewardSample], emit: Emit) -> None:
        places = asyncio.Semaphore(self.concurrency)

        async def one(index: int, sample: RewardSample) -> None:
            async with places:
                limit = asyncio.timeout(self.deadline_s)
                try:
                    async with limit:
                        result = read_one(await self.bound.call_sample(sample), len(sample.steps))
                except BaseException as error:  # noqa: B036 - as above
                    late = limit.expired() and isinstance(error, TimeoutError)
                    result = failure("timeout", f"no reward within {self.deadline_s:g} s") if late else as_failure(error)
            emit(index, result)

        await asyncio.gather(*(one(index, sample) for index, sample in enumerate(samples)))

    def close(self) -> None:
        """Closes the event loop."""
        self._runner.close()


def as_failure(error: BaseException) -> RewardResult:
    """What an exception means: the status, and the line that raised."""
    if isinstance(error, MemoryError):
        return failure("memory", "it ran out of memory")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return failure("error", f"{type(error).__name__}: {str(error)[:500]}{place}")


__all__ = ["BATCH", "COLUMNS", "SAMPLE", "BoundFunction", "Caller", "as_failure", "number", "plain"]
