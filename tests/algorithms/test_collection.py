"""Collections: exact counts of what is kept, and a stopped one that ends as if it had not been."""

import contextlib
import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from openrl_reason.algorithms.collection import collect_samples, without_bos
from openrl_reason.algorithms.collection_choice import choose, keep_balanced
from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.core.trajectory import StopReason, Trajectory, read_jsonl, read_parquet
from openrl_reason.data.pairs import build_pairs, read_samples
from openrl_reason.errors import CheckpointError, ConfigError, WorkerError
from openrl_reason.models.tiny import make_model
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig
from tests.algorithms.scripted import ScriptedPool, ScriptedRewards, ScriptedTask

SCRIPT = {
    "allright": "R" * 16, "allwrong": "W" * 16, "early": "RWRWRWRWRWRWRWRW", "onewrong": "RRRRRRRRWRRRRRRR", "late": "WWWWWWWWWWWWWWWR",
    "failed": "FRFRFWFRFWFRFWFW", "nothing": "F" * 16, "cut": "TTTTWWWWTWTWTWTW",
}  # fmt: skip


def sample(task, letters):
    def one(number, letter):
        graded = letter != "F"
        info = {"has_reward": graded, "grade_status": "ok" if graded else "timeout"}
        stop = StopReason.LENGTH if letter == "T" else StopReason.EOS
        about = dict(task_id=task, group_id=task, sample_index=number, reward=float(letter in "RT"), stop_reason=stop, info=info)
        return Trajectory.from_completion([5], [6, number], None, **about)

    return [one(number, letter) for number, letter in enumerate(letters)]


# ---- what is kept ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "right", "wrong"),
    [
        ("R" * 16, 1, 0), ("W" * 16, 0, 4), ("W" * 3, 0, 3), ("RRRRRRRRW", 1, 1), ("RRRWW", 2, 2), ("RWWWWWWWW", 1, 4), ("RRRRRWWWWW", 4, 4),
        ("RRWWWW", 2, 4), ("F" * 9, 0, 0), ("FRFRF", 1, 0), ("FRRFWF", 1, 1), ("", 0, 0),
    ],
)  # fmt: skip
def test_balanced_keeps_the_published_numbers(letters, right, wrong):
    config = CollectConfig(mode="balanced")
    kept, counts = choose(config, sample("q", letters))
    assert (sum(s.reward == 1 for s in kept), sum(s.reward == 0 for s in kept)) == (right, wrong)
    assert counts["samples"] == len(letters) == counts["kept"] + counts["ungraded"] + counts["over_limit"]
    assert counts["ungraded"] == letters.count("F")


def test_balanced_choice_is_drawn_without_replacement_by_seed_and_question_alone():
    questions = [sample(f"q{n}", "RW" * 8) for n in range(40)]

    def numbers(questions, seed=0):
        kept = keep_balanced([s for q in questions for s in q], threshold=1.0, max_per_side=4, seed=seed)
        return {s.task_id: [] for s in kept} | {t: [int(s.response_ids[1]) for s in kept if s.task_id == t] for t in {s.task_id for s in kept}}

    first = numbers(questions)
    assert all(len(set(own)) == 8 and own == sorted(own) for own in first.values())
    assert numbers(questions[::-1]) == first and numbers(questions[3:4])["q3"] == first["q3"] and numbers(questions, seed=1) != first
    taken = np.bincount([number for own in first.values() for number in own], minlength=16)
    assert taken.min() > 5 and len({tuple(own) for own in first.values()}) > 30, "every place can be drawn"


def test_all_keeps_what_is_graded_and_rejection_what_is_right():
    samples = sample("q", "RWFTRRW")
    kept, counts = choose(CollectConfig(), samples)
    assert len(kept) == 6 == counts["kept"] and counts["ungraded"] == 1
    kept, counts = choose(CollectConfig(mode="rejection", max_per_question=2), samples)
    assert [int(s.response_ids[1]) for s in kept] == [0, 4]
    assert counts == {"samples": 7, "kept": 2, "ungraded": 1, "wrong": 2, "truncated": 1, "repeated": 0, "over_limit": 1}


