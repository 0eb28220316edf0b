"""DPO and KTO: closed forms, gradients, and pieces that add up."""

import math

import pytest
import torch

from openrl_reason.core.losses import dpo_loss, kto_loss, kto_reference_point

PAIRS = [torch.tensor([value], dtype=torch.float64) for value in (-3.0, -4.0, -3.5, -3.8)]  # chosen, rejected, ref_chosen, ref_rejected


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_dpo_losses_equal_their_closed_forms():
    z = (-3.0 + 4.0) - (-3.5 + 3.8)
    assert float(dpo_loss(*PAIRS, beta=0.1)[0]) == pytest.approx(-log_sigmoid(0.1 * z))
    smooth = -0.9 * log_sigmoid(0.1 * z) - 0.1 * log_sigmoid(-0.1 * z)
    assert float(dpo_loss(*PAIRS, beta=0.1, label_smoothing=0.1)[0]) == pytest.approx(smooth)
    assert float(dpo_loss(*PAIRS, beta=0.1, kind="ipo")[0]) == pytest.approx((z - 5.0) ** 2)


def test_dpo_positive_takes_off_what_the_chosen_response_lost_inside_of_beta():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([value, value]) for value in (-3.0, -9.0, -2.5, -4.0))
    chosen = torch.tensor([-3.0, -2.0])  # the first fell below the reference by 0.5, the second rose
    z = ((chosen - rejected) - (ref_chosen - ref_rejected)).tolist()
    expected = -(log_sigmoid(0.3 * (z[0] - 50 * 0.5)) + log_sigmoid(0.3 * z[1])) / 2
    loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, positive_weight=50.0)
    assert float(loss) == pytest.approx(expected) and float(metrics["dpo/chosen_shortfall"]) == pytest.approx(0.25)
    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)[0]
    assert torch.equal(plain, dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, positive_weight=0.0)[0])


def test_dpo_at_the_reference_is_log_two_and_undecided():
    sums = torch.randn(7)
    loss, metrics = dpo_loss(sums, sums - 1, sums, sums - 1, beta=0.3)
    assert loss == pytest.approx(math.log(2)) and metrics["dpo/accuracy"] == 0.5 and metrics["dpo/reward_margin"] == pytest.approx(0, abs=1e-6)


def test_a_badly_ranked_pair_keeps_its_gradient():
    chosen = torch.tensor([-400.0], requires_grad=True)
    dpo_loss(chosen, torch.tensor([0.0]), torch.zeros(1), torch.zeros(1), beta=0.1)[0].backward()
    assert chosen.grad == pytest.approx(-0.1)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_pieces_add_up(kind):
    columns = [torch.randn(9, dtype=torch.float64) for _ in range(4)]
    whole, whole_metrics = dpo_loss(*columns, beta=0.2, kind=kind)
    parts = [dpo_loss(*(column[part] for column in columns), beta=0.2, kind=kind, denominator=9) for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for key in whole_metrics:
        torch.testing.assert_close(sum(metrics[key] for _, metrics in parts), whole_metrics[key])


@pytest.mark.parametrize("settings", [
    dict(beta=0.0), dict(beta=0.1, label_smoothing=0.5), dict(beta=0.1, kind="kto"), dict(beta=0.1, positive_weight=-1.0),
    dict(beta=0.1, kind="ipo", positive_weight=1.0),
])  # fmt: skip
def test_impossible_dpo_settings_are_refused(settings):
    with pytest.raises(ValueError):
        dpo_loss(*PAIRS, **settings)


# --- KTO --------------------------------------------------------------------------------------------------------------------------------

DESIRABLE = torch.tensor([True, False, True, False, False])
RATIOS = [0.7, -2.0, -0.4, 3.0, 0.0]


def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


def kto_inputs(ratios=RATIOS):
    ref_logprobs = torch.linspace(-30.0, -3.0, len(ratios), dtype=torch.float64)
    return (ref_logprobs + torch.tensor(ratios, dtype=torch.float64)).requires_grad_(), ref_logprobs


@pytest.mark.parametrize("point", [0.0, 0.6])
@pytest.mark.parametrize(("desirable_weight", "undesirable_weight"), [(1.0, 1.0), (1.0, 1.33), (0.0, 2.0)])
def test_kto_and_its_gradient_equal_the_closed_form(point, desirable_weight, undesirable_weight):
    logprobs, ref_logprobs = kto_inputs()
    loss, metrics = kto_loss(
        logprobs, ref_logprobs, DESIRABLE, beta=0.3, reference_point=point, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    loss.backward()
    total, gradient = 0.0, []
    for ratio, good in zip(RATIOS, DESIRABLE.tolist(), strict=True):
        weight, value = (desirable_weight, sigma(0.3 * (ratio - point))) if good else (undesirable_weight, sigma(0.3 * (point - ratio)))
        total += weight - weight * value
        gradient.append((-1 if good else 1) * weight * 0.3 * value * (1 - value) / 5)
    assert float(loss.detach()) == pytest.approx(total / 5, rel=1e-12) and metrics["kto_loss"] == loss.detach()
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, dtype=torch.float64))
    assert float(metrics["kto/reward_desirable"]) == pytest.approx(0.3 * (0.7 - 0.4) / 5)
    assert float(metrics["kto/reward_undesirable"]) == pytest.approx(0.3 * (3.0 - 2.0) / 5) and float(metrics["kto/desirable_share"]) == 0.4
    assert float(metrics["kto/accuracy"]) == pytest.approx((1 + 1 + 0 + 0 + (0.5 if point == 0 else 1)) / 5)


