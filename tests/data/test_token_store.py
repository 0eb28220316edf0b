"""A store holds what the rows say, in their order, is used again while nothing changed, and is read a row at a time."""

import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from openrl_reason.atomic import atomic_folder
from openrl_reason.core.trajectory import StopReason, Trajectory, write_jsonl, write_parquet
from openrl_reason.data import offline_build, store_writer
from openrl_reason.data.offline import OfflineDataConfig, OfflineLoader, TokenStore, build_store, split_held_out
from openrl_reason.data.readers import iter_rows
from openrl_reason.data.sources import expand, plan_parts
from openrl_reason.errors import ConfigError, DataError
from tests.data.offline_helpers import encode, write_lines, write_tokenizer_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer_folder(tmp_path_factory.mktemp("model") / "tiny")


def responses(count, *, siblings=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{number // siblings}+1?\n", "response": "so\n" * int(rng.integers(1, 5)) + str(number), "reward": int(rng.integers(0, 2))}
        for number in range(count)
    ]


def build(tmp_path, rows, model, *, name="rows.jsonl", folder="store", said=None, **settings):
    path = write_lines(tmp_path / name, rows) if rows is not None else str(tmp_path / name)
    config = OfflineDataConfig(path=(path,), parallel="never", **settings)
    return build_store(config, model, tmp_path / folder, say=(lambda text: said.append(text)) if said is not None else lambda text: None)


def same(left, right):
    names = ("token_ids", "action_mask", "step_ids", "rewards", "behaviour_logprobs")
    arrays = all(np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "behaviour_logprobs") for name in names)
    return arrays and (left.trajectory_id, left.task_id, left.group_id, left.info, left.stop_reason, left.policy_version) == (
        right.trajectory_id, right.task_id, right.group_id, right.info, right.stop_reason, right.policy_version,
    )  # fmt: skip


# ---- content -----------------------------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_the_order_of_the_file(tmp_path, model):
    from openrl_reason.models.loading import load_tokenizer

    rows, tokenizer = responses(50), load_tokenizer(model)
    store = build(tmp_path, rows, model)
    assert len(store) == 50 and store.kind == "responses" and store.num_tokens == int(store.lengths.sum())
    for number, (row, trajectory) in enumerate(zip(rows, store.trajectories(range(50)), strict=True)):
        assert tokenizer.decode(trajectory.token_ids) == row["prompt"] + row["response"] + "<|endoftext|>"
        assert trajectory.reward == row["reward"] == store.rewards[number] and store.labels[number] == (row["reward"] > 0)
        assert trajectory.num_tokens == store.lengths[number] and trajectory.num_prompt_tokens == store.prompt_lengths[number]
        assert trajectory.info == {"source": f"{tmp_path}/rows.jsonl:{number + 1}"} and trajectory.stop_reason == StopReason.OFFLINE
    assert len({trajectory.task_id for trajectory in store.trajectories(range(50))}) == 13 == len(np.unique(store.questions))
    assert same(store.trajectory(-1), store.trajectory(49))
    assert all(same(again, store.trajectory(3)) for again in store.trajectories([3, 3]))
    with pytest.raises(IndexError, match="row 50 of a store of 50"):
        store.trajectory(50)


