"""A collection as users run it: stopped by kill -9 and gone on with more engines, it ends with the files of the straight one."""

import json
import signal
import subprocess
import time

import pytest

from openrl_reason.data.pairs import read_samples
from tests.e2e.conftest import ENV, command, run

REWARD = """
def starts_with_a_digit(response):
    return float(response[:1].isdigit())
"""


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for name in ("samples", "trajectories", "rows", "pairs")
            for path in sorted((folder / name).iterdir())}  # fmt: skip


@pytest.mark.slow
def test_a_killed_collection_ends_as_the_straight_one_with_other_engines(tiny_model, tmp_path):
    function = tmp_path / "rewards.py"
    function.write_text(REWARD)
    words = [
        "collect", "--model", tiny_model, "--mode", "balanced", "--rounds", "12", "--max_per_side", "2", "--rows", "true",
        "--pairs_per_question", "2", "--questions_per_block", "16", "--questions_in_flight", "20", "--task.levels", "[1]", "--task.num_train", "96",
        "--reward.function", f"{function}:starts_with_a_digit", "--sampling.max_new_tokens", "24", "--rollout.dtype", "float32",
        "--rollout.max_model_len", "64", "--rollout.kv_cache_gib", "0.05",
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(*words, "--output", straight)
    found = json.loads((straight / "manifest.json").read_text())["statistics"]
    assert found["questions"] + found["repeated_questions"] == 96 and found["samples"] == found["right"] + found["wrong"]
    kept = list(read_samples([str(straight / "trajectories")]))
    by_question = {}
    for sample in kept:
        by_question.setdefault(sample.task_id, []).append(sample.reward)
    assert all(rewards.count(1) <= max(1, rewards.count(0)) and len(rewards) <= 4 for rewards in by_question.values())
    assert found["kept"]["kept"] == len(kept) and found["kept"]["kept_right"] > 5

    log = tmp_path / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(command(*words, "--output", killed), stdout=output, stderr=subprocess.STDOUT, env=ENV)
    deadline = time.monotonic() + 300
    while not list(killed.glob("samples/samples-*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert len(list(killed.glob("samples/samples-*.jsonl"))) < 6 and not (killed / "trajectories").exists()
    run(*words, "--output", killed, "--rollout.num_engines", "2", "--questions_in_flight", "7")
    assert files(killed) == files(straight)
    changed = subprocess.run(command(*words, "--output", killed, "--rounds", "13"), capture_output=True, text=True, env=ENV, timeout=100)
    assert changed.returncode == 1 and "other settings (rounds)" in changed.stderr