def test_kto_of_a_pair_is_that_of_its_two_sides_and_at_the_reference_half_the_weights():
    logprobs, ref_logprobs = kto_inputs([1.0, -1.0])
    pair = kto_loss(logprobs, ref_logprobs, torch.tensor([True, False]), beta=0.5)[0]
    assert float(pair.detach()) == pytest.approx(sigma(-0.5)), "both sides are on their right side, equally far"
    start = kto_loss(ref_logprobs, ref_logprobs, torch.tensor([True, False]), beta=0.5, desirable_weight=2.0)[0]
    assert float(start) == pytest.approx((2.0 + 1.0) / 2 / 2)


def test_kto_knows_only_the_distance_from_the_reference_point():
    (near, ref), (far, _) = kto_inputs(), kto_inputs([ratio + 5.0 for ratio in RATIOS])
    losses = [kto_loss(near, ref, DESIRABLE, beta=0.2, reference_point=0.3)[0], kto_loss(far, ref, DESIRABLE, beta=0.2, reference_point=5.3)[0]]
    torch.testing.assert_close(*losses)


def test_the_reference_point_carries_no_gradient_and_is_never_below_zero():
    logprobs, ref_logprobs = kto_inputs()
    point = kto_reference_point(logprobs, ref_logprobs)
    assert not point.requires_grad and float(point) == pytest.approx(sum(RATIOS) / 5) and kto_reference_point(logprobs[:0], ref_logprobs[:0]).isnan()
    moving = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(kto_loss(logprobs, ref_logprobs, DESIRABLE, beta=0.1, reference_point=moving)[0], moving, allow_unused=True) == (None,)
    below = kto_loss(logprobs, ref_logprobs, DESIRABLE, beta=0.1, reference_point=-4.0)[0]
    assert torch.equal(below, kto_loss(logprobs, ref_logprobs, DESIRABLE, beta=0.1, reference_point=0.0)[0])


def test_kto_pieces_add_up_under_the_whole_batchs_reference_point_and_not_under_their_own():
    logprobs, ref_logprobs = kto_inputs([0.7, 2.0, -0.4, 3.0, 1.0])
    logprobs = logprobs.detach()

    def cut(point_of):
        parts = [slice(0, 2), slice(2, 5)]
        return [
            kto_loss(logprobs[part], ref_logprobs[part], DESIRABLE[part], beta=0.2, reference_point=point_of(part), denominator=5) for part in parts
        ]

    point = kto_reference_point(logprobs, ref_logprobs)
    whole, whole_metrics = kto_loss(logprobs, ref_logprobs, DESIRABLE, beta=0.2, reference_point=point)
    pieces = cut(lambda part: point)
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole)
    for key in whole_metrics:
        torch.testing.assert_close(sum(metrics[key] for _, metrics in pieces), whole_metrics[key])
    own = cut(lambda part: kto_reference_point(logprobs[part], ref_logprobs[part]))
    assert abs(float(sum(loss for loss, _ in own) - whole)) > 1e-4


def test_a_response_far_on_either_side_weighs_at_most_lambda_and_its_gradient_is_finite():
    logprobs = torch.tensor([-500.0, 80.0, 500.0, -80.0], requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    losses = [kto_loss(logprobs[i : i + 1], torch.zeros(1), desirable[i : i + 1], beta=1.0, undesirable_weight=1.5)[0] for i in range(4)]
    assert [round(float(loss.detach()), 6) for loss in losses] == [1.0, 0.0, 1.5, 0.0] and all(loss > 0 for loss in losses)
    sum(losses).backward()
    assert logprobs.grad.isfinite().all() and logprobs.grad.abs().max() < 1e-6


@pytest.mark.parametrize("settings", [dict(beta=0.0), dict(beta=0.1, desirable_weight=-1.0), dict(beta=0.1, undesirable_weight=-0.5)])
def test_impossible_kto_settings_are_refused(settings):
    with pytest.raises(ValueError, match="beta"):
        kto_loss(*kto_inputs(), DESIRABLE, **settings)
