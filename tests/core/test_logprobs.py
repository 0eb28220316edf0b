"""The fused head equals log_softmax and gather, in value, gradient and entropy, at a fraction of the memory."""

import pickle
import subprocess
import sys

import pytest
import torch

from openrl_reason.core.logprobs import shifted_token_logprobs, token_logprobs

N, H, V = 9, 6, 700  # more than two blocks of the vocabulary at chunk_tokens=1


def make_inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((N, H), (V, H), (V,)))
    token_ids = torch.randint(0, V, (N,), generator=generator)
    token_ids[0], token_ids[1] = 0, V - 1
    return hidden, weight, bias, token_ids


def naive(hidden, weight, token_ids, temperature=1.0, bias=None):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    log_softmax = torch.log_softmax((logits if bias is None else logits + bias) / temperature, -1)
    return log_softmax.gather(1, token_ids[:, None]).squeeze(1), -(log_softmax.exp() * log_softmax).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [(True, False), (True, True), (False, True)])  # hidden, head
@pytest.mark.parametrize("upstream", [(True, True), (True, False), (False, True)])  # gradient into the log-probs, into the entropy
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_values_and_gradients_equal_the_naive_formula(temperature, with_bias, trained, upstream, chunk_tokens):
    hidden, weight, bias, token_ids = make_inputs()
    bias = bias if with_bias else None
    inputs = [(hidden, trained[0]), (weight, trained[1]), (bias, trained[1])]
    leaves = [tensor.requires_grad_() for tensor, wanted in inputs if wanted and tensor is not None]
    ours = token_logprobs(hidden, weight, token_ids, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True, bias=bias)
    theirs = naive(hidden, weight, token_ids, temperature, bias)
    torch.testing.assert_close(ours, theirs)
    scales = torch.randn(2, N, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(sum((part * scale).sum() for part, scale, used in zip(result, scales, upstream, strict=True) if used), leaves)
        for result in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_passes_through_logprobs_and_entropy(temperature):
    hidden, weight, bias, token_ids = make_inputs()
    weight, bias, token_ids = weight[:300], bias[:300], token_ids % 300

    def run(hidden, weight, bias):
        return token_logprobs(hidden, weight, token_ids, temperature=temperature, chunk_tokens=1, with_entropy=True, bias=bias)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in (hidden, weight, bias)], fast_mode=True)
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, frozen, token_ids, temperature=temperature), hidden)


def test_chunks_change_nothing_beyond_rounding():
    hidden, weight, _, token_ids = make_inputs(torch.float32)
    full = token_logprobs(hidden, weight, token_ids, chunk_tokens=10**6)
    for chunk_tokens in (1, 2, 7):
        torch.testing.assert_close(token_logprobs(hidden, weight, token_ids, chunk_tokens=chunk_tokens), full, rtol=1e-6, atol=1e-6)


def test_half_precision_inputs_get_a_single_precision_softmax():
    hidden, weight, _, token_ids = make_inputs(torch.bfloat16)
    exact = naive(hidden.double(), weight.double(), token_ids)[0]
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = token_logprobs(hidden, weight, token_ids, chunk_tokens=2)
    assert logprobs.dtype == torch.float32
    rounded_logits = naive(hidden, weight, token_ids)[0]  # logits rounded to bfloat16 as the model's own head would, then float32
    torch.testing.assert_close(logprobs, rounded_logits, rtol=1e-6, atol=1e-5)
    assert (logprobs - exact).abs().max() < 0.05
    ours = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    theirs = torch.autograd.grad(rounded_logits.sum(), [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - other.float()).norm() <= 0.02 * other.float().norm()


def test_a_frozen_bfloat16_head_gives_the_gradient_too():
    hidden, weight, _, token_ids = make_inputs(torch.bfloat16)
    hidden.requires_grad_()
    mine, other = (torch.autograd.grad(f(hidden, weight, token_ids).sum(), hidden)[0] for f in (token_logprobs, lambda *a: naive(*a)[0]))
    assert (mine.float() - other.float()).norm() <= 0.02 * other.float().norm()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_logits_stay_finite(shift):
    hidden, weight, bias, token_ids = make_inputs(torch.float32)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight * 100, token_ids, with_entropy=True, bias=bias + shift, chunk_tokens=1)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.isfinite().all() and (entropy >= -1e-3).all() and hidden.grad.isfinite().all()


def test_micro_batches_add_up_to_the_whole_gradient():
    hidden, weight, _, token_ids = make_inputs(torch.float32)
    weight.requires_grad_()
    token_logprobs(hidden, weight, token_ids).sum().backward()
    whole, weight.grad = weight.grad, None
    for part in (slice(0, 2), slice(2, 9)):
        token_logprobs(hidden[part], weight, token_ids[part]).sum().backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-5, atol=1e-6)


