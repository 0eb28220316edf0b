"""A reward function that misbehaves in every way: the run goes on or stops as configured, and every lost sample is counted."""

import subprocess

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import ENV, command, run

MISBEHAVING = """
import os, pathlib, time

CALLS = pathlib.Path(__file__).with_suffix(".calls")

def reward_func(queries, prompts, labels, **kwargs):
    with CALLS.open("a") as calls:  # the process may not live to count in memory
        calls.write("x")
    call, rewards = CALLS.stat().st_size, [float(len(query) % 2) for query in queries]
    if call == 2:
        time.sleep(1000)
    if call == 3:
        raise RuntimeError("because")
    if call == 4:
        rewards[0] = float("nan")
    if call == 5:
        rewards.pop()
    if call == 6:
        os.kill(os.getpid(), 9)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"length": [float(len(query)) for query in queries]}}
"""


def words(model, folder, function, *more):
    return [
        "reinforce", "--policy.path", model, "--policy.dtype", "float32", "--rollout.dtype", "float32", "--rollout.max_model_len", "96",
        "--rollout.kv_cache_gib", "0.05", "--sampling.max_new_tokens", "16", "--task.levels", "[1]", "--task.num_train", "32",
        "--prompts_per_step", "2", "--samples_per_prompt", "4", "--eval.num_items", "0", "--run.steps", "6", "--run.output_dir", folder,
        "--reward.function", function, "--reward.batch_size", "4", "--reward.deadline_s", "2", *more,
    ]  # fmt: skip


def test_the_run_goes_on_with_the_counts_or_stops_with_them(tiny_model, tmp_path):
    (tmp_path / "reward.py").write_text(MISBEHAVING)
    folder = tmp_path / "goes_on"
    run(*words(tiny_model, folder, tmp_path / "reward.py", "--reward.max_failed_rate", "1"))
    train = [record for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]
    assert len(train) == 6
    # Two calls of four samples a step. The second never comes back, the third raises, the fourth has one NaN, the fifth a reward too few, the
    # sixth kills its process; then all is well.
    counts = [{status: round(8 * step[f"reward/{status}_rate"]) for status in ("timeout", "error", "crashed")} for step in train]
    assert sum(step["timeout"] for step in counts) == 4 and sum(step["crashed"] for step in counts) == 4
    assert sum(step["error"] for step in counts) == 4 + 1 + 4
    assert [step["rollout/ungraded"] for step in train] == [sum(step.values()) for step in counts]
    assert counts[2] == {"timeout": 0, "error": 4, "crashed": 4} and train[2]["train/skipped_update"] == 1  # nothing to learn from
    assert sum(counts[-1].values()) == 0 and all(step["reward/reward_func/log/length"] > 0 for step in train if step["reward/failed_rate"] < 1)
    failed = [record for record in read_records(folder / "rollouts.jsonl") if record["status"] != "ok"]
    assert failed and all(record["reward"] is None and record["detail"] for record in failed)

    (tmp_path / "reward.calls").unlink()
    stops = command(*words(tiny_model, tmp_path / "stops", tmp_path / "reward.py", "--reward.max_failed_rate", "0.25"))
    result = subprocess.run(stops, capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "4 of 8 rewards failed (" in result.stderr and "timeout 4" in result.stderr and "--reward.max_failed_rate is 0.25" in result.stderr
    assert "Traceback" not in result.stderr
