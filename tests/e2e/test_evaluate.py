"""The evaluate command as users run it: two sets on one engine, killed and continued, compared."""

import json
import signal
import subprocess
import time

from tests.e2e.conftest import ENV, command, run

SETS = [
    {"name": "easy", "task": {"name": "arithmetic", "levels": [1]}, "num_items": 12, "greedy": True, "also_grade": ["gsm8k_lenient"], "ks": [2, 4]},
    {"name": "mixed", "task": {"name": "arithmetic", "levels": [1, 3]}, "num_items": 10, "num_samples": 2},
]


def words(model, output, *more):
    return [
        "evaluate", "--model", model, "--sets", json.dumps(SETS), "--num_samples", "4", "--sampling.temperature", "1.0",
        "--sampling.max_new_tokens", "32", "--rollout.max_model_len", "128", "--rollout.dtype", "float32", "--rollout.kv_cache_gib", "0.05",
        "--output", output, *more,
    ]  # fmt: skip


def test_sets_are_evaluated_killed_continued_and_compared(tiny_model, tmp_path):
    straight, killed = tmp_path / "straight.json", tmp_path / "killed.json"
    printed = run(*words(tiny_model, straight)).stdout
    assert "easy/greedy" in printed and "mixed by level" in printed
    result = json.loads(straight.read_text())
    for name in ("easy/pass@1", "easy/pass@2", "easy/pass@4_low", "easy/gsm8k_lenient/pass@1", "easy/greedy/pass@1", "mixed/pass@2_high"):
        assert 0 <= result[f"eval/{name}"] <= 1
    assert result["num_items"] == 34 and [one["num_samples"] for one in result["sets"]] == [4, 1, 2]
    assert result["model"]["weights_fingerprint"] and result["config"]["sets"][1]["name"] == "mixed"
    samples = (tmp_path / "straight.samples.jsonl").read_text()
    assert len(samples.splitlines()) == 12 * 4 + 12 + 10 * 2

    process = subprocess.Popen(command(*words(tiny_model, killed)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    partial, deadline = tmp_path / "killed.partial.jsonl", time.monotonic() + 120
    while not (partial.exists() and partial.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert "are used" in run(*words(tiny_model, killed)).stdout
    assert (tmp_path / "killed.samples.jsonl").read_text() == samples and not partial.exists()
    again = json.loads(killed.read_text())
    assert again["sets"] == result["sets"]

    compared = run("compare", straight, killed, "--output", tmp_path / "compared.json").stdout
    assert "0 / 0 / 12" in compared
    assert [one["p_value"] for one in json.loads((tmp_path / "compared.json").read_text())["comparisons"]] == [1.0] * 3
