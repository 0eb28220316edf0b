"""The processes of the grader pool in strange company: graders that misbehave as processes, lost templates, forks, sudden ends."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

import openrl_reason
from openrl_reason.errors import WorkerError
from openrl_reason.workers import grading
from openrl_reason.workers.grading import GraderPool
from tests.processes import wait_until

pytestmark = pytest.mark.alone

STRANGE = """
import os, signal, subprocess, sys, time

held = []

def grade(text, gold):
    if text == "fork":                    # both return from the grader
        os.fork()
        return 1.0, "forked"
    if text == "fork and die":            # the child keeps every pipe open
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(3)
    if text == "fork bomb":
        while True:
            try:
                os.fork()
            except OSError:
                pass
            time.sleep(0.05)
    if text == "daemon":                  # leaves the process group and its parent
        gate = os.pipe()
        if os.fork() == 0:
            os.setsid()
            daemon = os.fork()
            if daemon:
                os.write(gate[1], str(daemon).encode())
                os._exit(0)
            time.sleep(1000)
        return 1.0, os.read(gate[0], 100).decode()
    if text == "session":                 # leaves the group, and hangs
        subprocess.Popen(["sleep", gold], start_new_session=True)
        time.sleep(1000)
    if text == "noise":
        for _ in range(2000):
            print("noise " * 50)
        os.write(1, b"noise")
        return 1.0, "noise"
    if text == "close fds":
        os.closerange(0, 256)
        return 1.0, "closed"
    if text == "close fds and hang":
        os.closerange(0, 256)
        time.sleep(1000)
    if text in ("write nonsense", "write json", "write for ever"):
        for fd in range(3, 64):
            try:
                os.set_blocking(fd, True)
                while os.write(fd, b"[1, 2]\\n" if text == "write json" else b"no json") and text == "write for ever":
                    pass
            except OSError:
                pass
        return 1.0, "written"
    if text == "kill the template":
        os.kill(os.getppid(), signal.SIGKILL)
        return 1.0, "killed"
    if text == "stop the template":
        os.kill(os.getppid(), signal.SIGSTOP)
        return 1.0, "stopped"
    if text == "grow":
        held.append(bytearray(100 << 20))
        return 1.0, "grown"
    if text == "unprintable":
        class Unprintable(Exception):
            def __str__(self):
                raise RuntimeError
        raise Unprintable
    if text == "bad result":
        from openrl_reason.tasks.graders import GradeResult
        return GradeResult(1.0, object(), "ok", detail=3)
    if text == "parent":
        return 1.0, str(os.getppid())
    if text == "limits":
        import resource
        return 1.0, str(resource.getrlimit(resource.RLIMIT_AS)[0] >> 20)
    if text == "hang":
        time.sleep(1000)
    if text == "pid":
        return 1.0, str(os.getpid())
    return float(text == gold), text
"""


@pytest.fixture
def kind(tmp_path):
    (tmp_path / "strange_grader.py").write_text(STRANGE)
    return f"{tmp_path}/strange_grader.py:grade"


def processes(text):
    """Living processes whose command line holds ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, stat = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        if text.encode() in command.replace(b"\0", b" ") and stat.rpartition(")")[2].split()[0] != "Z":
            found.append(int(path.name))
    return found


MISBEHAVIOUR = {
    "fork": ("ok", ""), "noise": ("ok", ""), "fork and die": ("crashed", "status 3"), "fork bomb": ("timeout", "within"),
    "close fds": ("crashed", ""), "close fds and hang": ("crashed", "closed its pipes"), "write nonsense": ("crashed", ""),
    "write json": ("crashed", ""), "write for ever": ("crashed or timeout", ""), "unprintable": ("error", "Unprintable"),
}  # fmt: skip


@pytest.mark.parametrize("text", MISBEHAVIOUR)
def test_a_grader_that_misbehaves_as_a_process_costs_its_own_answer_only(kind, text):
    with GraderPool(1, deadline_s=1.0) as pool:
        futures = [pool.submit(each, "good", kind) for each in ("good", text, "good", "good")]
        results = [future.result(timeout=10) for future in futures]
        status, detail = MISBEHAVIOUR[text]
        assert results[1].status in status and detail in results[1].detail
        assert [result.status for result in results[:1] + results[2:]] == ["ok"] * 3
        assert pool.num_respawns == (status not in ("ok", "error"))
        assert pool.num_template_restarts == 0


def test_a_result_record_with_wrong_fields_still_arrives(kind):
    with GraderPool() as pool:
        result = pool.grade("bad result", "", kind)
        assert (result.status, result.detail) == ("ok", "3") and "object" in result.parsed


