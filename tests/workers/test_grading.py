"""A grader may hang, crash or eat memory: it costs its own answer, nothing else, and never goes uncounted."""

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
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.tasks.graders import STATUSES
from openrl_reason.workers.grading import GraderPool, grade
from tests.processes import alive, wait_until

pytestmark = pytest.mark.alone

HOSTILE = """
import os, subprocess, sys, time

def grade(text, gold):
    print("a grader may print")
    if text == "loop":
        while True:
            pass
    if text == "loop in C":
        10 ** 10 ** 9
    if text == "sleep":
        time.sleep(1000)
    if text == "memory":
        bytearray(1 << 33)
    if text == "crash":
        os.abort()
    if text == "leave":
        os._exit(7)
    if text == "exit":
        sys.exit(3)
    if text == "raise":
        raise RuntimeError("because")
    if text == "recursion":
        return grade("recursion", gold)
    if text == "nan":
        return float("nan")
    if text == "child":
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if text == "modules":
        return 1.0, ",".join(name for name in ("torch", "numpy", "ray", "vllm", "transformers") if name in sys.modules) or "none"
    if text == "pid":
        return 1.0, str(os.getpid())
    return float(text == gold), text
"""


@pytest.fixture
def kind(tmp_path):
    (tmp_path / "hostile_grader.py").write_text(HOSTILE)
    return f"{tmp_path}/hostile_grader.py:grade"


EXPECTED = {
    "loop": "timeout", "loop in C": "timeout", "sleep": "timeout", "memory": "memory", "crash": "crashed", "leave": "crashed",
    "exit": "error", "raise": "error", "recursion": "error", "nan": "error",
}  # fmt: skip


def test_every_misfortune_has_its_status_and_spares_the_other_answers(kind):
    texts = [text for trouble in EXPECTED for text in ("good", trouble, "good")]
    start = time.monotonic()
    with GraderPool(2, deadline_s=0.4) as pool:
        futures = [pool.submit(text, "good", kind) for text in texts]
        results = [future.result(timeout=60) for future in futures]
        counts = pool.counts
    for text, result in zip(texts, results, strict=True):
        assert result.status == EXPECTED.get(text, "ok"), text
        assert result.score == (1.0 if text == "good" else 0.0)
        assert bool(result.detail) == (text != "good")
    assert list(counts) == list(STATUSES)
    assert (counts["ok"], counts["timeout"], counts["crashed"], counts["memory"], counts["error"]) == (20, 3, 2, 1, 4)
    assert pool.num_respawns == 6
    assert time.monotonic() - start < 20


