"""The sample of trajectories: bounded, spread, siblings together; packed so that numbers come back."""

import gzip
import json

import numpy as np
import pytest

from openrl_reason.observe.report_rollouts import (
    MAX_CHARACTERS,
    chunk_entries,
    clean,
    columns,
    fit,
    index_groups,
    pack,
    pack_chunk,
    sample_rollouts,
    spread,
    to_planes,
)


def record(step=0, task="t", source="train", **more):
    return {"step": step, "source": source, "trajectory_id": "x", "task_id": task, "prompt": "p", "response": "r", "reward": 1.0, **more}


def write(path, records):
    path.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in records))
    return path


def test_every_beginning_of_the_order_is_spread_evenly():
    for count in (1, 2, 7, 1000):
        order = spread(count)
        assert sorted(order.tolist()) == list(range(count))
    first = np.sort(spread(1000)[:100])
    assert np.diff(first).max() <= 2 * 1000 / 100 and first[0] == 0 and first[-1] > 980


def test_a_large_file_gives_whole_groups_from_all_of_the_run_and_equal_shares_to_sources(tmp_path):
    rows = [record(step, f"task{step}", reward=place % 2) for step in range(500) for place in range(4)]
    rows += [record(499, f"e{item}", "eval/set") for item in range(3000)]
    sample, ranks = sample_rollouts(write(tmp_path / "r.jsonl", rows), 400)
    assert sample.total == 5000 and 390 <= len(sample.records) == len(ranks) <= 400
    steps = [entry["step"] for entry in sample.records if entry["source"] == "train"]
    assert all(steps.count(step) == 4 for step in steps) and np.diff(np.unique(steps)).max() < 30
    assert 60 <= len([entry for entry in sample.records if entry["source"] == "eval/set"])


def test_a_file_below_the_limit_is_taken_whole_in_order(tmp_path):
    rows = [record(step, f"{step}") for step in range(37)]
    sample, _ = sample_rollouts(write(tmp_path / "r.jsonl", rows), 37)
    assert [entry["step"] for entry in sample.records] == list(range(37)) and sample.total == 37


def test_an_absent_empty_damaged_or_growing_file_gives_what_there_is(tmp_path):
    assert sample_rollouts(tmp_path / "none.jsonl", 10)[0].records == []
    path = write(tmp_path / "r.jsonl", [record(0), record(1)])
    with path.open("ab") as file:
        file.write(b'not json\n\n{"step": 3, "resp')
    sample, _ = sample_rollouts(path, 10)
    assert [entry["step"] for entry in sample.records] == [0, 1] and sample.num_damaged == 1 and sample.total == 3


def test_old_records_and_fields_of_the_wrong_type_still_give_a_trajectory():
    old = clean({"step": 3, "prompt": "1+1=", "response": "2", "gold": "2", "parsed": None, "status": "ok", "reward": 1.0, "num_tokens": 1})
    assert (old["source"], old["tokens"], old["data"], old["length"], old["parsed"]) == ("train", None, {}, 1, "")
    odd = clean({"step": None, "prompt": [{"role": "user", "content": "hi"}], "response": None, "tokens": ["a", 3], "reward": "high",
                 "num_tokens": "x", "token_data": [1], "step_starts": [5], "reward_terms": None, "parsed": ["x", 1], "gold": 42,
                 "detail": {"a": 1}})  # fmt: skip
    assert odd["prompt"] == "[user]\nhi" and np.isnan(odd["reward"]) and odd["starts"] == [] and odd["gold"] == "42" and odd["detail"] == '{"a": 1}'
    short = clean({"step": 0, "tokens": ["a", "b"], "token_data": {"advantage": [1.0], "value": [0.5, None]}, "step_starts": [0, 2]})
    assert list(short["data"]) == ["value"] and short["starts"] == [] and short["response"] == "ab"
    silent = clean({"step": 0, "response": "", "tokens": [""], "token_data": {"logprob": [-0.5]}})  # only the end-of-sequence token
    entries = list(chunk_entries(pack(sample_of([old, odd, short, silent]))))
    assert len(entries) == 4 and entries[3] == {"tokens": [""], "constant": {"logprob": -0.5}}


def sample_of(records):
    from openrl_reason.observe.report_rollouts import Sample

    return Sample(records, len(records))


@pytest.mark.parametrize(
    ("values", "width"), [([0.5, -1.25, 3e-3], 2), ([1e6, 1.0], 4), ([np.nan, 2.0], 2), ([1.0001, 2e-9], 2), ([-np.inf, 1.0], 2)]
)
def test_numbers_are_halved_only_where_that_changes_nothing_one_can_see(values, width):
    array = np.array(values, dtype=np.float32)
    found, planes = to_planes(array)
    assert found == width and len(planes) == width * len(values)
    back = np.frombuffer(planes, np.uint8).reshape(width, -1).T.copy().view(f"<f{width}")[:, 0].astype(np.float32)
    np.testing.assert_allclose(back, array, rtol=1e-3, atol=1e-7)


def test_a_constant_channel_is_one_number_and_a_response_that_its_tokens_spell_is_not_stored_twice():
    entry = clean(record(response="ab", tokens=["a", "b"], token_data={"advantage": [0.5, 0.5], "logprob": [-1.0, -2.0]}))
    texts, numbers = pack_chunk([entry, entry])
    chunk = json.loads(gzip.decompress(texts))
    assert chunk["entries"][0]["constant"] == {"advantage": 0.5} and chunk["entries"][0]["channels"] == ["logprob"]
    assert "response" not in chunk["entries"][0] and chunk["numbers"]["logprob"] == {"width": 2, "offset": 0, "count": 4}
    assert len(gzip.decompress(numbers)) == 8


def test_a_giant_response_is_cut_and_says_so():
    texts, _ = pack_chunk([clean(record(response="9" * 1_000_000, tokens=["9"] * 1_000_000))])
    entry = json.loads(gzip.decompress(texts))["entries"][0]
    assert len(entry["response"]) == MAX_CHARACTERS and entry["cut"] == 1_000_000 - MAX_CHARACTERS and "tokens" not in entry


def test_the_sample_shrinks_evenly_until_it_fits(tmp_path):
    rng = np.random.default_rng(0)
    rows = [record(step, f"{step}", response="".join(map(chr, rng.integers(33, 126, 400)))) for step in range(300)]
    path = write(tmp_path / "r.jsonl", rows)
    whole, half = fit(path, 5000, 10**9), fit(path, 5000, 60_000)
    assert whole.index["shown"] == 300 and half.index["total"] == 300
    assert half.size <= 60_000 and 50 < half.index["shown"] < 300
    assert np.diff(half.index["step"]).max() <= 12


def test_siblings_share_a_group_number_also_when_other_lines_lie_between(tmp_path):
    rows = [clean(record(0, "a")), clean(record(0, "b")), clean(record(0, "a")), clean(record(1, "a"))]
    assert columns(sample_of(rows))["group"] == [0, 1, 0, 2]
    assert index_groups(write(tmp_path / "r.jsonl", [record(0, "a")] * 200)).counts.tolist() == [64, 64, 64, 8]


def test_secrets_of_the_environment_are_taken_out_of_responses(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-very-secret-value")
    path = write(tmp_path / "r.jsonl", [record(response="the key is sk-very-secret-value.")])
    assert sample_rollouts(path, 5)[0].records[0]["response"] == "the key is ***."
