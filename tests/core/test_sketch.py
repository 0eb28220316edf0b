"""The count sketch: exact for short vectors, unbiased for long ones with the variance that is claimed, linear, and a function of its seed."""

import pytest
import torch

from openrl_reason.core import sketch as module
from openrl_reason.core.sketch import CountSketch

PARTS = {"a": 37, "b": 1, "c": 62}


def vectors(count, seed=0, parts=PARTS):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(length, generator=generator) for name, length in parts.items()} for _ in range(count)]


def sketched(vector, *, size, seed=0, lengths=PARTS, order=None):
    sketch = CountSketch(lengths, size=size, seed=seed)
    into = sketch.zeros()
    for name in order or vector:
        sketch.add(name, vector[name], into)
    return into


def whole(vector):
    return torch.cat(list(vector.values()))


@pytest.mark.parametrize("size", [100, 101, 1 << 20])
def test_products_of_vectors_that_fit_are_exact_and_the_sketch_is_no_longer_than_they_are(size):
    left, right = vectors(2)
    a, b = sketched(left, size=size), sketched(right, size=size)
    assert len(a) == 100
    assert sorted(a.abs().tolist()) == sorted(whole(left).abs().tolist()), "a signed permutation"
    assert torch.dot(a, b).item() == pytest.approx(torch.dot(whole(left), whole(right)).item(), rel=1e-5)


@pytest.mark.parametrize("size", [16, 99])
def test_products_of_longer_vectors_are_unbiased_with_the_variance_that_is_claimed(size):
    left, right = vectors(2, seed=1)
    x, y = whole(left), whole(right)
    products = torch.stack([torch.dot(sketched(left, size=size, seed=s), sketched(right, size=size, seed=s)) for s in range(600)])
    exact, bound = torch.dot(x, y), (x.dot(x) * y.dot(y) + torch.dot(x, y) ** 2) / size
    assert abs(products.mean() - exact) < 4 * (bound / 600).sqrt()
    assert products.var() < 1.4 * bound and products.std() > 0


def test_structured_vectors_do_not_collide_more_than_random_ones():
    """A stripe that a plain fold of the vector would put onto one entry: shifts of the blocks spread it."""
    lengths = {"m": 64 * 64}
    stripe = torch.zeros(64, 64)
    stripe[:, 3] = 1.0
    norms = torch.stack([sketched({"m": stripe}, size=64, seed=s, lengths=lengths).square().sum() for s in range(150)])
    assert norms.mean() == pytest.approx(64, rel=0.1) and norms.var() < 1.7 * 2 * 64**2 / 64


def test_it_is_linear_whatever_the_order_of_the_parts_and_however_they_are_cut(monkeypatch):
    left, right = vectors(2, seed=2)
    both = {name: left[name] + 2 * right[name] for name in left}
    sums = sketched(left, size=16) + 2 * sketched(right, size=16)
    assert torch.allclose(sketched(both, size=16), sums, atol=1e-5)
    assert torch.allclose(sketched(both, size=16, order=["c", "a", "b"]), sums, atol=1e-5)
    assert not torch.allclose(sketched(both, size=16, seed=1), sums, atol=1e-2)


def test_parts_of_another_length_and_empty_sketches_are_refused():
    sketch = CountSketch(PARTS, size=8, seed=0)
    with pytest.raises(ValueError, match="b has 2 entries, 1 were announced"):
        sketch.add("b", torch.zeros(2), sketch.zeros())
    with pytest.raises(ValueError, match="at least 1"):
        CountSketch(PARTS, size=0, seed=0)


def test_long_parts_are_worked_on_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 10)
    (vector,) = vectors(1)
    found = sketched(vector, size=1000)
    assert sorted(found.abs().tolist()) == sorted(whole(vector).abs().tolist())
