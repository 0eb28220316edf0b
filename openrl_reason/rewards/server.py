"""Reward servers over HTTP, in OpenRLHF's JSON: ``{"query", "prompts", "labels"}`` -> ``{"rewards", "scores", "extra_logs"}``.

One event loop in one thread sends batches to whichever server is up and least busy, and tries again elsewhere when one fails. Neither
redirects nor proxies are followed, nothing is unpacked, and a response is read up to a limit of bytes and of seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import ssl
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openrl_reason.config import require
from openrl_reason.errors import WorkerError
from openrl_reason.rewards.answers import failure, read_batch
from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.rewards.config import RewardServerConfig

RETRIED = frozenset((408, 425, 429))  # and 5xx
LONGEST_WAIT_S = 30.0

_Request = tuple[RewardSample, Future[RewardResult]]


class _Refused(Exception):
    """An answer that another attempt would not change."""


class _Unavailable(Exception):
    """Perhaps only for now."""


@dataclass
class _Server:
    url: str
    under_way: int = 0
    last_used: int = 0
    failures_in_a_row: int = 0
    down_until: float = 0.0
    last_failure: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def shown(self) -> str:
        """The address as messages show it, without a query."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()


@dataclass
class _Call:
    """One batch on its way through attempts."""

    body: bytes
    attempts: int = 0
    end: float = math.inf
    """The deadline; not running while all servers are merely busy."""
    tried: set[int] = field(default_factory=set)
    is_late: bool = False
    reason: str = ""

    def begin(self, end: float) -> None:
        self.end = min(self.end, end)


