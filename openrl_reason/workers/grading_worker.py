"""The process that grades. Forked by the template process (:mod:`openrl_reason.workers.grading_template`), which imported this module.

Protocol, one JSON value a line. In: batches ``[[id, text, gold, kind], ...]``. Out: ``["ready"]``, and for each answer
``["result", id, score, parsed, status, detail, fit]``, in order, at once; before the first answer of a kind that was not loaded yet
``["loaded", id]``, or ``["unloadable", id, message]`` in place of the result. After a result that is not ``fit`` the process leaves.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading

from openrl_reason.tasks.graders import as_result, load_grader

MAX_DETAIL_CHARS = 2000


def serve(request_fd: int, reply_fd: int, limits: dict, graders: dict) -> None:
    """Grade until the request pipe closes. ``graders``: the functions of the kinds that the template has loaded."""
    replies = _Replies(reply_fd, limits["max_text_chars"])
    threading.Thread(target=_die_with_parent, args=(request_fd,), daemon=True).start()
    memory = _Memory(limits["memory_mb"] << 20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.send(["ready"])
    with os.fdopen(request_fd, "r", encoding="ascii", newline="\n", closefd=False) as requests:
        for line in requests:
            for number, text, gold, kind in json.loads(line):
                if kind not in graders:
                    _limit_cpu(limits["load_timeout_s"])
                    try:
                        graders[kind] = load_grader(kind)
                    except BaseException as error:  # noqa: B036 - importing a user's module may raise anything; the parent makes it a ConfigError
                        replies.send(["unloadable", number, _in_words(error)])
                        continue
                    memory.measure()
                    replies.send(["loaded", number])
                _limit_cpu(limits["deadline_s"])
                replies.grade(number, graders[kind], text, gold, memory)


class _Replies:
    """The way back to the parent."""

    def __init__(self, fd: int, max_parsed_chars: int) -> None:
        self.fd, self.max_parsed_chars, self.pid = fd, max_parsed_chars, os.getpid()

    def send(self, message: list) -> None:
        data = memoryview((json.dumps(message) + "\n").encode())
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError:  # the grader closed what is not its own: without its pipes this process is of no use
            os._exit(1)

    def grade(self, number: int, grader, text: str, gold: str, memory: _Memory) -> None:
        """Grade one answer and send its result; leave if this process is not fit for another one."""
        try:
            result = as_result(grader(text, gold))
            parsed = None if result.parsed is None else str(result.parsed)[: self.max_parsed_chars]
            fields = [float(result.score), parsed, result.status, str(result.detail)[:MAX_DETAIL_CHARS]]
        except MemoryError:
            fields = [0.0, None, "memory", "the grader hit its memory limit"]
        except BaseException as error:  # noqa: B036 - a grader may raise anything, SystemExit included; the answer gets the blame, not the pool
            fields = [0.0, None, "error", _in_words(error)]
        if os.getpid() != self.pid:  # the grader forked, and this is the copy; the original answers
            os._exit(0)
        fit = fields[2] != "memory" and memory.has_room()
        self.send(["result", number, *fields, fit])
        if not fit:
            os._exit(0)


class _Memory:
    """The address space of this process: limited, and looked at between answers.

    Heaps fragment and parsers keep caches: without a look in between, some innocent answer would meet the limit in the end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        bytearray(16 << 20)  # a limit that leaves no room to work in is a setting to complain about now, not a failure of every answer
        self.measure()

    def size(self) -> int:
        return int(os.pread(self.statm, 32, 0).split(None, 1)[0]) * resource.getpagesize()

    def measure(self) -> None:
        """Take the present size as the one that is needed at least: graders have just been loaded."""
        self.enough = max(self.limit * 3 // 4, (self.limit + self.size()) // 2)

    def has_room(self) -> bool:
        try:
            return self.size() <= self.enough
        except (OSError, ValueError, IndexError):  # closed by the grader
            return False


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
    except BaseException:  # noqa: B036 - the error's own __str__ is the grader's code, too
        return type(error).__name__


def _die_with_parent(request_fd: int) -> None:
    """Wait until the parent closes its end of the pipe (or dies), then take the whole process group down, children of graders too.

    The template does the same from outside; this is for the case that it is gone as well."""
    poll = select.poll()
    poll.register(request_fd, 0)  # hang-up and error are always reported
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _limit_cpu(seconds: float) -> None:
    """Allow that much more CPU time, then the kernel kills: the backstop for C code that holds the interpreter lock in an orphan."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def run_forked(request_fd: int, reply_fd: int, limits: dict, graders: dict) -> None:
    """The whole life of a forked worker; never returns into the template's code."""
    status = 1
    try:
        os.setsid()  # a kill of the group reaches what a grader started
        serve(request_fd, reply_fd, limits, graders)
        status = 0
    except BaseException:  # noqa: B036 - nothing may run the template's loop in this process
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)
