"""Stores that tasks wrote are those that one process writes, also where a run's bundles hold every CPU."""

import pytest

from openrl_reason.data import offline_build
from openrl_reason.data.offline import OfflineDataConfig, build_store
from openrl_reason.errors import DataError
from tests.data.offline_helpers import write_lines, write_tokenizer_folder

ray = pytest.importorskip("ray")
from openrl_reason.workers.loader import map_parts  # noqa: E402
from openrl_reason.workers.placement import Placement, PlacementConfig, Role  # noqa: E402


@pytest.fixture
def rows():
    return [{"prompt": f"{number // 3}+1?\n", "response": "so\n" * (number % 4) + str(number), "reward": number % 2} for number in range(200)]


def files(store):
    return {str(file.relative_to(store.folder)): file.read_bytes() for file in store.folder.rglob("*.npy")}


def build(path, model, folder, parallel):
    return build_store(OfflineDataConfig(path=(path,), parallel=parallel), model, folder, say=lambda text: None)


def test_tasks_beside_bundles_that_hold_all_cpus_write_what_one_process_does(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(offline_build, "_PART_BYTES", 3000)
    model = write_tokenizer_folder(tmp_path / "model")
    path = write_lines(tmp_path / "rows.jsonl", rows)
    alone = build(path, model, tmp_path / "alone", "never")
    assert not ray.is_initialized() and len(alone.manifest["shards"]) > 3
    with Placement(PlacementConfig(device="cpu"), [Role("policy", 2)]):
        assert ray.available_resources().get("CPU", 0) == 0
        together = build(path, model, tmp_path / "together", "always")
        # Of two mistakes the first in the file is told, whichever task finds one first.
        write_lines(tmp_path / "rows.jsonl", [*rows[:60], {"prompt": "1?"}, *rows[60:190], "oops", *rows[190:]])
        with pytest.raises(DataError, match=r"rows\.jsonl:61: no column 'response'"):
            build(path, model, tmp_path / "bad", "always")
        assert ray.is_initialized(), "a cluster that was there stays"
    assert together.identity == alone.identity and together.statistics == alone.statistics and files(together) == files(alone)


@pytest.mark.slow
def test_a_cluster_is_started_for_the_time_of_the_build_where_there_is_none_and_results_come_in_order():
    assert list(map_parts(lambda number: {"square": number**2}, 7, placement=PlacementConfig(device="cpu"))) == [{"square": n**2} for n in range(7)]
    assert not ray.is_initialized()
