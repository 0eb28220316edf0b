"""Prefixes shared to the token: the same samples as without, and few prompt tokens computed. With the real vLLM on a CPU in float32."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rollout_helpers import CONFIG, EngineProcess, make_tiny, perturb

from openrl_reason.workers.prefix_reuse import ROOT, BlockIndex, HeldRequests, attach, common_length
from openrl_reason.workers.rollout_config import Request, SamplingConfig
from openrl_reason.workers.weight_sync import make_sender

BLOCK = CONFIG.block_size
TINY_CACHE_GIB = 14 * BLOCK * 512 / 2**30
"""14 blocks of the tiny model, of which one sequence needs up to 6: whatever is cached is soon evicted, and two sequences may be too many."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engines(folder):
    """With reuse, without, and with reuse in a very small cache. They start together."""
    pytest.importorskip("vllm")
    config = replace(CONFIG, max_num_seqs=128)
    configs = [config, replace(config, partial_prefix_reuse="never"), replace(config, kv_cache_gib=TINY_CACHE_GIB)]
    processes = [EngineProcess(one, folder) for one in configs]
    yield processes
    for process in processes:
        process.stop()


def trajectories(engine, count, seed, max_new_tokens=100):
    """Prompts with what the engine says to them: (prompt, all tokens)."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 261) for _ in range(rng.randrange(20, 80))] for _ in range(count)]
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    requests = [Request(f"trajectory {number}", prompt, seed=number, sampling=sampling) for number, prompt in enumerate(prompts)]
    completions = engine.generate(requests)
    return [(request.prompt_ids, request.prompt_ids + completions[request.request_id].token_ids) for request in requests]


def cuts(texts, seed, steps):
    """The prefixes at the step boundaries of trajectories, with steps of random length."""
    rng = random.Random(seed)
    prefixes = []
    for prompt, tokens in texts:
        end = len(prompt)
        while end < len(tokens):
            prefixes.append(tokens[:end])
            end += rng.choice(steps)
    return prefixes


def branches(prefixes, siblings, max_new_tokens=20):
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    return [
        Request(f"{number}/{sibling}", prefix, seed=100 * number + sibling, sampling=sampling)
        for number, prefix in enumerate(prefixes)
        for sibling in range(siblings)
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].token_ids == other[key].token_ids, key
        torch.testing.assert_close(torch.tensor(one[key].logprobs), torch.tensor(other[key].logprobs), rtol=0, atol=1e-4)


def computed(requests, completions):
    """Prompt tokens that the engine computed, by request."""
    return {request.request_id: len(request.prompt_ids) - completions[request.request_id].num_cached_tokens for request in requests}


def test_samples_are_the_same_with_and_without_in_any_order(engines):
    reusing, plain, _ = engines
    texts = trajectories(reusing, 8, seed=1)
    assert texts == trajectories(plain, 8, seed=1)
    requests = branches(cuts(texts, seed=1, steps=range(1, 40)), siblings=5)
    expected = plain.generate(requests)
    assert_same(reusing.generate(requests), expected)
    for seed in (2, 3):
        random.Random(seed).shuffle(requests)
        reusing.reset_prefix_cache()
        assert_same(reusing.generate(requests), expected)


def test_requests_that_come_while_others_run_are_the_same_too(engines):
    reusing, plain, _ = engines
    requests = branches(cuts(trajectories(plain, 4, seed=2), seed=2, steps=range(1, 40)), siblings=5)
    random.Random(2).shuffle(requests)
    expected, found = plain.generate(requests), []
    for start in range(0, len(requests), 7):
        found += reusing.pump(requests[start : start + 7], 0.0)
    while reusing.get("num_unfinished"):
        found += reusing.pump([], 10.0)
    assert len(found) == len(requests)
    assert_same({completion.request_id: completion for completion in found}, expected)


def test_samples_are_the_same_where_blocks_are_evicted_and_requests_preempted(engines):
    reusing, plain, small = engines
    texts = trajectories(small, 4, seed=3)
    assert texts == trajectories(plain, 4, seed=3)
    for siblings, max_new_tokens in ((3, 12), (2, 64)):
        prefixes = [prefix for prefix in cuts(texts, seed=siblings, steps=range(1, 40)) if len(prefix) + max_new_tokens <= CONFIG.max_model_len]
        requests = branches(prefixes, siblings, max_new_tokens)
        random.Random(siblings).shuffle(requests)
        assert_same(small.generate(requests), plain.generate(requests))


def test_samples_are_those_of_the_new_weights_after_an_update(engines, folder):
    from transformers import AutoModelForCausalLM

    reusing, plain, _ = engines
    requests = branches(cuts(trajectories(reusing, 4, seed=4), seed=4, steps=range(5, 30)), siblings=5)
    before = reusing.generate(requests)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    perturb(model, seed=5)
    for version, weights in ((1, model.named_parameters()), (2, original.items())):
        manifest = make_sender("shared_memory", dtype="float32").send(weights, version)
        for engine in (reusing, plain):
            engine.load_weights(manifest, version)
        after = reusing.generate(requests)
        assert_same(after, plain.generate(requests))
        assert (after["0/0"].token_ids == before["0/0"].token_ids) == (version == 2)


@pytest.mark.parametrize("seed", [6, 7])
def test_branches_compute_little_more_than_one_token_each(engines, seed):
    reusing, plain, _ = engines
    reusing.reset_prefix_cache()
    texts = trajectories(reusing, 8, seed)
    prefixes = cuts(texts, seed, steps=range(10, 30))
    requests = branches(prefixes, siblings=9)
    random.Random(seed).shuffle(requests)
    counts = computed(requests, reusing.generate(requests))
    distinct = len({tuple(prefix[:length]) for prefix in prefixes for length in range(1, len(prefix) + 1)})
    assert set(counts.values()) == {1}  # the last token is always computed: it gives the first logits
    assert sum(computed(requests, plain.generate(requests)).values()) > 3 * distinct  # so there is something to save


@pytest.mark.parametrize("length", [1, 9, 24, 25, 31, 32, 33, 75])
def test_what_goes_on_from_a_response_computes_its_last_token_alone(engines, length):
    reusing, plain, tiny = engines
    for engine in engines:
        engine.reset_prefix_cache()
    rng = random.Random(length)
    beams = [[rng.randrange(5, 261) for _ in range(length)] for _ in range(3)]
    for depth in range(6):  # steps of a search; some end in the block in which they began, some at its edge
        requests = branches(beams, siblings=2, max_new_tokens=8)
        found = reusing.generate(requests)
        assert_same(found, plain.generate(requests))
        assert_same(found, tiny.generate(requests))
        if depth:
            assert set(computed(requests, found).values()) == {1}
        beams = [beam + found[f"{number}/{depth % 2}"].token_ids for number, beam in enumerate(beams)]
    for engine in engines:
        engine.reset_prefix_cache()  # an error if a block were still held


@pytest.mark.parametrize("max_new_tokens", [1, 30])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 75])
def test_of_one_prompt_submitted_many_times_one_request_computes_it(engines, length, max_new_tokens):
    reusing = engines[0]
    reusing.reset_prefix_cache()
    rng = random.Random(length)
    requests = branches([[rng.randrange(5, 261) for _ in range(length)]], siblings=6, max_new_tokens=max_new_tokens)
    assert computed(requests, reusing.generate(requests)) == {request.request_id: length if request is requests[0] else 1 for request in requests}


def test_a_request_that_ended_with_its_first_step_leads_nobody(engines):
    reusing = engines[0]
    reusing.reset_prefix_cache()
    rng = random.Random(3)
    prompt = [rng.randrange(5, 261) for _ in range(75)]
    reusing.generate(branches([prompt], siblings=1, max_new_tokens=1))
    reusing.reset_prefix_cache()
    requests = branches([prompt], siblings=6, max_new_tokens=1)
    assert sorted(computed(requests, reusing.generate(requests)).values()) == [1, 1, 1, 1, 1, 75]


def test_prefixes_that_the_engine_has_never_seen_are_computed_once(engines):
    reusing = engines[0]
    reusing.reset_prefix_cache()
    rng = random.Random(8)
    texts = [([], [rng.randrange(5, 261) for _ in range(150)]) for _ in range(4)]
    prefixes = [prefix for prefix in cuts(texts, seed=8, steps=range(10, 30)) if prefix]
    requests = branches(prefixes, siblings=3)
    counts = computed(requests, reusing.generate(requests))
    longest = max(len(prefix) for prefix in prefixes)
    assert sum(counts.values()) <= 4 * longest + len(requests)


def test_after_an_abort_in_the_middle_everything_works(engines):
    reusing, plain, _ = engines
    requests = branches(cuts(trajectories(plain, 4, seed=9), seed=9, steps=range(5, 30)), siblings=5)
    for pumps in range(4):  # after the first, most requests are held; then some run
        reusing.pump(requests, 0.0)
        for _ in range(pumps):
            reusing.pump([], 0.0)
        reusing.abort_all()
        assert reusing.get("num_unfinished") == 0
    assert_same(reusing.generate(requests), plain.generate(requests))
    reusing.reset_prefix_cache()  # an error if a block were still held


def test_a_vllm_that_is_built_otherwise_is_left_alone_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert attach(SimpleNamespace(engine_core=None)) is None
    assert len(caplog.records) == 1 and "whole blocks only" in caplog.text


# --- the parts alone ---


def test_the_index_finds_the_longest_beginning_that_is_cached_and_computed():
    rng = random.Random(0)
    cached, blocks = {}, {}
    index = BlockIndex(cached.get, max_blocks=40)
    for step in range(1, 400):
        number, key = rng.randrange(60), str(rng.randrange(10**9)).encode()
        tokens, parent = tuple(rng.randrange(3) for _ in range(rng.choice((3, 8)))), rng.choice((ROOT, b"parent"))
        if number in blocks:  # the block is taken from the cache, and used anew
            cached.pop(blocks.pop(number)[2])
        before, written = rng.randrange(len(tokens) + 1), rng.choice((step, step - 1))
        cached[key], blocks[number] = number, (parent, tokens, key, written, before)
        index.add(parent, tokens, key, number, step=written, before=before)
        target = tuple(rng.randrange(3) for _ in range(7))
        lengths = {
            key: common_length(tokens, target) if written < step else min(common_length(tokens, target), before)
            for place, tokens, key, written, before in blocks.values()
            if place == parent
        }
        key, length = index.find(parent, target, step=step)
        assert length == max(lengths.values())
        assert not length or lengths[key] == length


def test_held_requests_each_go_once_and_after_a_prompt_that_contains_theirs():
    rng = random.Random(1)
    for _ in range(200):
        computed_ids, order = set(), []
        held = HeldRequests(computed_ids.__contains__)
        requests = [Request(str(number), [rng.randrange(2) for _ in range(rng.randrange(1, 5))], seed=number) for number in range(12)]

        def add(request, order=order):
            order.append(request)
            return request.request_id

        for start in range(0, 12, 4):
            held.admit(requests[start : start + 4], add)
            fresh = [request.request_id for request in order if request.request_id not in computed_ids]
            computed_ids.update(rng.sample(fresh, len(fresh) // 2))
            held.release(add)
            new_prompts = [tuple(request.prompt_ids) for request in order if request.request_id not in computed_ids]
            assert len(order) == len({request.request_id for request in order}), new_prompts
        while len(order) < 12:
            computed_ids.update(request.request_id for request in order)
            before = len(order)
            held.release(add)
            assert len(order) > before
        assert sorted(request.request_id for request in order) == sorted(request.request_id for request in requests)


def test_of_prompts_submitted_together_only_those_that_no_other_contains_go_ahead():
    order = []
    held = HeldRequests(lambda request_id: True)
    prompts = {"a": [1, 2], "b": [1], "c": [1, 2, 3], "d": [2], "e": [1, 2, 3], "f": [1, 4]}
    requests = [Request(name, prompt, seed=0) for name, prompt in prompts.items()]
    add = lambda request: order.append(request.request_id) or request.request_id  # noqa: E731
    held.admit(requests, add)
    assert set(order) == {"c", "d", "f"}
    held.release(add)
    assert sorted(order) == sorted(prompts)
    assert held.clear() == []
