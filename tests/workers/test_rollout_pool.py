"""Properties of the pool, with real Ray actors and the real vLLM: every request completes exactly once, whatever dies."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rollout_helpers import CONFIG, hf_greedy, make_requests, make_tiny, perturb

from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.workers.rollout import RolloutPool
from openrl_reason.workers.rollout_config import Request, SamplingConfig
from tests.clusters import local_ray

pytest.importorskip("vllm")
ray = pytest.importorskip("ray")


class Placement:
    """No placement group."""

    def actor_options(self, role, index):
        return {"num_cpus": 0.1}


class Publisher:
    """Stands for a model group: publishes a model's weights from this process."""

    def __init__(self, model):
        self.model = model

    def publish_weights(self, sender, version):
        return sender.send(self.model.named_parameters(), version)


@pytest.fixture(scope="module")
def cluster():
    with local_ray():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared_pool(cluster, folder):
    with RolloutPool(replace(CONFIG, num_engines=2), folder, placement=Placement()) as pool:
        yield pool


@pytest.fixture
def pool(shared_pool):
    """The shared pool, with its usual configuration and a fresh budget of restarts."""
    for seat in shared_pool._seats:
        seat.restarts = 0
    shared_pool.config = replace(CONFIG, num_engines=2)
    return shared_pool


def by_id(completions):
    """Completions by id; an id that comes twice is an error."""
    completions = list(completions)
    result = {completion.request_id: completion for completion in completions}
    assert len(result) == len(completions)
    return result


def text(completions):
    return {key: completion.token_ids for key, completion in completions.items()}


def pid_of(pool, index):
    return pool._seats[index].about["pid"]


def test_every_request_completes_once_and_siblings_share_an_engine(pool):
    requests = make_requests(10, siblings=4)
    before = Counter(pool.stats())
    iterator = pool.generate(requests)
    seats = [{request_id.split("/")[0] for request_id in seat.unfinished} for seat in pool._seats]
    assert len(seats[0]) == len(seats[1]) == 5 and not seats[0] & seats[1]
    completions = by_id(iterator)
    assert set(completions) == {request.request_id for request in requests}
    stats = Counter(pool.stats())
    stats.subtract(before)
    assert stats["requests"] == stats["completed"] == 40
    assert stats["prompt_tokens"] == sum(len(request.prompt_ids) for request in requests)
    assert stats["generated_tokens"] == sum(len(completion.token_ids) for completion in completions.values())
    assert stats["cached_prompt_tokens"] >= 32 * 3
    assert stats["restarts"] == stats["resubmitted"] == 0
    assert 0 < stats["seconds_busy_max"] <= stats["seconds_busy/engine-0"] + stats["seconds_busy/engine-1"]


def test_movable_requests_leave_an_engine_that_has_clearly_more_to_do_and_stay_together(pool):
    budget = SamplingConfig(max_new_tokens=8)

    def request(name, group, movable=False):
        return Request(name, [5, 6, 7], seed=1, sampling=budget, group=group, movable=movable)

    try:
        pool.submit([request(f"a{index}", "a") for index in range(12)])  # one group, one engine
        (busy,) = [seat for seat in pool._seats if len(seat.unfinished) == 12]
        idle = pool._seats[1 - busy.index]
        pool.submit([request(f"fixed{index}", "a") for index in range(3)])
        assert len(busy.unfinished) == 15 and not idle.unfinished
        pool.submit([request(f"moved{index}", "a", movable=True) for index in range(9)])
        assert len(busy.unfinished) == 15 and set(idle.unfinished) == {f"moved{index}" for index in range(9)}
        pool.submit([request(f"kept{index}", "a", movable=True) for index in range(9)])  # 15 against 9: the difference is less than these nine
        assert len(busy.unfinished) == 24
        completions = by_id(pool.generate())
        assert len(completions) == 33 and len(set(map(tuple, text(completions).values()))) == 1, "the same seed, the same sample, wherever"
    finally:
        pool.abort_all()


def test_results_stream_and_branches_start_while_others_generate(pool):
    short = [replace(request, sampling=SamplingConfig(max_new_tokens=1)) for request in make_requests(2, seed=1)]
    # Enough of them to keep the engines busy for many pumps, also on an idle machine.
    budget = SamplingConfig(max_new_tokens=180)
    long = [Request(f"long-{index}", [5 + index % 40] * 4, seed=index, sampling=budget) for index in range(120)]
    seen = []
    for completion in pool.generate(long + short):
        seen.append(completion.request_id)
        if completion.request_id == short[0].request_id:
            assert pool.num_unfinished > 4
            pool.submit([Request("branch", short[0].prompt_ids + completion.token_ids, seed=7, sampling=SamplingConfig(max_new_tokens=2))])
    assert Counter(seen) == Counter([request.request_id for request in long + short] + ["branch"])
    assert seen.index("branch") < len(seen) - 1


def test_a_stopped_iteration_drops_what_is_left(pool):
    requests = make_requests(8, siblings=2, max_new_tokens=100)
    expected = text(by_id(pool.generate(requests)))
    for _ in pool.generate(requests):
        break
    assert pool.num_unfinished == 0
    assert text(by_id(pool.generate(requests))) == expected