def test_two_reads_share_no_memory(tmp_path, model):
    store = build(tmp_path, responses(3), model)
    first, second = store.trajectories([1, 1])
    first.token_ids[:] = 0
    first.info["x"] = 1
    assert second.token_ids.any() and "x" not in second.info and store.trajectory(1).token_ids.any()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_our_own_trajectories_come_back_as_they_are(suffix, tmp_path, model):
    rng = np.random.default_rng(0)
    written = []
    for number in range(30):
        length = int(rng.integers(1, 9))
        written.append(
            Trajectory.from_completion(
                [5, 6], rng.integers(5, 200, length).tolist(), None if number % 3 else rng.normal(size=length), task_id=f"q{number % 7}",
                group_id=f"g{number % 7}", sample_index=number, step_ids=np.sort(rng.integers(0, 3, length)), rewards=[0.0, 0.25, float(number % 2)],
                policy_version=number, stop_reason=rng.choice([StopReason.EOS, StopReason.LENGTH]), info={"gold": "é", "n": [1, None]},
            )
        )  # fmt: skip
    path = tmp_path / f"samples.{suffix}"
    (write_jsonl if suffix == "jsonl" else write_parquet)(path, written)
    store = build(tmp_path, None, model, name=path.name)
    for number, (before, after) in enumerate(zip(written, store.trajectories(range(30)), strict=True)):
        assert after.info.pop("source").startswith(str(path)) and same(before, after), number


