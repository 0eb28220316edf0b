"""Reward servers may be slow, broken, gone or hostile: batches go where they are answered, and the rest is a status."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from reward_helpers import alive, make_sample, reward_threads, score_all, wait_until

import openrl_reason
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.rewards.config import RewardConfig, RewardServerConfig
from openrl_reason.rewards.server import ServerRewards

QUICK = {"backoff_s": 0.02, "timeout_s": 5.0, "deadline_s": 20.0}


def right_answers(data):
    return {"rewards": [float(query.endswith(label)) for query, label in zip(data["query"], data["labels"], strict=True)]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append((data, dict(self.headers)))
        answer = server.answer(data, number)
        if answer is None:
            server.released.wait(30)
            self.close_connection = True
            return
        status, body, headers = (*answer, {})[:3] if isinstance(answer, tuple) else (200, answer, {})
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class RewardServer(ThreadingHTTPServer):
    """``answer(data, number) -> body | (status, body[, headers]) | None`` (hang)."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.seen, self.lock, self.released = answer, [], threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/get_reward"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer=lambda data, number: right_answers(data)):
        servers.append(RewardServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect():
    sources = []

    def make(*servers, send=(), **settings):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        sources.append(ServerRewards(urls, RewardServerConfig(**(QUICK | settings)), send))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def dead_url():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/get_reward"


def numbered(count):
    return [make_sample(str(number), "4") for number in range(count)]


def test_a_server_gets_openrlhfs_json_in_batches_and_its_logs_are_kept(serve, connect):
    server = serve(lambda data, number: right_answers(data) | {"scores": [1.0] * len(data["query"]), "extra_logs": {"size": len(data["query"])}})
    results = score_all(connect(server, batch_size=4), numbered(6))
    assert [result.score for result in results] == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert [result.logs["size"] for result in results] == [4.0, 4.0, 4.0, 4.0, 2.0, 2.0]
    first = server.seen[0][0] if len(server.seen[0][0]["query"]) == 4 else server.seen[1][0]
    assert first == {"query": [f"What is 2+2? {n}" for n in range(4)], "prompts": ["What is 2+2? "] * 4, "labels": ["4"] * 4}


def test_further_fields_are_sent_when_asked_for_and_a_server_may_reward_steps(serve, connect):
    server = serve(lambda data, number: {"rewards": [[1.0] * len(steps) for steps in data["steps"]]})
    source = connect(server, send=("steps", "responses", "task_ids", "num_tokens", "stop_reasons"))
    result = score_all(source, [make_sample("ab", steps="ab")])[0]
    assert result.step_scores == (1.0, 1.0)
    data = server.seen[0][0]
    assert (data["steps"], data["responses"], data["task_ids"], data["num_tokens"]) == ([["a", "b"]], ["ab"], ["id-4"], [5])


def test_two_failures_then_success_is_two_retries(serve, connect):
    server = serve(lambda data, number: (500, b"no") if number < 2 else right_answers(data))
    source = connect(server)
    assert score_all(source, [make_sample("4")])[0].score == 1.0
    numbers = source.metrics()
    assert (numbers["server0/requests"], numbers["server0/retries"], numbers["server0/failures"]) == (3.0, 2.0, 2.0)
    assert source.metrics()["server0/requests"] == 0.0, "each report covers what happened since the last"


def test_work_is_spread_over_all_servers(serve, connect):
    def slowly(data, number):
        time.sleep(0.02)
        return right_answers(data)

    servers = [serve(slowly) for _ in range(3)]
    results = score_all(connect(*servers, batch_size=1, max_concurrent=2), numbered(30))
    assert [n for n, result in enumerate(results) if result.score == 1.0] == [4, 14, 24]
    assert all(len(server.seen) >= 6 for server in servers), Counter(len(server.seen) for server in servers)
    one_by_one = connect(*servers, batch_size=1)
    before = [len(server.seen) for server in servers]
    for _ in range(6):
        score_all(one_by_one, [make_sample("4")])
    assert [len(server.seen) - count for server, count in zip(servers, before, strict=True)] == [2, 2, 2], "idle servers take turns"


def test_one_dead_server_of_three_costs_nothing_but_its_retries(serve, connect):
    servers = [serve(), dead_url(), serve()]
    source = connect(*servers, batch_size=1)
    results = score_all(source, numbered(20))
    assert {result.status for result in results} == {"ok"}
    numbers = source.metrics()
    assert 1 <= numbers["server1/failures"] <= 10, "it is tried now and then, not with every batch"
    assert numbers["server0/failures"] == numbers["server2/failures"] == 0


def test_a_server_that_comes_back_is_used_again(serve, connect):
    down = threading.Event()
    down.set()
    server = serve(lambda data, number: (503, b"") if down.is_set() else right_answers(data))
    source = connect(server, serve(), batch_size=1)
    assert {result.status for result in score_all(source, numbered(4))} == {"ok"}
    down.clear()
    time.sleep(0.2)
    seen = len(server.seen)
    assert {result.status for result in score_all(source, numbered(8))} == {"ok"}
    assert len(server.seen) > seen + 1


def test_a_server_that_hangs_is_a_timeout_at_its_deadline(serve, connect):
    server = serve(lambda data, number: None)
    source = connect(server, timeout_s=0.2, deadline_s=0.7)
    started = time.monotonic()
    result = score_all(source, [make_sample("4")])[0]
    assert result.status == "timeout" and "no response within" in result.detail
    assert time.monotonic() - started < 2.0
    healthy = connect(server, serve(), timeout_s=0.2)
    assert {result.status for result in score_all(healthy, numbered(40))} == {"ok"}


def test_a_server_that_trickles_bytes_is_ended_at_the_deadline_too(connect):
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def trickle():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not ended.wait(0.05):
                connection.sendall(b" ")

    threading.Thread(target=trickle, daemon=True).start()
    source = connect(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.5, deadline_s=0.6, retries=0)
    started = time.monotonic()
    assert score_all(source, [make_sample("4")])[0].status == "timeout"
    assert time.monotonic() - started < 2.0
    ended.set()
    listener.close()


def test_a_dead_server_alone_is_an_error_after_its_retries_whatever_waits(connect):
    source = connect(dead_url(), batch_size=1, retries=2, deadline_s=2.0)
    started = time.monotonic()
    results = score_all(source, numbered(50))
    assert {result.status for result in results} <= {"error", "timeout"}
    assert all("Connect" in result.detail for result in results)
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("answer", "message", "attempts"),
    [
        (b"<html>oops", "no JSON", 1),
        (b"[" * 100_000, "no JSON", 1),
        ({"reward_list": [1.0]}, "needs 'rewards'", 1),
        ({"rewards": [1.0, 2.0]}, "2 rewards for 1 responses", 1),
        (b'{"rewards": [NaN]}', "finite", 1),
        ({"rewards": [None]}, "None", 1),
        ({"rewards": {"a": 1}}, "record with 'a'", 1),
        (b" " * (1 << 20) + b"[1.0]" + b" ", "max_response_mb", 1),
        ((404, b"not here"), "HTTP 404", 1),
        ((401, b""), "HTTP 401", 1),
        ((302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), "redirects", 1),
        ((200, b"x", {"Content-Encoding": "gzip"}), "compressed", 1),
        ((500, b"why" * 1000), "HTTP 500 'whywhy", 3),
        ((429, b""), "HTTP 429", 3),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_and_only_what_may_pass_is_retried(serve, connect, answer, message, attempts):
    server = serve(lambda data, number: answer)
    result = score_all(connect(server, retries=2, max_response_mb=1), [make_sample("4")])[0]
    assert result.status == "error" and message in result.detail and len(result.detail) < 1001
    assert len(server.seen) == attempts


def test_the_token_comes_from_the_environment_and_shows_nowhere_else(serve, connect, monkeypatch, capfd):
    monkeypatch.setenv("REWARD_KEY", "s3cret-value")
    server = serve(lambda data, number: (500, b"you sent s3cret-value"))
    source = connect(server, token_variable="REWARD_KEY", retries=0)
    result = score_all(source, [make_sample("4")])[0]
    assert server.seen[0][1]["Authorization"] == "Bearer s3cret-value"
    shown = result.detail + repr(vars(source)) + repr(RewardServerConfig(token_variable="REWARD_KEY")) + "".join(capfd.readouterr())
    assert "s3cret" not in shown
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        connect(server, token_variable="NO_SUCH_VARIABLE")


def test_proxies_of_the_environment_are_not_used(serve, connect, monkeypatch):
    proxy, server = serve(), serve()
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    assert score_all(connect(server), [make_sample("4")])[0].score == 1.0
    assert not proxy.seen


@pytest.mark.parametrize("url", ["http://", "http://user:word@host/x", "http://host:99999/", "http://a:1/,ftp://b:1/", "https://[::1/"])
def test_addresses_that_cannot_work_are_refused_without_showing_passwords(url):
    with pytest.raises(ConfigError, match="reward.function") as caught:
        RewardConfig(function=url)
    assert "word" not in str(caught.value).replace("password", "")


def test_close_cancels_what_is_under_way_and_leaves_no_thread(serve):
    server = serve(lambda data, number: None)
    source = ServerRewards([server.url.replace("127.0.0.1", "localhost")], RewardServerConfig(batch_size=1))
    futures = [source.submit(make_sample("4")) for _ in range(6)]
    assert wait_until(lambda: server.seen)
    started = time.monotonic()
    source.close()
    source.close()
    assert time.monotonic() - started < 4
    assert not reward_threads()
    for future in futures:
        with pytest.raises(WorkerError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(WorkerError, match="closed"):
        source.submit(make_sample("4")).result(timeout=5)


def test_a_forgotten_source_takes_its_thread_along(serve):
    source = ServerRewards([serve().url], RewardServerConfig())
    assert score_all(source, [make_sample("4")])[0].score == 1.0
    del source
    assert wait_until(lambda: not reward_threads())


def test_a_process_with_requests_under_way_ends_at_once_when_told_to(serve, tmp_path):
    server = serve(lambda data, number: None)
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from reward_helpers import make_sample
        from openrl_reason.rewards.config import RewardServerConfig
        from openrl_reason.rewards.server import ServerRewards
        source = ServerRewards([{server.url!r}], RewardServerConfig(batch_size=1))
        source.submit(make_sample("4"))
        print("ready", flush=True)
        time.sleep(0.3 if sys.argv[1] == "exit" else 100)
        """)
    )
    root = str(Path(openrl_reason.__file__).parents[1])
    for how in ("exit", "kill"):
        parent = subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
        assert parent.stdout.readline() == "ready\n"
        if how == "kill":
            parent.send_signal(signal.SIGKILL)
        assert parent.wait(timeout=10) == (0 if how == "exit" else -signal.SIGKILL)
        parent.stdout.close()
        assert not alive(parent.pid)
