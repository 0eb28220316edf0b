"""The processes of a grader pool as their parent sees them: the template that forks workers, and a worker with its two pipes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

MAX_PACKET = 1 << 17
REAP_TIMEOUT_S = 5.0
# A result's text arrives as JSON: at most twelve bytes a character (a surrogate pair), and fields beside it.
BYTES_PER_CHAR = 12
NUM_FIELDS = {"['loaded']": 2, "['unloadable']": 3, "['result']": 7}


@dataclass(frozen=True)
class Limits:
    """What a grader pool allows. See :class:`openrl_reason.workers.grading.GraderPool` for the meaning of each."""

    num_workers: int
    deadline_s: float
    memory_mb: int
    load_timeout_s: float
    max_queued: int
    max_text_chars: int
    max_queued_chars: int


class WorkerDied(Exception):
    """The process ended, or the pipe to it broke."""


class WorkerLate(Exception):
    """Nothing came back within the time allowed."""


class TemplateLost(Exception):
    """The template process ended, or did not answer in time and was killed."""


class Template:
    """The template process of a pool, restarted when it is lost. Thread-safe: it serves one request after another."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_restarts = 0
        self._lock = threading.RLock()
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def fork(self, request_fd: int, reply_fd: int, kinds: list[str]) -> tuple[int, set[str], subprocess.Popen]:
        """A new worker on these two pipe ends, with ``kinds`` loaded: its process id, the kinds it has loaded, its template.

        Raises OSError if it could not be forked, TemplateLost."""
        with self._lock:
            if self._process is None:
                self._start()
            template = self._process
            reply = self._ask({"fork": kinds}, [request_fd, reply_fd], self.limits.load_timeout_s)
            assert template is not None
        if "failed" in reply:
            raise OSError(reply["failed"])
        return reply["pid"], set(reply["loaded"]), template

    def reap(self, pid: int, template: subprocess.Popen) -> int | None:
        """The exit code of a worker that has ended by itself; None if it had not ended, and had to be killed.

        Raises TemplateLost if the template that forked it is gone and nobody can tell."""
        with self._lock:
            if template is not self._process:
                raise TemplateLost
            return self._ask({"reap": pid}, [], REAP_TIMEOUT_S)["exit_code"]

    def discard(self, pid: int, template: subprocess.Popen) -> None:
        """Have a worker killed and collected. Does not wait for it."""
        with self._lock, contextlib.suppress(TemplateLost):
            if template is self._process:
                self._ask({"discard": pid}, [], 0.0, reply=False)

    def close(self) -> None:
        """End the template and with it all workers. Does not wait for a request in progress; safe from any thread."""
        self._closed = True
        process, control = self._process, self._control
        if process is None or control is None:
            return
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:  # it is importing, for instance
            process.kill()
            process.wait()
        with self._lock:
            control.close()
            self._process = None

    def _start(self) -> None:
        if self._closed:
            raise TemplateLost("the pool is closed")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).with_name("grading_template.py"))
        # Several workers with as many threads as cores would only be in each other's way.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
        # start_new_session: Ctrl-C at the terminal is the parent's to handle.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", script, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(self.limits.load_timeout_s)
        self._control = ours
        search_path = [os.path.abspath(entry or os.getcwd()) for entry in sys.path]
        package_root = str(Path(__file__).resolve().parents[2])
        limits = {name: getattr(self.limits, name) for name in ("deadline_s", "memory_mb", "load_timeout_s", "max_text_chars")}
        self._ask({"sys_path": [*search_path, package_root], "parent_pid": os.getpid(), "limits": limits}, [], 0.0, reply=False)

    def _ask(self, message: dict, fds: list[int], timeout_s: float, reply: bool = True) -> dict:
        """Send one packet and wait for the answer. A template that is dead or late is killed, and the next fork starts another one."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
            if not reply:
                return {}
            if not _wait(self._control.fileno(), select.POLLIN, timeout_s):
                raise TemplateLost(f"did not answer within {timeout_s:g} s")
            data = self._control.recv(MAX_PACKET)
            if not data:
                raise TemplateLost("the template process of the graders ended")
            return json.loads(data)
        except (OSError, TemplateLost) as error:
            self._give_up()
            raise TemplateLost(str(error)) from None

    def _give_up(self) -> None:
        if self._closed:  # it is ending by itself, and takes what it forked along
            return
        process, self._process = self._process, None
        assert process is not None and self._control is not None
        process.kill()
        process.wait()
        self._control.close()
        self.num_restarts += 1


class Worker:
    """One worker process and its two pipes. Used by one thread only, except :meth:`kill`, which is safe from any."""

    def __init__(self, template: Template, kinds: list[str]) -> None:
        """Raises OSError or TemplateLost if there is no process to be had."""
        self._template = template
        self._max_line = BYTES_PER_CHAR * template.limits.max_text_chars + (1 << 16)
        self._buffer = bytearray()
        self._lines: deque[bytes] = deque()
        self._ending = threading.Lock()
        self._ended = False
        self._pidfd: int | None = None
        self.offered_kinds = set(kinds)
        worker_reads, self._requests = os.pipe()
        self._replies, worker_writes = os.pipe()
        try:
            self.pid, self.loaded_kinds, self._forked_by = template.fork(worker_reads, worker_writes, kinds)
        except BaseException:
            self._close()
            raise
        finally:
            os.close(worker_reads)
            os.close(worker_writes)
        os.set_blocking(self._requests, False)
        # Tells that the process has ended even when a child of it holds the pipe open.
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(self.pid)

    def send(self, message: object, timeout_s: float) -> None:
        """Write one message. Raises WorkerLate when the worker does not read it in time, WorkerDied when nobody will."""
        data = memoryview((json.dumps(message) + "\n").encode())
        end = time.monotonic() + timeout_s
        while data:
            if not _wait(self._requests, select.POLLOUT, end - time.monotonic(), self._pidfd):
                raise WorkerLate
            try:
                data = data[os.write(self._requests, data) :]
            except (BrokenPipeError, BlockingIOError):  # nobody reads it; it is full, and what was ready is the news of a death
                raise WorkerDied from None

    def wait_until_ready(self, timeout_s: float) -> None:
        if self._receive(timeout_s) != ["ready"]:
            raise WorkerDied

    def receive_about(self, number: int, timeout_s: float) -> list:
        """The next message, which must be about the answer with this number: ``[tag, *fields]``."""
        message = self._receive(timeout_s)
        if not isinstance(message, list) or NUM_FIELDS.get(str(message[:1])) != len(message) or message[1] != number:
            raise WorkerDied  # a grader wrote to a pipe that is not its own
        return [message[0], *message[2:]]

    def _receive(self, timeout_s: float) -> object:
        """One line. Raises WorkerLate after ``timeout_s`` without one, WorkerDied at the end of the pipe or after nonsense on it."""
        end = time.monotonic() + timeout_s
        while not self._lines:
            # The pipe is looked at even when time is up: a parent that was itself held up must not blame a worker that has answered.
            if not _wait(self._replies, select.POLLIN, end - time.monotonic(), self._pidfd):
                raise WorkerLate
            if not _wait(self._replies, select.POLLIN, 0.0):
                raise WorkerDied
            data = os.read(self._replies, 1 << 16)
            self._buffer += data
            if not data or len(self._buffer) > self._max_line:
                raise WorkerDied
            if b"\n" in data:
                *lines, self._buffer = self._buffer.split(b"\n")
                self._lines.extend(lines)
        try:
            return json.loads(self._lines.popleft())
        except ValueError:
            raise WorkerDied from None

    def kill(self) -> None:
        """Kill the process and everything it started. Safe from any thread, and at any time."""
        with self._ending:  # once collected, the number may belong to somebody else
            if not self._ended:
                self._kill_group()

    def _kill_group(self) -> None:
        for kill in (os.killpg, os.kill):  # it has no group of its own in its first instants
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of it and free everything. Does not wait until it has gone."""
        self.kill()
        with self._ending:
            self._ended = True
        self._template.discard(self.pid, self._forked_by)
        self._close()

    def cause_of_death(self) -> str:
        """How a worker ended that nobody asked to, in words. In place of :meth:`end`."""
        with self._ending:
            self._ended = True
        try:
            code = self._template.reap(self.pid, self._forked_by)
        except TemplateLost:
            self._kill_group()  # nobody else will
            cause = "ended (nobody knows how: its template process is gone, too)"
        else:
            cause = "closed its pipes" if code is None else f"exited with status {code}"
            if code is not None and code < 0:
                cause = f"was killed by {signal.Signals(-code).name}"
        self._close()
        return cause

    def _close(self) -> None:
        for fd in (self._requests, self._replies, self._pidfd):
            if fd is not None:
                os.close(fd)


def _wait(fd: int, event: int, timeout_s: float, other_fd: int | None = None) -> bool:
    """Whether ``fd`` became ready (or ``other_fd`` readable) in time. poll, not select: file descriptors beyond 1023 are usual in Ray."""
    poll = select.poll()
    poll.register(fd, event)
    if other_fd is not None:
        poll.register(other_fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s * 1000.0)))
