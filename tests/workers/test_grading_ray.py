"""The grader pool inside of Ray actors: an async one keeps answering while its answers wait, and a killed one leaves no process."""

import time

import pytest

from tests.clusters import local_ray
from tests.processes import alive

pytestmark = pytest.mark.alone

ray = pytest.importorskip("ray")

SLOW = "import time\ndef grade(text, gold):\n    time.sleep(0.05)\n    return float(text == gold)\n"


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


def grading_actor():
    """A class that travels by value: the actor's process cannot import this file."""

    class Grading:
        """As an engine would hold it: one pool, many calls at once."""

        def __init__(self):
            from openrl_reason.workers.grading import GraderPool

            self.pool = GraderPool(2, max_queued=4)

        async def grade(self, text, gold, kind):
            return (await self.pool.agrade(text, gold, kind)).score

        async def ping(self):
            return time.monotonic()

        async def processes(self):
            return [self.pool._queue.template._process.pid, *(worker.pid for worker in self.pool._queue.workers)]

    return ray.remote(Grading).options(num_cpus=0.1, max_concurrency=200).remote()


def test_an_async_actor_stays_responsive_and_takes_its_graders_along_when_it_is_killed(cluster, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    actor = grading_actor()
    assert ray.get(actor.grade.remote("\\boxed{\\frac12}", "0.5", "math"), timeout=60) == 1.0
    answers = [actor.grade.remote(str(index % 2), "1", f"{tmp_path}/slow.py:grade") for index in range(60)]
    waits = []
    for _ in range(10):  # meanwhile the queue is full
        start = time.monotonic()
        ray.get(actor.ping.remote(), timeout=60)
        waits.append(time.monotonic() - start)
    assert sorted(waits)[5] < 0.5
    assert sum(ray.get(answers, timeout=60)) == 30.0
    pids = ray.get(actor.processes.remote(), timeout=60)
    assert len(pids) == 3 and all(map(alive, pids))
    busy = actor.grade.remote("1", "1", f"{tmp_path}/slow.py:grade")
    ray.kill(actor)
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(busy, timeout=60)
