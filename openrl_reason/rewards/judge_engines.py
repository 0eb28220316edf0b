"""The engines that judges share: jobs of some requests each, answered in any order, as futures.

A ``RolloutPool`` is driven by one thread, and its completions go to whoever iterates over it. So a judge with a model of its own has a pool of
its own, which a thread of this class drives while the policy generates. A policy that judges itself has only its own pool, which the
collector is iterating over: there the jobs wait for ``flush``, when the collection is complete and the pool idle, and run in the caller's
thread.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openrl_reason.errors import WorkerError
from openrl_reason.rewards.base import RewardResult
from openrl_reason.workers.rollout_config import Completion, Request

if TYPE_CHECKING:
    from openrl_reason.workers.rollout import RolloutPool


@dataclass
class Job:
    """One response to be judged."""

    prepare: Callable[[], list[Request]]
    """Makes the requests (their ids are set afterwards); called in the thread that drives the pool, since tokenizers belong to one thread."""
    finish: Callable[[list[Completion]], RewardResult]
    """Makes the result out of the completions, in the order of the requests."""
    future: Future[RewardResult] = field(default_factory=Future)


@dataclass
class _Call:
    """A method of the pool, to be called by the thread that drives it."""

    method: str
    future: Future[None] = field(default_factory=Future)


class JobFailed(Exception):
    """Raised by ``Job.prepare`` with the result of a response that cannot be judged."""

    def __init__(self, result: RewardResult) -> None:
        super().__init__(result.detail)
        self.result = result


@dataclass
class _Open:
    """A job whose completions are under way."""

    job: Job
    completions: list[Completion | None]
    missing: int


class JudgeEngines:
    """A pool and the tokenizer of its model.

    Args:
        shared: the pool is the policy's and belongs to the caller: jobs run in ``flush``, and ``close`` leaves the pool open.
        seed: the run's; enters the seeds of judges that sample, and the fences around what is judged.
    """

    def __init__(self, pool: RolloutPool, tokenizer: Any, *, shared: bool = False, seed: int = 0) -> None:
        self.pool, self.tokenizer, self.shared, self.seed = pool, tokenizer, shared, seed
        self._jobs: queue.SimpleQueue[Job | _Call | None] = queue.SimpleQueue()
        self._open: dict[str, tuple[_Open, int]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if not shared:
            self._thread = threading.Thread(target=self._serve, name="judge", daemon=True)
            self._thread.start()

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus completion of the pool's engines."""
        return self.pool.config.max_model_len

    def submit(self, job: Job) -> Future[RewardResult]:
        """Queues a job. Its future fails if the engines fail for good, or are closed before."""
        self._put(job)
        return job.future

    def _put(self, entry: Job | _Call) -> None:
        with self._lock:  # so that nothing slips in behind what ends the thread
            if self._failure is None:
                self._jobs.put(entry)
            else:
                entry.future.set_exception(self._failure)

    def sleep(self) -> None:
        """Frees the GPUs of a pool of its own (on CPUs does nothing); when all futures are done. A shared pool is its owner's to put to sleep."""
        self._call("sleep")

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._call("wake")

    def _call(self, method: str) -> None:
        if not self.shared:
            call = _Call(method)
            self._put(call)
            call.future.result()

    def flush(self) -> None:
        """With a shared pool: judges what was submitted, and returns when that is done. Otherwise jobs are on their way already.

        Raises:
            WorkerError: the pool is in the middle of a ``generate``.
        """
        if not self.shared:
            return
        jobs = self._waiting()
        try:
            if jobs and self.pool.num_unfinished:
                raise WorkerError(f"the policy's engines have {self.pool.num_unfinished} requests of their own: judging by them must wait for those")
            for completion in self.pool.generate(self._requests(jobs)):
                self._arrived(completion)
        except BaseException as error:
            for job in jobs:
                _fail(job.future, error)
            self._open.clear()
            raise

    def close(self) -> None:
        """Ends the thread and a pool of its own; jobs that are not done fail. May be called twice."""
        self._end(WorkerError("the judge was closed before this response was judged"))
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=10)
            self.pool.close()

    # --- the thread that drives the pool ---

    def _serve(self) -> None:
        entries: list[Job | _Call] = []
        try:
            while self._failure is None:
                entries = self._waiting(block=not self._open)
                for call in (entry for entry in entries if isinstance(entry, _Call)):
                    getattr(self.pool, call.method)()
                    call.future.set_result(None)
                self.pool.submit(self._requests(entry for entry in entries if isinstance(entry, Job)))
                for completion in self.pool.poll():
                    self._arrived(completion)
        except Exception as error:  # noqa: BLE001  whoever waits for a future gets it
            self._end(error)
        assert self._failure is not None
        for entry in (*entries, *(opened.job for opened, _ in self._open.values())):
            _fail(entry.future, self._failure)

    def _waiting(self, *, block: bool = False) -> list[Job | _Call]:
        entries = [self._jobs.get()] if block else []
        with contextlib.suppress(queue.Empty):
            while True:
                entries.append(self._jobs.get_nowait())
        return [entry for entry in entries if entry is not None]

    def _requests(self, jobs: Iterable[Job]) -> list[Request]:
        """The requests of all jobs; those without any are done."""
        requests = []
        for job in jobs:
            number = next(self._numbers)
            try:
                own = job.prepare()
            except JobFailed as error:
                _resolve(job.future, error.result)
                continue
            except Exception as error:  # noqa: BLE001  one job's fault must not end the others
                _fail(job.future, error)
                continue
            opened = _Open(job, [None] * len(own), len(own))
            for index, request in enumerate(own):
                request.request_id = f"judge/{number}/{index}"
                self._open[request.request_id] = opened, index
            if not own:
                self._finish(opened)
            requests += own
        return requests

    def _arrived(self, completion: Completion) -> None:
        opened, index = self._open.pop(completion.request_id)
        opened.completions[index] = completion
        opened.missing -= 1
        if not opened.missing:
            self._finish(opened)

    @staticmethod
    def _finish(opened: _Open) -> None:
        try:
            result = opened.job.finish(opened.completions)
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits for this response
            _fail(opened.job.future, error)
            return
        _resolve(opened.job.future, result)

    def _end(self, failure: Exception) -> None:
        """From now on every job fails, those that wait included."""
        with self._lock:
            self._failure = self._failure or failure
            for entry in self._waiting():
                _fail(entry.future, self._failure)


def _resolve(future: Future, result: RewardResult) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        future.set_result(result)


def _fail(future: Future, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
