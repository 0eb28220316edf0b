"""A pool of grading processes that can be killed.

Model output is hostile input: a grader may loop forever in C, eat all memory or crash the interpreter. So every answer is graded in a
separate process, and the *parent* enforces the deadline of each answer: a worker that is late is killed with all its children and
replaced, which costs that one answer a counted ``timeout``. No ``signal.alarm``: it works in the main thread only, and not inside C.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path

from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.tasks.graders import STATUSES, GradeResult, check_kind

MAX_BATCH = 32
MAX_FAILED_STARTS = 3


@dataclass
class _Request:
    text: str
    gold: str
    kind: str
    future: Future[GradeResult]


class _WorkerDied(Exception):
    """The process ended, or the pipe to it broke."""


class _WorkerLate(Exception):
    """Nothing came back within the time allowed."""


class _Process:
    """One worker process and its two pipes. Used by one thread only, except :meth:`kill`, which is safe from any."""

    def __init__(self, deadline_s: float, load_timeout_s: float, memory_mb: int) -> None:
        worker_reads, self._requests = os.pipe()
        self._replies, worker_writes = os.pipe()
        self._buffer = b""
        self._lines: deque[bytes] = deque()
        self._reaping = threading.Lock()
        self.loaded_kinds: set[str] = set()
        script = Path(__file__).with_name("grading_worker.py")
        # start_new_session: Ctrl-C at the terminal is the parent's to handle, and a kill reaches what a grader started.
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(worker_reads), str(worker_writes)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(worker_reads, worker_writes), start_new_session=True,
            )  # fmt: skip
        except OSError:
            self.close()
            raise
        finally:
            os.close(worker_reads)
            os.close(worker_writes)
        os.set_blocking(self._requests, False)
        search_path = [os.path.abspath(entry or os.getcwd()) for entry in sys.path]
        package_root = str(Path(__file__).resolve().parents[2])
        self.setup = {
            "sys_path": [*search_path, package_root], "deadline_s": deadline_s, "load_timeout_s": load_timeout_s, "memory_mb": memory_mb,
        }  # fmt: skip

    def start(self, timeout_s: float) -> None:
        self.send(self.setup, timeout_s)
        self.receive(timeout_s)

    def send(self, message: object, timeout_s: float) -> None:
        """Write one message. Raises _WorkerLate when the worker does not read it in time, _WorkerDied when nobody will."""
        data = memoryview((json.dumps(message) + "\n").encode())
        end = time.monotonic() + timeout_s
        while data:
            _, ready, _ = select.select([], [self._requests], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise _WorkerLate
            try:
                data = data[os.write(self._requests, data) :]
            except BrokenPipeError:
                raise _WorkerDied from None

    def receive(self, timeout_s: float) -> list:
        """The next message. Raises _WorkerLate after ``timeout_s`` without one, _WorkerDied at the end of the pipe."""
        end = time.monotonic() + timeout_s
        while not self._lines:
            # The pipe is looked at even when time is up: a parent that was itself held up must not blame a worker that has answered.
            ready, _, _ = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise _WorkerLate
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise _WorkerDied
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._lines.extend(lines)
        return json.loads(self._lines.popleft())

    def kill(self) -> None:
        """Kill the process and everything it started. Safe from any thread, and at any time."""
        with self._reaping:  # once reaped, the number may belong to somebody else
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self) -> str:
        """Kill what is left and collect the exit status; returns how the process had ended, in words."""
        self.kill()
        with self._reaping:
            code = self.process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def close(self) -> None:
        os.close(self._requests)
        os.close(self._replies)


class GraderPool:
    """Grades answers in ``num_workers`` processes; a future per answer, results in any order.

    num_workers: processes (each about 15 MB); they start with the first answer.
    deadline_s: wall-clock seconds that one answer may take; then ``timeout``. Importing a user's grader does not count.
    memory_mb: address space of one worker process; beyond it ``memory``. Raise it for graders that import numpy or sympy.

    The queue is unbounded: ``submit`` never blocks, and answers are small. Thread-safe; usable in Ray actors. A pool that is garbage
    collected, closed or whose process dies leaves no worker behind.
    """

    def __init__(self, num_workers: int = 1, deadline_s: float = 5.0, memory_mb: int = 1024, load_timeout_s: float = 60.0) -> None:
        for name, value in (("num_workers", num_workers), ("deadline_s", deadline_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise ConfigError(f"grader pool: {name}={value} must be positive")
        self._shared = _Shared(num_workers, deadline_s, memory_mb, load_timeout_s)
        self._finalizer = weakref.finalize(self, _Shared.close, self._shared)

    def submit(self, text: str, gold: str, kind: str) -> Future[GradeResult]:
        """Queue one answer. ``kind``: "arithmetic", "gsm8k", "gsm8k_lenient", "module:function" or "path/to/file.py:function".

        Raises ConfigError for an unknown kind. The future fails with ConfigError if a user's grader cannot be imported and with
        WorkerError if workers do not start at all; every other trouble is a status of the result."""
        try:
            check_kind(kind)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        request = _Request(text, gold, kind, Future())
        self._shared.put(request)
        return request.future

    def grade(self, text: str, gold: str, kind: str) -> GradeResult:
        """Submit one answer and wait for its result."""
        return self.submit(text, gold, kind).result()

    @property
    def counts(self) -> dict[str, int]:
        """How many answers ended in each status so far (all six always present)."""
        with self._shared.changed:
            return {status: self._shared.counts[status] for status in STATUSES}

    @property
    def num_respawns(self) -> int:
        """Worker processes that were replaced after a timeout, a crash or a memory failure."""
        return self._shared.num_respawns

    def close(self) -> None:
        """End the workers; answers still waiting are cancelled. May be called twice."""
        self._finalizer()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shared:
    """Queue, counters and worker threads. Held by the threads, so that the pool object itself can be garbage collected."""

    def __init__(self, num_workers: int, deadline_s: float, memory_mb: int, load_timeout_s: float) -> None:
        self.num_workers, self.deadline_s, self.memory_mb, self.load_timeout_s = num_workers, deadline_s, memory_mb, load_timeout_s
        self.changed = threading.Condition()
        self.queue: deque[_Request] = deque()
        self.counts: Counter[str] = Counter()
        self.num_respawns = 0
        self.closed = False
        self.start_failure = ""
        self.broken: str | None = None
        self.threads: list[threading.Thread] = []
        self.processes: set[_Process] = set()

    def put(self, request: _Request) -> None:
        with self.changed:
            if self.closed:
                raise RuntimeError("this GraderPool is closed")
            if self.broken:
                raise WorkerError(self.broken)
            self.queue.append(request)
            if len(self.threads) < self.num_workers:
                thread = threading.Thread(target=self._serve, name=f"grader-{len(self.threads)}", daemon=True)
                self.threads.append(thread)
                thread.start()
            self.changed.notify()

    def take(self) -> list[_Request]:
        """Wait for work; an even share of the queue, at most MAX_BATCH. Empty when the pool is closed."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.queue or self.closed)
                if self.closed:
                    return []
                share = min(MAX_BATCH, max(1, len(self.queue) // self.num_workers))
                batch = [self.queue.popleft() for _ in range(share)]
                batch = [request for request in batch if request.future.running() or request.future.set_running_or_notify_cancel()]
                if batch:
                    return batch

    def give_back(self, requests: list[_Request]) -> None:
        with self.changed:
            self.queue.extendleft(reversed(requests))
            self.changed.notify_all()

    def finish(self, request: _Request, result: GradeResult) -> None:
        with self.changed:
            self.counts[result.status] += 1
        with contextlib.suppress(InvalidStateError):  # the pool was closed a moment ago
            request.future.set_result(result)

    def _serve(self) -> None:
        """The life of one worker thread. An error that nobody foresaw must not leave futures waiting for ever."""
        try:
            self._keep_serving()
        except BaseException as error:
            self.start_failure = repr(error)
            self._fail(deque())
            for process in list(self.processes):
                process.kill()
            raise

    def _keep_serving(self) -> None:
        """Keep one process fed, replace it when it is lost."""
        process: _Process | None = None
        while batch := self.take():
            pending = deque(batch)
            while pending and not self.closed:
                if process is None:
                    process = self._start_process()
                    if process is None:
                        self._fail(pending)
                        return
                if not self._grade_batch(process, pending):
                    self._discard(process)
                    process = None
                    self.num_respawns += 1
                    self.give_back(list(pending))  # another worker may be free; the poison answer itself has its result
                    pending.clear()
            for request in pending:
                _abandon(request)
        if process is not None:
            self._discard(process)

    def _start_process(self) -> _Process | None:
        for _ in range(MAX_FAILED_STARTS):
            try:
                process = _Process(self.deadline_s, self.load_timeout_s, self.memory_mb)
            except OSError as error:  # no memory, processes or file descriptors left: perhaps only for a moment
                self.start_failure = str(error)
                time.sleep(0.2)
                continue
            with self.changed:
                self.processes.add(process)
            try:
                process.start(self.load_timeout_s)
                return process
            except (_WorkerDied, _WorkerLate) as error:
                ended = self._discard(process)
                self.start_failure = "did not start in time" if isinstance(error, _WorkerLate) else ended
                if self.closed:
                    return None
        return None

    def _discard(self, process: _Process) -> str:
        ended = process.reap()
        with self.changed:
            self.processes.discard(process)
        process.close()
        return ended

    def _fail(self, pending: deque[_Request]) -> None:
        """Workers do not start: every waiting answer, and every later one, fails with the reason."""
        with self.changed:
            if not self.closed:
                self.broken = (
                    f"grader workers do not start: {MAX_FAILED_STARTS} attempts, the last one {self.start_failure}. "
                    f"See standard error for its traceback; memory_mb={self.memory_mb} may be too small."
                )
            waiting = [*pending, *self.queue]
            self.queue.clear()
        for request in waiting:
            _abandon(request, self.broken)

    def _grade_batch(self, process: _Process, pending: deque[_Request]) -> bool:
        """Send ``pending`` as one message and take its answers off one by one. False when the process is lost and must be replaced."""
        try:
            process.send([[request.text, request.gold, request.kind] for request in pending], self.deadline_s)
            while pending:
                request = pending[0]
                known = request.kind in process.loaded_kinds
                tag, *fields = process.receive(self.deadline_s if known else self.load_timeout_s)
                if tag == "loaded":
                    process.loaded_kinds.add(request.kind)
                    continue
                pending.popleft()
                if tag == "unloadable":
                    with contextlib.suppress(InvalidStateError):
                        request.future.set_exception(ConfigError(f"grader {request.kind!r} cannot be loaded: {fields[0]}"))
                    continue
                self.finish(request, GradeResult(*fields))
                if fields[2] == "memory":  # the worker leaves by itself: its heap is not to be trusted
                    return False
        except _WorkerLate:
            process.kill()
            limit = self.deadline_s if pending[0].kind in process.loaded_kinds else self.load_timeout_s
            self.finish(pending.popleft(), GradeResult(0.0, None, "timeout", f"no result within {limit:g} s"))
            return False
        except _WorkerDied:
            if self.closed:
                return False
            self.finish(pending.popleft(), GradeResult(0.0, None, "crashed", f"the grading process {process.reap()}"))
            return False
        return True

    def close(self) -> None:
        with self.changed:
            if self.closed:
                return
            self.closed = True
            waiting = list(self.queue)
            self.queue.clear()
            processes = list(self.processes)
            self.changed.notify_all()
        for process in processes:
            process.kill()
        for request in waiting:
            _abandon(request)
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(5.0)


def _abandon(request: _Request, reason: str | None = None) -> None:
    if reason is None and request.future.cancel():
        return
    with contextlib.suppress(InvalidStateError):
        request.future.set_exception(WorkerError(reason or "the GraderPool was closed before this answer was graded"))


_default_pool: GraderPool | None = None
_default_pool_owner = 0
_default_lock = threading.Lock()


def default_pool() -> GraderPool:
    """The pool that :func:`grade` uses: one worker, started on first use, one per operating-system process."""
    global _default_pool, _default_pool_owner
    with _default_lock:
        if _default_pool is None or _default_pool_owner != os.getpid():
            _default_pool, _default_pool_owner = GraderPool(), os.getpid()
        return _default_pool


def grade(answer_text: str, gold: str, kind: str) -> GradeResult:
    """Grade one answer in the default pool (deadline 5 s, 1 GiB). See :meth:`GraderPool.submit` for kinds and errors."""
    return default_pool().grade(answer_text, gold, kind)
