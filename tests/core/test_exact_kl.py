"""The exact KL from the head's tiles equals the one over whole distributions, in value and gradient, at a fraction of the memory."""

import json
import subprocess
import sys

import pytest
import torch

from openrl_reason.core.logprobs import Reference, shifted_rows, shifted_token_scores, token_scores

N, H, OTHER_H, V = 9, 6, 4, 700


def make_inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, H), (V, H), (V,), (N, OTHER_H), (V, OTHER_H), (V,))
    return *(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes), torch.randint(0, V, (N,), generator=generator)


def naive(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, token_ids, temperature, direction):
    log_p = torch.log_softmax((hidden @ weight.T + bias) / temperature, -1)
    log_q = torch.log_softmax((ref_hidden @ ref_weight.T + ref_bias) / temperature, -1)
    left, right = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    chosen = log_p.gather(1, token_ids[:, None]).squeeze(1)
    return chosen, -(log_p.exp() * log_p).sum(1), (left.exp() * (left - right)).sum(1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_tokens", [1, 1000])
@pytest.mark.parametrize("trained", [(True, False), (True, True), (False, True)])  # hidden, head
@pytest.mark.parametrize("upstream", [(1, 1, 1), (0, 0, 1), (1, 0, 1), (0, 1, 1)])  # into log-probs, entropy, KL
def test_values_and_gradients_equal_the_naive_formula(direction, temperature, chunk_tokens, trained, upstream):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, token_ids = make_inputs()
    leaves = [tensor.requires_grad_() for tensor, wanted in ((hidden, trained[0]), (weight, trained[1]), (bias, trained[1])) if wanted]
    reference = Reference(ref_hidden, ref_weight, ref_bias, direction)
    scores = token_scores(
        hidden, weight, token_ids, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True, bias=bias, reference=reference
    )
    ours = (scores.logprobs, scores.entropy, scores.kl)
    theirs = naive(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, token_ids, temperature, direction)
    torch.testing.assert_close(ours, theirs)
    scales = torch.randn(3, N, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(sum((part * scale).sum() for part, scale, used in zip(parts, scales, upstream, strict=True) if used), leaves)
        for parts in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)


def test_of_a_model_to_itself_it_is_zero_and_so_is_its_gradient():
    hidden, weight, bias, *_, token_ids = make_inputs(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(hidden, weight, token_ids, bias=bias, reference=Reference(hidden.detach(), weight.detach(), bias))
    assert scores.kl.abs().max() < 1e-6
    assert all(gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(scores.kl.sum(), [hidden, weight]))


def test_logprobs_are_the_same_bits_with_and_without_a_reference():
    hidden, weight, bias, ref_hidden, ref_weight, _, token_ids = make_inputs(torch.float32)
    with_it = token_scores(hidden, weight, token_ids, bias=bias, reference=Reference(ref_hidden, ref_weight))
    without = token_scores(hidden, weight, token_ids, bias=bias)
    assert torch.equal(with_it.logprobs, without.logprobs) and without.kl is None


def test_rows_of_the_reference_are_shifted_like_the_policy_s():
    hidden, weight, _, ref_hidden, ref_weight, _, token_ids = make_inputs()
    cu_seqlens, mask = torch.tensor([0, 4, 4, 9]), torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    rows = shifted_rows(ref_hidden, token_ids, cu_seqlens, mask)
    scores = shifted_token_scores(hidden, weight, token_ids, cu_seqlens, score_mask=mask, reference=Reference(rows, ref_weight))
    log_p, log_q = torch.log_softmax(hidden @ weight.T, -1), torch.log_softmax(ref_hidden @ ref_weight.T, -1)
    exact = (log_p.exp() * (log_p - log_q)).sum(1)
    expected = torch.tensor([0.0 if t in (0, 4) or not mask[t] else exact[t - 1] for t in range(N)], dtype=torch.float64)
    torch.testing.assert_close(scores.kl, expected)


@pytest.mark.parametrize("change", [{"direction": "sideways"}, {"hidden": torch.zeros(3, OTHER_H)}, {"weight": torch.zeros(5, OTHER_H)}])
def test_a_reference_that_does_not_fit_is_refused(change):
    hidden, weight, _, ref_hidden, ref_weight, _, token_ids = make_inputs()
    with pytest.raises(ValueError, match="reference|direction"):
        token_scores(hidden, weight, token_ids, reference=Reference(**({"hidden": ref_hidden, "weight": ref_weight} | change)))


MEMORY = """
import json, resource, sys, torch
sys.path.insert(0, {root!r})
from openrl_reason.core.logprobs import Reference, token_scores
torch.set_num_threads(1)
N, H, V = 1024, 64, 151_936
g = torch.Generator().manual_seed(0)
hidden, ref_hidden = (torch.randn(N, H, generator=g) * 0.3 for _ in range(2))
weight, ref_weight = (torch.randn(V, H, generator=g) * 0.3 for _ in range(2))
ids = torch.randint(0, V, (N,), generator=g)
hidden.requires_grad_(), weight.requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if {chunked}:
    kl = token_scores(hidden, weight, ids, chunk_tokens=16, reference=Reference(ref_hidden, ref_weight)).kl
else:
    log_p, log_q = torch.log_softmax(hidden @ weight.T, -1), torch.log_softmax(ref_hidden @ ref_weight.T, -1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
kl.mean().backward()
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
norms = {{"grad": float(weight.grad.double().norm()), "hidden": float(hidden.grad.double().norm())}}
print(json.dumps({{"peak": peak, "kl": float(kl.mean().detach()), **norms}}))
"""


@pytest.mark.slow
def test_a_real_vocabulary_takes_at_most_15_percent_of_the_memory(request):
    root = str(request.config.rootpath)
    chunked, full = (
        json.loads(subprocess.run([sys.executable, "-c", MEMORY.format(root=root, chunked=flag)], capture_output=True, text=True, check=True).stdout)
        for flag in (True, False)
    )
    for name in ("kl", "grad", "hidden"):
        assert chunked[name] == pytest.approx(full[name], rel=1e-6 if name == "kl" else 1e-4), name
    assert chunked["peak"] <= 0.15 * full["peak"], (chunked, full)