def naive_shifted(hidden, weight, token_ids, cu_seqlens, temperature):
    logprobs, entropies = [], []
    edges = cu_seqlens.tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        if end > start:
            scored, entropy = naive(hidden[start : end - 1], weight, token_ids[start + 1 : end], temperature)
            zero = scored.new_zeros(1)
            logprobs += [zero, scored]
            entropies += [zero, entropy]
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("edges", [[0, 9], [0, 4, 9], [0, 0, 1, 2, 9, 9], list(range(10))])
def test_the_shift_scores_each_token_with_the_state_before_it_and_never_across_sequences(edges):
    hidden, weight, _, token_ids = make_inputs()
    hidden.requires_grad_()
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    ours = shifted_token_logprobs(hidden, weight, token_ids, cu_seqlens, temperature=0.7, with_entropy=True, chunk_tokens=2)
    theirs = naive_shifted(hidden, weight, token_ids, cu_seqlens, 0.7)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(shifted_token_logprobs(hidden, weight, token_ids, cu_seqlens, temperature=0.7), ours[0])
    mine, other = (torch.autograd.grad(result[0].sum() + result[1].sum(), hidden)[0] for result in (ours, theirs))
    torch.testing.assert_close(mine, other)
    lasts = cu_seqlens[1:][cu_seqlens.diff() > 0] - 1
    assert not mine[lasts].any()  # the last state of a sequence predicts nothing in it


def test_a_score_mask_leaves_the_others_at_zero():
    hidden, weight, _, token_ids = make_inputs()
    cu_seqlens, score_mask = torch.tensor([0, 4, 9]), torch.rand(N) < 0.5
    before = score_mask.clone()
    full = shifted_token_logprobs(hidden, weight, token_ids, cu_seqlens)
    part = shifted_token_logprobs(hidden, weight, token_ids, cu_seqlens, score_mask=score_mask)
    torch.testing.assert_close(part, torch.where(score_mask, full, 0.0))
    assert (score_mask == before).all()


def test_no_tokens_give_no_logprobs_but_keep_the_graph():
    hidden, weight, _, token_ids = make_inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = shifted_token_logprobs(hidden[:2], weight, token_ids[:2], torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == [0.0, 0.0]
    logprobs.sum().backward()  # a rank whose micro-batch is a dummy runs the same backward as the others
    assert not hidden.grad.any() and not weight.grad.any()


class ReleasedAfterUse(torch.autograd.Function):
    """Re-gathers a parameter's data before the backward of what ran on ``inputs``, as ZeRO-3's hooks do."""

    @staticmethod
    def forward(ctx, output, parameter, data):
        ctx.parameter, ctx.data = parameter, data
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.parameter.data = ctx.data
        return grad, None, None


@pytest.mark.parametrize("trained", [False, True])
def test_a_parameter_released_after_forward_and_gathered_for_backward_works(trained):
    hidden, weight, _, token_ids = make_inputs(torch.float32)
    hidden.requires_grad_()
    expected = weight.clone().requires_grad_(trained)
    leaves = [hidden, expected] if trained else [hidden]
    wanted = torch.autograd.grad(token_logprobs(hidden, expected, token_ids).sum(), leaves)
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=trained)
    data = parameter.data
    logprobs = ReleasedAfterUse.apply(token_logprobs(hidden, parameter, token_ids), parameter, data)
    parameter.data = torch.empty(0)
    gradients = torch.autograd.grad(logprobs.sum(), [hidden, parameter] if trained else [hidden])
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(token_ids=torch.tensor([700] * N)), "vocabulary of 700"),
        (dict(token_ids=torch.tensor([-1] * N)), "-1"),
        (dict(token_ids=torch.zeros(3, dtype=torch.int64)), "expected"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(chunk_tokens=0), "chunk_tokens"),
        (dict(bias=torch.zeros(3)), "bias"),
        (dict(hidden=torch.zeros(N, H, dtype=torch.bfloat16)), "cast one of them"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, complaint):
    hidden, weight, _, token_ids = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=complaint):
        token_logprobs(**dict(hidden=hidden, lm_head_weight=weight, token_ids=token_ids) | change)


def test_memory_stays_far_below_the_logits():
    """512 x 40 000 logits are 82 MB; naive code holds three such tensors. Measured: growth of the peak resident size in a fresh process."""
    code = """
import resource, sys, torch
from openrl_reason.core.logprobs import token_logprobs
hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(40_000, 64)
token_ids = torch.randint(0, 40_000, (512,))
token_logprobs(hidden[:8], weight, token_ids[:8], chunk_tokens=1).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_logprobs(hidden, weight, token_ids, chunk_tokens=32, with_entropy=True)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40


def test_loss_functions_that_hold_these_can_be_sent_to_workers():
    assert pickle.loads(pickle.dumps(shifted_token_logprobs)) is shifted_token_logprobs
