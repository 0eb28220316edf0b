"""The estimators are unbiased: enumerated over all batches that a table of action probabilities can give, they average to closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from openrl_reason.algorithms.online_config import PolicyUpdateConfig
from openrl_reason.algorithms.policy_gradient import PolicyGradientLoss
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.reinforce import group_credit
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.credit import gae
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.evaluation.gradient_noise import cosine, gradient_noise, inner_products, jackknife, noise_to_signal, signal, variance
from openrl_reason.workers.gradients import sketched_gradient

CHANCES = np.array([0.5, 0.3, 0.2])
REWARDS = np.array([1.0, 0.0, 3.0])
MEAN = float(CHANCES @ REWARDS)


class Table(nn.Module):
    """A policy that is one softmax over three actions, with the forward of a ``LanguageModel``."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(np.log(CHANCES)).float())

    def forward(self, token_ids, cu_seqlens, temperature, with_entropy, mask):
        logprobs = (self.logits / temperature).log_softmax(-1)
        chosen = torch.where(mask, logprobs[token_ids], 0.0)
        return chosen, torch.zeros_like(chosen)


def gradient(actions, credit):
    """Of one prompt's responses, of one action each, by the library's own credit and loss."""
    trajectories = [
        Trajectory.from_completion([0], [action], [math.log(CHANCES[action])], task_id="t", group_id="t", sample_index=i, reward=REWARDS[action])
        for i, action in enumerate(actions)
    ]
    batch = TokenBatch.from_trajectories(trajectories)
    batch = batch.with_sequences(group_ids=torch.zeros(batch.num_sequences, dtype=torch.int64))
    if credit == "group":
        advantages = group_credit(batch, kind="rloo", gamma=1.0)
    else:
        values = torch.full((batch.num_tokens,), MEAN)
        advantages = gae(batch.tokens["rewards"], values, batch.action_mask, batch.cu_seqlens)[0]
    weights, denominator = loss_weights(batch, "batch")
    batch = batch.with_tokens(advantages=advantages, loss_weights=weights)
    denominators = {"loss": denominator, "tokens": float(batch.num_actions)}
    loss = PolicyGradientLoss(PolicyUpdateConfig(), 0.0)
    return sketched_gradient(Table(), [batch], loss, denominators, 1.0, True, size=1024, seed=0).sketch


@pytest.mark.parametrize("credit", ["group", "critic"])
def test_variance_and_signal_average_to_the_closed_form_over_all_batches_of_a_tabular_policy(credit):
    """With advantages r_i - r_j of two siblings the gradient is -(r_i - r_j)(e_i - e_j) / 2, so E |g|^2 = Var r. With the exact value as the critic
    it is the mean of two independent -(r - E r)(e - pi)."""
    pairs = list(itertools.product(range(3), repeat=2))
    chances = np.array([CHANCES[i] * CHANCES[j] for i, j in pairs])
    sketches = [gradient(pair, credit) for pair in pairs]
    shared = float(((CHANCES * (REWARDS - MEAN)) ** 2).sum())  # |pi (r - E r)|^2
    if credit == "group":
        square = float(CHANCES @ (REWARDS - MEAN) ** 2)
    else:
        spread = ((np.eye(3) - CHANCES) ** 2).sum(axis=1)
        square = 0.5 * (float(CHANCES @ ((REWARDS - MEAN) ** 2 * spread)) - shared) + shared
    averages = {"variance": 0.0, "signal": 0.0}
    for i, j in itertools.product(range(len(pairs)), repeat=2):  # two independent batches
        products = inner_products([sketches[i], sketches[j]])
        averages["variance"] += chances[i] * chances[j] * variance(products)
        averages["signal"] += chances[i] * chances[j] * signal(products)
    assert averages["signal"] == pytest.approx(shared, rel=1e-5)
    assert averages["variance"] == pytest.approx(square - shared, rel=1e-5)


def products_of(vectors):
    return vectors @ vectors.T


def test_the_numbers_are_those_of_the_vectors_themselves():
    vectors = np.random.default_rng(0).normal(1.0, 1.0, (6, 4))
    products = products_of(vectors)
    mean = vectors.mean(axis=0)
    assert variance(products) == pytest.approx(((vectors - mean) ** 2).sum() / 5)
    assert signal(products) == pytest.approx(mean @ mean - variance(products) / 6)
    assert noise_to_signal(products) == pytest.approx(variance(products) / signal(products))
    angles = [v @ w / np.sqrt(v @ v * (w @ w)) for v, w in itertools.combinations(vectors, 2)]
    assert cosine(products) == pytest.approx(np.mean(angles))


def test_standard_errors_are_the_spread_of_repetitions():
    rng = np.random.default_rng(1)
    repeats, mean = 200, np.array([1.0, 0.5, 0.0])
    found = [gradient_noise(products_of(rng.normal(mean, 0.5, (16, 3)))) for _ in range(repeats)]
    for name, exact in (("variance", 3 * 0.25), ("signal", 1.25)):
        values, errors = (np.array([one[name][key] for one in found]) for key in ("value", "stderr"))
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(repeats), "unbiased"
        assert np.mean(errors) == pytest.approx(values.std(), rel=0.2)


def test_credits_on_the_same_batches_are_compared_with_one_another():
    rng = np.random.default_rng(2)
    noise = rng.normal(0.0, 1.0, (20, 5))
    first, half = products_of(1.0 + noise), products_of(1.0 + 0.5 * noise)
    found = gradient_noise(half, first)
    assert found["relative_variance"]["value"] == pytest.approx(0.25)
    assert found["relative_variance"]["stderr"] < 1e-6 < found["variance"]["stderr"], "the responses are the same"
    assert "relative_variance" not in gradient_noise(half)


def test_what_is_not_defined_is_nan_and_never_a_number():
    opposite = products_of(np.array([[1.0], [-1.0]]))
    assert variance(opposite) == 2.0 and signal(opposite) == -1.0 and math.isnan(noise_to_signal(opposite))
    assert math.isnan(jackknife(variance, opposite)["stderr"]), "two batches have no standard error"
    assert math.isnan(cosine(products_of(np.zeros((3, 2))))) and variance(np.zeros((3, 3))) == 0.0
    assert math.isnan(gradient_noise(np.ones((3, 3)), np.zeros((3, 3)))["relative_variance"]["value"])
