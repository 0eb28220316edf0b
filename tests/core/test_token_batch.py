"""The packed batch: cutting it up and putting it together are inverses."""

import numpy as np
import pytest
import torch

from openrl_reason.core.batch import TokenBatch, place_step_rewards, unsplit_sequences, unsplit_tokens
from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.core.trajectory import Trajectory


def make_batch(lengths=(3, 1, 7, 2, 5), seed=0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.6
    return TokenBatch(
        token_ids=torch.randint(0, 50, (total,), generator=generator),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        action_mask=mask,
        step_ids=torch.where(mask, 0, -1),
        behaviour_logprobs=torch.randn(total, generator=generator),
        tokens={"advantages": torch.randn(total, generator=generator), "wide": torch.randn(total, 3, generator=generator)},
        sequences={"rewards": torch.randn(len(lengths), generator=generator), "group_ids": torch.arange(len(lengths))},
    )


def assert_equal(left: TokenBatch, right: TokenBatch) -> None:
    assert left.cu_seqlens.tolist() == right.cu_seqlens.tolist() and left.cu_seqlens.dtype == right.cu_seqlens.dtype
    for mine, theirs in ((left._own_tokens() | left.tokens, right._own_tokens() | right.tokens), (left.sequences, right.sequences)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, msg=name)


def test_selecting_equals_slicing_sequence_by_sequence():
    batch = make_batch()
    order = [4, 0, 2, 2]
    chosen = batch.select(order)
    parts = [batch.tokens["wide"][batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] for i in order]
    torch.testing.assert_close(chosen.tokens["wide"], torch.cat(parts))
    assert chosen.lengths.tolist() == [5, 3, 7, 7]
    assert chosen.sequences["group_ids"].tolist() == order


@pytest.mark.parametrize("seed", range(20))
def test_concatenating_the_pieces_of_a_split_and_restoring_the_order_gives_the_batch_back(seed):
    rng = np.random.default_rng(seed)
    batch = make_batch(tuple(rng.integers(1, 9, rng.integers(1, 12))), seed)
    plan = plan_micro_batches(batch.lengths.tolist(), int(rng.integers(1, 4)), int(rng.integers(1, 20)))
    index_lists = [indices for micro_batches in plan for indices in micro_batches]
    pieces = batch.split(index_lists)
    assert all(piece.num_tokens > 0 for piece in pieces)  # empty lists became dummies
    torch.testing.assert_close(unsplit_tokens([piece.tokens["wide"] for piece in pieces], index_lists, batch), batch.tokens["wide"])
    torch.testing.assert_close(
        unsplit_sequences([piece.sequences["rewards"] for piece in pieces], index_lists, batch), batch.sequences["rewards"]
    )
    order = [index for indices in index_lists for index in indices]
    whole = TokenBatch.concat([piece for piece, indices in zip(pieces, index_lists, strict=True) if indices])
    assert_equal(whole.select(np.argsort(order).tolist()), batch)


def test_positions_and_sequence_ids_restart_with_each_sequence():
    batch = make_batch((3, 1, 2))
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert (batch.num_tokens, batch.num_sequences, batch.num_actions) == (6, 3, int(batch.action_mask.sum()))


def test_a_dummy_has_two_tokens_no_action_and_the_same_keys():
    dummy = make_batch().empty_like_dummy()
    assert dummy.num_tokens == 2 and dummy.num_sequences == 1 and dummy.num_actions == 0
    assert dummy.tokens["wide"].shape == (2, 3) and not dummy.tokens["wide"].any() and not dummy.sequences["rewards"].any()
    TokenBatch.concat([make_batch(), dummy])
    assert TokenBatch.dummy().num_actions == 0


def test_adding_tensors_leaves_the_original_alone():
    batch = make_batch()
    more = batch.with_tokens(values=torch.zeros(batch.num_tokens)).with_sequences(weights=torch.ones(batch.num_sequences))
    assert "values" in more.tokens and "weights" in more.sequences
    assert "values" not in batch.tokens and "weights" not in batch.sequences
    with pytest.raises(ValueError, match="'short' has 1 entries"):
        batch.with_tokens(short=torch.zeros(1))
    with pytest.raises(ValueError, match="per-sequence tensor 'short'"):
        batch.with_sequences(short=torch.zeros(1))


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="different keys"):
        TokenBatch.concat([make_batch(), make_batch().with_tokens(values=torch.zeros(18))])
    with pytest.raises(ValueError, match="at least one trajectory"):
        TokenBatch.from_trajectories([])
    with pytest.raises(ValueError, match="cu_seqlens"):
        make_batch().__class__(**{**make_batch().__dict__, "cu_seqlens": torch.tensor([0, 5])})


def trajectory(num_prompt, num_completion, step_ids=None, **settings):
    settings = dict(task_id="t", group_id="g", sample_index=0) | settings
    return Trajectory.from_completion(range(num_prompt), range(num_completion), None, step_ids=step_ids, **settings)


def test_trajectories_are_packed_in_order():
    trajectories = [
        trajectory(2, 3, reward=1.0, policy_version=4),
        trajectory(1, 2, group_id="other", reward=-2.0),
        trajectory(3, 0, reward=5.0),
    ]
    batch = TokenBatch.from_trajectories(trajectories)
    assert batch.token_ids.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert batch.action_mask.int().tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert batch.tokens["rewards"].tolist() == [0, 0, 0, 0, 1, 0, 0, -2, 0, 0, 0]
    assert batch.sequences["rewards"].tolist() == [1, -2, 5]
    assert batch.sequences["policy_versions"].tolist() == [4, -1, -1]
    groups = batch.sequences["group_ids"]
    assert groups[0] == groups[2] != groups[1] and groups.dtype == torch.int64
    assert batch.behaviour_logprobs.isnan().all()
    with pytest.raises(ValueError, match="without a single token"):
        TokenBatch.from_trajectories([trajectory(0, 0)])


def test_step_rewards_lie_on_the_steps_last_tokens_and_none_is_lost():
    placed = place_step_rewards(trajectory(1, 5, [0, 0, 1, 1, 3], rewards=[1.0, 2.0, 4.0, 8.0, 16.0]))
    assert placed.tolist() == [0, 0, 1, 0, 6, 24]  # step 2 has no token: its reward is on the action before; likewise step 4
    placed = place_step_rewards(trajectory(1, 2, [1, 1], rewards=[1.0, 2.0]))
    assert placed.tolist() == [0, 1, 2]
