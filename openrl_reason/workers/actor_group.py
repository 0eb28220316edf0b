"""Ray actors that live and die together: calls to all of them, and one clear error when one fails."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from openrl_reason.errors import OpenRLError, WorkerError

_GRACE_S = 3.0
"""After a first failure, how long to wait for one that explains it: a dead rank breaks its neighbours' collectives."""


class ActorGroup:
    """The ranks ``<role>-rank<i>``. When one fails all of them are ended, and WorkerError says which one it was, why, and where its log lies.
    Errors that are the user's to mend (ConfigError, DataError, CheckpointError) come through as they are.

    Actors have ``call(method, *args, **kwargs)``. ``_describing`` and ``_starting`` are what their descriptions (with the path of their logs) and
    their starts are awaited by.
    """

    def __init__(self, role: str, actors: list[Any], timeout_s: float) -> None:
        self.role, self.timeout_s = role, timeout_s
        self._actors, self._names = actors, [f"{role}-rank{rank}" for rank in range(len(actors))]
        self._info: list[dict[str, Any]] = [{} for _ in actors]
        self._describing: list[Any] = []
        self._starting: list[Any] = []
        self._failure: str | None = None

    def ready(self) -> None:
        """Returns when every rank has loaded its model."""
        if self._starting:
            starting, self._starting = self._starting, []
            self._info = self._gather(self._describing, "start")
            self._gather(starting, "start")

    @property
    def num_ranks(self) -> int:
        return len(self._actors)

    def close(self) -> None:
        """Ends all ranks, and returns when their names are free again."""
        self._failure = self._failure or "it was shut down"
        self._kill()

    def _alive(self) -> list[Any]:
        self.ready()
        if self._failure is not None:
            raise WorkerError(f"the {self.role} group is gone: {self._failure}")
        return self._actors

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return self._gather([actor.call.remote(method, *args) for actor in self._alive()], method)

    def _gather(self, refs: Sequence[Any], what: str) -> list[Any]:
        import ray

        self._wait(refs, what)
        return ray.get(list(refs))

    def _wait(self, refs: Sequence[Any], what: str) -> None:
        """Returns when all ``refs`` (one per rank) are done; the first failure kills the group and raises."""
        import ray

        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=self.timeout_s, fetch_local=False)
            if not done:
                stuck = ", ".join(self._names[refs.index(ref)] for ref in pending)
                self._fail(f"{stuck} did not finish {what} within {self.timeout_s:.0f} s", refs.index(pending[0]))
            if _error_of(done[0]) is not None:
                ray.wait(pending, num_returns=len(pending), timeout=_GRACE_S, fetch_local=False) if pending else None
                self._raise_first_cause(refs, what)

    def _raise_first_cause(self, refs: Sequence[Any], what: str) -> None:
        import ray

        finished = set(ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0])
        failures = [(rank, error) for rank, ref in enumerate(refs) if ref in finished and (error := _error_of(ref)) is not None]
        rank, error = min(failures, key=lambda failure: _severity(failure[1]))
        if isinstance(error, OpenRLError):
            self._failure = str(error)
            self._kill()
            raise error
        cause = _death(error) if isinstance(error, ray.exceptions.RayActorError) else f"{type(error).__name__}: {_first_line(error)}"
        self._fail(f"{self._names[rank]} failed in {what}: {cause}", rank)

    def _fail(self, message: str, rank: int) -> None:
        log = self._info[rank].get("log", "see the Ray session's logs folder")
        self._failure = f"{message}. Its log: {log}"
        self._kill()
        raise WorkerError(self._failure)

    def _kill(self) -> None:
        import ray

        if not ray.is_initialized():
            return
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        deadline = time.monotonic() + 10.0
        for name in self._names:
            while time.monotonic() < deadline and _is_named_actor(name):
                time.sleep(0.02)


def _error_of(ref: Any) -> Exception | None:
    """The exception a finished call ended with: what the rank raised, or that the actor died."""
    import ray

    try:
        ray.get(ref, timeout=0)
    except ray.exceptions.RayTaskError as error:
        return error.cause if error.cause is not None else error
    except ray.exceptions.RayError as error:
        return error
    return None


def _severity(error: Exception) -> int:
    """A death explains broken collectives, and so does an error of ours; a broken collective explains nothing."""
    import ray

    if isinstance(error, ray.exceptions.RayActorError):
        return 0
    if isinstance(error, OpenRLError):
        return 1
    words = ("gloo", "nccl", "connection", "peer")
    return 3 if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words) else 2


def _death(error: Exception) -> str:
    """Ray's account of an actor's death, in one line and without its general advice."""
    found = re.search(r"exit type: (\w+).*?exit detail: (.*?)(?: Some common causes|\. |$)", str(error), re.DOTALL)
    return "the process died, or was killed" + (f" ({found[1]}: {found[2].strip()})" if found else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _is_named_actor(name: str) -> bool:
    import ray

    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True