def test_nothing_that_a_grader_starts_survives(kind):
    """Not even what left the process group (a session of its own) or its parent (a daemon): the template is the last of their parents."""
    tag = f"98765.{os.getpid()}"  # sleep this many seconds: recognisable
    with GraderPool(1, deadline_s=0.5) as pool:
        daemon = int(pool.grade("daemon", tag, kind).parsed)
        assert wait_until(lambda: daemon not in processes(""))
        assert pool.grade("session", tag, kind).status == "timeout"
        assert wait_until(lambda: not processes(f"sleep {tag}"))
        pool.submit("session", tag, kind)
        assert wait_until(lambda: processes(f"sleep {tag}"))
    assert wait_until(lambda: not processes(f"sleep {tag}"), 2.0)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_template_is_restarted_and_nothing_hangs(kind, how):
    with GraderPool(1, deadline_s=0.5, load_timeout_s=3.0) as pool:
        assert pool.grade("#### 1", "1", "gsm8k").score == 1.0
        assert pool.grade(f"{how} the template", "", kind).status == "ok"
        if how == "kill":
            assert wait_until(lambda: pool._queue.template._process.poll() is not None)
        assert pool.grade("good", "good", kind).status == "ok", "the worker lives on without it"
        assert pool.num_template_restarts == 0
        assert pool.grade("hang", "good", kind).status == "timeout"
        assert pool.grade("good", "good", kind).status == "ok"
        assert pool.grade("#### 1", "1", "gsm8k").score == 1.0
        assert (pool.num_template_restarts, pool.num_respawns) == (1, 1)
        parent = int(pool.grade("parent", "", kind).parsed)
        assert parent == pool._queue.template._process.pid


def test_a_template_killed_again_and_again_ends_in_an_answer_for_everyone(kind):
    """From outside and at any moment, as the kernel does when memory runs out."""
    with GraderPool(2, deadline_s=0.3, load_timeout_s=5.0) as pool:
        futures = [pool.submit("hang" if index % 5 == 0 else "good", "good", kind) for index in range(80)]
        stop = threading.Event()

        def kill():
            for _ in range(4):  # not so often that three in a row cannot start: the pool would give up, and say so
                if not stop.wait(0.5) and (process := pool._queue.template._process) is not None:
                    process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        statuses = [future.result(timeout=60).status for future in futures]
        stop.set()
        killer.join()
        assert [status for index, status in enumerate(statuses) if index % 5] == ["ok"] * 64
        assert set(statuses[::5]) == {"timeout"}
        assert pool.num_template_restarts >= 2


def test_a_worker_that_has_grown_is_replaced_before_it_fails_an_innocent_answer(kind):
    with GraderPool(1, memory_mb=512) as pool:
        results = [pool.grade("grow", "", kind) for _ in range(12)]
        assert {result.status for result in results} == {"ok"}
        assert pool.num_retired >= 2 and pool.num_respawns == 0
        assert pool.grade("limits", "", kind).parsed == "512"


def test_file_descriptors_do_not_leak(kind):
    with GraderPool(1, deadline_s=0.1) as pool:
        pool.grade("good", "good", kind)
        before = len(os.listdir("/proc/self/fd"))
        for text in ("hang", "close fds", "kill the template", "hang", "good"):
            pool.grade(text, "good", kind)
        assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    gc.collect()


def test_a_pool_works_in_a_process_with_a_thousand_open_files(kind):
    script = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        held = [open("/dev/null") for _ in range(1500)]
        from openrl_reason.workers.grading import grade
        print(grade("good", "good", {kind!r}).score)
    """
    assert run_python(script) == "1.0\n"


def run_python(script):
    environment = {**os.environ, "PYTHONPATH": str(Path(openrl_reason.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_process_gets_a_default_pool_of_its_own_and_does_no_harm_to_its_parents():
    script = """
        import os, sys
        from openrl_reason.workers.grading import GraderPool, grade, default_pool
        pool = GraderPool()
        assert grade("#### 1", "1", "gsm8k").score == pool.grade("#### 1", "1", "gsm8k").score == 1.0
        child = os.fork()
        if child == 0:
            try:
                pool.submit("#### 1", "1", "gsm8k")
            except RuntimeError as error:
                assert "forked" in str(error)
                pool.close()
                del pool
                sys.exit(7 if grade("#### 1", "1", "gsm8k").score == 1.0 else 1)
            sys.exit(2)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(pool.grade("#### 1", "1", "gsm8k").score, grade("#### 1", "1", "gsm8k").score, pool.num_respawns, pool.num_template_restarts)
    """
    assert run_python(script) == "7\n1.0 1.0 0 0\n"


def test_the_template_dies_with_its_parent_although_a_forked_child_holds_its_socket(kind, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, time
        from openrl_reason.workers.grading import GraderPool
        pool = GraderPool(1)
        worker, template = pool.grade("pid", "", {kind!r}).parsed, pool.grade("parent", "", {kind!r}).parsed
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        print(worker, template, child, flush=True)
        time.sleep(100)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(openrl_reason.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    worker, template, child = map(int, parent.stdout.readline().split())
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        assert wait_until(lambda: not {worker, template} & set(processes("grading_template")), 5.0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_ray_like_use_a_pool_made_and_dropped_in_a_thread(kind):
    before = threading.active_count()

    def use():
        pool = GraderPool(2)
        futures = [pool.submit("x", "x", kind) for _ in range(20)]
        assert all(future.result().score == 1.0 for future in futures)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(20)
    assert wait_until(lambda: threading.active_count() == before)


def test_a_pool_may_be_closed_at_any_moment(kind):
    for delay in (0.0, 0.005, 0.02, 0.05, 0.1):
        pool = GraderPool(2, deadline_s=30)
        futures = [pool.submit(text, "x", kind) for text in ("x", "hang", "x", "hang", "x")]
        time.sleep(delay)
        start = time.monotonic()
        pool.close()
        assert time.monotonic() - start < 3.0
        for future in futures:
            try:
                assert future.result(timeout=5).status == "ok"
            except (WorkerError, CancelledError):
                pass
        assert pool._queue.template._process is None
    assert grading.default_pool() is grading.default_pool()
