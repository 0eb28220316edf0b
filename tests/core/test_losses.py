"""Losses: their formulas, that pieces add up to the whole, and that what is masked does not exist."""

import math

import pytest
import torch

from openrl_reason.core.losses import entropy_loss, explained_variance, kl_loss, policy_loss, sft_loss, value_loss


def make_inputs(lengths=(5, 9, 3, 1, 12), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def noise(scale=1.0):
        return scale * torch.randn(total, generator=generator, dtype=torch.float64).to(dtype)

    logprobs = noise() - 2
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs + noise(0.3),
        behaviour_logprobs=logprobs + noise(0.8),
        advantages=noise(),
        values=noise(),
        old_values=noise(),
        returns=noise(),
        weights=noise().abs(),
        mask=torch.rand(total, generator=generator) < 0.6,
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
    )


POLICY_SETTINGS = {
    "plain": {},
    "asymmetric clip": dict(clip_low=0.1, clip_high=0.4),
    "dual clip": dict(dual_clip=1.5),
    "token weights": dict(token_weights=True),
    "sequence ratio": dict(ratio_level="sequence"),
    "truncated importance": dict(importance_correction="truncate", importance_cap=1.5),
    "masked importance": dict(importance_correction="mask", importance_cap=1.5),
    "everything": dict(ratio_level="sequence", dual_clip=3.0, token_weights=True, importance_correction="truncate"),
}


def run_policy_loss(inputs, settings, denominator=None):
    settings = dict(settings)
    if settings.pop("token_weights", False):
        settings["token_weights"] = inputs["weights"]
    if "importance_correction" in settings:
        settings["behaviour_logprobs"] = inputs["behaviour_logprobs"]
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    return policy_loss(*(inputs[name] for name in names), cu_seqlens=inputs["cu_seqlens"], denominator=denominator, **settings)


def naive_policy_loss(inputs, denominator, *, clip_low=0.2, clip_high=0.2, dual_clip=None, ratio_level="token", token_weights=False,
                      importance_correction=None, importance_cap=2.0):  # fmt: skip
    total = 0.0
    edges = inputs["cu_seqlens"].tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        tokens = [t for t in range(start, end) if inputs["mask"][t]]
        log_ratios = {t: float(inputs["logprobs"][t] - inputs["old_logprobs"][t]) for t in tokens}
        for t in tokens:
            log_ratio = log_ratios[t] if ratio_level == "token" else sum(log_ratios.values()) / len(tokens)
            ratio, advantage = math.exp(log_ratio), float(inputs["advantages"][t])
            term = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
            if dual_clip is not None and advantage < 0:
                term = max(term, dual_clip * advantage)
            if token_weights:
                term *= float(inputs["weights"][t])
            if importance_correction is not None:
                weight = math.exp(float(inputs["old_logprobs"][t] - inputs["behaviour_logprobs"][t]))
                over = importance_cap if importance_correction == "truncate" else 0.0
                term *= weight if weight <= importance_cap else over
            total -= term
    return total / denominator


@pytest.mark.parametrize("name", POLICY_SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_policy_loss_equals_its_formula_written_as_a_loop(name, seed):
    inputs = make_inputs(seed=seed)
    loss, metrics = run_policy_loss(inputs, POLICY_SETTINGS[name])
    assert float(loss) == pytest.approx(naive_policy_loss(inputs, int(inputs["mask"].sum()), **POLICY_SETTINGS[name]), rel=1e-10)
    assert metrics["policy_loss"] == loss


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_the_plain_policy_gradient_and_ratios_are_one(level):
    inputs = make_inputs()
    logprobs = inputs["logprobs"].requires_grad_()
    advantages = inputs["advantages"]
    if level == "sequence":  # one advantage per sequence, as GSPO has it: then the gradient is the same
        advantages = torch.arange(5.0, dtype=torch.float64).repeat_interleave(inputs["cu_seqlens"].diff().long())
    loss, metrics = policy_loss(
        logprobs, logprobs.detach(), advantages, inputs["mask"], ratio_level=level, cu_seqlens=inputs["cu_seqlens"], denominator=7
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(inputs["mask"], -advantages / 7, 0.0))
    assert metrics["ratio/max"] == metrics["ratio/min"] == 1 and metrics["approx_kl"] == 0 and metrics["clip_fraction/high"] == 0


def test_clip_fractions_count_the_tokens_whose_gradient_is_gone():
    inputs = make_inputs(seed=3)
    logprobs = inputs["logprobs"].requires_grad_()
    loss, metrics = policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], inputs["mask"])
    loss.backward()
    gone = int(((logprobs.grad == 0) & inputs["mask"]).sum())
    assert gone == round(float(metrics["clip_fraction/low"] + metrics["clip_fraction/high"]) * int(inputs["mask"].sum())) > 0


