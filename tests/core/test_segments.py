"""Segment operations equal their naive loops, in value and gradient."""

import numpy as np
import pytest
import torch

from openrl_reason.core import segments

LENGTHS = [[5], [0, 3, 0, 0, 32, 31, 33, 1, 64, 65, 0], [1] * 40, [2000, 3, 1100], [32, 64, 96], []]


def packed(lengths, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32) if lengths else torch.tensor([0], dtype=torch.int32)
    total = sum(lengths)
    return torch.randn(total, generator=generator, dtype=dtype), cu_seqlens, torch.rand(total, generator=generator) < 0.5


def slices(cu_seqlens):
    return [slice(int(start), int(end)) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def naive_scan(values, cu_seqlens, discount):
    result = values.clone().double()
    for part in slices(cu_seqlens):
        running = 0.0
        for t in reversed(range(part.start, part.stop)):
            running = float(values[t]) + discount * running
            result[t] = running
    return result


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("discount", [1.0, 0.99, 0.5, 1e-3, 1e-300, 0.0])
def test_the_blocked_scan_equals_a_loop_over_time(lengths, discount):
    values, cu_seqlens, _ = packed(lengths)
    expected = naive_scan(values, cu_seqlens, discount)
    torch.testing.assert_close(segments.discounted_reverse_scan(values, cu_seqlens, discount), expected, rtol=1e-12, atol=1e-12)


def test_a_long_undiscounted_sum_in_single_precision_is_exact_to_the_last_rounding():
    values, cu_seqlens, _ = packed([20_000], dtype=torch.float32)
    expected = values.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(segments.reverse_cumsum(values, cu_seqlens), expected.float(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_the_scan_is_differentiable(discount):
    values, cu_seqlens, _ = packed([0, 40, 3, 33])
    assert torch.autograd.gradcheck(lambda x: segments.discounted_reverse_scan(x, cu_seqlens, discount), values.requires_grad_())


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_zero_and_one_is_refused(discount):
    with pytest.raises(ValueError, match="discount"):
        segments.discounted_reverse_scan(torch.zeros(3), torch.tensor([0, 3]), discount)


def test_a_nan_stays_in_its_segment():
    values, cu_seqlens, _ = packed([40, 40, 40])
    values[45] = float("nan")
    for result in (
        segments.reverse_cumsum(values, cu_seqlens),
        segments.segment_broadcast(segments.segment_sum(values, cu_seqlens), cu_seqlens),
    ):
        assert not result[:40].isnan().any() and not result[80:].isnan().any()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_sum_mean_max_and_count_equal_loops(lengths, masked):
    values, cu_seqlens, mask = packed(lengths)
    if masked:
        values = torch.where(mask, values, torch.nan)
    used = mask if masked else None
    parts = [values[part][mask[part]] if masked else values[part] for part in slices(cu_seqlens)]

    def gather(numbers):
        return torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64)

    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(segments.segment_sum(values, cu_seqlens, used), gather([part.sum() for part in parts]))
    torch.testing.assert_close(
        segments.segment_mean(values, cu_seqlens, used), gather([part.mean() if len(part) else zero for part in parts])
    )
    highest = gather([part.max() if len(part) else zero + 7 for part in parts])
    torch.testing.assert_close(segments.segment_max(values, cu_seqlens, used, empty=7.0), highest)
    assert segments.segment_count(cu_seqlens, used).tolist() == [len(part) for part in parts]


@pytest.mark.parametrize("operation", [segments.segment_sum, segments.segment_mean, segments.segment_max])
def test_reductions_are_differentiable_and_hidden_nans_reach_no_gradient(operation):
    values, cu_seqlens, mask = packed([3, 9, 4])
    mask[0] = mask[4] = mask[13] = True  # a maximum of nothing is -inf, which gradcheck cannot difference
    assert torch.autograd.gradcheck(lambda x: operation(x, cu_seqlens, mask), values.clone().requires_grad_())
    dirty = torch.where(mask, values, torch.nan).requires_grad_()
    operation(dirty, cu_seqlens, mask).sum().backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()


def test_broadcasting_back_repeats_each_segments_value():
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    assert segments.segment_broadcast(torch.tensor([1.0, 2.0, 3.0]), cu_seqlens).tolist() == [1, 1, 3, 3, 3]
    assert segments.segment_ids(cu_seqlens).tolist() == [0, 0, 2, 2, 2]
    assert segments.segment_starts(cu_seqlens).tolist() == [0, 0, 2, 2, 2]