# ---- whole collections -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model(folder, hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=32)
    return str(folder)


@pytest.fixture
def collect(tmp_path, monkeypatch, model):
    """A function that runs the command on scripted engines; ``pools`` are those that were started."""
    module = importlib.import_module("openrl_reason.algorithms.collection")
    pools, state = [], {}

    @contextlib.contextmanager
    def engines(config, path, **settings):
        pools.append(ScriptedPool(state["script"], order=state["order"], fail_after=state["fail_after"]))
        yield pools[-1], ScriptedRewards("mixed", state["order"])

    monkeypatch.setattr(module, "rewarded_engines", engines)
    monkeypatch.setattr(module, "Placement", lambda config, roles: contextlib.nullcontext())

    def run(output="out", *, script=SCRIPT, order=0, fail_after=None, **changes):
        state.update(script=script, order=order, fail_after=fail_after)
        settings = {"mode": "balanced", "questions_per_block": 3, "questions_in_flight": 5, "reward": RewardConfig(max_failed_rate=1.0),
                    "sampling": SamplingConfig(max_new_tokens=8)}  # fmt: skip
        config = CollectConfig(model=model, output=str(tmp_path / output), **settings | changes)
        return collect_samples(config, task=ScriptedTask(script))

    run.pools = pools
    return run


