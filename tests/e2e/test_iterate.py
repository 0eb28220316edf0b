"""Iterated training as users run it: two rounds of rejection sampling, killed in the second, end as rounds that were not."""

import json
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import ENV, command, run

REWARD = """
def starts_with_a_letter(response):
    return float(response[:1].isascii() and response[:1].isalpha())
"""


@pytest.mark.slow
def test_rounds_learn_and_a_killed_run_ends_as_the_straight_one(tiny_model, tmp_path):
    function = tmp_path / "rewards.py"
    function.write_text(REWARD)
    words = [
        "iterate", "--model", tiny_model, "--algorithm", "rejection", "--rounds", "2", "--data", "union", "--task.levels", "[1]",
        "--task.num_train", "48", "--rollout.dtype", "float32", "--rollout.max_model_len", "64", "--rollout.kv_cache_gib", "0.05",
        "--collect.num_samples", "8", "--collect.sampling.max_new_tokens", "4", "--collect.reward.function", f"{function}:starts_with_a_letter",
        "--collect.questions_per_block", "16", "--sft.epochs", "8", "--sft.batch_size", "8", "--sft.max_length", "64",
        "--sft.data.keep_truncated", "true", "--sft.policy.dtype", "float32", "--sft.policy.lr", "3e-3", "--sft.run.save_every", "3",
        "--sft.run.report", "false", "--eval.num_items", "8",
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(*words, "--output", straight, timeout=900)
    summary = json.loads((straight / "summary.json").read_text())
    assert [one["round"] for one in summary] == ["start", "0", "1"] and (straight / "accuracy.png").stat().st_size > 1000
    # Of 384 samples each: 0.1 is about three standard errors of the difference.
    rates = [one["collected"]["right_rate"] for one in summary[1:]]
    assert rates[1] > rates[0] + 0.1, "the second round samples from what the first has learned"
    inputs = [one["inputs"] for one in json.loads((straight / "manifest.json").read_text())["rounds"]]
    assert len(inputs[1]["data"]) == 2 * len(inputs[0]["data"]) == 6 and inputs[1]["policy"] == "round-00/train/model"

    log = tmp_path / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(command(*words, "--output", killed), stdout=output, stderr=subprocess.STDOUT, env=ENV)
    deadline = time.monotonic() + 900
    while len(read_records(killed / "round-01/train/metrics.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    result = run(*words, "--output", killed, timeout=900)
    assert "round 1, collect: is finished" in result.stdout and "resumed after step" in result.stdout
    one, two = (load_file(folder / "round-01/train/model/model.safetensors") for folder in (straight, killed))
    assert all(one[name].equal(two[name]) for name in one)
    assert json.loads((killed / "summary.json").read_text())[1:] == summary[1:]
