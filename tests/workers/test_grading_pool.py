"""The grader pool under load: full queues, long texts, event loops, many threads."""

import asyncio
import queue
import threading
import time

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.tasks.graders import STATUSES
from openrl_reason.workers.grading import GraderPool
from tests.processes import wait_until

pytestmark = pytest.mark.alone

GRADER = """
import time

def grade(text, gold):
    if text == "slowly":
        time.sleep(0.05)
    if text == "hang":
        time.sleep(1000)
    return float(text == gold), text
"""


@pytest.fixture
def kind(tmp_path):
    (tmp_path / "a_grader.py").write_text(GRADER)
    return f"{tmp_path}/a_grader.py:grade"


# --- backpressure


def test_submit_waits_while_the_queue_is_full_and_nothing_is_lost(kind):
    with GraderPool(2, max_queued=5) as pool:
        deepest, futures = 0, []
        for index in range(60):
            futures.append(pool.submit("slowly" if index % 4 == 0 else str(index), str(index), kind))
            deepest = max(deepest, pool.num_queued)
        assert deepest <= 5
        assert sum(future.result(timeout=30).score for future in futures) == 45.0
        assert pool.counts["ok"] == 60


def test_submit_with_a_timeout_raises_instead_of_waiting(kind):
    with GraderPool(1, deadline_s=30, max_queued=2) as pool:
        busy(pool, kind)
        waiting = [pool.submit("x", "x", kind) for _ in range(2)]
        start = time.monotonic()
        with pytest.raises(queue.Full, match="2 answers waiting"):
            pool.submit("x", "x", kind, timeout=0.2)
        assert 0.15 < time.monotonic() - start < 1.0
        with pytest.raises(queue.Full):
            pool.submit("x", "x", kind, timeout=0)
    assert all(future.cancelled() for future in waiting)


def busy(pool, kind):
    """Occupy the only worker of a pool until it is closed."""
    hanging = pool.submit("hang", "", kind)
    assert wait_until(lambda: hanging.running() and pool.num_queued == 0)
    return hanging


def test_closing_wakes_those_who_wait_for_room(kind):
    pool = GraderPool(1, deadline_s=30, max_queued=1)
    busy(pool, kind)
    pool.submit("x", "x", kind)
    raised = []

    def submit():
        try:
            pool.submit("x", "x", kind)
        except RuntimeError as error:
            raised.append(str(error))

    async def wait_for_room():
        with pytest.raises(RuntimeError, match="closed"):
            await pool.agrade("x", "x", kind)

    threads = [threading.Thread(target=submit) for _ in range(3)]
    threads.append(threading.Thread(target=asyncio.run, args=(wait_for_room(),)))
    for thread in threads:
        thread.start()
    assert wait_until(lambda: len(pool._queue.on_room) == 1)
    time.sleep(0.1)
    assert not raised
    pool.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert raised == ["this GraderPool is closed"] * 3


def test_a_callback_may_submit_although_the_queue_is_full(kind):
    with GraderPool(1, max_queued=1) as pool:
        done, left = threading.Event(), [20]

        def again(future):
            left[0] -= 1
            if not left[0]:
                done.set()
            else:
                for _ in range(2):  # twice as many as there is room for
                    if left[0] > 1:
                        pool.submit("x", "x", kind).add_done_callback(again)

        pool.submit("x", "x", kind).add_done_callback(again)
        assert done.wait(20)


def test_an_answer_beyond_the_length_limit_is_a_status_with_a_reason(kind):
    with GraderPool(max_text_chars=1000) as pool:
        assert pool.grade("x" * 1000, "", kind).status == "ok"
        result = pool.grade("x" * 1001, "", kind)
        assert (result.status, result.score, result.parsed) == ("no_answer", 0.0, None)
        assert result.detail == "the answer has 1001 characters, more than max_text_chars=1000"
        result = pool.grade("x", "y" * 1001, kind)
        assert result.status == "error" and "gold" in result.detail, "a broken gold is not the model's fault"
        assert pool.counts == {**dict.fromkeys(STATUSES, 0), "ok": 1, "no_answer": 1, "error": 1}
        assert pool.rates["ok"] == pytest.approx(1 / 3)
        with pytest.raises(TypeError, match="NoneType"):
            pool.submit(None, "x", kind)
    assert GraderPool().rates == dict.fromkeys(STATUSES, 0.0)
    for name in ("max_queued", "max_text_chars", "max_queued_chars", "load_timeout_s"):
        with pytest.raises(ConfigError, match=name):
            GraderPool(**{name: 0})


def test_the_queue_is_full_by_characters_too(kind):
    with GraderPool(1, deadline_s=30, max_queued_chars=1_000_000) as pool:
        busy(pool, kind)
        for _ in range(2):
            pool.submit("x" * 500_000, "", kind, timeout=0)
        with pytest.raises(queue.Full):
            pool.submit("x", "", kind, timeout=0.05)


# --- asyncio


def test_agrade_never_blocks_the_event_loop_even_when_the_queue_is_full(kind):
    async def run():
        gaps, last, done = [], time.monotonic(), False

        async def heartbeat():
            nonlocal last
            while not done:
                await asyncio.sleep(0.005)
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        beat = asyncio.create_task(heartbeat())
        texts = [str(index) if index % 10 else "slowly" for index in range(200)]
        results = await asyncio.gather(*(pool.agrade(text, text, kind) for text in texts))
        done = True
        await beat
        assert [result.parsed for result in results] == texts
        return max(gaps)

    with GraderPool(2, max_queued=3) as pool:
        assert asyncio.run(run()) < 0.3
        assert pool.counts["ok"] == 200


def test_a_cancelled_agrade_leaves_no_trace_and_the_others_go_on(kind):
    async def run():
        tasks = [asyncio.create_task(pool.agrade("slowly", "", kind)) for _ in range(30)]
        await asyncio.sleep(0.1)
        for task in tasks[::2]:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in ended) >= 10
        assert all(result.status == "ok" for result in ended[1::2])
        await asyncio.wait_for(pool.agrade("x", "x", kind), 5)

    with GraderPool(1, max_queued=2) as pool:
        asyncio.run(run())


def test_one_pool_serves_several_event_loops_and_threads_at_once(kind):
    with GraderPool(2, max_queued=8) as pool:

        async def many(base):
            results = await asyncio.gather(*(pool.agrade(str(index), str(index), kind) for index in range(base, base + 50)))
            wrong.extend(index for index, result in enumerate(results, base) if result.parsed != str(index))

        wrong = []
        threads = [threading.Thread(target=asyncio.run, args=(many(base),)) for base in range(0, 200, 50)]
        threads += [threading.Thread(target=lambda: wrong.extend(1 for _ in range(50) if pool.grade("y", "y", kind).score != 1.0)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong
        assert pool.counts["ok"] == 350
