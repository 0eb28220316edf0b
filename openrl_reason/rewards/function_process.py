"""The two places in which a reward function runs: a process that can be killed, and, for a Python callable, a thread that cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openrl_reason.errors import DataError
from openrl_reason.rewards.answers import from_wire
from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.rewards.calling import BoundFunction, Caller


class Lost(Exception):
    """The process ended, or the pipe to it broke."""


class Late(Exception):
    """Nothing came back within the time allowed."""


class Unloadable(Exception):
    """The function cannot be imported or called at all."""


@dataclasses.dataclass(frozen=True)
class FunctionSettings:
    """What a function process is told about its function."""

    place: str
    """Absolute path of a .py file, or a module."""
    function: str
    """Its name."""
    form: str
    """batch, columns, sample or auto."""
    options: dict[str, Any]
    """Fixed keyword arguments."""
    deadline_s: float
    """Seconds of one call."""
    load_timeout_s: float
    """Seconds of the import."""
    memory_mb: int
    """Address space; 0: no limit."""
    concurrency: int
    """Async calls at once."""


def encode(sample: RewardSample) -> str:
    """A sample as JSON, for a function process. Raises DataError for an item whose info is no JSON."""
    fields = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}
    fields["item"] = {f.name: getattr(sample.item, f.name) for f in dataclasses.fields(sample.item)}
    try:
        return json.dumps(fields)
    except (TypeError, ValueError) as error:
        raise DataError(f"item {sample.item.task_id} cannot be sent to a reward function: its info must be JSON-able ({error})") from None


class ProcessPlace:
    """One function process and its two pipes. Used by one thread at a time, except :meth:`kill`, which is safe from any."""

    can_be_killed = True

    def __init__(self, settings: FunctionSettings) -> None:
        self.settings, self.form, self.is_async = settings, "", False
        worker_reads, self._requests = os.pipe()
        self._replies, worker_writes = os.pipe()
        self._buffer, self._lines, self._closed = b"", deque[bytes](), False
        self._reaping = threading.Lock()
        script = Path(__file__).with_name("function_worker.py")
        # start_new_session: Ctrl-C at the terminal is the parent's to handle, and a kill reaches what a function started.
        # What a function prints would drown the run's own lines; standard error stays.
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(worker_reads), str(worker_writes)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(worker_reads, worker_writes), start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._close()
            raise
        finally:
            os.close(worker_reads)
            os.close(worker_writes)
        os.set_blocking(self._requests, False)

    def start(self) -> None:
        """Import the function. Raises Unloadable when that fails, Late or Lost when the process does not come up."""
        search_path = [os.path.abspath(entry or os.getcwd()) for entry in sys.path]
        setup = dataclasses.asdict(self.settings) | {"sys_path": [*search_path, str(Path(__file__).resolve().parents[2])]}
        self._write(json.dumps(setup), self.settings.load_timeout_s)
        tag, *fields = self._read(self.settings.load_timeout_s)
        if tag == "unloadable":
            raise Unloadable(fields[0])
        self.form, self.is_async = fields

    def send(self, encoded: Sequence[str], samples: Sequence[RewardSample]) -> None:
        """Start the work on some samples."""
        self._write(f"[{','.join(encoded)}]", self.settings.deadline_s)

    def receive(self) -> tuple[int, RewardResult]:
        """The next result. Raises Late after the deadline without one, Lost at the end of the process."""
        # An async call ends by itself at its deadline; the process is killed if it does not.
        message = self._read(self.settings.deadline_s + (1.0 if self.is_async else 0.0))
        try:
            _, index, fields = message
            return index, from_wire(fields)
        except (TypeError, ValueError):  # the user's code wrote into the pipe
            raise Lost from None

    def _write(self, text: str, timeout_s: float) -> None:
        data = memoryview((text + "\n").encode())
        end = time.monotonic() + timeout_s
        while data:
            if not _wait(self._requests, select.POLLOUT, end):
                raise Late
            try:
                data = data[os.write(self._requests, data) :]
            except BrokenPipeError:
                raise Lost from None

    def _read(self, timeout_s: float) -> list:
        end = time.monotonic() + timeout_s
        while not self._lines:
            if not _wait(self._replies, select.POLLIN, end):
                raise Late
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise Lost
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._lines.extend(lines)
        try:
            return json.loads(self._lines.popleft())
        except ValueError:  # as above
            raise Lost from None

    def kill(self) -> None:
        """Kill the process and everything it started. Safe from any thread, and at any time."""
        with self._reaping:  # once reaped, the number may belong to somebody else
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Kill what is left and collect it; returns how the process had ended, in words."""
        self.kill()  # does not change the status of one that ended by itself
        with self._reaping:
            code = self.process.wait()
        self._close()
        return f"was killed by {signal.strsignal(-code) or -code}" if code < 0 else f"exited with status {code}"

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._requests)
            os.close(self._replies)


class ThreadPlace:
    """A Python callable in a daemon thread of this process. It cannot be killed: one that hangs is left behind."""

    can_be_killed = False

    def __init__(self, function: Callable[..., Any], settings: FunctionSettings) -> None:
        try:
            self._bound = BoundFunction(function, settings.form, settings.options)
        except ValueError as error:
            raise Unloadable(str(error)) from None
        self.settings, self.form, self.is_async = settings, self._bound.form, self._bound.is_async
        self._work: queue.SimpleQueue[Sequence[RewardSample] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, RewardResult] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._serve, name="reward-function", daemon=True).start()

    def _serve(self) -> None:
        caller = Caller(self._bound, self.settings.deadline_s, self.settings.concurrency)
        while (samples := self._work.get()) is not None:
            caller.run(samples, lambda index, result: self._done.put((index, result)))
        caller.close()

    def send(self, encoded: Sequence[str], samples: Sequence[RewardSample]) -> None:
        """Start the work on some samples."""
        self._work.put(samples)

    def receive(self) -> tuple[int, RewardResult]:
        """The next result. Raises Late after the deadline without one, Lost when :meth:`kill` was called meanwhile."""
        try:
            done = self._done.get(timeout=self.settings.deadline_s + (1.0 if self.is_async else 0.0))
        except queue.Empty:
            raise Late from None
        if done is None:
            raise Lost
        return done

    def kill(self) -> None:
        """Wait for it no longer; the thread ends when its call returns."""
        self._work.put(None)
        self._done.put(None)

    def end(self) -> str:
        """As :meth:`kill`."""
        self.kill()
        return "was left behind"


def _wait(fd: int, event: int, end: float) -> bool:
    """Wait for a pipe. It is looked at even when time is up: a parent that was itself held up must not blame a worker that has answered."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, end - time.monotonic()) * 1000))
