"""`ray job submit` as the example scripts do it, against a cluster that only this machine, and only with the token, can reach.

The cluster is a child of the test, in a process group and a folder of its own, and is ended by its group: other Rays of this machine go on.
"""

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import ENV, ROOT
from tests.sockets import beyond_loopback, command_lines, listening, process_tree

SECRET = f"canary-{secrets.token_hex(16)}"  # not in this file, which goes to the cluster with the working directory


@dataclass
class Cluster:
    """A running cluster: its process, where jobs go, the variables that a user of it has set, and its token."""

    process: subprocess.Popen
    url: str
    environment: dict[str, str]
    token: str
    folder: Path


def free_ports(count: int) -> list[int]:
    """Ports below those that `ray start` keeps for workers and those that the kernel hands out."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            if len(found) < count and not probe.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    ray_folder = Path("/tmp") / f"ray-{os.getpid()}"  # short: the paths of its sockets may have 107 characters
    port, dashboard, client, agent = free_ports(4)
    environment = ENV | {
        "RAY_PORT": str(port), "RAY_DASHBOARD_PORT": str(dashboard), "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_TMPDIR": str(ray_folder),
        "WANDB_API_KEY": SECRET,
    }  # fmt: skip
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    options = ["--block", "--num-cpus", "2", "--num-gpus", "0", "--object-store-memory", str(150 << 20),
               "--ray-client-server-port", client, "--dashboard-agent-listen-port", agent]  # fmt: skip
    words = ["bash", ROOT / "examples/scripts/start_ray.sh", *options]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, words)), cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    running = Cluster(process, f"http://127.0.0.1:{dashboard}", environment, "", folder)
    try:
        deadline = time.monotonic() + 60
        while status(running.url + "/api/version", "") is None or not (folder / "token").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        running.token = (folder / "token").read_text()
        yield running
    finally:
        members = process_tree(process.pid) if process.poll() is None else []
        os.killpg(process.pid, signal.SIGKILL)
        for member in members:  # workers have groups of their own
            if member.is_running():
                member.kill()
        process.wait()
        psutil.wait_procs(members, timeout=10)
        subprocess.run(["rm", "-rf", "--one-file-system", str(ray_folder)], check=True)


def status(url: str, token: str, method: str = "GET") -> int | None:
    """The HTTP status of a request with a token ("": without one); None if nobody answers."""
    request = urllib.request.Request(url, method=method, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def jobs(cluster):
    """The output of ray_job_cpu.sh, and what the cluster's processes listened on and were called with while it ran."""
    words = ["bash", str(ROOT / "examples/scripts/ray_job_cpu.sh"), str(cluster.folder / "out")]
    log, sockets, lines = cluster.folder / "job.log", set(), ""
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=cluster.environment, cwd=cluster.folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            sockets |= listening(cluster.process.pid)
            lines += command_lines(cluster.process.pid) + command_lines(process.pid) if process.poll() is None else ""
            time.sleep(1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, log.read_text()[-8000:]
    return log.read_text(), sockets, lines


def test_jobs_run_to_their_end_and_their_logs_come_back(cluster, jobs):
    output, _, _ = jobs
    assert "step 4/4" in output and "step 2/2" in output and output.count("succeeded") == 2
    for run, steps in (("sft", 4), ("rl", 2)):
        records = read_records(cluster.folder / "out" / run / "metrics.jsonl")
        assert [record["step"] for record in records if record["event"] == "train"] == list(range(steps))
        assert (cluster.folder / "out" / run / "model/model.safetensors").exists()


def test_nothing_of_the_cluster_or_its_jobs_listens_beyond_loopback(jobs):
    _, sockets, _ = jobs
    assert len(sockets) > 10 and any("_ModelActor" in name for name, _, _ in sockets)
    assert beyond_loopback(sockets) == []


@pytest.mark.usefixtures("jobs")
def test_who_has_no_token_is_refused(cluster):
    for path, method in (("/api/jobs/", "GET"), ("/api/jobs/", "POST"), ("/api/jobs/x", "DELETE"), ("/nodes?view=summary", "GET")):
        assert status(cluster.url + path, "", method) == 401, path
        assert status(cluster.url + path, secrets.token_hex(32), method) == 403, path
    assert status(cluster.url + "/api/jobs/", cluster.token) == 200
    with pytest.raises(subprocess.CalledProcessError) as refused:
        without = cluster.environment | {"RAY_AUTH_MODE": "disabled"}
        subprocess.run(["ray", "job", "list", "--address", cluster.url], env=without, check=True, capture_output=True, text=True, timeout=60)
    assert "Missing authentication token" in refused.value.stderr


def test_the_token_and_secrets_are_on_no_command_line_and_in_no_file_but_the_token_s(cluster, jobs):
    output, _, lines = jobs
    assert "openrl_reason" in lines
    assert (cluster.folder / "token").stat().st_mode & 0o777 == 0o600
    assert (Path("/tmp") / f"ray-{os.getpid()}").stat().st_mode & 0o777 == 0o700
    for secret in (cluster.token, SECRET):
        assert len(secret) > 15 and secret not in lines and secret not in output
        places = [cluster.folder, Path("/tmp") / f"ray-{os.getpid()}"]
        found = [
            path for place in places for path in place.rglob("*") if path.is_file() and path.name != "token" and secret.encode() in path.read_bytes()
        ]
        assert not found


def test_a_job_that_fails_fails_its_submission(cluster):
    words = ["ray", "job", "submit", "--address", cluster.url, "--", "python", "-m", "openrl_reason", "sft", "--policy.path", "/no/such/model"]
    environment = cluster.environment | {"RAY_AUTH_MODE": "token"}
    result = subprocess.run(words, env=environment, cwd=cluster.folder, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "/no/such/model" in result.stdout + result.stderr
