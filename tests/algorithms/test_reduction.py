"""Reductions: named averages, independent of how the batch is cut."""

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.reduction import REDUCTIONS, loss_weights
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.trajectory import Trajectory


def batch_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return TokenBatch.from_trajectories(
        [
            Trajectory.from_completion(rng.integers(0, 9, 3), rng.integers(0, 9, n), None, task_id=str(i), group_id="g", sample_index=i)
            for i, n in enumerate(lengths)
        ]
    )


def reduced(batch, terms, weights, denominator):
    return float(torch.where(batch.action_mask, terms * weights, 0.0).sum() / denominator)


def test_each_reduction_is_the_average_its_name_promises():
    lengths = [1, 7, 4]
    batch = batch_of(lengths)
    terms = torch.rand(batch.num_tokens)
    per_sequence = [terms[batch.sequence_ids == b][batch.action_mask[batch.sequence_ids == b]] for b in range(3)]
    expected = {
        "token": torch.cat(per_sequence).mean(),
        "sequence": torch.stack([t.mean() for t in per_sequence]).mean(),
        "batch": torch.cat(per_sequence).sum() / 3,
        "constant": torch.cat(per_sequence).sum() / (3 * 20),
    }
    for name in REDUCTIONS:
        assert reduced(batch, terms, *loss_weights(batch, name, max_response_tokens=20)) == pytest.approx(float(expected[name]), rel=1e-6), name


@pytest.mark.parametrize("name", REDUCTIONS)
def test_pieces_of_a_batch_add_up_to_the_whole(name):
    batch = batch_of([3, 9, 1, 5, 2])
    batch = batch.with_tokens(terms=torch.rand(batch.num_tokens))
    weights, denominator = loss_weights(batch, name, max_response_tokens=16)
    batch = batch.with_tokens(weights=weights)
    pieces = [batch.select([4, 0]), batch.select([2]), batch.select([1, 3])]
    total = sum(reduced(piece, piece.tokens["terms"], piece.tokens["weights"], denominator) for piece in pieces)
    assert total == pytest.approx(reduced(batch, batch.tokens["terms"], weights, denominator), rel=1e-6)
