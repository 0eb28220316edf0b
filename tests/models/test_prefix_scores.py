"""Scores of prefixes that grow: those of the whole model on the whole prefix, whatever was computed before and whatever was dropped."""

import numpy as np
import pytest
import torch

from openrl_reason.errors import DataError
from openrl_reason.models.attention import PACKED, choose_attention
from openrl_reason.models.prefix_scores import LEAST_SHARED, PrefixScorer, prefix_hashes
from openrl_reason.models.scalar_model import ScalarModel, load_scalar_model
from tests.helpers_models import VOCAB, write_tiny_model


def make_model(folder, **config):
    attention = choose_attention("packed", torch.device("cpu"))
    path = write_tiny_model(folder, **config)
    return ScalarModel(load_scalar_model(str(path), "float32", head_init="small", attn_implementation=attention), attn_impl=PACKED).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "model")


def whole(model, prefixes):
    scores = []
    with torch.no_grad():
        for ids in prefixes:
            edges = torch.tensor([0, len(ids)], dtype=torch.int32)
            scores.append(float(model(torch.tensor(ids), edges, shifted=False)[-1]))
    return scores


def grow(rng, states, count, longest=12):
    """A beam search's next states: some of the last ones, each continued several times."""
    chosen = [states[place] for place in rng.choice(len(states), min(count, len(states)), replace=False)]
    return [(*state, *rng.integers(2, VOCAB, rng.integers(1, longest)).tolist()) for state in chosen for _ in range(3)]


@pytest.mark.parametrize("budget", [1 << 30, 20_000, 1])
@pytest.mark.parametrize("max_tokens", [4096, 16])
def test_scores_are_those_of_whole_prefixes(model, budget, max_tokens):
    rng = np.random.default_rng(0)
    scorer = PrefixScorer(model, max_bytes=budget, max_tokens=max_tokens)
    header = tuple(rng.integers(2, VOCAB, 20).tolist())
    states = [(*header, *rng.integers(2, VOCAB, rng.integers(1, 9)).tolist()) for _ in range(4)]
    for _ in range(5):
        asked = [*states, states[0], header]
        assert scorer.scores(asked) == pytest.approx(whole(model, asked), rel=1e-4, abs=1e-5)
        states = grow(rng, states, 3)
    assert scorer._bytes_kept <= budget and (budget == 1) == (not len(scorer._known))


def test_only_new_tokens_go_through_the_model(model):
    rng = np.random.default_rng(1)
    scorer = PrefixScorer(model, max_bytes=1 << 30, max_tokens=4096)
    prompt = tuple(rng.integers(2, VOCAB, 30).tolist())
    first = [(*prompt, 2, 3), (*prompt, 4, 5), (*prompt, 6)]
    scorer.scores(first)
    assert scorer.counts == {"tokens": 95, "computed_tokens": 30 + 5}  # the prompt once
    scorer.scores(first)
    assert scorer.counts["computed_tokens"] == 35  # nothing is new
    scorer.scores([(*first[1], 7, 8), (*first[1], 9)])
    assert scorer.counts["computed_tokens"] == 38
    scorer.scores([prompt])
    assert scorer.counts["computed_tokens"] == 38  # it was computed on the way, score included


def test_a_prefix_that_is_asked_for_beside_its_continuation_is_computed_before_it(model):
    scorer = PrefixScorer(model, max_bytes=1 << 30, max_tokens=4096)
    chain = [tuple(range(2, 2 + length)) for length in (3, 9, 4, 1)]
    assert scorer.scores(chain) == pytest.approx(whole(model, chain), rel=1e-4, abs=1e-5)
    assert scorer.counts["computed_tokens"] == 9


def test_short_common_prefixes_are_not_worth_a_pass_of_their_own(model):
    scorer = PrefixScorer(model, max_bytes=1 << 30, max_tokens=4096)
    common = tuple(range(2, 2 + LEAST_SHARED - 1))
    scorer.scores([(*common, 30), (*common, 31)])
    assert scorer.counts["computed_tokens"] == 2 * LEAST_SHARED


def test_a_sliding_window_is_kept(tmp_path):
    model = make_model(tmp_path / "m", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    rng, scorer = np.random.default_rng(2), PrefixScorer(model, max_bytes=1 << 30, max_tokens=4096)
    states = [tuple(rng.integers(2, VOCAB, 12).tolist())]
    for _ in range(3):
        assert scorer.scores(states) == pytest.approx(whole(model, states), rel=1e-4, abs=1e-5)
        states = grow(rng, states, 2)


def test_too_long_a_prefix_is_named_and_no_prefix_is_no_score(model):
    scorer = PrefixScorer(model, max_bytes=1 << 30, max_tokens=4096)
    with pytest.raises(DataError, match=f"{model.max_positions + 1} tokens"):
        scorer.scores([[2] * (model.max_positions + 1)])
    assert scorer.scores([]) == []


def test_hashes_of_prefixes_differ_where_the_ids_do():
    one, other = (prefix_hashes(np.array(ids)) for ids in ([0, 5, 7, 7], [0, 5, 7, 8]))
    assert one[:3].tolist() == other[:3].tolist() and one[3] != other[3]
    assert len({int(prefix_hashes(np.zeros(length, np.int64))[-1]) for length in range(1, 300)}) == 299
