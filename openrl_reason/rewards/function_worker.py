"""The process that calls a reward function. Started by :mod:`openrl_reason.rewards.function_process` as a script.

Protocol, one JSON value a line. In: a setup object, then lists of samples. Out: ``["ready", form, is_async]`` or ``["unloadable", message]``,
then for each sample ``["result", index, fields]`` as soon as it is known, in any order.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading
from typing import Any

GRACE_S = 10.0


def _die_with_parent(request_fd: int) -> None:
    """Wait until the parent closes its end of the pipe (or dies), then take the whole process group down, children of functions too."""
    poll = select.poll()
    poll.register(request_fd, 0)  # hang-up and error are always reported
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _end_after(seconds: float) -> None:
    """The kernel ends this process (SIGALRM's default) unless told otherwise in time; 0: never. Only an orphan lives to see it, one that hangs
    in C code with the interpreter lock held, so that the thread above cannot run. A function that uses the alarm itself takes it over."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _sample(fields: dict[str, Any]) -> Any:
    from openrl_reason.rewards.base import RewardSample
    from openrl_reason.tasks.base import TaskItem

    item = fields["item"]
    if not isinstance(item["prompt"], str):
        item["prompt"] = tuple(item["prompt"])
    return RewardSample(**fields | {"item": TaskItem(**item), "steps": tuple(fields["steps"])})


def serve(request_fd: int, reply_fd: int) -> None:
    """Call the function until the request pipe closes."""

    def send(message: list) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(reply_fd, data) :]

    requests = os.fdopen(request_fd, "r", encoding="ascii", newline="\n", closefd=False)
    setup = json.loads(requests.readline())
    sys.path[:] = setup["sys_path"]
    from openrl_reason.rewards.answers import to_wire
    from openrl_reason.rewards.calling import BoundFunction, Caller
    from openrl_reason.user_code import load_function

    threading.Thread(target=_die_with_parent, args=(request_fd,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory_mb"]:
        limit = setup["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _end_after(setup["load_timeout_s"] + GRACE_S)
    try:
        bound = BoundFunction(load_function(setup["place"], setup["function"]), setup["form"], setup["options"])
    except BaseException as error:  # noqa: B036 - importing a user's module may raise anything
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        send(["unloadable", reason[:2000]])
        return
    caller = Caller(bound, setup["deadline_s"], setup["concurrency"])
    _end_after(0)
    send(["ready", bound.form, bound.is_async])
    unfit = False

    def emit(index: int, result: Any) -> None:
        nonlocal unfit
        send(["result", index, to_wire(result)])
        _end_after(setup["deadline_s"] + GRACE_S)
        unfit = unfit or result.status == "memory"

    for line in requests:
        samples = [_sample(fields) for fields in json.loads(line)]
        _end_after(setup["deadline_s"] + GRACE_S)
        caller.run(samples, emit)
        _end_after(0)
        if unfit:  # a heap that overflowed is not to be trusted
            os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
