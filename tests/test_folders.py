"""No command writes into another one's folder, nor two at once into one."""

import json
import os
import signal
import subprocess
import sys

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.folders import COLLECTION, ITERATED, RUN, claimed, occupant, refuse_others


def make(folder, kind):
    folder.mkdir(parents=True)
    if kind == RUN:
        (folder / "metrics.jsonl").touch()
    elif kind == "a run that wrote a checkpoint alone":
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    elif kind == "a model":
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
    elif kind is not None:
        content = {COLLECTION: {"format": "openrl_reason.collection.v1"}, ITERATED: {"format": "openrl_reason.iterate.v1"}}
        (folder / "manifest.json").write_text(json.dumps(content.get(kind, {"token_store": 1})))


@pytest.mark.parametrize("own", [COLLECTION, ITERATED, RUN])
@pytest.mark.parametrize("kind", [COLLECTION, ITERATED, RUN, "a run that wrote a checkpoint alone", "a model", "a token store", None])
def test_a_folder_is_only_its_own_commands(tmp_path, own, kind):
    folder = tmp_path / "out"
    make(folder, kind)
    found = RUN if kind == "a run that wrote a checkpoint alone" else kind
    assert occupant(folder) == found
    if found in (None, own):
        refuse_others(folder, "output", own)
    else:
        with pytest.raises(ConfigError, match=f"--output is .*out, which holds {found}: choose another folder"):
            refuse_others(folder, "output", own)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="--output is .*out, which is a file: name a folder"):
        refuse_others(tmp_path / "out", "output", RUN)
    assert occupant(tmp_path / "nothing") is None


CLAIM = """
import pathlib, sys, time
from openrl_reason.folders import claimed
with claimed(pathlib.Path(sys.argv[1]), 'x'):
    print('there', flush=True)
    time.sleep(60)
"""


def test_a_folder_is_claimed_until_its_process_ends_however_that_ends(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CLAIM, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    with pytest.raises(ConfigError, match="--run.output_dir is .*, where another process is at work"), claimed(tmp_path, "run.output_dir"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    with claimed(tmp_path, "run.output_dir"), pytest.raises(ConfigError), claimed(tmp_path, "run.output_dir"):
        pass
    assert not list(tmp_path.iterdir())
