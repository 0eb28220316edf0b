"""The estimators against the exact KL of two tiny models, by going through all their responses; standard errors against repetitions."""

import itertools
import math

import numpy as np
import pytest
import torch

from openrl_reason.core.batch import TokenBatch
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.policy_kl import KINDS, kl_estimates, response_sums
from tests.helpers_models import write_tiny_model

INTERVALS = IntervalConfig(num_resamples=500)
LETTERS, LENGTH, PROMPT = 9, 2, [2, 3]
TEMPERATURE = 0.7


def as_batch(responses):
    """Every response after the prompt."""
    rows = torch.tensor([[*PROMPT, *response] for response in responses])
    mask = torch.tensor([False] * len(PROMPT) + [True] * len(responses[0])).repeat(len(responses))
    return TokenBatch(
        token_ids=rows.flatten(), cu_seqlens=torch.arange(len(rows) + 1, dtype=torch.int32) * rows.shape[1], action_mask=mask,
        step_ids=torch.where(mask, 0, -1), behaviour_logprobs=torch.zeros(rows.numel()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of nine tokens, and the log-probs of all responses of two tokens under each."""
    paths = [write_tiny_model(tmp_path_factory.mktemp("models") / str(seed), seed=seed, vocab_size=LETTERS) for seed in (0, 1)]
    batch = as_batch(list(itertools.product(range(LETTERS), repeat=LENGTH)))
    with torch.no_grad():
        return batch, *(local_model(path)(batch.token_ids, batch.cu_seqlens, TEMPERATURE, False, batch.action_mask)[0] for path in paths)


def local_model(path):
    from openrl_reason.models.attention import choose_attention
    from openrl_reason.models.loading import load_causal_lm
    from openrl_reason.models.policy import LanguageModel

    attention = choose_attention("auto", torch.device("cpu"))
    return LanguageModel(load_causal_lm(path, "float32", attn_implementation=attention), attn_impl=attention)


@pytest.mark.parametrize("direction", ["policy", "reference"])
def test_k1_and_k3_have_the_exact_kl_as_their_expectation_and_k2_comes_close(models, direction):
    batch, policy, reference = models
    p, q = (policy, reference) if direction == "policy" else (reference, policy)
    sums = response_sums(batch, p, q)
    whole = [logprobs.double().reshape(len(sums["k1"]), -1).sum(dim=1).numpy() for logprobs in (p, q)]
    chances = np.exp(whole[0])
    assert chances.sum() == pytest.approx(1.0, abs=1e-4), "all responses of two tokens"
    exact = float(chances @ (whole[0] - whole[1]))
    assert exact > 0.05
    assert chances @ sums["k1"] == pytest.approx(exact, rel=1e-4) and chances @ sums["k3"] == pytest.approx(exact, rel=1e-3)
    assert 0 < chances @ sums["k2"] and set(sums["num_tokens"]) == {LENGTH}
    drawn = np.random.default_rng(0).choice(len(chances), 4000, p=chances / chances.sum())
    found = kl_estimates({name: values[drawn] for name, values in sums.items()}, np.arange(len(drawn)), INTERVALS)
    for kind in ("k1", "k3"):
        whole, token = found[kind]["per_response"], found[kind]["per_token"]
        assert abs(whole["value"] - exact) < 4 * whole["stderr"] and whole["low"] < whole["value"] < whole["high"]
        assert token["value"] == pytest.approx(whole["value"] / LENGTH) and token["stderr"] == pytest.approx(whole["stderr"] / LENGTH)


def test_a_model_is_nowhere_from_itself(models):
    batch, policy, _ = models
    sums = response_sums(batch, policy, policy.clone())
    found = kl_estimates(sums, np.arange(batch.num_sequences), INTERVALS)
    assert all(found[kind][unit]["value"] == found[kind][unit]["high"] == 0.0 for kind in KINDS for unit in found[kind])


def test_prompts_are_not_scored_whatever_stands_there(models):
    batch, policy, reference = models
    broken = torch.where(batch.action_mask, reference, math.nan)
    assert all(np.array_equal(values, response_sums(batch, policy, broken)[name]) for name, values in response_sums(batch, policy, reference).items())


def test_tokens_weigh_alike_per_token_and_responses_per_response():
    sums = {"num_tokens": np.array([1, 3, 4]), **{kind: np.array([1.0, 6.0, 2.0]) for kind in KINDS}}
    found = kl_estimates(sums, np.array(["a", "b", "b"]), INTERVALS)["k1"]
    assert found["per_token"]["value"] == pytest.approx(9 / 8) and found["per_response"]["value"] == pytest.approx(3.0)
    assert found["per_token"]["method"] == "bootstrap"
    alone = kl_estimates(sums, np.array(["a", "a", "a"]), INTERVALS)["k1"]["per_token"]
    assert alone["value"] == pytest.approx(9 / 8) and alone["method"] == "none" and math.isnan(alone["stderr"])


def test_standard_errors_know_that_responses_to_one_problem_are_alike():
    rng = np.random.default_rng(0)
    problems, values, errors = np.repeat(np.arange(40), 4), [], []
    for _ in range(300):
        tokens = rng.integers(5, 15, 160)
        per_token = np.repeat(rng.gamma(2.0, 0.5, 40), 4) + rng.normal(0, 0.1, 160)
        sums = {"num_tokens": tokens, **{kind: tokens * per_token for kind in KINDS}}
        one = kl_estimates(sums, problems, IntervalConfig(num_resamples=100))["k1"]["per_token"]
        values.append(one["value"])
        errors.append(one["stderr"])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)
    assert abs(np.mean(values) - 1.0) < 4 * np.std(values) / math.sqrt(300)
