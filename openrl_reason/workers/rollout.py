"""A pool of vLLM engines as Ray actors: requests in, completions streaming out, dead engines replaced.

The driver pumps: each busy engine always has two `pump` calls in flight, so that it never waits for the driver, and the driver sees results
(and signs of life) about every `PUMP_SECONDS`. Requests are assigned to engines by a rule that depends on submission order alone.

Failure: an engine that dies, raises, or leaves a call unanswered for ``request_timeout_s`` is killed and replaced by a new one, which gets
the current weights and the requests that its predecessor had not returned. A request is forgotten only when its completion has arrived,
and nothing of a replaced engine is read any more: each request completes exactly once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from openrl_reason.core.seeds import content_id
from openrl_reason.environment import require
from openrl_reason.errors import ConfigError, OpenRLError, WorkerError
from openrl_reason.workers.engine import EngineActor, RolloutEngine
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig, check_requests
from openrl_reason.workers.weight_broadcast import BroadcastSender
from openrl_reason.workers.weight_sync import BROADCASTS, Manifest, Sender, host_identity, make_sender

__all__ = ["Completion", "Request", "RolloutConfig", "RolloutEngine", "RolloutPool", "SamplingConfig"]

PUMP_SECONDS = 0.1
CALLS_IN_FLIGHT = 2


class PlacesActors(Protocol):
    """What the pool needs of ``workers.placement.Placement``."""

    def actor_options(self, role: str, index: int) -> dict[str, Any]:
        """Options for ``ActorClass.options(...)``."""
        ...


class PublishesWeights(Protocol):
    """What the pool needs of ``workers.model_group.ModelGroup``."""

    def publish_weights(self, sender: Sender, version: int) -> Manifest:
        """Runs ``sender.send`` on the weights in the process of rank 0."""
        ...


@dataclass
class _Call:
    """A remote call whose answer has not been read."""

    method: str
    answer_ref: Any


@dataclass
class _Seat:
    """One engine's place in the pool; the actor on it may be replaced."""

    index: int
    role: str = "engine"
    actor: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    """Process, host and log of the actor, known once it has started."""
    calls: deque[_Call] = field(default_factory=deque)
    """In order: an actor answers in order too."""
    waiting_since: float = 0.0
    """Since when the first of ``calls`` has been the first."""
    unsent: list[Request] = field(default_factory=list)
    """Assigned, and not yet sent to the actor."""
    unfinished: dict[str, Request] = field(default_factory=dict)
    """Assigned, and not completed: what a successor has to do."""
    seconds_busy: float = 0.0
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


