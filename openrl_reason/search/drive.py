"""Many searches at once on one set of engines and one value model, without a barrier between problems.

A search is a generator: it yields what it wants sampled (``Expand``), is sent what came of it, with values, and returns its result. Its next
request leaves as soon as its own last one is complete, whatever the other searches wait for. What a search is sent does not depend on the order in
which completions and values arrive, so neither does its result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from openrl_reason.errors import WorkerError
from openrl_reason.workers.branching import Branch, Prefix
from openrl_reason.workers.rollout_config import Completion

TokenIds = tuple[int, ...]


class Sampler(Protocol):
    """Where continuations come from (``serving.PoolSampler``; a script in tests)."""

    def submit(self, prefix: Prefix, num_samples: int) -> str:
        """Asks for so many continuations of a prefix and returns ``prefix.key``. A sample's seed comes from the prefix and its number alone."""
        ...

    def poll(self) -> list[Branch]:
        """What has finished, in any order; may wait a moment for it."""
        ...

    @property
    def num_open(self) -> int:
        """Continuations that are still to come."""
        ...


class Valuer(Protocol):
    """Where values come from (``serving.BatchedValuer``; an oracle in tests)."""

    def submit(self, token_ids: TokenIds) -> Future[float]:
        """The value of the state after the last of these tokens, prompt included."""
        ...


class HasStates(Protocol):
    """Something read from a completion."""

    @property
    def states(self) -> Sequence[TokenIds]:
        """Token ids (prompt included) whose values are wanted; there may be none."""
        ...


@dataclass(frozen=True)
class Expand:
    """A search's request."""

    prefixes: Sequence[Prefix]
    """States to continue. Their keys differ: each has an identity of its own."""
    num_samples: int
    """Continuations of each."""
    read: Callable[[int, Completion], HasStates]
    """(place of the prefix, completion) -> what it means; called as each completion arrives, so that values are asked for at once."""


@dataclass(frozen=True)
class Expanded:
    """The answer."""

    found: list[list[Any]]
    """[prefix][sample] what ``Expand.read`` returned."""
    values: dict[TokenIds, float]
    """Value of each of their states; equal ones are valued once."""


Search = Generator[Expand, Expanded, Any]


@dataclass(eq=False)
class _Run:
    """A search under way."""

    place: int
    search: Search
    expand: Expand | None = None
    found: list[list[Any]] = field(default_factory=list)
    values: dict[TokenIds, float] = field(default_factory=dict)
    num_missing: int = 0
    """Completions and values that are still to come."""

    def take(self, place: int, sample: int, completion: Completion) -> list[TokenIds]:
        """Reads a completion; returns the states that nobody has asked for yet."""
        assert self.expand is not None and self.found[place][sample] is None, "a sample came twice"
        one = self.found[place][sample] = self.expand.read(place, completion)
        new = [state for state in dict.fromkeys(one.states) if state not in self.values]
        self.values |= dict.fromkeys(new, math.nan)
        self.num_missing += len(new) - 1
        return new


class _Driver:
    def __init__(self, sampler: Sampler, valuer: Valuer | None) -> None:
        self.sampler, self.valuer = sampler, valuer
        self.results: dict[int, Any] = {}
        self.num_running = 0
        self._owners: dict[str, tuple[_Run, int]] = {}
        self._valued: SimpleQueue[tuple[_Run, TokenIds, Future[float]]] = SimpleQueue()

    def advance(self, run: _Run, answer: Expanded | None) -> None:
        """Sends a search its answer (None at its start), and on their way what it asks for next."""
        try:
            run.expand = run.search.send(answer)
        except StopIteration as end:
            self.results[run.place] = end.value
            self.num_running -= 1
            return
        count = run.expand.num_samples
        run.found, run.values = [[None] * count for _ in run.expand.prefixes], {}
        run.num_missing = count * len(run.expand.prefixes)
        assert run.num_missing, "a search asks for nothing, and would wait for ever"
        for place, prefix in enumerate(run.expand.prefixes):
            key = self.sampler.submit(prefix, count)
            assert key not in self._owners, "two searches ask for one prefix: give their problems identities of their own"
            self._owners[key] = run, place

    def step(self) -> None:
        """Takes what is there; waits if there is nothing."""
        for branch in self.sampler.poll() if self.sampler.num_open else ():
            run, place = self._owners[branch.key]
            for state in run.take(place, branch.sample, branch.completion):
                assert self.valuer is not None, "a search wants values, and there is no value model"
                future = self.valuer.submit(state)
                future.add_done_callback(lambda done, run=run, state=state: self._valued.put((run, state, done)))
            self._go_on(run)
        wait = not self.sampler.num_open and bool(self.num_running)
        while self.num_running:
            try:
                run, state, future = self._valued.get(block=wait)
            except Empty:
                return
            run.values[state] = _finite(future.result())
            run.num_missing -= 1
            self._go_on(run)
            wait = False

    def _go_on(self, run: _Run) -> None:
        if run.num_missing:
            return
        assert run.expand is not None
        for prefix in run.expand.prefixes:
            del self._owners[prefix.key]
        self.advance(run, Expanded(run.found, run.values))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise WorkerError(f"the value model says {value}, which ranks nothing: its weights or its dtype are broken")
    return value


def run_searches(
    searches: Iterable[Search], sampler: Sampler, valuer: Valuer | None, *, concurrent: int = 0, tell: Callable[[int], None] = lambda num_done: None
) -> list[Any]:
    """What each search returns, in their order.

    Args:
        valuer: None if no search asks for values.
        concurrent: searches under way at a time; 0: all.
        tell: called with the number of finished searches whenever there is something new.

    Raises:
        WorkerError: a value is not finite, or what sampler or valuer raise.
    """
    driver, waiting = _Driver(sampler, valuer), deque(enumerate(searches))
    while waiting or driver.num_running:
        while waiting and (not concurrent or driver.num_running < concurrent):
            driver.num_running += 1
            driver.advance(_Run(*waiting.popleft()), None)
        if driver.num_running:
            driver.step()
        tell(len(driver.results))
    return [driver.results[place] for place in sorted(driver.results)]