def test_the_deadline_holds_for_each_answer_not_for_the_batch(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef grade(text, gold):\n    time.sleep(0.1)\n    return 1.0\n")
    with GraderPool(1, deadline_s=1.0) as pool:
        futures = [pool.submit("x", "x", f"{tmp_path}/slow.py:grade") for _ in range(20)]
        assert {future.result(timeout=60).status for future in futures} == {"ok"}


def test_importing_a_slow_grader_is_not_the_answers_fault(tmp_path):
    (tmp_path / "heavy.py").write_text("import time\ntime.sleep(1.0)\ndef grade(text, gold):\n    return 1.0\n")
    with GraderPool(1, deadline_s=0.3) as pool:
        assert pool.grade("x", "x", f"{tmp_path}/heavy.py:grade").status == "ok"


def test_workers_import_nothing_heavy_and_start_quickly(kind):
    with GraderPool() as pool:
        start = time.perf_counter()
        assert pool.grade("#### 4", "4", "arithmetic").score == 1.0
        assert time.perf_counter() - start < 1.0  # 0.03 s on an idle machine
        assert pool.grade("modules", "", kind).parsed == "none"


def test_two_thousand_answers_a_second():
    with GraderPool() as pool:
        pool.grade("#### 4", "4", "gsm8k")
        start = time.perf_counter()
        futures = [pool.submit(f"3*4=12\n#### {index}", "12", "gsm8k") for index in range(4000)]
        assert sum(future.result().score for future in futures) == 1.0
        assert time.perf_counter() - start < 2.0
        assert pool.counts["ok"] == 4001


def test_many_threads_may_submit_and_each_gets_its_own_results():
    with GraderPool(2) as pool:
        wrong = []

        def submit(base):
            futures = [(index, pool.submit(f"#### {index}", str(index), "arithmetic")) for index in range(base, base + 200)]
            wrong.extend(index for index, future in futures if future.result().parsed != str(index))

        threads = [threading.Thread(target=submit, args=(base,)) for base in range(0, 1600, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert pool.counts["ok"] == 1600


def test_no_answer_is_told_apart_from_a_wrong_one():
    assert grade("I do not know", "4", "gsm8k").status == "no_answer"
    assert grade("#### 5", "4", "gsm8k").status == "ok"
    assert grade("#### 5", "four", "gsm8k").status == "error", "a gold answer that is no number is not the model's fault"


def test_text_of_any_kind_reaches_the_grader_unchanged(kind):
    with GraderPool() as pool:
        for text in ("a\nb\r\n\x00\x7f", "\ud800 lone", "\u2028\u0085", "x" * 300_000, ""):
            result = pool.grade(text, text, kind)
            assert (result.score, result.parsed) == (1.0, text)


def test_an_unknown_or_broken_grader_is_an_error_and_not_a_reward_of_zero(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(1000)\n")
    with GraderPool(load_timeout_s=2.0) as pool:
        with pytest.raises(ConfigError, match="arithmetic"):
            pool.submit("x", "x", "arithmetics")
        with pytest.raises(ConfigError, match="no_such_module_anywhere"):
            pool.grade("x", "x", f"{tmp_path}/broken.py:grade")
        with pytest.raises(ConfigError, match="no function"):
            pool.grade("x", "x", f"{tmp_path}/empty.py:grade")
        with pytest.raises(ConfigError, match="load_timeout_s=2"):
            pool.grade("x", "x", f"{tmp_path}/endless.py:grade")
        assert pool.grade("#### 1", "1", "gsm8k").score == 1.0, "the pool goes on"
    for wrong in ({"num_workers": 0}, {"deadline_s": 0}, {"memory_mb": -1}):
        with pytest.raises(ConfigError):
            GraderPool(**wrong)


def test_a_pool_whose_workers_cannot_start_says_so():
    with GraderPool(memory_mb=1) as pool, pytest.raises(WorkerError, match="memory_mb=1"):
        pool.grade("#### 1", "1", "gsm8k")


def test_close_leaves_no_process_may_be_repeated_and_ends_what_waits(kind):
    pool = GraderPool(1, deadline_s=60)
    pid = int(pool.grade("pid", "", kind).parsed)
    running = pool.submit("sleep", "", kind)
    waiting = pool.submit("good", "good", kind)
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 5
    assert not alive(pid)
    for future in (running, waiting):
        with pytest.raises((WorkerError, CancelledError)):
            future.result(timeout=5)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("x", "x", kind)


def test_a_forgotten_pool_takes_its_workers_along(kind):
    pool = GraderPool()
    pid = int(pool.grade("pid", "", kind).parsed)
    del pool
    assert wait_until(lambda: not alive(pid))


def test_a_timeout_reaches_what_the_grader_started(kind):
    def sleepers():
        found = subprocess.run(["ps", "-eo", "sid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if line.split()[:1] == [str(pid)]]

    with GraderPool(deadline_s=0.5) as pool:
        pid = int(pool.grade("pid", "", kind).parsed)
        assert pool.grade("child", "", kind).status == "timeout"
        assert wait_until(lambda: not sleepers())


@pytest.mark.parametrize("state", ["idle", "sleep", "loop", "loop in C"])
def test_workers_do_not_outlive_a_killed_parent(kind, tmp_path, state):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from openrl_reason.workers.grading import GraderPool
        pool = GraderPool(1, deadline_s=1.0)
        print(pool.grade("pid", "", {kind!r}).parsed, flush=True)
        if {state!r} != "idle":
            pool.submit({state!r}, "", {kind!r})
            time.sleep(0.3)
        print("ready", flush=True)
        time.sleep(100)
        """)
    )
    root = str(Path(openrl_reason.__file__).parents[1])
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    # In C with the interpreter lock held, the kernel's CPU limit ends it: the deadline and two to three seconds.
    assert wait_until(lambda: not alive(pid), seconds=20)
