"""A pool of grading processes that can be killed.

Model output is hostile input: a grader may loop forever in C, eat all memory or crash the interpreter. So every answer is graded in a
separate process, and the *parent* enforces the deadline of each answer: a worker that is late is killed with all its children and
replaced, which costs that one answer a counted ``timeout``. No ``signal.alarm``: it works in the main thread only, and not inside C.

Workers are forked by a template process that has the graders of this library loaded (:mod:`openrl_reason.workers.grading_template`), so
that a replacement takes milliseconds even where the grader imports sympy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from concurrent.futures import Future

from openrl_reason.errors import ConfigError
from openrl_reason.tasks.graders import STATUSES, GradeResult, check_kind
from openrl_reason.workers.grading_process import Limits
from openrl_reason.workers.grading_queue import GradingQueue, Request


class GraderPool:
    """Grades answers in ``num_workers`` processes; a future per answer, results in any order.

    num_workers: processes; they start with the first answer and share the memory of what the template process has loaded.
    deadline_s: wall-clock seconds that one answer may take; then ``timeout``. Importing a grader does not count.
    memory_mb: address space of one worker process; beyond it ``memory``. The graders of this library take 140 of it before the first
        answer. Raise it for a grader of your own that imports torch.
    load_timeout_s: seconds that importing a grader may take.
    max_queued: answers that may wait; then ``submit`` blocks and ``agrade`` waits without blocking its event loop.
    max_text_chars: an answer longer than this is not looked at: it becomes a ``no_answer`` that says so (a gold answer: an ``error``).
    max_queued_chars: characters that may wait, all answers together; beyond, the queue is full, too. It bounds the queue's memory.

    Thread-safe; usable in Ray actors, and from asyncio by ``await pool.agrade(...)``. Belongs to the process that made it: after a fork
    the child needs a pool of its own. A pool that is garbage collected or closed, or whose process dies, leaves no process behind.
    """

    def __init__(
        self,
        num_workers: int = 1,
        deadline_s: float = 5.0,
        memory_mb: int = 1024,
        load_timeout_s: float = 60.0,
        max_queued: int = 10_000,
        max_text_chars: int = 1_000_000,
        max_queued_chars: int = 100_000_000,
    ) -> None:
        limits = Limits(num_workers, deadline_s, memory_mb, load_timeout_s, max_queued, max_text_chars, max_queued_chars)
        for name, value in vars(limits).items():
            if not value > 0:
                raise ConfigError(f"grader pool: {name}={value} must be positive")
        self.limits = limits
        self._owner = os.getpid()
        self._queue = GradingQueue(limits)
        self._checked_kinds: set[str] = set()
        self._finalizer = weakref.finalize(self, _close_in, self._owner, self._queue)

    def submit(self, text: str, gold: str, kind: str, timeout: float | None = None) -> Future[GradeResult]:
        """Queue one answer. ``kind``: one of ``openrl_reason.tasks.graders.GRADERS``, "module:function" or "path/to/file.py:function".

        Blocks while the queue is full: for ever, or ``timeout`` seconds, and then raises ``queue.Full``. (In a callback of one of the
        pool's own futures it never blocks.) If the pool is closed meanwhile, RuntimeError. Raises ConfigError for an unknown kind.
        The future fails with ConfigError if a user's grader cannot be imported and with WorkerError if workers do not start at all;
        every other trouble is a status of the result."""
        request = self._request(text, gold, kind)
        if not request.future.done():
            self._queue.put(request, timeout)
        return request.future

    def grade(self, text: str, gold: str, kind: str) -> GradeResult:
        """Submit one answer and wait for its result."""
        return self.submit(text, gold, kind).result()

    async def agrade(self, text: str, gold: str, kind: str) -> GradeResult:
        """As :meth:`grade`, for coroutines: waits for room in the queue and for the result without blocking the event loop.

        Cancelling it takes the answer out of the queue; one that is being graded already is finished, and counted."""
        request = self._request(text, gold, kind)
        loop = asyncio.get_running_loop()
        while not request.future.done():
            room = asyncio.Event()

            def tell(room: asyncio.Event = room) -> None:
                with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                    loop.call_soon_threadsafe(room.set)

            if self._queue.put_or_call(request, tell):
                break
            await room.wait()
        return await asyncio.wrap_future(request.future)

    def _request(self, text: str, gold: str, kind: str) -> Request:
        """The checked request; its future is done already if the answer is too long to be looked at."""
        if os.getpid() != self._owner:
            raise RuntimeError(f"this GraderPool belongs to process {self._owner}; a forked process needs a pool of its own")
        if not (isinstance(text, str) and isinstance(gold, str)):
            raise TypeError(f"text and gold must be str, not {type(text).__name__} and {type(gold).__name__}")
        if kind not in self._checked_kinds:
            try:
                check_kind(kind)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            self._checked_kinds.add(kind)
        request = Request(text, gold, kind, Future())
        limit = self.limits.max_text_chars
        for name, value, status in (("gold answer", gold, "error"), ("answer", text, "no_answer")):
            if len(value) > limit and not request.future.done():
                result = GradeResult(0.0, None, status, f"the {name} has {len(value)} characters, more than max_text_chars={limit}")
                self._queue.finish(request, result)
        return request

    @property
    def counts(self) -> dict[str, int]:
        """How many answers ended in each status so far (all six always present)."""
        with self._queue.lock:
            return {status: self._queue.counts[status] for status in STATUSES}

    @property
    def rates(self) -> dict[str, float]:
        """The share of each status among the answers so far; all 0.0 before the first."""
        counts = self.counts
        return {status: count / max(1, sum(counts.values())) for status, count in counts.items()}

    @property
    def num_queued(self) -> int:
        """Answers that wait for a worker at this moment."""
        return len(self._queue.requests)

    @property
    def num_respawns(self) -> int:
        """Worker processes that were replaced after a timeout, a crash or a memory failure."""
        return self._queue.num_respawns

    @property
    def num_retired(self) -> int:
        """Worker processes that were replaced between two answers because they had grown close to ``memory_mb``."""
        return self._queue.num_retired

    @property
    def num_template_restarts(self) -> int:
        """How often the template process was lost and started again."""
        return self._queue.template.num_restarts

    def close(self) -> None:
        """End the workers; answers still waiting are cancelled, and ``submit`` calls that wait for room raise. May be called twice."""
        self._finalizer()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_in(owner: int, queue: GradingQueue) -> None:
    if os.getpid() == owner:  # a forked child that exits must not end the workers of its parent
        queue.close()


_default_pool: GraderPool | None = None
_default_lock = threading.Lock()


def _forget_default_pool() -> None:
    """A forked process has none of the threads, and perhaps a lock that nobody will release."""
    global _default_pool, _default_lock
    _default_pool, _default_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_default_pool)


def default_pool() -> GraderPool:
    """The pool that :func:`grade` uses: one worker, started on first use, one per operating-system process."""
    global _default_pool
    with _default_lock:
        if _default_pool is None:
            _default_pool = GraderPool()
        return _default_pool


def grade(answer_text: str, gold: str, kind: str) -> GradeResult:
    """Grade one answer in the default pool (deadline 5 s, 1 GiB). See :meth:`GraderPool.submit` for kinds and errors."""
    return default_pool().grade(answer_text, gold, kind)
