"""The template process of a grader pool: it imports graders once and forks the processes that grade with them.

A worker that was killed is replaced within milliseconds, however long its graders take to import. Only graders of this library are
loaded here, and no answer is ever seen here: the graders of users and all answers live in the forked processes. Single-threaded, so that
forking is safe. It is also the keeper of what it forked: it collects exit statuses, kills what workers leave behind (it is the
"child subreaper" of their descendants), and when its parent is gone it kills them all, even those that are stuck in C.

Protocol over a Unix socket, one JSON object a packet. First ``{"sys_path", "parent_pid", "limits"}``. Then, with the worker's two pipe
ends attached, ``{"fork": [kinds]}`` -> ``{"pid", "loaded": [kinds]}`` or ``{"failed": reason}``; ``{"reap": pid}`` ->
``{"exit_code": n or null}``; ``{"discard": pid}`` without a reply.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time

MAX_PACKET = 1 << 17
TICK_S = 1.0
PR_SET_CHILD_SUBREAPER = 36

# Graded once after loading, so that parsers build their tables and lazy imports happen before the fork and not in every worker.
WARM_UP = (
    (r"So the answer is $\boxed{\frac{1}{2}}$.", "0.5"),
    (r"\boxed{x^2+\sqrt{2}}", r"\sqrt2+x^2"),
    (r"\boxed{(-\infty, 3] \cup \{5\}}", r"(-\infty,3]\cup\{5\}"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("The answer is (A).\n#### 18", "A"),
)


class Template:
    def __init__(self, control: socket.socket, parent_pid: int, limits: dict) -> None:
        self.control, self.parent_pid, self.limits = control, parent_pid, limits
        self.graders: dict[str, object] = {}
        self.unloadable: set[str] = set()
        self.workers: set[int] = set()
        self.doomed: set[int] = set()
        self.children_file = f"/proc/self/task/{os.getpid()}/children"

    def serve(self) -> None:
        """Until the parent closes its socket or is gone. (A process that it forked may hold the socket open: hence the second look.)"""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        try:
            while os.getppid() == self.parent_pid:
                ready = poll.poll(20 if self.doomed else int(TICK_S * 1000))
                if ready and not self.answer():
                    break
                self.sweep()
        finally:
            self.end()

    def answer(self) -> bool:
        """Handle one packet; False at the end of the stream."""
        data, fds, _, _ = socket.recv_fds(self.control, MAX_PACKET, 2, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        message = json.loads(data)
        reply = None
        if "fork" in message:
            try:
                self.preload(message["fork"])
                reply = {"pid": self.fork(*fds), "loaded": [kind for kind in message["fork"] if kind in self.graders]}
            except OSError as error:  # no memory or processes left: perhaps only for a moment
                reply = {"failed": str(error)}
            finally:
                for fd in fds:
                    os.close(fd)
        elif "reap" in message:
            reply = {"exit_code": self.reap(message["reap"])}
        elif message["discard"] in self.workers:
            self.doomed.add(message["discard"])
        try:
            return reply is None or self.control.send(json.dumps(reply).encode()) > 0
        except BrokenPipeError:  # the pool was closed meanwhile
            return False

    def preload(self, kinds: list[str]) -> None:
        from openrl_reason.tasks.graders import load_grader

        new = [kind for kind in kinds if kind not in self.graders and kind not in self.unloadable]
        for kind in new:
            try:
                grader = self.graders[kind] = load_grader(kind)
            except Exception:  # the worker will meet the same error, and report it for the answer that wants this kind
                self.unloadable.add(kind)
                continue
            for text, gold in WARM_UP:
                with contextlib.suppress(Exception):  # a grader of numbers refuses a gold that is a matrix
                    grader(text, gold)
        if new:
            gc.collect()
            gc.freeze()  # a collection in a worker shall not copy the pages of all these modules

    def fork(self, request_fd: int, reply_fd: int) -> int:
        from openrl_reason.workers.grading_worker import run_forked

        pid = os.fork()
        if pid == 0:
            self.control.close()
            run_forked(request_fd, reply_fd, self.limits, self.graders)
        self.workers.add(pid)
        return pid

    def reap(self, pid: int) -> int | None:
        """The exit code of a worker that ended by itself; None if it is unknown or had to be killed (it had closed its pipes)."""
        if pid not in self.workers:
            return None
        for _ in range(100):  # the end of its pipes is seen a moment before the process has ended
            # WNOWAIT: as long as it is not collected, nobody else gets its number, and its group can be killed by it.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                _kill_group(pid)
                self.workers.discard(pid)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.001)
        self.doomed.add(pid)
        return None

    def sweep(self) -> None:
        """Kill and collect doomed workers, and processes whose parent (a worker, or a child of one) has left them."""
        for pid in list(self.doomed):
            _kill_group(pid)
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.doomed.discard(pid)
                self.workers.discard(pid)
        for pid in self.children() - self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def children(self) -> set[int]:
        try:
            with open(self.children_file) as file:
                return set(map(int, file.read().split()))
        except OSError:  # a kernel without this file: descendants that left their group are not found
            return set(self.workers)

    def end(self) -> None:
        """Leave nothing behind."""
        self.doomed |= self.workers
        end = time.monotonic() + 5.0
        while (self.doomed or self.children()) and time.monotonic() < end:
            self.sweep()
            time.sleep(0.001)


def _kill_group(pid: int) -> None:
    """SIGKILL for a worker that is not collected yet and for its group. It has no group of its own in its first instants."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def become_subreaper() -> None:
    """Descendants that lose their parent become children of this process instead of init's. Linux; elsewhere they are not found."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(control_fd: int) -> None:
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    setup = json.loads(control.recv(MAX_PACKET) or "null")
    if setup is None:
        return
    sys.path[:] = setup["sys_path"]
    become_subreaper()
    Template(control, setup["parent_pid"], setup["limits"]).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
