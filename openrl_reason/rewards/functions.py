"""Reward functions of users, as a source of rewards: called in processes that are killed at a deadline, or in a thread for a callable.

A call that hangs, raises, returns nonsense or ends its process costs its own samples their reward: they get a status with the reason, the
process is replaced, and everything else goes on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.rewards.answers import failure
from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.rewards.config import RewardConfig, split_function
from openrl_reason.rewards.function_process import FunctionSettings, Late, Lost, ProcessPlace, ThreadPlace, Unloadable, encode

MAX_FAILED_STARTS = 3
MAX_LEFT_BEHIND = 16
"""Threads that a Python callable may leave hanging before the run stops."""
SAMPLES_PER_MESSAGE = 32

Place = ProcessPlace | ThreadPlace


@dataclass
class _Request:
    sample: RewardSample
    encoded: str
    future: Future[RewardResult]


class FunctionRewards:
    """Rewards by one function.

    Batched functions are called with up to ``batch_size`` samples, as they come, siblings or not; a partly filled batch waits for
    :meth:`flush`. The first process starts, and imports the function, here: what cannot be loaded is a ConfigError now.
    """

    def __init__(self, make_place: Callable[[], Place], what: str, *, workers: int, batch_size: int, concurrency: int) -> None:
        self._shared = _Shared(make_place, what, workers)
        first = self._shared.start_place()
        if first is None:
            raise WorkerError(self._shared.broken)
        self.form, self.is_async = first.form, first.is_async
        self._shared.spare.append(first)
        self._shared.fills_batches = self.form != "sample"
        self._shared.all_or_nothing = self._shared.fills_batches or self.is_async
        self._shared.batch_size = batch_size if self._shared.fills_batches else 4 * concurrency if self.is_async else SAMPLES_PER_MESSAGE
        self._encodes = isinstance(first, ProcessPlace)
        self._finalizer = weakref.finalize(self, _Shared.close, self._shared)

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response. The future fails with WorkerError if processes do not start any more."""
        request = _Request(sample, encode(sample) if self._encodes else "", Future())
        self._shared.put(request)
        return request.future

    def flush(self) -> None:
        """Start the last batch."""
        self._shared.flush()

    def metrics(self) -> dict[str, Any]:
        """Calls, seconds in them, and processes (or threads) that had to be replaced, since the last time."""
        with self._shared.changed:
            counts, self._shared.counts = self._shared.counts, Counter()
        return {name: float(counts[name]) for name in ("calls", "seconds", "restarts")}

    def close(self) -> None:
        """End the processes; what still waits fails. May be called twice."""
        self._finalizer()


