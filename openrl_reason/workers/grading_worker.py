"""The process that grades. Started by :mod:`openrl_reason.workers.grading` as a script; it imports graders and nothing heavy.

Protocol, one JSON value a line. In: a setup object, then batches ``[[text, gold, kind], ...]``. Out: ``["ready"]``, and for each answer
``["result", score, parsed, status, detail]``, in order, at once; before the first answer of a kind ``["loaded"]``, or
``["unloadable", message]`` in place of the result.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading


def _die_with_parent(request_fd: int) -> None:
    """Wait until the parent closes its end of the pipe (or dies), then take the whole process group down, children of graders too."""
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


def _grade_one(grader, text: str, gold: str) -> tuple[list, bool]:
    """One result message, and whether this process is still fit for the next answer."""
    from openrl_reason.tasks.graders import as_result

    try:
        result = as_result(grader(text, gold))
    except MemoryError:
        return ["result", 0.0, None, "memory", "the grader hit its memory limit"], False
    except BaseException as error:  # noqa: B036 - a grader may raise anything, SystemExit included; the answer gets the blame, not the pool
        return ["result", 0.0, None, "error", f"{type(error).__name__}: {error}"[:2000]], True
    return ["result", result.score, result.parsed, result.status, result.detail], True


def serve(request_fd: int, reply_fd: int) -> None:
    """Grade until the request pipe closes."""

    def send(message: list) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(reply_fd, data) :]

    requests = os.fdopen(request_fd, "r", encoding="ascii", newline="\n", closefd=False)
    setup = json.loads(requests.readline())
    sys.path[:] = setup["sys_path"]
    from openrl_reason.tasks.graders import load_grader

    threading.Thread(target=_die_with_parent, args=(request_fd,), daemon=True).start()
    limit = setup["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bytearray(16 << 20)  # a limit that leaves no room to work in is a setting to complain about now, not a failure of every answer
    send(["ready"])
    graders: dict[str, object] = {}
    for line in requests:
        for text, gold, kind in json.loads(line):
            if kind not in graders:
                _limit_cpu(setup["load_timeout_s"])
                try:
                    graders[kind] = load_grader(kind)
                except BaseException as error:  # noqa: B036 - importing a user's module may raise anything; the parent turns it into a ConfigError
                    send(["unloadable", f"{type(error).__name__}: {error}"])
                    continue
                send(["loaded"])
            _limit_cpu(setup["deadline_s"])
            message, fit = _grade_one(graders[kind], text, gold)
            send(message)
            if not fit:
                os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
