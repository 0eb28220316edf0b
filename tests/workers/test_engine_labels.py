"""Log-probs of given labels at the first generated position, with the real vLLM and SmolLM2 in float32, against Hugging Face's forward."""

from pathlib import Path

import pytest
import torch
from rollout_helpers import EngineProcess, hf_logprobs

from openrl_reason.errors import ConfigError
from openrl_reason.workers.rollout_config import Request, RolloutConfig, SamplingConfig, check_requests

pytest.importorskip("vllm")
MODEL = Path("/opt/dev/smollm2-135m")
CONFIG = RolloutConfig(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_gib=0.25)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=1)


@pytest.fixture(scope="module")
def engine():
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"SmolLM2-135M-Instruct is not at {MODEL}: make it with `openrl-reason make-model --smollm2`")
    process = EngineProcess(CONFIG, MODEL)
    yield process
    process.stop()


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = ["Two and two is", "Rate this from 1 to 9. Score: ", "Is the sky blue? Answer Yes or No.\nAnswer:", "x" * 200]
    return [tokenizer(text)["input_ids"] for text in texts], [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(1, 10)]


def test_label_logprobs_are_those_of_a_hugging_face_forward_in_any_company(engine, model, prompts):
    prompts, digits = prompts
    labels = [tuple(digits), (digits[0], 5, 17), tuple(digits[::-1]), tuple(range(100, 228))]
    requests = [Request(f"label/{i}", prompt, seed=i, sampling=GREEDY, label_ids=labels[i]) for i, prompt in enumerate(prompts)]
    sampled = SamplingConfig(temperature=0.7, top_k=5, max_new_tokens=8)
    requests += [Request(f"text/{i}", prompt, seed=i, sampling=sampled) for i, prompt in enumerate(prompts)]
    requests += [Request("both", prompts[0], seed=9, sampling=SamplingConfig(temperature=1.0, max_new_tokens=6), label_ids=tuple(digits))]
    together = engine.generate(requests)
    for request in requests:
        completion = together[request.request_id]
        assert len(completion.logprobs) == len(completion.token_ids)
        assert torch.allclose(hf_logprobs(model, request, completion), torch.tensor(completion.logprobs), atol=1e-3), request.request_id
        assert len(completion.label_logprobs) == len(request.label_ids)
        if request.label_ids:
            with torch.no_grad():
                expected = model(torch.tensor([request.prompt_ids])).logits[0, -1].log_softmax(-1)[list(request.label_ids)]
            assert torch.allclose(expected, torch.tensor(completion.label_logprobs), atol=1e-3), request.request_id
    alone = {request.request_id: engine.generate([request])[request.request_id] for request in requests}
    for name, completion in together.items():
        assert alone[name].token_ids == completion.token_ids
        assert alone[name].label_logprobs == pytest.approx(completion.label_logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_ids": (1, 2, 1)}, "each of them once"),
        ({"label_ids": tuple(range(129))}, "at most 128"),
        ({"label_ids": (1,), "sampling": SamplingConfig(temperature=0.5)}, "temperature 0 or 1"),
        ({"label_ids": (1,), "sampling": SamplingConfig(top_p=0.9)}, "without top_p"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        check_requests([Request("r", [1, 2], seed=0, **changes)], CONFIG, [])


def test_a_label_that_the_model_does_not_have_is_refused(engine):
    with pytest.raises(ConfigError, match="999999"):
        engine.generate([Request("r", [1, 2], seed=0, sampling=GREEDY, label_ids=(999999,))])
