"""A checkpoint is complete or absent, whatever happens while it is written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openrl_reason.atomic import atomic_folder, write_json
from openrl_reason.errors import CheckpointError
from openrl_reason.workers.checkpoint import CheckpointManager


def writer(text):
    def write(folder):
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return write


def content(checkpoint):
    return (checkpoint.path / "part" / "weights").read_text()


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_newest_checkpoint_comes_back_with_its_state(tmp_path):
    manager = CheckpointManager(tmp_path / "runs" / "a", keep=2)
    assert manager.latest() is None
    for step in (2, 4, 10):
        assert manager.save(step, writer(f"weights {step}"), {"position": step, "nested": {"x": [1, 2.5, None]}}).is_dir()
    latest = CheckpointManager(tmp_path / "runs" / "a").latest()
    assert latest.step == 10 and latest.state == {"position": 10, "nested": {"x": [1, 2.5, None]}} and content(latest) == "weights 10"


def test_only_the_newest_are_kept_and_saving_a_step_again_replaces_it(tmp_path):
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2, 3):
        manager.save(step, writer(str(step)), {})
    manager.save(3, writer("again"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert content(manager.latest()) == "again"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "denied")])
def test_a_full_disk_leaves_the_previous_checkpoint_and_names_the_path(tmp_path, failure):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, writer("good"), {"position": 1})

    def fail_midway(folder):
        writer("half")(folder)
        raise failure

    with pytest.raises(CheckpointError, match=f"could not write {tmp_path}/step-00000002.*Nothing that was there") as raised:
        manager.save(2, fail_midway, {})
    assert failure.strerror in str(raised.value)
    assert content(manager.latest()) == "good" and manager.latest().state == {"position": 1} and not hidden(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_disk_that_fills_at_the_very_end_does_no_harm_either(tmp_path, monkeypatch, call):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, writer("good"), {})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="step-00000002.*No space left"):
            manager.save(2, writer("new"), {})
    assert content(manager.latest()) == "good"
    manager.save(3, writer("later"), {})
    assert content(manager.latest()) == "later" and not hidden(tmp_path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interruption_passes_through_and_leaves_nothing_half_written(tmp_path, interruption):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, writer("good"), {})

    def interrupted(folder):
        writer("half")(folder)
        raise interruption

    with pytest.raises(interruption):
        manager.save(2, interrupted, {})
    assert content(manager.latest()) == "good" and not hidden(tmp_path)


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        CheckpointManager(tmp_path / "x").save(1, writer(""), {"tensor": object()})
    assert not (tmp_path / "x").exists()


def test_kill_9_during_a_save_leaves_the_previous_one_and_the_next_run_cleans_up(tmp_path):
    CheckpointManager(tmp_path, keep=1).save(1, writer("good"), {})
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom openrl_reason.workers.checkpoint import CheckpointManager\n"
        "def write(folder):\n    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)\n"
        f"CheckpointManager({str(tmp_path)!r}, keep=1).save(2, write, {{}})"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)})
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(hidden(tmp_path)) == 1
    assert content(CheckpointManager(tmp_path).latest()) == "good"
    assert content(CheckpointManager(tmp_path).latest(clean=True)) == "good" and not hidden(tmp_path)


def test_a_kill_between_the_two_renames_of_a_replacement_is_undone(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, writer("first"), {})
    renames = []
    real = os.rename

    def die_at_the_second(source, target):
        renames.append(target)
        if len(renames) == 2:
            os.replace(source, source.with_name(".unfinished-step-00000001-lost"))  # a killed process cleans nothing up
            raise SystemExit
        real(source, target)

    monkeypatch.setattr(os, "rename", die_at_the_second)
    with pytest.raises(SystemExit):
        manager.save(1, writer("second"), {})
    monkeypatch.undo()
    assert content(CheckpointManager(tmp_path).latest(clean=True)) == "first" and not hidden(tmp_path)


def test_a_pointer_to_a_deleted_checkpoint_falls_back_to_the_newest_complete_one(tmp_path):
    manager = CheckpointManager(tmp_path, keep=3)
    manager.save(1, writer("one"), {})
    manager.save(2, writer("two"), {})
    write_json(tmp_path / "latest", {"step": 9, "path": "step-00000009"})
    (tmp_path / "step-00000003").mkdir()  # not a checkpoint: it has no state
    assert content(manager.latest()) == "two"


def test_damaged_records_are_named(tmp_path):
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, writer("one"), {})
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        manager.latest()
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json"):
        manager.latest()
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointManager(tmp_path, keep=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full_leaves_no_half_written_checkpoint(tmp_path):
    import torch
    from safetensors.torch import save_file

    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        manager = CheckpointManager(mount, keep=2)
        manager.save(1, lambda folder: save_file({"x": torch.zeros(1000)}, folder / "a.safetensors"), {})
        with pytest.raises(CheckpointError, match="step-00000002"):
            manager.save(2, lambda folder: save_file({"x": torch.zeros(1_000_000)}, folder / "a.safetensors"), {})
        assert manager.latest().step == 1 and not hidden(mount)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_folder_in_use_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "export"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    start = time.time()
    with atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["b"] and time.time() - start < 5 and not hidden(tmp_path)