class ServerRewards:
    """Rewards by one or several equal servers. A partly filled batch waits for :meth:`flush`.

    send: further fields of each request: responses, steps (lists of texts), task_ids, num_tokens, stop_reasons.
    """

    def __init__(self, urls: Sequence[str], config: RewardServerConfig, send: Sequence[str] = ()) -> None:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        token = os.environ.get(config.token_variable, "") if config.token_variable else ""
        if config.token_variable:
            require(bool(token), "reward.server.token_variable", config.token_variable, "there is no such environment variable, or it is empty")
            require(token.isprintable() and token.isascii(), "reward.server.token_variable", config.token_variable, "its value is no token")
            headers["Authorization"] = f"Bearer {token}"
        self._lock, self._filling = threading.Lock(), list[_Request]()
        self._batch_size = config.batch_size
        self._shared = _Shared(urls, config, tuple(send), headers, token)
        self._finalizer = weakref.finalize(self, _Shared.close, self._shared)

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response."""
        future: Future[RewardResult] = Future()
        with self._lock:
            self._filling.append((sample, future))
            if len(self._filling) >= self._batch_size:
                self._post()
        return future

    def flush(self) -> None:
        """Send what has gathered."""
        with self._lock:
            self._post()

    def _post(self) -> None:
        batch, self._filling = self._filling, []
        if batch:
            self._shared.post(batch)

    def metrics(self) -> dict[str, Any]:
        """Requests, retries, failures and seconds of each server since the last time."""
        return self._shared.metrics()

    def close(self) -> None:
        """Cancel what is under way and end the thread. May be called twice."""
        with self._lock:
            batch, self._filling = self._filling, []
        for _, future in batch:
            _fail(future)
        self._finalizer()


class _Shared:
    """The thread, its event loop, and the servers. Held by the thread, so that the source itself can be garbage collected."""

    def __init__(self, urls: Sequence[str], config: RewardServerConfig, send: tuple[str, ...], headers: dict[str, str], token: str) -> None:
        self.config, self.send, self.headers, self.token = config, send, headers, token
        self.servers = [_Server(url) for url in urls]
        self.lock = threading.Lock()
        self.inbox: deque[list[_Request]] = deque()
        self.closed = False
        self.owner = os.getpid()
        self.random = random.Random()
        self.order = 0
        self.loop = asyncio.new_event_loop()
        self.wake, self.freed = asyncio.Event(), asyncio.Condition()
        self.thread = threading.Thread(target=self._run, name="reward-servers", daemon=True)
        self.thread.start()

    def post(self, batch: list[_Request]) -> None:
        with self.lock:
            if self.closed:
                for _, future in batch:
                    _fail(future)
                return
            self.inbox.append(batch)
            self.loop.call_soon_threadsafe(self.wake.set)

    def close(self) -> None:
        if os.getpid() != self.owner:  # in a forked child there is no such thread
            return
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.loop.call_soon_threadsafe(self.wake.set)
        if self.thread is not threading.current_thread():
            self.thread.join(5.0)

    def metrics(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        with self.lock:
            for index, server in enumerate(self.servers):
                counts, server.counts = server.counts, Counter()
                numbers |= {f"server{index}/{name}": float(counts[name]) for name in ("requests", "retries", "failures", "seconds")}
        return numbers

    def count(self, server: _Server, **numbers: float) -> None:
        with self.lock:
            server.counts.update(numbers)

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._serve())
        finally:
            self.loop.close()
            with self.lock:
                self.closed = True
                waiting = [request for batch in self.inbox for request in batch]
                self.inbox.clear()
            for _, future in waiting:
                _fail(future)

    async def _serve(self) -> None:
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * self.config.max_concurrent * len(self.servers))
        client = httpx.AsyncClient(
            headers=self.headers, follow_redirects=False, trust_env=False, timeout=None, limits=limits, verify=ssl.create_default_context()
        )
        tasks: set[asyncio.Task] = set()
        async with client:
            while not self.closed:
                await self.wake.wait()
                self.wake.clear()
                while self.inbox:
                    task = self.loop.create_task(self._score(client, self.inbox.popleft()))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            running = list(tasks)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # the thread that looks host names up
            await asyncio.wait_for(self.loop.shutdown_default_executor(), 2.0)

    async def _score(self, client: Any, batch: list[_Request]) -> None:
        """Every future of the batch gets a result, whatever happens."""
        try:
            results = await self._attempts(client, [sample for sample, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                with contextlib.suppress(InvalidStateError):
                    future.set_result(result)
        except BaseException as error:
            for _, future in batch:
                _fail(future, None if isinstance(error, asyncio.CancelledError) else repr(error))
            raise

    async def _attempts(self, client: Any, samples: list[RewardSample]) -> list[RewardResult]:
        call, steps = _Call(self._body(samples)), [len(sample.steps) for sample in samples]
        while call.attempts <= self.config.retries:
            if call.attempts:
                longest = min(LONGEST_WAIT_S, self.config.backoff_s * 2 ** (call.attempts - 1))
                await asyncio.sleep(min(self.random.uniform(0.0, longest), max(0.0, call.end - time.monotonic())))
            server = await self._acquire(call)
            if server is None:
                break
            started = time.monotonic()
            call.begin(started + self.config.deadline_s)
            try:
                async with asyncio.timeout(min(self.config.timeout_s, call.end - started)):
                    returned = await self._post(client, server, call.body)
                self._went_well(server)
                return read_batch(returned, steps)
            except _Refused as error:
                self.count(server, failures=1)
                return [self._failure("error", f"{server.shown}: {error}") for _ in samples]
            except (TimeoutError, _Unavailable) as error:
                call.is_late = isinstance(error, TimeoutError)
                call.reason = f"no response within {time.monotonic() - started:.3g} s" if call.is_late else str(error)
                self._went_wrong(server, call)
            finally:
                self.count(server, requests=1, retries=min(call.attempts, 1), seconds=time.monotonic() - started)
                call.attempts += 1
                await self._release(server)
        status = "timeout" if call.is_late or time.monotonic() >= call.end else "error"
        reason = call.reason or " | ".join(f"{server.shown}: {server.last_failure}" for server in self.servers[:3])
        return [self._failure(status, f"{reason} (attempts: {call.attempts})") for _ in samples]

    def _failure(self, status: str, detail: str) -> RewardResult:
        """A server may repeat the token that it got."""
        return failure(status, detail.replace(self.token, "***") if self.token else detail)

    def _body(self, samples: list[RewardSample]) -> bytes:
        body: dict[str, Any] = {
            "query": [s.query for s in samples], "prompts": [s.prompt for s in samples], "labels": [s.item.gold for s in samples],
        }  # fmt: skip
        further = {"responses": "response", "steps": "steps", "num_tokens": "num_tokens", "stop_reasons": "stop_reason"}
        for name in self.send:
            body[name] = [s.item.task_id if name == "task_ids" else getattr(s, further[name]) for s in samples]
        return json.dumps(body).encode()

    async def _acquire(self, call: _Call) -> _Server | None:
        """The least busy server that is up, one not yet tried if possible; among equals the one whose turn it is. None at the deadline."""
        async with self.freed:
            while True:
                now = time.monotonic()
                if now >= call.end:
                    return None
                if all(server.failures_in_a_row for server in self.servers):  # not merely busy
                    call.begin(now + self.config.deadline_s)
                free = [server for server in self.servers if server.under_way < self.config.max_concurrent]
                up = [server for server in free if server.down_until <= now]
                if up:
                    chosen = min(up, key=lambda s: (id(s) in call.tried and len(up) > 1, s.under_way, s.last_used))
                    if chosen.failures_in_a_row:  # one request tries whether it is back; the others wait for the outcome
                        chosen.down_until = now + self.config.timeout_s
                    self.order += 1
                    chosen.under_way, chosen.last_used = chosen.under_way + 1, self.order
                    return chosen
                pause = min([call.end - now, *(server.down_until - now for server in free)])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.001, pause) if pause < math.inf else None):
                        await self.freed.wait()

    async def _release(self, server: _Server) -> None:
        async with self.freed:
            server.under_way -= 1
            self.freed.notify_all()

    def _went_well(self, server: _Server) -> None:
        server.failures_in_a_row, server.down_until = 0, 0.0

    def _went_wrong(self, server: _Server, call: _Call) -> None:
        """Leave it alone for a while, the longer the oftener it failed."""
        pause = min(LONGEST_WAIT_S, self.config.backoff_s * 2**server.failures_in_a_row)
        server.failures_in_a_row = min(server.failures_in_a_row + 1, 30)
        server.down_until, server.last_failure = time.monotonic() + pause, call.reason
        call.tried.add(id(server))
        call.reason = f"{server.shown}: {call.reason}"
        self.count(server, failures=1)

    async def _post(self, client: Any, server: _Server, body: bytes) -> Any:
        """One attempt. Raises _Refused or _Unavailable."""
        import httpx

        limit, read = self.config.max_response_mb << 20, bytearray()
        try:
            async with client.stream("POST", server.url, content=body, headers={"Content-Type": "application/json"}) as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise _Refused("its response is compressed, which it was asked not to be")
                async for part in response.aiter_raw():
                    read += part
                    if len(read) > limit:
                        raise _Refused(f"its response is longer than --reward.server.max_response_mb {self.config.max_response_mb}")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise _Refused(f"{type(error).__name__}: {error}") from None
        except httpx.HTTPError as error:
            raise _Unavailable(f"{type(error).__name__}: {str(error)[:300]}".strip(": ")) from None
        if response.status_code in RETRIED or response.status_code >= 500:
            raise _Unavailable(f"HTTP {response.status_code} {_start(read)}".strip())
        if response.is_redirect:
            raise _Refused(f"HTTP {response.status_code}: it redirects, which is not followed; give the final address")
        if response.status_code != 200:
            raise _Refused(f"HTTP {response.status_code} {_start(read)}".strip())
        try:
            return json.loads(read)
        except (ValueError, RecursionError):
            raise _Refused(f"its response is no JSON: {_start(read)}") from None


def _start(read: bytearray) -> str:
    """The beginning of a response, for a message."""
    return repr(bytes(read[:200]).decode("utf-8", "replace")) if read else ""


def _fail(future: Future[RewardResult], reason: str | None = None) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(WorkerError(reason or "the reward servers' client was closed before this response had its reward"))
