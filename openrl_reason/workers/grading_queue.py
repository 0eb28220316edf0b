"""The queue of a grader pool, the threads that serve it, and the counts. See :mod:`openrl_reason.workers.grading`."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.tasks.graders import GradeResult
from openrl_reason.workers.grading_process import Limits, Template, TemplateLost, Worker, WorkerDied, WorkerLate

MAX_BATCH = 32
MAX_BATCH_CHARS = 1 << 18
MAX_FAILED_STARTS = 3


@dataclass
class Request:
    text: str
    gold: str
    kind: str
    future: Future[GradeResult]

    def num_chars(self) -> int:
        return len(self.text) + len(self.gold)


class GradingQueue:
    """Queue, counters and worker threads. Held by the threads, so that the pool object itself can be garbage collected."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)
        self.room = threading.Condition(self.lock)
        self.on_room: list[Callable[[], None]] = []
        self.requests: deque[Request] = deque()
        self.num_chars = 0
        self.counts: Counter[str] = Counter()
        self.num_respawns = self.num_retired = 0
        self.closed = False
        self.start_failure = ""
        self.broken: str | None = None
        self.threads: list[threading.Thread] = []
        self.workers: set[Worker] = set()
        self.template = Template(limits)
        self.kinds: list[str] = []

    # --- the side of those who submit

    def put(self, request: Request, timeout_s: float | None) -> None:
        """Append; wait while the queue is full. Raises queue.Full after ``timeout_s``, RuntimeError or WorkerError if the pool has ended."""
        with self.lock:
            # A callback of a future runs in the thread that makes room: it must not wait for itself.
            if threading.current_thread() not in self.threads:
                if not self.room.wait_for(lambda: self.closed or self.broken or not self.is_full(), timeout_s):
                    raise queue.Full(f"the grader pool has {len(self.requests)} answers waiting, and no room came within {timeout_s:g} s")
            self._append(request)

    def put_or_call(self, request: Request, on_room: Callable[[], None]) -> bool:
        """Append if there is room. If not, ``on_room`` is called once, from some thread, when it is worth another try."""
        with self.lock:
            if self.is_full() and not (self.closed or self.broken):
                self.on_room.append(on_room)
                return False
            self._append(request)
            return True

    def is_full(self) -> bool:
        return len(self.requests) >= self.limits.max_queued or self.num_chars >= self.limits.max_queued_chars

    def _append(self, request: Request) -> None:
        if self.closed:
            raise RuntimeError("this GraderPool is closed")
        if self.broken:
            raise WorkerError(self.broken)
        self.requests.append(request)
        self.num_chars += request.num_chars()
        if ":" not in request.kind and request.kind not in self.kinds:  # one of this library's: for the template to load
            self.kinds.append(request.kind)
        if len(self.threads) < self.limits.num_workers:
            thread = threading.Thread(target=self._serve, name=f"grader-{len(self.threads)}", daemon=True)
            self.threads.append(thread)
            thread.start()
        self.work.notify()

    def _tell_of_room(self, always: bool = False) -> None:
        """Wake those who wait, all at once, when a quarter is free: not a thousand of them for every answer that leaves."""
        limits = self.limits
        if always or (len(self.requests) <= limits.max_queued * 3 // 4 and self.num_chars <= limits.max_queued_chars * 3 // 4):
            self.room.notify_all()
            waiting, self.on_room = self.on_room, []
            for call in waiting:
                call()

    def finish(self, request: Request, result: GradeResult) -> None:
        with self.lock:
            self.counts[result.status] += 1
        with contextlib.suppress(InvalidStateError):  # the pool was closed a moment ago
            request.future.set_result(result)

    # --- the side of the worker threads

    def _take(self) -> list[Request]:
        """Wait for work; an even share of the queue within MAX_BATCH and MAX_BATCH_CHARS. Empty when the pool is closed."""
        with self.lock:
            while True:
                self.work.wait_for(lambda: self.requests or self.closed)
                if self.closed:
                    return []
                share = min(MAX_BATCH, max(1, len(self.requests) // self.limits.num_workers))
                batch, num_chars = [], 0
                while self.requests and len(batch) < share and (not batch or num_chars + self.requests[0].num_chars() <= MAX_BATCH_CHARS):
                    batch.append(self.requests.popleft())
                    num_chars += batch[-1].num_chars()
                self.num_chars -= num_chars
                self._tell_of_room()
                batch = [request for request in batch if request.future.running() or request.future.set_running_or_notify_cancel()]
                if batch:
                    return batch

    def _give_back(self, requests: deque[Request]) -> None:
        with self.lock:
            if not (self.closed or self.broken):
                self.requests.extendleft(reversed(requests))
                self.num_chars += sum(request.num_chars() for request in requests)
                self.work.notify_all()
                return
        for request in requests:
            _abandon(request, self.broken)

    def _serve(self) -> None:
        """The life of one worker thread. An error that nobody foresaw must not leave futures waiting for ever."""
        try:
            self._keep_serving()
        except BaseException as error:
            self.start_failure = repr(error)
            self._fail(deque())
            for worker in list(self.workers):
                worker.kill()
            raise

    def _keep_serving(self) -> None:
        """Keep one worker fed, replace it when it is lost."""
        worker: Worker | None = None
        while batch := self._take():
            pending = deque(batch)
            while pending and not self.closed:
                if worker is not None and any(kind not in worker.offered_kinds for kind in self.kinds):
                    # A kind that is new to the pool: loaded once, in the template, and a worker with it costs milliseconds.
                    self._end(worker)
                    worker = None
                if worker is None:
                    worker = self._start_worker()
                    if worker is None:
                        self._fail(pending)
                        return
                if not self._grade_batch(worker, pending):
                    worker = None
                    self._give_back(pending)  # another worker may be free; the poison answer itself has its result
                    pending.clear()
            for request in pending:
                _abandon(request)
        if worker is not None:
            self._end(worker)

    def _start_worker(self) -> Worker | None:
        for _ in range(MAX_FAILED_STARTS):
            try:
                worker = Worker(self.template, list(self.kinds))
            except (OSError, TemplateLost) as error:  # no memory, processes or file descriptors left: perhaps only for a moment
                if self.closed:
                    return None
                self.start_failure = f"failed: {error}"
                time.sleep(0.2)
                continue
            with self.lock:
                self.workers.add(worker)
                if self.closed:
                    worker.kill()
            try:
                worker.wait_until_ready(self.limits.load_timeout_s)
                return worker
            except WorkerLate:
                self._end(worker)
                self.start_failure = "did not start in time"
            except WorkerDied:
                self.start_failure = self._cause_of_death(worker)
            if self.closed:
                return None
        return None

    def _end(self, worker: Worker) -> None:
        with self.lock:
            self.workers.discard(worker)
        worker.end()

    def _cause_of_death(self, worker: Worker) -> str:
        with self.lock:
            self.workers.discard(worker)
        return worker.cause_of_death()

    def _fail(self, pending: deque[Request]) -> None:
        """Workers do not start: every waiting answer, and every later one, fails with the reason."""
        with self.lock:
            if not self.closed:
                self.broken = (
                    f"grader workers do not start: {MAX_FAILED_STARTS} attempts, the last one {self.start_failure}. "
                    f"See standard error for its traceback; memory_mb={self.limits.memory_mb} may be too small."
                )
            waiting = [*pending, *self.requests]
            self.requests.clear()
            self.num_chars = 0
            self._tell_of_room(always=True)
        for request in waiting:
            _abandon(request, self.broken)

    def _grade_batch(self, worker: Worker, pending: deque[Request]) -> bool:
        """Send ``pending`` as one message and take its answers off one by one. False when the worker is lost and must be replaced."""
        limits = self.limits
        limit_s = limits.deadline_s
        try:
            worker.send([[number, request.text, request.gold, request.kind] for number, request in enumerate(pending)], limit_s)
            number = 0
            while pending:
                request = pending[0]
                limit_s = limits.deadline_s if request.kind in worker.loaded_kinds else limits.load_timeout_s
                tag, *fields = worker.receive_about(number, limit_s)
                if tag == "loaded":
                    worker.loaded_kinds.add(request.kind)
                    continue
                pending.popleft()
                number += 1
                if tag == "unloadable":
                    _refuse(request, fields[0])
                    continue
                *result, fit = fields
                if not fit:  # it leaves by itself: its heap is not to be trusted, or has grown too large
                    self._lose(worker, request, GradeResult(*result))
                    return False
                self.finish(request, GradeResult(*result))
        except WorkerLate:
            worker.kill()
            request = pending.popleft()
            if ":" in request.kind and request.kind not in worker.loaded_kinds:  # no fault of the answer, and the next one would wait as long
                _refuse(request, f"importing it took more than load_timeout_s={limit_s:g} s")
                self._end(worker)
            else:
                self._lose(worker, request, GradeResult(0.0, None, "timeout", f"no result within {limit_s:g} s"))
            return False
        except WorkerDied:
            if self.closed:
                self._end(worker)
            else:
                cause = self._cause_of_death(worker)
                self._lose(None, pending.popleft(), GradeResult(0.0, None, "crashed", f"the grading process {cause}"))
            return False
        return True

    def _lose(self, worker: Worker | None, request: Request, result: GradeResult) -> None:
        """The result of the answer that cost a worker, and the end of that worker if it has not ended yet."""
        with self.lock:
            if result.status in ("timeout", "memory", "crashed"):
                self.num_respawns += 1
            else:
                self.num_retired += 1
        self.finish(request, result)
        if worker is not None:
            self._end(worker)

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            waiting = list(self.requests)
            self.requests.clear()
            self.num_chars = 0
            workers = list(self.workers)
            self.work.notify_all()
            self._tell_of_room(always=True)
        for worker in workers:
            worker.kill()
        self.template.close()
        for request in waiting:
            _abandon(request)
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        self.template.close()  # a thread may have been starting it just then


def _abandon(request: Request, reason: str | None = None) -> None:
    if reason is None and request.future.cancel():
        return
    with contextlib.suppress(InvalidStateError):
        request.future.set_exception(WorkerError(reason or "the GraderPool was closed before this answer was graded"))


def _refuse(request: Request, reason: str) -> None:
    with contextlib.suppress(InvalidStateError):
        request.future.set_exception(ConfigError(f"grader {request.kind!r} cannot be loaded: {reason}"))