class RolloutPool:
    """Engines that serve requests and take weight updates. A context manager; `close` ends the actors.

    Args:
        config: engine settings.
        model_path: folder with the first weights, readable by every engine.
        placement: says where actors go.
        version: version of those weights.
        seed: seed of the engines themselves; requests bring their own.
        role: under which ``placement`` knows these actors. A pool is driven by one thread; another pool may be driven by another.

    Raises:
        WorkerError: an engine does not start.
    """

    def __init__(
        self, config: RolloutConfig, model_path: str, *, placement: PlacesActors, version: int = 0, seed: int = 0, role: str = "engine"
    ) -> None:
        self._ray = require("ray", "to run engines as actors")
        self.config, self.model_path = config, str(model_path)
        self._placement, self._first_version, self._seed, self._role = placement, version, seed, role
        self.version = version
        self._manifest: Manifest | None = None
        self._publisher: PublishesWeights | None = None
        self._senders: dict[str, Sender] = {}
        self._broadcaster: BroadcastSender | None = None
        self._engine_of_group: dict[str, int] = {}
        self._assigned = [0] * config.num_engines
        self._counts: Counter[str] = Counter(requests=0, completed=0, restarts=0, resubmitted=0, moved=0)
        self._counts.update(prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=0)
        self._seats = [_Seat(index, role) for index in range(config.num_engines)]
        try:
            for seat in self._seats:
                self._start(seat)
            self._settle()
        except BaseException:
            self.close()
            raise

    # --- requests ---

    def generate(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Completions of ``requests``, and of what is `submit`\\ ted meanwhile, as they finish. One iteration at a time.

        Ending the iteration early (``break``, an exception, Ctrl-C) drops the requests that are left.

        Raises:
            ConfigError: a request cannot be served; nothing has been submitted then.
            WorkerError: an engine failed more than ``max_restarts`` times.
        """
        self.submit(requests)
        return self._stream()

    def _stream(self) -> Iterator[Completion]:
        try:
            while self.num_unfinished:
                yield from self._poll()
        finally:
            if self.num_unfinished:
                self.abort_all()

    def submit(self, requests: Iterable[Request]) -> None:
        """Adds requests, to be answered by the running (or next) `generate`.

        Requests of one group (of one prompt, where ``group`` is None) go to the engine that has the group already; a new group goes to the
        engine that has been given the fewest requests so far. Those that are ``movable`` go, together, to the engine with the fewest unfinished
        requests if that of their group has more than these more: computing their prefix once again is cheaper than an idle engine.

        Raises:
            ConfigError: a request cannot be served, or its id is in use; nothing has been submitted then.
        """
        requests = list(requests)
        check_requests(requests, self.config, [seat.unfinished for seat in self._seats])
        groups = [request.group if request.group is not None else content_id(str(request.prompt_ids)) for request in requests]
        moved = self._moved_groups(requests, groups)
        for request, group in zip(requests, groups, strict=True):
            if group not in self._engine_of_group:
                self._engine_of_group[group] = min(range(len(self._seats)), key=lambda index: (self._assigned[index], index))
            seat = self._seats[moved[group] if request.movable and group in moved else self._engine_of_group[group]]
            self._assigned[seat.index] += 1
            seat.unsent.append(request)
            seat.unfinished[request.request_id] = request
        self._counts["requests"] += len(requests)
        for seat in self._seats:
            self._feed(seat)

    def _moved_groups(self, requests: list[Request], groups: list[str]) -> dict[str, int]:
        """Engines of the groups whose movable requests leave their own engine."""
        loads = [len(seat.unfinished) for seat in self._seats]
        moved: dict[str, int] = {}
        for group, count in Counter(group for request, group in zip(requests, groups, strict=True) if request.movable).items():
            own, idlest = self._engine_of_group.get(group), min(range(len(loads)), key=lambda index: (loads[index], index))
            if own is not None and loads[own] > loads[idlest] + count:
                moved[group] = own = idlest
                self._counts["moved"] += count
            if own is not None:
                loads[own] += count
        return moved

    def poll(self) -> list[Completion]:
        """Waits at most a second for an engine to answer; what has finished. For a driver that must look elsewhere between completions."""
        return self._poll() if self.num_unfinished else []

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return sum(len(seat.unfinished) for seat in self._seats)

    def abort_all(self) -> None:
        """Drops every unfinished request, without waiting for the engines."""
        for seat in self._seats:
            seat.calls = deque(call for call in seat.calls if call.method != "pump")
            if seat.unfinished and seat.actor is not None:
                self._call(seat, "abort_all")
            seat.unsent.clear()
            seat.unfinished.clear()
        self._forget_groups()

    def _forget_groups(self) -> None:
        self._engine_of_group.clear()
        self._assigned = [0] * len(self._seats)

    # --- calls to the engines ---

    def _start(self, seat: _Seat) -> None:
        seat.about = {}
        options = {"name": f"{seat.name}-{os.urandom(3).hex()}", "max_restarts": 0} | self._placement.actor_options(self._role, seat.index)
        seat.actor = self._ray.remote(EngineActor).options(**options).remote()
        self._call(seat, "describe")
        self._call(seat, "start", self.config, self.model_path, self._first_version, self._seed)
        if self._manifest is not None:
            if self._manifest.transport in BROADCASTS:  # what was broadcast cannot be read again
                self._manifest = self._publish(self.version, "object_store")
            self._call(seat, "load_weights", self._manifest, self.version)
        self._feed(seat)

    def _call(self, seat: _Seat, method: str, *args: Any) -> None:
        if not seat.calls:
            seat.waiting_since = time.monotonic()
        seat.calls.append(_Call(method, getattr(seat.actor, method).remote(*args)))

    def _call_all(self, method: str, *args: Any) -> None:
        """Calls every engine and waits for the answers."""
        for seat in self._seats:
            self._call(seat, method, *args)
        self._settle()

    def _feed(self, seat: _Seat) -> None:
        while seat.unfinished and sum(call.method == "pump" for call in seat.calls) < CALLS_IN_FLIGHT:
            self._call(seat, "pump", seat.unsent, PUMP_SECONDS)
            seat.unsent = []

    def _poll(self) -> list[Completion]:
        """Waits until some engine answers or a deadline may have passed; reads the answers."""
        completions: list[Completion] = []
        heads = {seat.calls[0].answer_ref: seat for seat in self._seats if seat.calls}
        ready, waiting = self._ray.wait(list(heads), num_returns=1, timeout=min(1.0, self.config.request_timeout_s / 4))
        if waiting:
            ready += self._ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for ref in ready:
            completions += self._read(heads.pop(ref))
        for seat in heads.values():
            waited = time.monotonic() - seat.waiting_since
            method = seat.calls[0].method
            if waited > (self.config.start_timeout_s if method in ("describe", "start") else self.config.request_timeout_s):
                self._replace(seat, f"hung: no answer to {method!r} for {waited:.0f} s", hung=True)
        return completions

    def _read(self, seat: _Seat) -> list[Completion]:
        call = seat.calls.popleft()
        seat.waiting_since = time.monotonic()
        try:
            answer = self._ray.get(call.answer_ref)
        except self._ray.exceptions.RayTaskError as error:
            what = f"{type(error.cause).__name__}: {_first_line(error.cause)}"
            if isinstance(error.cause, OpenRLError):  # our own refusal: a new engine would answer alike
                raise type(error.cause)(f"{seat.name}: {error.cause}; log: {self._log(seat)}") from error
            if call.method == "load_weights" or (call.method == "start" and not seat.restarts):
                raise WorkerError(f"{seat.name} failed to {call.method}: {what}; log: {self._log(seat)}") from error
            self._replace(seat, f"{call.method} raised {what}")
            return []
        except self._ray.exceptions.RayError as error:
            self._replace(seat, f"died in {call.method}: {_first_line(error)}")
            return []
        completions: list[Completion] = []
        if call.method == "describe":
            seat.about = answer
        elif call.method == "pump":
            completions, seconds = answer
            seat.seconds_busy += seconds
            for completion in completions:
                self._count(seat.unfinished.pop(completion.request_id), completion)
        self._feed(seat)
        return completions

    def _count(self, request: Request, completion: Completion) -> None:
        self._counts["completed"] += 1
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        self._counts["cached_prompt_tokens"] += completion.num_cached_tokens
        self._counts["generated_tokens"] += len(completion.token_ids)

    def _settle(self) -> list[Completion]:
        """Reads answers until no call is open. Without unfinished requests none brings completions."""
        completions: list[Completion] = []
        while any(seat.calls for seat in self._seats):
            completions += self._poll()
        return completions

    def _replace(self, seat: _Seat, cause: str, *, hung: bool = False) -> None:
        log = self._log(seat)
        self._kill(seat, hung=hung)
        seat.restarts += 1
        if seat.restarts > self.config.max_restarts:
            limit = self.config.max_restarts
            raise WorkerError(f"{seat.name} failed {seat.restarts} times (rollout.max_restarts {limit}): {cause}; log: {log}")
        self._counts["restarts"] += 1
        self._counts["resubmitted"] += len(seat.unfinished) - len(seat.unsent)
        seat.unsent = list(seat.unfinished.values())
        self._broadcaster = None  # its group has lost a member
        self._start(seat)

    def _kill(self, seat: _Seat, *, hung: bool = False) -> None:
        if seat.actor is None:
            return
        if hung and seat.about.get("host") == host_identity():
            with contextlib.suppress(ProcessLookupError):
                os.kill(seat.about["pid"], signal.SIGKILL)  # Ray asks the process to end, which a stopped one never does
        self._ray.kill(seat.actor)
        seat.actor = None
        seat.calls.clear()

    def _log(self, seat: _Seat) -> str:
        return seat.about.get("log", "(it had not started; see the logs folder of the Ray session)")

    # --- weights, sleep, end ---

    def sync_weights(
        self, model_group: PublishesWeights, version: int, *, between: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Gives the engines the weights of ``model_group`` as ``version``, and empties their prefix caches.

        ``between`` runs when the trainer has packed its weights and before the engines load them: on shared GPUs the one gives its memory to
        the other. (A broadcast does both at once, so engines and trainer need GPUs of their own for it.)

        Returns:
            seconds: ``sync/publish`` (packing, at the trainer), ``sync/load`` (in vLLM, the slowest engine), ``sync/total``.

        Raises:
            ConfigError: requests are unfinished.
            WorkerError: versions or checksums differ, a weight is missing, or an engine failed more than ``max_restarts`` times.
        """
        if self.num_unfinished:
            raise ConfigError(f"{self.num_unfinished} requests are unfinished: finish or abort them before new weights are loaded")
        started = time.perf_counter()
        self._settle()
        self._publisher = model_group
        if self.config.weight_transport in BROADCASTS:
            manifest = self._broadcast(version)
        else:
            manifest = self._publish(version, self.config.weight_transport)
        published = time.perf_counter()
        self._manifest, self.version = manifest, version
        self._forget_groups()
        if between is not None:
            between()
        if manifest.transport in BROADCASTS:
            self._settle()
        else:
            self._call_all("load_weights", manifest, version)
        ended = time.perf_counter()
        return {"sync/publish": published - started, "sync/load": ended - published, "sync/total": ended - started}

    def sleep(self) -> None:
        """Frees the GPUs for the trainer; on CPUs does nothing."""
        self._call_all("sleep")

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._call_all("wake")

    def _publish(self, version: int, transport: str) -> Manifest:
        if transport not in self._senders:
            hosts = {seat.about.get("host", "") for seat in self._seats}
            checksum = self.config.sync_checksum
            self._senders[transport] = make_sender(transport, dtype=self.config.dtype, checksum=checksum, engine_hosts=hosts)
        manifest = self._publisher.publish_weights(self._senders[transport], version)
        if manifest.version != version:
            raise WorkerError(f"the trainer published weights version {manifest.version}, but version {version} was asked for")
        return manifest

    def _broadcast(self, version: int) -> Manifest:
        """Engines first, then the trainer: a broadcast needs everybody. An engine found dead before is replaced before."""
        self._call_all("describe")
        if self._broadcaster is None:
            workers = self.config.tensor_parallel
            self._broadcaster = BroadcastSender(
                self.config.weight_transport, self.config.dtype, self.config.sync_checksum, workers * len(self._seats),
                self.config.request_timeout_s,
            )  # fmt: skip
        for seat in self._seats:
            announced = self._broadcaster.announce(version, seat.index * self.config.tensor_parallel)
            self._call(seat, "load_weights", announced, version)
        return self._publisher.publish_weights(self._broadcaster, version)

    def stats(self) -> dict[str, float]:
        """Counters since the start: requests, completed, restarts, resubmitted, moved (to another engine than their group's), prompt_tokens,
        cached_prompt_tokens, generated_tokens, ``seconds_busy_max`` (of the busiest engine) and ``seconds_busy/engine-<i>``."""
        busy = {f"seconds_busy/{seat.name}": seat.seconds_busy for seat in self._seats}
        return dict(self._counts) | {"seconds_busy_max": max(busy.values())} | busy

    def close(self) -> None:
        """Kills the engines. Does not wait for them, and may be called twice."""
        if self._ray.is_initialized():
            for seat in self._seats:
                self._kill(seat)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__