def files(folder):
    """Content of everything but the manifest's and the config's own place."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "config.yaml")}  # fmt: skip


def test_a_balanced_collection_has_the_counts_that_the_script_foretells(collect, tmp_path):
    manifest = collect(rows=True, pairs_per_question=5)
    found, kept = manifest["statistics"], manifest["statistics"]["kept"]
    # early stops after 8; failed has its fourth right (11) and wrong (15) with the last sample; cut: after 8
    assert found["questions"] == 8 and found["samples"] == 6 * 16 + 2 * 8
    assert found["right"] + found["wrong"] + found["ungraded"] == found["samples"] and found["ungraded"] == 24 and found["failed"] == {"timeout": 24}
    assert (found["questions_none_right"], found["questions_all_right"], found["questions_ungraded"]) == (1, 1, 1)
    assert found["truncated"] == 4 and found["right_rate"] == found["right"] / (found["right"] + found["wrong"])
    #       allright, allwrong, early, onewrong, late, failed, nothing, cut
    assert kept["kept_right"] == 1 + 0 + 4 + 1 + 1 + 4 + 0 + 4 and kept["kept_wrong"] == 0 + 4 + 4 + 1 + 4 + 4 + 0 + 4
    samples = list(read_samples([str(tmp_path / "out/trajectories")]))
    assert len(samples) == kept["kept"] == 36 and {s.info["prompt"].strip() for s in samples} == set(SCRIPT) - {"nothing"}
    assert not any(s.info["response"].startswith("F") for s in samples), "a failed grading is never wrong"
    rows = [json.loads(line) for file in manifest["files"]["rows"] for line in (tmp_path / "out" / file).read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "response", "reward"}] * 36
    assert [(row["response"], row["reward"]) for row in rows] == [(s.info["response"], s.reward) for s in samples]
    pairs = [json.loads(line) for file in manifest["files"]["pairs"] for line in (tmp_path / "out" / file).read_text().splitlines()]
    straight = build_pairs(samples, threshold=1.0, max_per_question=5, seed=0)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(p.chosen.info["response"], p.rejected.info["response"]) for p in straight.pairs]
    assert found["pairs"]["pairs"] == len(pairs) and all(p["chosen"][0] in "RT" and p["rejected"][0] == "W" for p in pairs)
    assert {p["prompt"].strip() for p in pairs} == {"early", "onewrong", "late", "failed"}, "a right response that was cut off is not chosen"


@pytest.mark.parametrize("settings", [{}, {"mode": "all", "num_samples": 5}, {"mode": "rejection", "num_samples": 6, "dedup": True}], ids=str)
def test_a_collection_stopped_anywhere_ends_as_the_straight_one(collect, tmp_path, settings):
    collect("straight", rows=True, **settings)
    served = collect.pools[0].served
    for stop in range(0, served, max(1, served // 9)):
        output = f"stopped-{stop}"
        with contextlib.suppress(KeyboardInterrupt):
            collect(output, rows=True, fail_after=stop, order=stop, **settings)
        whole = {path.name for path in (tmp_path / output / "samples").glob("samples-*.jsonl")}
        assert not (tmp_path / output / "trajectories").exists()
        asked = len(collect.pools)
        collect(output, rows=True, order=stop + 1, **settings | {"questions_in_flight": 2, "rollout": RolloutConfig(num_engines=3)})
        assert files(tmp_path / output) == files(tmp_path / "straight")
        again = collect.pools[asked].requests if len(collect.pools) > asked else []
        there = {t.task_id for name in whole for t in read_jsonl(tmp_path / output / "samples" / name)}
        assert not {request.group.rpartition("/")[2] for request in again} & there, "what is written is not sampled again"


def test_one_stopped_while_its_data_is_written_writes_it_again_without_engines(collect, tmp_path, monkeypatch):
    collect("straight", pairs_per_question=3)
    module = importlib.import_module("openrl_reason.algorithms.collection")
    own, calls = module._write_part, []

    def stop(file, kept):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        own(file, kept)

    monkeypatch.setattr(module, "_write_part", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(pairs_per_question=3)
    assert not (tmp_path / "out/trajectories").exists() and not json.loads((tmp_path / "out/manifest.json").read_text())["finished"]
    pools = len(collect.pools)
    collect(pairs_per_question=3)
    assert len(collect.pools) == pools and files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_complete_collection_is_left_alone_and_its_data_is_made_again_if_it_is_gone(collect, tmp_path, capsys):
    first = collect()
    before = files(tmp_path / "out")
    assert collect() == first and len(collect.pools) == 1 and "nothing is sampled again" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out/trajectories")
    collect()
    assert len(collect.pools) == 1 and files(tmp_path / "out") == before
    collect(seed=7, overwrite=True)
    assert len(collect.pools) == 2 and files(tmp_path / "out").keys() == before.keys() and files(tmp_path / "out") != before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"), ({"max_per_side": 3}, "max_per_side"), ({"rounds": 9}, "rounds"), ({"samples_per_round": 2}, "samples_per_round"),
        ({"mode": "all"}, "mode"), ({"sampling": SamplingConfig(max_new_tokens=8, top_p=0.9)}, "sampling.top_p"), ({"threshold": 0.5}, "threshold"),
        ({"questions_per_block": 4}, "block"), ({"num_items": 3}, "num_items"), ({"reward": RewardConfig(no_answer=-1.0)}, "reward"),
        ({"format": "parquet"}, "format"), ({"rows": True}, "rows"), ({"rollout": RolloutConfig(dtype="float32")}, "rollout.dtype"),
        ({"script": {**SCRIPT, "new": "R" * 16}}, "questions"),
    ],
)  # fmt: skip
def test_changed_settings_are_refused_by_name_and_nothing_is_touched(collect, tmp_path, changes, name):
    with pytest.raises(KeyboardInterrupt):
        collect(fail_after=60)
    before = files(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"other settings \(.*\b{name}\b.*\): delete them, or choose another --output"):
        collect(**changes)
    assert files(tmp_path / "out") == before and len(collect.pools) == 1


def test_another_models_samples_are_refused_and_a_moved_folder_is_not(collect, tmp_path, model):
    collect()
    shutil.copytree(model, tmp_path / "moved")
    config = CollectConfig(
        model=str(tmp_path / "moved"), output=str(tmp_path / "out"), mode="balanced", questions_per_block=3,
        reward=RewardConfig(max_failed_rate=1.0), sampling=SamplingConfig(max_new_tokens=8),
    )  # fmt: skip
    collect_samples(config, task=ScriptedTask(SCRIPT))
    make_model(tmp_path / "other", hidden_size=32, num_layers=2, num_heads=1, num_kv_heads=1, intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"other settings \(model\)"):
        collect_samples(replace(config, model=str(tmp_path / "other")), task=ScriptedTask(SCRIPT))


def test_folders_that_no_collection_wrote_are_not_touched(collect, tmp_path):
    (tmp_path / "out/rows").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has a folder 'rows' that no collection wrote"):
        collect(overwrite=True)
    (tmp_path / "out/rows").rmdir()
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no manifest of a collection"):
        collect()


def test_parquet_holds_the_same_trajectories_and_blocks_without_any_leave_no_file(collect, tmp_path):
    collect("lines")
    manifest = collect("columns", format="parquet", questions_per_block=1)
    lines = [t for file in sorted((tmp_path / "lines/trajectories").iterdir()) for t in read_jsonl(file)]
    columns = [t for file in manifest["files"]["trajectories"] for t in read_parquet(tmp_path / "columns" / file)]
    assert [t.to_record() for t in columns] == [t.to_record() for t in lines], "neither format nor blocks matter"
    assert len(manifest["files"]["trajectories"]) == 7


def test_a_question_that_the_data_holds_twice_is_sampled_once_and_counted(collect, model, tmp_path):
    script = {"a": "R" * 16, "b": "W" * 16}

    class Twice(ScriptedTask):
        def load_split(self, split):
            return super().load_split(split) * 2

    collect(script=script)
    config = CollectConfig(model=model, output=str(tmp_path / "twice"), mode="balanced", sampling=SamplingConfig(max_new_tokens=8))
    found = collect_samples(config, task=Twice(script))["statistics"]
    assert (found["questions"], found["repeated_questions"], found["samples"]) == (2, 2, 32)


def test_too_many_failed_gradings_stop_the_collection_with_their_cause(collect):
    with pytest.raises(WorkerError, match="rewards failed.*too late"):
        collect(reward=RewardConfig(max_failed_rate=0.1))


def test_a_dry_run_tells_the_plan_and_starts_nothing(collect, tmp_path, capsys):
    assert collect(dry_run=True) == {} and not collect.pools and not (tmp_path / "out").exists()
    assert "up to 16 rounds of 1 samples, until 4 are right and 4 wrong" in capsys.readouterr().out


def test_text_rows_have_one_bos():
    class Tokenizer:
        bos_token, bos_token_id = "<s>", 1

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text):
            ids = [1] * self.adds
            if text.startswith("<s>"):
                ids, text = [*ids, 1], text.removeprefix("<s>")
            return {"input_ids": [*ids, *map(ord, text)]}

    assert without_bos("<s>hello", Tokenizer(True)) == "hello" and without_bos("<s>hello", Tokenizer(False)) == "<s>hello"
    assert without_bos("hello", Tokenizer(True)) == "hello"


# ---- settings ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "balance"}, "--mode is 'balance'"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "--sampling.temperature is 0"),
        ({"mode": "balanced", "sampling": SamplingConfig(temperature=0.0)}, "--sampling.temperature is 0"),
        ({"mode": "balanced", "rounds": 1}, "--rounds is 1"),
        ({"dedup": True}, "--dedup is True: is for --mode rejection"),
        ({"mode": "rejection", "pairs_per_question": 3}, "--pairs_per_question is 3"),
        ({"format": "csv"}, "--format is 'csv'"),
        ({"num_samples": 0}, "--num_samples is 0"),
        ({"threshold": float("nan")}, "--threshold is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CollectConfig(**settings)


def test_engines_in_which_no_prompt_fits_are_refused(collect):
    with pytest.raises(ConfigError, match="--sampling.max_new_tokens is 2048: leaves no room for a prompt"):
        collect(sampling=SamplingConfig(max_new_tokens=2048))


def test_the_window_keeps_the_engines_twice_as_busy_as_they_can_be():
    assert CollectConfig(mode="balanced", rollout=RolloutConfig(num_engines=8)).in_flight == 512  # 2 x 8 x 256 sequences, 8 of a question
    assert CollectConfig(num_samples=1000, rollout=RolloutConfig(max_num_seqs=8)).in_flight == 1
    assert CollectConfig(questions_in_flight=3).in_flight == 3