def test_ctrl_c_in_the_iteration_leaves_a_pool_that_works(pool):
    requests = make_requests(8, siblings=4, max_new_tokens=100)
    expected = text(by_id(pool.generate(requests)))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        for _ in range(100):
            list(pool.generate(requests))
    assert pool.num_unfinished == 0
    assert text(by_id(pool.generate(requests))) == expected


def test_updates_reach_every_engine_from_whichever_transport(pool, model):
    requests = make_requests(6, temperature=0.0)
    for version, transport in enumerate(("auto", "object_store", "shared_memory", "gloo", "gloo"), start=1):
        pool._senders.clear()
        pool.config = replace(pool.config, weight_transport=transport, sync_checksum=True)
        perturb(model, seed=version)
        seconds = pool.sync_weights(Publisher(model), version)
        assert set(seconds) == {"sync/publish", "sync/load", "sync/total"}
        completions = by_id(pool.generate(requests))
        for request in requests:
            assert completions[request.request_id].token_ids == hf_greedy(model, request)
            assert completions[request.request_id].policy_version == version


def test_weights_come_from_a_trainer_in_another_process(pool, model):
    @ray.remote(num_cpus=0.1)
    class Trainer:
        def __init__(self, state):
            self.state = state

        def publish(self, sender, version):
            return sender.send(self.state.items(), version)

    perturb(model, seed=11)
    trainer = Trainer.remote({name: parameter.detach() for name, parameter in model.named_parameters()})

    class Group:
        def publish_weights(self, sender, version):
            return ray.get(trainer.publish.remote(sender, version))

    requests = make_requests(4, temperature=0.0)
    for version in (21, 22):
        pool.sync_weights(Group(), version)
        assert text(by_id(pool.generate(requests))) == {request.request_id: hf_greedy(model, request) for request in requests}


def test_a_sync_is_refused_while_requests_are_unfinished_or_versions_differ(pool, model):
    pool.submit(make_requests(2))
    with pytest.raises(ConfigError, match="2 requests are unfinished"):
        pool.sync_weights(Publisher(model), 40)
    pool.abort_all()

    class Late(Publisher):
        def publish_weights(self, sender, version):
            return super().publish_weights(sender, version - 1)

    with pytest.raises(WorkerError, match="published weights version 39, but version 40"):
        pool.sync_weights(Late(model), 40)
    pool.sync_weights(Publisher(model), 41)


@pytest.mark.parametrize(("end", "transport"), [("killed", "gloo"), ("stopped", "shared_memory")])
def test_an_engine_that_dies_in_mid_generation_loses_and_doubles_nothing(pool, model, end, transport):
    requests = make_requests(8, siblings=4, seed=2, max_new_tokens=90)
    perturb(model, seed=5)
    pool.config = replace(pool.config, weight_transport=transport)
    pool.sync_weights(Publisher(model), 50)  # so that a successor needs weights that are in no folder
    expected, before = by_id(pool.generate(requests)), Counter(pool.stats())
    pool.config = replace(pool.config, request_timeout_s=4.0)
    completions = []
    for completion in pool.generate(requests):
        completions.append(completion)
        if len(completions) == 1:
            os.kill(pid_of(pool, 0), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    completions = by_id(completions)
    assert text(completions) == text(expected)
    assert all(completion.policy_version == 50 for completion in completions.values())
    stats = Counter(pool.stats())
    stats.subtract(before)
    assert stats["completed"] == stats["requests"] == len(requests)
    assert stats["restarts"] >= 1 and stats["resubmitted"] >= 1  # a busy machine may look hung once more, and no harm is done


def test_an_engine_that_dies_between_steps_is_replaced_with_the_new_weights(pool, model):
    requests = make_requests(4, temperature=0.0)
    perturb(model, seed=6)
    pool.config = replace(pool.config, weight_transport="gloo")
    os.kill(pid_of(pool, 1), signal.SIGKILL)
    pool.sync_weights(Publisher(model), 60)
    assert text(by_id(pool.generate(requests))) == {request.request_id: hf_greedy(model, request) for request in requests}


def test_too_many_deaths_end_in_one_error_with_name_cause_and_log(pool):
    pool.config = replace(pool.config, max_restarts=0)
    requests = make_requests(8, siblings=4, max_new_tokens=90)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"engine-1 failed 1 times \(rollout.max_restarts 0\): died in pump: .*; log: ") as caught:
        for _ in pool.generate(requests):
            with contextlib.suppress(ProcessLookupError):  # killed by the completion before, and not noticed yet
                os.kill(pid_of(pool, 1), signal.SIGKILL)
    assert time.monotonic() - started < 10
    assert Path(str(caught.value).split("log: ")[1]).exists()
    assert pool.num_unfinished == 0
    pool.close()
    pool.close()


def test_a_folder_without_a_model_is_one_error_at_the_start(cluster, tmp_path):
    (tmp_path / "readme.txt").write_text("not a model")
    started = time.monotonic()
    with pytest.raises(WorkerError, match="engine-0 failed to start: .*; log: "):
        RolloutPool(CONFIG, tmp_path, placement=Placement())
    assert time.monotonic() - started < 60