def cut(inputs, pieces):
    """The inputs of each piece: lists of consecutive sequences."""
    edges = inputs["cu_seqlens"].tolist()
    for first, last in pieces:
        part = slice(edges[first], edges[last])
        piece = {name: tensor[part] for name, tensor in inputs.items() if name != "cu_seqlens"}
        yield part, piece | {"cu_seqlens": inputs["cu_seqlens"][first : last + 1] - edges[first]}


LOSSES = {
    **{
        f"policy, {name}": ("logprobs", lambda inputs, count, settings=settings: run_policy_loss(inputs, settings, count))
        for name, settings in POLICY_SETTINGS.items()
    },
    "value": ("values", lambda i, count: value_loss(i["values"], i["old_values"], i["returns"], i["mask"], clip=0.3, denominator=count)),
    "kl": ("logprobs", lambda i, count: kl_loss(i["logprobs"], i["old_logprobs"], i["mask"], kind="k3", denominator=count)),
    "entropy": ("values", lambda i, count: entropy_loss(i["values"], i["mask"], denominator=count)),
    "sft, token": ("logprobs", lambda i, count: sft_loss(i["logprobs"], i["mask"], denominator=count)),
    "sft, weighted": ("logprobs", lambda i, count: sft_loss(i["logprobs"], i["mask"], token_weights=i["weights"], denominator=count)),
    "sft, batch": ("logprobs", lambda i, count: sft_loss(i["logprobs"], i["mask"], reduction="batch", denominator=count)),
    "sft, sequence": (
        "logprobs",
        lambda i, count: sft_loss(i["logprobs"], i["mask"], cu_seqlens=i["cu_seqlens"], reduction="sequence", denominator=count),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pieces", [[(0, 5)], [(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]])
def test_losses_gradients_and_metrics_of_the_pieces_add_up_to_those_of_the_whole(name, pieces):
    variable, loss_fn = LOSSES[name]
    inputs = make_inputs(dtype=torch.float32)
    count = 13.0
    whole = inputs | {variable: inputs[variable].clone().requires_grad_()}
    loss, metrics = loss_fn(whole, count)
    loss.backward()
    parts, sums, gradient = inputs | {variable: inputs[variable].clone().requires_grad_()}, {}, 0.0
    for _, piece in cut(parts, pieces):
        piece_loss, piece_metrics = loss_fn(piece, count)
        piece_loss.backward()
        gradient += piece_loss.detach()
        for key, value in piece_metrics.items():
            combine = max if key.endswith("/max") else min if key.endswith("/min") else (lambda a, b: a + b)
            sums[key] = combine(sums[key], value) if key in sums else value
    torch.testing.assert_close(gradient, loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts[variable].grad, whole[variable].grad, rtol=1e-6, atol=1e-8)
    assert sums.keys() == metrics.keys()
    for key in metrics:
        torch.testing.assert_close(sums[key], metrics[key], rtol=1e-5, atol=1e-6, msg=key)
        assert not metrics[key].requires_grad and metrics[key].ndim == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_the_mask_hides_reaches_neither_loss_nor_gradient_nor_metrics(name, poison):
    variable, loss_fn = LOSSES[name]
    clean = make_inputs()
    dirty = {key: torch.where(clean["mask"], value, poison) if value.is_floating_point() else value for key, value in clean.items()}
    results = []
    for inputs in (clean, dirty):
        leaf = inputs[variable].clone().requires_grad_()
        loss, metrics = loss_fn(inputs | {variable: leaf}, 13.0)
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    torch.testing.assert_close(results[0], results[1])
    assert not results[1][1][~clean["mask"]].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_single_action_gives_zero_and_a_zero_gradient(name):
    variable, loss_fn = LOSSES[name]
    inputs = make_inputs((2,))
    inputs["mask"] = torch.zeros(2, dtype=torch.bool)
    leaf = inputs[variable].clone().requires_grad_()
    loss, _ = loss_fn(inputs | {variable: leaf}, None if name != "sft, batch" else 1.0)
    loss.backward()
    assert loss == 0 and leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_unknown_behaviour_logprobs_mean_no_correction(correction):
    inputs = make_inputs()
    inputs["behaviour_logprobs"] = torch.full_like(inputs["logprobs"], torch.nan)
    leaf = inputs["logprobs"].requires_grad_()
    corrected, metrics = run_policy_loss(inputs, dict(importance_correction=correction))
    plain, _ = run_policy_loss(inputs, {})
    torch.testing.assert_close(corrected, plain)
    (gradient,) = torch.autograd.grad(corrected, leaf)
    assert gradient.isfinite().all() and metrics["importance_weight"] == pytest.approx(1.0)


@pytest.mark.parametrize("log_ratio", [200.0, -200.0, 1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_exploded_ratio_gives_a_finite_loss_and_gradient(log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.tensor([True]))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(clip_low=1.5), "clip_low"),
        (dict(clip_high=-0.1), "clip_high"),
        (dict(dual_clip=0.9), "dual_clip"),
        (dict(ratio_level="word"), "ratio_level"),
        (dict(ratio_level="sequence"), "needs cu_seqlens"),
        (dict(importance_correction="truncate"), "needs behaviour_logprobs"),
        (dict(importance_correction="clip"), "'truncate' or 'mask'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([True]), **settings)


def test_the_value_loss_is_half_the_squared_error_and_clipping_takes_the_larger_one():
    values, old_values, returns = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([3.0, 0.5, 0.0])
    mask = torch.tensor([True, True, False])
    assert value_loss(values, None, returns, mask)[0] == pytest.approx(0.5 * (4 + 0.25) / 2)
    clipped, metrics = value_loss(values, old_values, returns, mask, clip=0.2)
    assert clipped == pytest.approx(0.5 * (2.8**2 + 0.25) / 2) and metrics["value_clip_fraction"] == 0.5
    with pytest.raises(ValueError, match="old_values"):
        value_loss(values, None, returns, mask, clip=0.2)


def test_explained_variance_is_made_of_summed_moments():
    inputs = make_inputs()
    metrics = value_loss(inputs["values"], None, inputs["returns"], inputs["mask"])[1]
    values, returns = inputs["values"][inputs["mask"]], inputs["returns"][inputs["mask"]]
    expected = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert explained_variance(metrics) == pytest.approx(float(expected))
    constant = value_loss(inputs["values"], None, torch.zeros_like(inputs["returns"]), inputs["mask"])[1]
    assert math.isnan(explained_variance(constant))


def test_the_three_sft_reductions_by_hand():
    logprobs, mask = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([True, True, True, False])
    cu_seqlens = torch.tensor([0, 2, 4])
    assert sft_loss(logprobs, mask)[0] == pytest.approx((1 + 2 + 3) / 3)
    assert sft_loss(logprobs, mask, cu_seqlens=cu_seqlens, reduction="sequence")[0] == pytest.approx((1.5 + 3) / 2)
    assert sft_loss(logprobs, mask, cu_seqlens=cu_seqlens, reduction="batch")[0] == pytest.approx((1 + 2 + 3) / 2)
    weighted = sft_loss(logprobs, mask, token_weights=torch.tensor([1.0, 0.0, 2.0, 5.0]))
    assert weighted[0] == pytest.approx((1 + 6) / 3)
    for settings in (dict(reduction="mean"), dict(reduction="sequence"), dict(reduction="batch")):
        with pytest.raises(ValueError, match="reduction"):
            sft_loss(logprobs, mask, **settings)