class _Shared:
    """Queue and worker threads. Held by the threads, so that the source itself can be garbage collected."""

    def __init__(self, make_place: Callable[[], Place], what: str, workers: int) -> None:
        self.make_place, self.what, self.workers = make_place, what, workers
        self.fills_batches, self.all_or_nothing, self.batch_size = False, False, 1
        self.owner = os.getpid()
        self.changed = threading.Condition()
        self.queue: deque[_Request] = deque()
        self.due = 0  # so many at the head of the queue may start
        self.counts: Counter[str] = Counter()
        self.left_behind = 0
        self.closed, self.broken = False, ""
        self.spare: list[Place] = []
        self.places: set[Place] = set()
        self.threads: list[threading.Thread] = []

    def put(self, request: _Request) -> None:
        with self.changed:
            if self.closed:
                raise RuntimeError(f"{self.what} is closed")
            if self.broken:
                raise WorkerError(self.broken)
            self.queue.append(request)
            full = len(self.queue) // self.batch_size * self.batch_size if self.fills_batches else len(self.queue)
            self._allow(max(self.due, full))

    def flush(self) -> None:
        with self.changed:
            self._allow(len(self.queue))

    def _allow(self, due: int) -> None:
        self.due = due
        if due and len(self.threads) < self.workers:
            thread = threading.Thread(target=self._serve, name=f"rewards-{len(self.threads)}", daemon=True)
            self.threads.append(thread)
            thread.start()
        self.changed.notify()

    def take(self) -> list[_Request]:
        """Wait for work: a batch, or an even share of the queue. Empty when closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.due or self.closed)
            if self.closed:
                return []
            share = self.due if self.fills_batches else max(1, self.due // self.workers)
            batch = [self.queue.popleft() for _ in range(min(share, self.batch_size))]
            self.due -= len(batch)
            self.changed.notify()
            return batch

    def give_back(self, requests: Sequence[_Request]) -> None:
        with self.changed:
            self.queue.extendleft(reversed(requests))
            self.due += len(requests)
            self.changed.notify_all()

    def _serve(self) -> None:
        """The life of one worker thread. An error that nobody foresaw must not leave futures waiting for ever."""
        place: Place | None = None
        batch: list[_Request] = []
        try:
            while batch := self.take():
                if place is None:
                    place = self._spare_place() or self.start_place()
                if place is None:
                    break
                unfinished = self._call(place, batch)
                if unfinished is not None:
                    self.end_place(place)
                    place = None
                    self.give_back(unfinished)
        except WorkerError as error:
            self.broken = str(error)
        except BaseException as error:
            self.broken = self.broken or f"{self.what}: {error!r}"
            raise
        finally:
            if place is not None:
                self.end_place(place)
            self._abandon(batch)

    def _spare_place(self) -> Place | None:
        with self.changed:
            return self.spare.pop() if self.spare else None

    def start_place(self) -> Place | None:
        """A place that has loaded the function; None if that cannot be had, with the reason in ``broken``. Raises ConfigError the first time."""
        reason = ""
        for attempt in range(MAX_FAILED_STARTS):
            place = None
            try:
                place = self.make_place()
                with self.changed:
                    self.places.add(place)
                    if self.closed:
                        place.kill()
                place.start()
                return place
            except Unloadable as error:
                reason = f"cannot be loaded: {error}"
                if not self.threads:  # at the very start: a mistake in the settings
                    self.end_place(place)
                    raise ConfigError(f"{self.what} {reason}") from None
            except Late:  # it would be as late again
                self.end_place(place)
                if not self.threads:
                    raise ConfigError(f"{self.what} did not load in time: see --reward.load_timeout_s") from None
                self.broken = f"the process of {self.what} did not load in time (--reward.load_timeout_s)"
                return None
            except Lost:
                reason = "ended while it was loading; --reward.memory_mb may be too small, see standard error"
            except OSError as error:  # no memory, processes or file descriptors left: perhaps only for a moment
                reason = f"could not be started: {error}"
                time.sleep(0.2)
            self.end_place(place)
            if self.closed:
                return None
            if attempt + 1 == MAX_FAILED_STARTS:
                self.broken = f"the process of {self.what} {reason} ({MAX_FAILED_STARTS} attempts)"
        return None

    def end_place(self, place: Place | None) -> str:
        if place is None:
            return ""
        ended = place.end()
        with self.changed:
            self.places.discard(place)
        return ended

    def _call(self, place: Place, batch: list[_Request]) -> list[_Request] | None:
        """Score one batch. None when all went well; else the place is lost, and what is to be tried again is returned."""
        started, waiting = time.monotonic(), dict(enumerate(batch))
        failed: RewardResult | None = None
        overflowed = False
        try:
            place.send([request.encoded for request in batch], [request.sample for request in batch])
            while waiting:
                index, result = place.receive()
                self._finish(waiting.pop(index), result)
                overflowed |= result.status == "memory" and place.can_be_killed  # such a process ends itself
                if overflowed and not self.all_or_nothing:
                    break
        except Late:
            failed = failure("timeout", f"no reward within {place.settings.deadline_s:g} s")
            self.left_behind += not place.can_be_killed
        except Lost:
            failed = failure("crashed", f"the process of the function {self.end_place(place)}")
        if failed is None and not overflowed:
            with self.changed:
                self.counts.update(calls=1 if self.fills_batches else len(batch), seconds=time.monotonic() - started)
            return None
        if self.closed:
            self._abandon(list(waiting.values()))
            return []
        if self.left_behind > MAX_LEFT_BEHIND:
            raise WorkerError(f"{self.what}: {self.left_behind} calls hang in threads, which cannot be ended; give it by path, to run in processes")
        return self._lost(waiting, failed, started)

    def _lost(self, waiting: dict[int, _Request], failed: RewardResult | None, started: float) -> list[_Request]:
        """Of a batch, or of calls under way together, nobody knows which is to blame: all fail. Of calls in a row it is the first unfinished."""
        with self.changed:
            self.counts.update(restarts=1, calls=1, seconds=time.monotonic() - started)
        rest = list(waiting.values())
        if failed is None:
            return rest
        blamed = rest if self.all_or_nothing else rest[:1]
        for request in blamed:
            self._finish(request, failed)
        return rest[len(blamed) :]

    def _finish(self, request: _Request, result: RewardResult) -> None:
        with contextlib.suppress(InvalidStateError):  # closed a moment ago
            request.future.set_result(result)

    def _abandon(self, requests: Sequence[_Request]) -> None:
        """Closed or broken: nothing is left waiting."""
        with self.changed:
            if not (self.closed or self.broken):
                return
            waiting = [*requests, *self.queue]
            self.queue.clear()
            self.due = 0
        for request in waiting:
            with contextlib.suppress(InvalidStateError):
                request.future.set_exception(WorkerError(self.broken or f"{self.what} was closed before this response had its reward"))

    def close(self) -> None:
        if os.getpid() != self.owner:  # a forked child's exit must not end its parent's processes
            return
        with self.changed:
            if self.closed:
                return
            self.closed = True
            places = list(self.places)
            spare, self.spare = self.spare, []
            self.changed.notify_all()
        for place in places:
            place.kill()
        for place in spare:
            self.end_place(place)
        self._abandon(())
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(5.0)


def function_rewards(
    source: str, config: RewardConfig, *, form: str = "auto", options: dict[str, Any] | None = None, deadline_s: float | None = None
) -> FunctionRewards:
    """Rewards by ``path/to/file.py:function`` or ``module:function``, in processes. Raises ConfigError if it cannot be loaded."""
    place, function = split_function(source)
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(f"--reward: there is no file {place} (of the reward function {source})")
        place = str(Path(place).resolve())
    settings = FunctionSettings(
        place, function, form, dict(options or {}), deadline_s or config.deadline_s, config.load_timeout_s, config.memory_mb, config.concurrency
    )
    return FunctionRewards(
        lambda: ProcessPlace(settings), f"the reward function {source}",
        workers=config.processes, batch_size=config.batch_size, concurrency=config.concurrency,
    )  # fmt: skip


def callable_rewards(function: Callable[..., Any], config: RewardConfig, *, form: str = "auto") -> FunctionRewards:
    """Rewards by a Python callable, in a thread of this process. Raises ConfigError if it is none, or cannot be called."""
    if not callable(function):
        raise ConfigError(f"reward_function is {function!r}: give a function such as f(queries, prompts, labels, **kwargs) or f(response, gold)")
    settings = FunctionSettings("", "", form, {}, config.deadline_s, config.load_timeout_s, 0, config.concurrency)
    name = getattr(function, "__qualname__", type(function).__name__)
    return FunctionRewards(
        lambda: ThreadPlace(function, settings), f"reward_function {name}",
        workers=1, batch_size=config.batch_size, concurrency=config.concurrency,
    )  # fmt: skip
