"""KL estimators against the exact KL of a small distribution, and the controllers' arithmetic."""

import pytest
import torch

from openrl_reason.core.kl import KL_KINDS
from openrl_reason.core.losses import AdaptiveKL, FixedKL, kl_loss, kl_penalty


def test_k3_golden_values():
    ref_minus_logprob = torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(
        kl_penalty(torch.zeros(3), ref_minus_logprob, kind="k3"), torch.tensor([0.0, 0.71828, 0.36788]), atol=1e-5, rtol=0
    )


def distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_average_to_the_exact_kl(kind):
    _, logprobs, ref_logprobs = distributions()
    exact = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    torch.testing.assert_close((logprobs.exp() * kl_penalty(logprobs, ref_logprobs, kind=kind)).sum(), exact)


def test_abs_is_the_distance_of_each_token_and_on_average_not_below_the_kl():
    _, logprobs, ref_logprobs = distributions()
    k1, found = (kl_penalty(logprobs, ref_logprobs, kind=kind) for kind in ("k1", "abs"))
    assert k1.min() < 0 and torch.equal(found, torch.where(k1 < 0, -k1, k1))
    assert (logprobs.exp() * found).sum() > (logprobs.exp() * k1).sum()
    assert not kl_penalty(logprobs, logprobs, kind="abs").any()


@pytest.mark.parametrize(("kind", "direction"), [("k1", "none"), ("k2", "reverse"), ("k3", "forward"), ("abs", "variation")])
def test_on_policy_gradients_of_the_estimators_are_what_the_docstring_says(kind, direction):
    logits, logprobs, ref_logprobs = distributions()
    on_policy = (logprobs.exp().detach() * kl_penalty(logprobs, ref_logprobs, kind=kind)).sum()
    exact = {
        "none": 0.0 * logprobs.sum(),
        "reverse": (logprobs.exp() * (logprobs - ref_logprobs)).sum(),
        "forward": (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(),
        "variation": (logprobs.exp() - ref_logprobs.exp()).abs().sum(),
    }[direction]
    (mine,), (theirs,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (on_policy, exact))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_masked_nans_reach_neither_the_loss_nor_the_gradient(kind):
    logprobs = torch.randn(5, requires_grad=True)
    ref_logprobs = torch.tensor([0.0, torch.nan, 1.0, torch.inf, -1.0])
    mask = torch.tensor([True, False, True, False, True])
    loss, metrics = kl_loss(logprobs, ref_logprobs, mask, kind=kind)
    loss.backward()
    assert loss.isfinite() and metrics["kl"] == loss.detach()
    assert logprobs.grad.isfinite().all() and not logprobs.grad[~mask].any()
    assert not kl_penalty(logprobs, ref_logprobs, kind=kind, mask=mask)[~mask].any()


def test_an_absurd_token_keeps_the_loss_finite():
    logprobs = torch.tensor([-1000.0], requires_grad=True)
    loss = kl_penalty(logprobs, torch.tensor([0.0]), kind="k3").sum()
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3, abs"):
        kl_penalty(torch.zeros(1), torch.zeros(1), kind="k4")


def test_the_adaptive_coefficient_follows_its_sequence():
    controller = AdaptiveKL(0.1, target=2.0, horizon=100)
    for kl, num_samples, factor in [
        (2.0, 10, 1.0),
        (4.0, 10, 1.02),
        (0.0, 10, 0.98),
        (2.2, 50, 1.05),
        (100.0, 10_000, 1.2),
        (float("nan"), 10, 1.0),
    ]:
        before = controller.coefficient
        controller.update(kl, num_samples)
        assert controller.coefficient == pytest.approx(before * factor)
    again = AdaptiveKL(1.0, target=2.0)
    again.load_state_dict(controller.state_dict())
    assert again.coefficient == controller.coefficient


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.1)
    controller.update(100.0, 10)
    assert controller.coefficient == 0.1 and controller.state_dict() == {"coefficient": 0.1}
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKL(0.1, target=0.0)