@pytest.mark.parametrize("max_rows", [1, 2, 7, 4096])
@pytest.mark.parametrize("part_bytes", [64, 1 << 20])
def test_neither_shards_nor_parts_can_be_told_from_the_rows(max_rows, part_bytes, tmp_path, model, monkeypatch):
    rows = [{"prompt": f"{number}?", "chosen": "a" * (number % 5 + 1), "rejected": "b"} for number in range(40)]
    straight = build(tmp_path, rows, model, folder="straight")
    monkeypatch.setattr(offline_build, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(offline_build, "ShardWriter", lambda folder, part: store_writer.ShardWriter(folder, part, max_rows=max_rows))
    store = build(tmp_path, None, model)
    assert store.identity == straight.identity and store.statistics == straight.statistics
    assert all(same(left, right) for left, right in zip(store.trajectories(range(80)), straight.trajectories(range(80)), strict=True))
    assert len(store.manifest["shards"]) > 4 or (max_rows == 4096 and part_bytes > 64)


def test_a_pair_is_two_rows_in_one_shard(tmp_path, model, monkeypatch):
    monkeypatch.setattr(offline_build, "ShardWriter", lambda folder, part: store_writer.ShardWriter(folder, part, max_rows=3))
    store = build(tmp_path, [{"prompt": f"{number}?", "chosen": "aa", "rejected": "b"} for number in range(9)], model)
    assert len(store) == 18 and store.kind == "pairs" and store.labels.tolist() == [True, False] * 9
    assert store.rewards.tolist() == [1, 0] * 9 and (store.questions[::2] == store.questions[1::2]).all()
    assert all(shard["rows"] % 2 == 0 for shard in store.manifest["shards"])


def test_the_arrays_are_plain_npy_files_that_can_be_mapped(tmp_path, model):
    store = build(tmp_path, responses(5), model)
    (shard,) = store.manifest["shards"]
    mapped = np.load(store.folder / "shards" / shard["name"] / "token_ids.npy", mmap_mode="r")
    assert mapped.dtype == np.int32 and mapped.tolist() == [int(t) for row in store.trajectories(range(5)) for t in row.token_ids]
    assert {file.name.partition(".")[0] for file in (store.folder / "index").iterdir()} >= {"tokens", "reward", "question"}


def test_a_store_can_be_sent_to_another_process(tmp_path, model):
    store = build(tmp_path, responses(5), model)
    again = pickle.loads(pickle.dumps(store))
    assert again.identity == store.identity and same(again.trajectory(2), store.trajectory(2))


def test_statistics_are_those_of_the_rows(tmp_path, model):
    rows = [*responses(40), responses(40)[0], {"prompt": "x" * 90, "response": "a", "reward": 1}, {"prompt": "?", "response": "", "reward": 0}]
    store = build(tmp_path, [*rows, {"prompt": "?", "response": "a"}, "not json"], model, max_length=60, bad_rows="skip", reward_scale=2.0)
    found = store.statistics
    assert found["counts"] == {
        "rows": 45, "kept": 41, "prompt_too_long": 1, "empty": 1, "bad": 2, "bad/missing_column": 1, "bad/malformed": 1,
    }  # fmt: skip
    kept = store.trajectories(range(len(store)))
    lengths, steps = [t.num_tokens - t.num_prompt_tokens for t in kept], [t.num_steps for t in kept]
    rewards = np.array([t.reward for t in kept])
    for name, values in (("response_length", lengths), ("steps", steps), ("prompt_length", [t.num_prompt_tokens for t in kept])):
        spread = {"mean": np.mean(values), "p50": np.percentile(values, 50), "p95": np.percentile(values, 95), "max": max(values)}
        assert found[name] == pytest.approx(spread)
    assert found["reward"]["mean"] == pytest.approx(rewards.mean()) and found["reward"]["std"] == pytest.approx(rewards.std())
    assert set(found["reward"]["values"]) == {"0", "2"} and found["duplicates"] == 1 and found["questions"] == 10
    assert found["tokens"] == store.num_tokens and json.loads(json.dumps(found)) == found


# ---- used again, or not ------------------------------------------------------------------------------------------------------------------


def test_a_store_is_used_again_while_nothing_changed(tmp_path, model):
    said: list[str] = []
    first = build(tmp_path, responses(9), model, said=said)
    inode = os.stat(first.folder).st_ino
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    again = build(tmp_path, None, model, said=said)
    assert os.stat(again.folder).st_ino == inode and again.identity == first.identity
    assert "9 of 9 rows kept" in said[0] and "from an earlier run" in said[1]


CHANGES = {
    "content of the file": (lambda path, model: path.write_text(path.read_text().replace("so", "no")), {}, "files"),
    "a row more": (lambda path, model: write_lines(path, responses(10)), {}, "files"),
    "step kind": (lambda path, model: None, {"step_kind": "whole"}, r"settings \(step_kind\)"),
    "two settings": (lambda path, model: None, {"max_length": 99, "eos": "space_eos"}, r"settings \(eos, max_length\)"),
    "reward map": (lambda path, model: None, {"reward_shift": 1.0}, r"settings \(reward_shift\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_rows_builds_them_again_and_says_why(change, tmp_path, model):
    alter, settings, reason = CHANGES[change]
    said: list[str] = []
    before = build(tmp_path, responses(9), model, said=said)
    alter(tmp_path / "rows.jsonl", model)
    after = build(tmp_path, None, model, said=said, **settings)
    assert len(said) == 3 and after.identity == TokenStore.open(after.folder).identity
    assert re.search(f"built again, since it was made with other {reason}", said[1]), said
    if change != "two settings":
        assert after.identity != before.identity


def test_another_tokenizer_builds_again(tmp_path, model):
    said: list[str] = []
    build(tmp_path, responses(3), model, said=said)
    build(tmp_path, None, write_tokenizer_folder(tmp_path / "other", template=False), said=said)
    assert "made with other tokenizer" in said[1]


def test_a_large_file_that_changes_in_its_middle_is_noticed_by_its_time(tmp_path, model, monkeypatch):
    from openrl_reason.data import sources

    monkeypatch.setattr(sources, "_HASHED_WHOLE", 100)
    monkeypatch.setattr(sources, "_SAMPLE", 4)
    monkeypatch.setattr(sources, "_NUM_SAMPLES", 3)
    said: list[str] = []
    build(tmp_path, responses(30), model, said=said)
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text[:100] + text[100:160].replace("so", "no") + text[160:])
    build(tmp_path, None, model, said=said)
    assert "made with other files" in said[1]


def test_a_damaged_store_is_built_again(tmp_path, model):
    said: list[str] = []
    store = build(tmp_path, responses(9), model, said=said)
    file = next(store.folder.glob("shards/*/token_ids.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="is damaged"):
        TokenStore.open(store.folder)
    again = build(tmp_path, None, model, said=said)
    assert "damaged, built again" in said[1] and again.identity == store.identity
    (store.folder / "manifest.json").write_text("{}")
    build(tmp_path, None, model, said=said)
    assert "of another version, built again" in said[3]


def test_a_first_row_without_its_reward_does_not_cost_the_others_theirs(tmp_path, model):
    rows = [{"prompt": "1?", "response": "a"}, *responses(5)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: no column 'reward'"):
        build(tmp_path, rows, model)
    store = build(tmp_path, rows, model, bad_rows="skip")
    assert store.kind == "responses" and len(store) == 5 and store.has_reward.all()


def test_a_store_that_another_run_replaces_says_so_and_never_reads_the_other_s_rows(tmp_path, model):
    first = build(tmp_path, responses(9), model)
    copy = pickle.dumps(first)
    expected = first.trajectory(3).token_ids.tolist()
    second = build(tmp_path, responses(12, seed=5), model, name="other.jsonl")
    assert second.identity != first.identity and second.trajectory(3).token_ids.tolist() != expected
    for read in (lambda: first.trajectory(3), lambda: pickle.loads(copy)):
        with pytest.raises(DataError, match="was replaced by another one while it was in use"):
            read()


def test_a_collection_is_not_taken_for_a_store_nor_a_folder_that_holds_the_data(tmp_path, model):
    folder = tmp_path / "store"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "samples-00000.jsonl").write_text("precious")
    (folder / "manifest.json").write_text('{"format": "openrl_reason.collection.v1"}')
    with pytest.raises(ConfigError, match="--data.store: .* is no token store"):
        build(tmp_path, responses(3), model)
    assert (folder / "samples" / "samples-00000.jsonl").read_text() == "precious"
    (folder / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    with pytest.raises(ConfigError, match="data.store is .*: the data .*rows.jsonl lie in it"):
        build_store(OfflineDataConfig(path=(str(folder / "rows.jsonl"),), max_length=64), model, folder, say=lambda text: None)


@pytest.mark.parametrize("manifest", ['{"name": "my app"}', "{", "[]"])
def test_a_folder_of_another_program_is_left_alone_whatever_its_files_are_called(manifest, tmp_path, model):
    folder = tmp_path / "store"
    (folder / "index").mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="--data.store: .* is no token store"):
        build(tmp_path, responses(3), model)
    assert (folder / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("damage", [
    lambda manifest: manifest.pop("key"), lambda manifest: manifest.pop("shards"), lambda manifest: manifest.pop("statistics"),
    lambda manifest: manifest.update(key=[]), lambda manifest: manifest.update(num_rows="3"), lambda manifest: manifest.update(shards=[{}]),
])  # fmt: skip
def test_a_manifest_that_lost_something_is_built_again(damage, tmp_path, model):
    store = build(tmp_path, responses(3), model)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    damage(manifest)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    assert build(tmp_path, responses(3), model).identity == store.identity


def test_an_index_whose_bytes_changed_is_built_again(tmp_path, model):
    store = build(tmp_path, responses(3), model)
    file = store.folder / "index" / "tokens.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    assert build(tmp_path, responses(3), model).identity == store.identity


def test_a_folder_that_is_no_store_is_left_alone(tmp_path, model):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="--data.store: .* is no token store"):
        build(tmp_path, responses(3), model)
    assert (tmp_path / "store" / "thesis.tex").read_text() == "precious"
    with pytest.raises(DataError, match="there is no token store"):
        TokenStore.open(tmp_path / "store")


def test_a_build_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path, model):
    store = build(tmp_path, responses(9), model)
    write_lines(tmp_path / "rows.jsonl", [*responses(9), {"prompt": "?", "response": "a", "reward": "b"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:10: column 'reward' holds 'b'"):
        build(tmp_path, None, model)
    assert TokenStore.open(store.folder).identity == store.identity
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl", "store"]


def test_what_a_killed_build_left_goes_and_what_others_left_stays(tmp_path, model):
    def left_by_a_killed_writer(name):
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / name) as folder:
            (folder / "shards").mkdir()
            folder.rename(tmp_path / "kept")
            raise KeyboardInterrupt
        (tmp_path / "kept").rename(folder)
        return folder.name

    names = [left_by_a_killed_writer(name) for name in ("store", "store-2")] + [".unfinished-store-of-another-machine"]
    (tmp_path / names[2]).mkdir()
    build(tmp_path, responses(3), model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*names[1:], "rows.jsonl", "store"])


def test_a_link_to_a_folder_on_another_disk_stays_one(tmp_path, model):
    (tmp_path / "big" / "store").mkdir(parents=True)
    (tmp_path / "store").symlink_to(tmp_path / "big" / "store")
    for length in (64, 40, 32):
        store = build(tmp_path, responses(3), model, max_length=length)
        assert store.folder == tmp_path / "big" / "store" and (tmp_path / "store").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big", "rows.jsonl", "store"]


def test_of_two_runs_that_want_one_store_at_once_one_builds_it(tmp_path, model):
    write_lines(tmp_path / "rows.jsonl", responses(9))
    config, said = OfflineDataConfig(path=(str(tmp_path / "rows.jsonl"),), max_length=64), []
    with ThreadPoolExecutor(2) as threads:
        stores = [threads.submit(build_store, config, model, tmp_path / "store", say=said.append) for _ in range(2)]
    assert stores[0].result().trajectory(3).token_ids.tolist() == stores[1].result().trajectory(3).token_ids.tolist()
    assert sorted(text.split(":")[0] for text in said)[0] == "token store" and len(said) == 2
    assert sum("kept" in text for text in said) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl", "store"]


def test_nothing_that_is_left_is_an_error(tmp_path, model):
    with pytest.raises(DataError, match=r"no row is left \(0 of 1 rows kept \(1 prompt too long\)\)"):
        build(tmp_path, [{"prompt": "x" * 99, "response": "a", "reward": 1}], model, max_length=20)
    for rows, message in (([], "is empty"), (["", "  "], "has no rows"), (["oops"], r"rows\.jsonl:1: malformed JSON")):
        with pytest.raises(DataError, match=message):
            build(tmp_path, rows, model)
    with pytest.raises(DataError, match="there is no file .*did you mean 'rows.jsonl'"):
        build(tmp_path, None, model, name="rows.json")
    with pytest.raises(ConfigError, match="--data.path is ''"):
        build_store(OfflineDataConfig(), model, tmp_path / "x")


def test_malformed_lines_are_errors_or_counted(tmp_path, model):
    lines = [json.dumps(row) for row in responses(4)]
    lines[2:2] = ['{"prompt": "cut of', "[1]"]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: malformed JSON"):
        build(tmp_path, lines, model)
    store = build(tmp_path, None, model, bad_rows="skip")
    assert len(store) == 4 and store.statistics["counts"]["bad/malformed"] == 2
    assert store.trajectory(2).info["source"].endswith(":5"), "lines are counted as an editor does"


# ---- sources -----------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path, model):
    rows = responses(12)
    write_lines(tmp_path / "data/b.jsonl", rows[4:])
    write_lines(tmp_path / "data/a.jsonl", rows[:4])
    (tmp_path / "data/settings.json").write_text('{"seed": 1}')
    (tmp_path / "data/notes.md").write_text("notes")
    store = build(tmp_path, None, model, name="data")
    assert len(store) == 12 and store.identity == build(tmp_path, rows, model, folder="one").identity
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no data file"):
        build(tmp_path, None, model, name="empty", folder="x")


def test_a_folder_of_mixed_layouts_is_refused_with_both_files_and_their_columns(tmp_path, model):
    write_lines(tmp_path / "data/a.jsonl", responses(2))
    write_lines(tmp_path / "data/b.jsonl", [{"prompt": "1?", "chosen": "a", "rejected": "b"}])
    message = r"data/a\.jsonl and .*data/b\.jsonl do not belong together: the one has the columns prompt, response, reward \(responses\), the other"
    with pytest.raises(DataError, match=message + r" prompt, chosen, rejected \(pairs\)"):
        build(tmp_path, None, model, name="data")
    write_lines(tmp_path / "data/b.jsonl", [{"prompt": "1?", "completion": "a", "reward": 1}])
    with pytest.raises(DataError, match="do not belong together"):
        build(tmp_path, None, model, name="data")
    paths = (str(tmp_path / "data/a.jsonl"), str(tmp_path / "data/b.jsonl"))
    both = build_store(OfflineDataConfig(path=paths, parallel="never"), model, tmp_path / "both")
    assert len(both) == 3, "files that are named one by one may differ, as long as their rows are of one kind"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_rows(suffix, tmp_path, model):
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    rows = responses(20)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), path)
    elif suffix == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        write_lines(path, rows)
    store = build(tmp_path, None, model, name=path.name)
    assert store.identity == build(tmp_path, rows, model, name="again.jsonl", folder="again").identity


@pytest.mark.parametrize("part_bytes", [1, 50, 333, 10_000])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
def test_parts_make_up_the_source(suffix, part_bytes, tmp_path, monkeypatch):
    from openrl_reason.data import sources

    rows = responses(37)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        lines = "\n".join("" if number % 7 == 3 else json.dumps(row) for number, row in enumerate(rows))
        path.write_text("\ufeff" + lines, encoding="utf-8")  # a mark at the beginning, blank lines, none at the end
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        import datasets

        monkeypatch.setattr(sources, "_ROWS_PER_PART", 5)
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    real = type(path).open
    if suffix == "jsonl":  # blocks of a few bytes, so that parts end anywhere

        class Slow:
            def __init__(self, stream):
                self.stream = stream

            def read(self, size):
                return self.stream.read(min(size, 11))

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.stream.close()

        monkeypatch.setattr(type(path), "open", lambda self, *args, **kwargs: Slow(real(self, *args, **kwargs)))
    (source,) = expand([str(path)])
    parts = plan_parts(source, "train", part_bytes)
    monkeypatch.setattr(type(path), "open", real)
    found = [row for part in parts for row in iter_rows(source.path, part=part)]
    assert found == list(iter_rows(source.path)) and len(found) > 30
    assert len(parts) > 3 or part_bytes == 10_000


def test_the_first_entry_of_a_json_list_is_read_without_the_list(tmp_path):
    from openrl_reason.data.sources import Source, _first_entry, first_row

    path = tmp_path / "list.json"
    long = {"conversations": [{"role": "user", "content": "é" * (1 << 20)}], "reward": 1}
    for text, expected in (
        (json.dumps([{"a": 1}, {"b": 2}]), {"a": 1}), ("\ufeff [\n  {\"a\": 1}", {"a": 1}), (json.dumps([long] * 2, ensure_ascii=False), long),
        ("[]", None), ("[1]", None), ('{"a": 1}', None), ('[{"a": 1', None), ('[{"a" 1}]', None),
    ):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        assert _first_entry(path) == expected
    path.write_text(json.dumps([{"a": 1}, {"b": 2}]))
    assert first_row(Source(str(path)), "train").values == {"a": 1}
    path.write_text('[{"a": 1')
    with pytest.raises(DataError, match=r"list\.json:1: malformed JSON"):
        first_row(Source(str(path)), "train")


# ---- which rows a step sees --------------------------------------------------------------------------------------------------------------


def test_steps_are_a_pure_function_of_seed_and_step(tmp_path, model):
    store = build(tmp_path, responses(23), model)
    straight = OfflineLoader(store, 4, seed=1)
    batches = [straight.trajectories(step) for step in range(12)]
    resumed = OfflineLoader(store, 4, seed=1)
    for step in (7, 8, 3, 11):
        for left, right in zip(resumed.trajectories(step), batches[step], strict=True):
            assert same(left, right)
    assert resumed.identity == straight.identity
    seen = [row for step in range(12) for row in straight.rows(step)]
    assert sorted(seen[:23]) == sorted(seen[23:46]) == list(range(23)), "epochs follow one another without a gap"
    assert seen[:23] != seen[23:46] and seen != [row for step in range(12) for row in OfflineLoader(store, 4, seed=2).rows(step)]
    straight.close()
    resumed.close()


def test_a_last_batch_ends_with_its_epoch(tmp_path, model):
    store = build(tmp_path, responses(10), model)
    loader = OfflineLoader(store, 4, seed=0, epochs=2)
    assert loader.num_steps(2) == 5 and loader.num_steps(1) == 3
    rows = [loader.rows(step) for step in range(6)]
    assert [len(batch) for batch in rows] == [4, 4, 4, 4, 4, 0] and sorted(sum(rows, [])) == sorted([*range(10)] * 2)
    one = OfflineLoader(store, 4, seed=0, epochs=1)
    assert [len(one.trajectories(step)) for step in range(3)] == [4, 4, 2]
    loader.close()
    one.close()


def test_pairs_stay_together(tmp_path, model):
    store = build(tmp_path, [{"prompt": f"{n // 2}?", "chosen": "a", "rejected": "b"} for n in range(7)], model)
    loader = OfflineLoader(store, 3, seed=0, rows=np.array([0, 1, 4, 5, 12, 13]))
    assert loader.num_units == 3 and loader.num_steps(1) == 1
    rows = loader.rows(0)
    assert sorted(rows) == [0, 1, 4, 5, 12, 13] and all(rows[i] % 2 == 0 and rows[i + 1] == rows[i] + 1 for i in (0, 2, 4))
    assert loader.identity != OfflineLoader(store, 3, seed=0).identity
    for wrong in ([0, 1, 2], [0, 0], [1, 2]):
        with pytest.raises(ValueError, match="one row of a pair without the other|twice"):
            OfflineLoader(store, 3, seed=0, rows=wrong)
    with pytest.raises(DataError, match="no rows to learn from"):
        OfflineLoader(store, 3, seed=0, rows=[])


def test_what_the_thread_meets_is_raised(tmp_path, model):
    store = build(tmp_path, responses(8), model)
    loader = OfflineLoader(store, 4, seed=0)
    loader.trajectories(0)
    loader._next[1].result()
    file = next(store.folder.glob("shards/*/step_ids.npy"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="is cut short"):
        for step in range(1, 4):
            loader.trajectories(step)
    loader.close()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_questions_are_held_out_with_all_their_rows(fraction, tmp_path, model):
    rows = [{"prompt": f"{(n * 7) % 20}?", "chosen": "a" * (n % 3 + 1), "rejected": "b"} for n in range(60)]
    store = build(tmp_path, rows, model)
    train, held_out = split_held_out(store, fraction, seed=3)
    assert sorted([*train, *held_out]) == list(range(120)) and (np.diff(train) > 0).all() and len(train)
    assert not set(store.questions[train]) & set(store.questions[held_out])
    assert len(np.unique(store.questions[held_out])) == min(round(fraction * 20), 19)
    again = split_held_out(store, fraction, seed=3)
    assert np.array_equal(again[1], held_out) and (not 0 < fraction < 0.9 or set(split_held_out(store, fraction, seed=4)[1]) != set(held_out))
    OfflineLoader(store, 2, seed=0, rows=train).close()


def test_helpers_encode_as_the_store_does(tmp_path, model):
    from openrl_reason.models.loading import load_tokenizer

    row = {"prompt": "1?", "response": "a\nb", "reward": 1}
    (side,), _ = encode(row, load_tokenizer(model))
    assert build(tmp_path, [row], model).trajectory(0).token_ids.tolist() == side.token_ids.tolist()
