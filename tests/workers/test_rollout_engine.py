"""Properties of one engine, with the real vLLM on a CPU in float32."""

from dataclasses import replace

import pytest
import torch
from rollout_helpers import CONFIG, EngineProcess, hf_greedy, hf_logprobs, make_requests, make_tiny, perturb

from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.workers.rollout_config import Request, SamplingConfig
from openrl_reason.workers.weight_sync import make_sender

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {tied: make_tiny(base / f"tied-{tied}", tied=tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def engines(folders):
    """One engine with a tied head; one with a head of its own and a KV cache of 52 blocks, too small for a full batch. They start together."""
    processes = {True: EngineProcess(CONFIG, folders[True]), False: EngineProcess(replace(CONFIG, kv_cache_gib=0.0008), folders[False])}
    yield processes
    for process in processes.values():
        process.stop()


@pytest.fixture
def engine(engines):
    return engines[True]


@pytest.fixture(params=[True, False], ids=["tied head", "own head"])
def pair(request, engines, folders):
    """(engine, Hugging Face model with the same weights, function that sends the model's weights as the next version)."""
    engine, model = engines[request.param], load(folders[request.param])
    sender = make_sender("shared_memory", dtype="float32", checksum=True)

    def sync():
        version = engine.get("version") + 1
        engine.load_weights(sender.send(model.named_parameters(), version), version)
        return version

    sync()
    return engine, model, sync


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def same(one, other):
    assert one.keys() == other.keys()
    return all(one[key].token_ids == other[key].token_ids and one[key].logprobs == other[key].logprobs for key in one)


def test_a_sample_depends_on_its_request_alone(engine):
    requests = make_requests(12, siblings=2)
    together = engine.generate(requests)
    assert len({tuple(completion.token_ids) for completion in together.values()}) == len(requests)
    engine.reset_prefix_cache()
    backwards = engine.generate(requests[::-1])
    engine.reset_prefix_cache()
    alone = {}
    for request in requests[::3]:
        engine.reset_prefix_cache()
        alone |= engine.generate([request])
    cached = engine.generate(requests)
    assert sum(completion.num_cached_tokens > 0 for completion in cached.values()) >= 6
    assert same(together, backwards) and same(together, cached)
    assert same({key: together[key] for key in alone}, alone)


def test_a_sample_survives_being_preempted(engines):
    engine, requests = engines[False], make_requests(12, siblings=2, max_new_tokens=90)
    together = engine.generate(requests)
    assert sum(len(r.prompt_ids) + len(together[r.request_id].token_ids) for r in requests) > 1.2 * 52 * CONFIG.block_size
    alone = {}
    for request in requests:
        alone |= engine.generate([request])
    assert same(together, alone)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_p": 0.7}, {"top_k": 20}, {"temperature": 0.0}], ids=str
)
def test_logprobs_are_those_of_the_distribution_sampled_from(engine, folders, sampling):
    sender = make_sender("shared_memory", dtype="float32")
    model, version = load(folders[True]), engine.get("version") + 1
    engine.load_weights(sender.send(model.named_parameters(), version), version)
    requests = make_requests(8, **sampling)
    completions = engine.generate(requests)
    difference = torch.cat(
        [
            (torch.tensor(completions[request.request_id].logprobs) - hf_logprobs(model, request, completions[request.request_id])).abs()
            for request in requests
        ]
    )
    assert difference.mean() < 1e-5 and difference.max() < 1e-4


def test_greedy_equals_hugging_face_after_every_update(pair):
    engine, model, sync = pair
    requests = make_requests(6, temperature=0.0)
    seen = set()
    for update in range(3):
        completions = engine.generate(requests)
        for request in requests:
            assert completions[request.request_id].token_ids == hf_greedy(model, request), (update, request.request_id)
        seen.add(tuple(completions[requests[0].request_id].token_ids))
        perturb(model, seed=update)
        sync()
    assert len(seen) == 3


def test_an_update_leaves_nothing_of_the_old_prefix_cache(pair):
    engine, model, sync = pair
    (request,) = [request for request in make_requests(5, seed=3) if len(request.prompt_ids) == 90][:1]
    before = engine.generate([request])[request.request_id]
    assert engine.generate([request])[request.request_id].num_cached_tokens >= 64
    perturb(model, seed=9)
    version = sync()
    after = engine.generate([request])[request.request_id]
    assert after.num_cached_tokens == 0
    assert (before.policy_version, after.policy_version) == (version - 1, version)
    assert (torch.tensor(after.logprobs) - hf_logprobs(model, request, after)).abs().max() < 1e-4
    assert before.token_ids != after.token_ids


def test_completions_say_why_they_ended(engine, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[True])
    reasons = set()
    for completion in engine.generate(make_requests(30, max_new_tokens=90)).values():
        reasons.add(completion.stop_reason)
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert completion.stop_reason == (StopReason.EOS if ended else StopReason.LENGTH)
        assert (len(completion.token_ids) == 90) or ended
        assert tokenizer.eos_token_id not in completion.token_ids[:-1]
    assert reasons == {StopReason.EOS, StopReason.LENGTH}


def test_stop_strings_end_a_completion_and_their_tokens_stay(engine, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[True])
    request = make_requests(1, seed=5, max_new_tokens=60)[0]
    free = engine.generate([request])[request.request_id]
    letters = [index for index, token in enumerate(free.token_ids) if tokenizer.decode([token]).isalnum() and token < 5 + 256]
    end = next(index for index in letters if index > 5)
    stop = tokenizer.decode([free.token_ids[end]])
    first = next(index for index in letters if tokenizer.decode([free.token_ids[index]]) == stop)
    stopped = engine.generate([replace(request, sampling=replace(request.sampling, stop=("never this", stop)))])[request.request_id]
    assert (stopped.stop_reason, stopped.stop_string) == (StopReason.STOP_STRING, stop)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == free.logprobs[: first + 1]


def test_what_cannot_be_served_is_refused_before_anything_is_added(engine):
    good = Request("good", [5, 6, 7], seed=0, sampling=SamplingConfig(max_new_tokens=4))
    for bad, words in [
        (Request("long", [5] * 150, seed=0, sampling=SamplingConfig(max_new_tokens=43)), ("150", "43", "193", "192", "max_model_len")),
        (Request("empty", [], seed=0), ("empty prompt",)),
        (Request("alien", [5, 261], seed=0, sampling=SamplingConfig(max_new_tokens=4)), ("token id 261", "261 tokens")),
        (Request("good", [5], seed=0, sampling=SamplingConfig(max_new_tokens=4)), ("unique",)),
    ]:
        with pytest.raises(ConfigError) as caught:
            engine.pump([good, bad], 0.01)
        assert all(word in str(caught.value) for word in words), caught.value
        assert engine.get("num_unfinished") == 0


def test_weights_are_not_replaced_under_a_running_request(engine, folders):
    requests = make_requests(3, max_new_tokens=100)
    manifest = make_sender("shared_memory", dtype="float32").send(load(folders[True]).named_parameters(), 77)
    engine.pump(requests, 0.0)
    with pytest.raises(ConfigError, match="3 requests are unfinished"):
        engine.load_weights(manifest, 77)
    engine.abort_all()
    assert engine.get("num_unfinished") == 0
    engine.load_weights(manifest, 77)
    assert len(engine.generate(requests)) == 3


def test_a_wrong_or_damaged_update_is_an_error_and_the_engine_will_not_generate_on(engine, folders):
    sender, weights = make_sender("shared_memory", dtype="float32", checksum=True), dict(load(folders[True]).named_parameters())
    manifest = sender.send(weights.items(), 5)
    with pytest.raises(WorkerError, match="version 6, but the manifest says version 5"):
        engine.load_weights(manifest, 6)
    with pytest.raises(WorkerError, match="no usable weights"):
        engine.pump(make_requests(1), 0.1)
    damaged = replace(manifest, tensors=(replace(manifest.tensors[0], checksum=1), *manifest.tensors[1:]))
    with pytest.raises(WorkerError, match="checksum of 'model.embed_tokens.weight' is 0x.* here and 0x00000001 at the sender"):
        engine.load_weights(damaged, 5)
    incomplete = sender.send([(name, tensor) for name, tensor in weights.items() if "layers.1.mlp.down" not in name], 6)
    with pytest.raises(WorkerError, match="version 6 lack 1 parameters of the engine, for instance.*down_proj"):
        engine.load_weights(incomplete, 6)
    engine.load_weights(sender.send(weights.items(), 7), 7)
    assert engine.get("version") == 7
    assert len(engine.generate(make_requests(2))) == 2


def test_sleeping_and_waking_changes_nothing(engine):
    requests = make_requests(3)
    before = engine.generate(requests)
    engine.sleep()
    engine.wake()
    assert same(before, engine.generate(requests))


def test_a_bfloat16_engine_takes_bfloat16_updates(folders):
    model = load(folders[True])
    engine = EngineProcess(replace(CONFIG, dtype="bfloat16"), folders[True])
    try:
        perturb(model, seed=4)
        full = make_sender("shared_memory", dtype="float32").send(model.named_parameters(), 1)
        manifest = make_sender("shared_memory", dtype="bfloat16").send(model.named_parameters(), 1)
        assert manifest.nbytes * 2 == full.nbytes
        engine.load_weights(manifest, 1)
        requests = make_requests(6)
        completions = engine.generate(requests)
        difference = torch.cat(
            [
                torch.tensor(completions[request.request_id].logprobs)
                - hf_logprobs(model.bfloat16(), request, completions[request.request_id])
                for request in requests
            ]
        ).abs()
        assert difference.mean() < 0.1
    finally:
        engine.stop()


def test_one_character_is_found_by_its_tokens_and_ends_what_detokenising_ends(engine, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[True])
    requests = make_requests(12, max_new_tokens=60)
    free = engine.generate(requests)
    texts = {token: tokenizer.decode([token], skip_special_tokens=True) for one in free.values() for token in one.token_ids}
    stop = ("e", next(text for text in texts.values() if len(text) == 1 and text.isascii() and text not in ("e", " ")))
    ended = 0
    for way in (stop, (*stop, "never this")):  # with a string of several characters every token is detokenised
        for request, found in ((one, engine.generate([replace(one, sampling=replace(one.sampling, stop=way))])[one.request_id]) for one in requests):
            whole = free[request.request_id]
            end = next((place for place, token in enumerate(whole.token_ids) if any(one in texts[token] for one in stop)), None)
            assert found.token_ids == (whole.token_ids if end is None else whole.token_ids[: end + 1])
            if end is not None:
                ended += 1
                assert (found.stop_reason, found.stop_string) == (StopReason.STOP_STRING, next(s for s in stop if s in texts[whole.token_ids[end]]))
            else:
                assert (found.stop_reason, found.stop_string) == (whole.stop_reason, None)
    assert ended >= 4
