"""Pairs of a token store are the pairs of its rows, whatever layout the file had."""

import json

import pytest

from openrl_reason.core.trajectory import write_jsonl
from openrl_reason.data.offline import OfflineDataConfig, build_store
from openrl_reason.data.pair_store import pair_store, rows_by_question
from openrl_reason.data.pairs import PairBuilder, build_pairs
from openrl_reason.errors import DataError
from tests.helpers_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def store_of(tmp_path, model, rows, **settings):
    file = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
    if isinstance(rows[0], dict):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_jsonl(file, rows)
    return build_store(OfflineDataConfig(path=(str(file),), max_length=64, parallel="never", **settings), model, tmp_path / f"{file.stem}-store")


ROWS = [
    {"prompt": prompt, "response": response, "reward": reward}
    for prompt, response, reward in (
        ("1+1=?", "2", 1.0), ("2+2=?", "5", 0.0), ("1+1=?", "3", 0.0), ("1+1=?", "2", 1.0), ("2+2=?", "4", 1), ("3+3=?", "6", 1),
        ("2+2=?", "6", 0.25), ("1+1=?", "1+1=2", 0.5), ("4+4=?", "9", 0),
    )
]  # fmt: skip


def texts(pairs):
    return [(pair.chosen.token_ids.tolist(), pair.rejected.token_ids.tolist()) for pair in pairs]


def test_rewarded_rows_are_paired_as_the_trajectories_they_are(tmp_path, model):
    store = store_of(tmp_path, model, ROWS)
    data, expected = pair_store(store, PairBuilder()), build_pairs(store.trajectories(range(len(store))))
    assert sorted(texts(data.pairs)) == sorted(texts(expected.pairs)) and data.counts == expected.counts
    assert len(data.pairs) == 4 and data.counts["repeated"] == 1 and data.counts["questions_all_accepted"] == 1
    again = pair_store(store_of(tmp_path, model, store.trajectories(range(len(store)))), PairBuilder())
    assert texts(again.pairs) == texts(data.pairs), "this library's own files give the same"
    assert [pair.pair_id for pair in pair_store(store, PairBuilder()).pairs] == [pair.pair_id for pair in data.pairs]


def test_labels_are_rewards_and_pairs_are_taken_as_they_are(tmp_path, model):
    labels = [{"prompt": row["prompt"], "completion": row["response"], "label": row["reward"] >= 0.5} for row in ROWS]
    from_labels = pair_store(store_of(tmp_path, model, labels), PairBuilder())
    assert texts(from_labels.pairs) == texts(pair_store(store_of(tmp_path, model, ROWS), PairBuilder()).pairs)
    rows = [{"prompt": "1+1=?", "chosen": "2", "rejected": "3"}] * 2 + [{"prompt": "2+2=?", "chosen": "4", "rejected": "5"}]
    given = pair_store(store_of(tmp_path, model, rows), PairBuilder())
    assert given.counts == {"rows": 3, "pairs": 3} and len({pair.pair_id for pair in given.pairs}) == 3
    assert given.pairs[0].task_id == given.pairs[1].task_id != given.pairs[2].task_id
    for pair in given.pairs:
        assert pair.chosen.prompt_ids.tolist() == pair.rejected.prompt_ids.tolist() and pair.chosen.num_actions == 2  # a digit and EOS
    with pytest.raises(DataError, match="kind 'sft': pairs are made of rewarded responses"):
        pair_store(store_of(tmp_path, model, [{"prompt": "A", "response": "B"}]), PairBuilder())


def test_rows_are_grouped_by_question_in_the_order_of_the_first_ones(tmp_path, model):
    groups = [rows.tolist() for rows in rows_by_question(store_of(tmp_path, model, ROWS))]
    assert groups == [[0, 2, 3, 7], [1, 4, 6], [5], [8]]
