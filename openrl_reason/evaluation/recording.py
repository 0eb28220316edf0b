"""An evaluation that can be killed: completions are written down as they arrive, and are not generated again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig


class RecordingPool:
    """A rollout pool that remembers in a file. Requests that the file has answers to are answered from it; ``pool`` gets the others.

    A request's id and seed come from its identity (run seed, set, place, sample), so a continued evaluation asks for the same ones and ends
    with the same samples as one that was never interrupted.

    Args:
        identity: hash of what the samples depend on (model, prompts, sampling, seed); an existing file must hold the same.

    Raises:
        ConfigError: the file belongs to another evaluation.
    """

    pool: Any = None
    """Serves the requests; set once it has started."""

    def __init__(self, path: Path, identity: str, *, resume: bool) -> None:
        self.path = path
        self._ready: list[Completion] = []
        self.known: dict[str, Completion] = read_completions(path, identity) if resume else {}
        # Written anew and renamed, rather than appended to: a killed writer may have left half a line.
        unfinished = path.with_name(f".unfinished-{path.name}")
        self._file: TextIO = open(unfinished, "w", encoding="utf-8")
        self._write({"identity": identity}, *map(_as_json, self.known.values()))
        os.replace(unfinished, path)

    def _write(self, *records: dict[str, Any]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As the pool's; completions from the file come first."""
        requests = list(requests)
        yield from (self.known[request.request_id] for request in requests if request.request_id in self.known)
        missing = [request for request in requests if request.request_id not in self.known]
        for completion in self.pool.generate(missing) if missing else ():
            self._write(_as_json(completion))
            yield completion

    def submit(self, requests: Iterable[Request]) -> None:
        """As the pool's; what the file has is there at the next ``poll``."""
        requests = list(requests)
        self._ready += [self.known[request.request_id] for request in requests if request.request_id in self.known]
        missing = [request for request in requests if request.request_id not in self.known]
        if missing:
            self.pool.submit(missing)

    def poll(self) -> list[Completion]:
        """As the pool's."""
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        completions = self.pool.poll()
        self._write(*map(_as_json, completions))
        return completions

    @property
    def config(self) -> RolloutConfig:
        """The pool's."""
        return self.pool.config

    def stats(self) -> dict[str, float]:
        """The pool's."""
        return self.pool.stats()

    def finish(self) -> None:
        """The result is written: the file is not needed any more."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file and leaves it for the next attempt."""
        self._file.close()


def _as_json(completion: Completion) -> dict[str, Any]:
    return vars(completion) | {"stop_reason": str(completion.stop_reason)}


def read_completions(path: Path, identity: str) -> dict[str, Completion]:
    """Completions by request id; empty if there is no file. Lines that a killed writer did not finish are left out."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for record in map(_parse, lines) if record is not None]
    if records and records[0].get("identity") != identity:
        raise ConfigError(
            f"{path} holds samples of another evaluation (another model, other prompts, sampling settings, seed or dtype): go on with the"
            " settings it was started with, give another --output, or pass --resume false to start anew"
        )
    found = [Completion(**record | {"stop_reason": StopReason(record["stop_reason"])}) for record in records[1:]]
    return {completion.request_id: completion for completion in found}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
