"""Online RL as users run it: generation, grading, update, weight sync, resume."""

import json
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import ENV, comparable, run, run_until


def words(sft_run, folder, *more):
    return [
        "reinforce", "--policy.path", sft_run / "model", "--policy.dtype", "float32", "--policy.lr", "1e-3", "--rollout.dtype", "float32",
        "--rollout.max_model_len", "128", "--rollout.kv_cache_gib", "0.05", "--sampling.max_new_tokens", "32", "--task.levels", "[1]",
        "--task.num_train", "64", "--prompts_per_step", "8", "--samples_per_prompt", "4", "--eval.num_items", "8", "--run.steps", "5",
        "--run.save_every", "2", "--run.output_dir", folder, "--algo.kl.where", "loss", "--algo.kl.coef", "0.01", "--algo.minibatches", "2",
        "--reference.prompts_per_chunk", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(sft_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl") / "straight"
    run(*words(sft_run, folder))
    return folder


def test_engine_and_trainer_agree_and_the_first_step_has_kl_zero(straight):
    train = [record for record in read_records(straight / "metrics.jsonl") if record["event"] == "train"]
    assert [record["step"] for record in train] == list(range(5))
    for record in train:
        assert record["rollout/ungraded"] == 0 and record["reward/error_rate"] == 0
    # Later minibatches of a step score with updated weights; the first step's KL is that of its second minibatch alone.
    assert train[0]["train/kl"] < 1e-2 < train[-1]["train/kl"] + 1
    rollouts = read_records(straight / "rollouts.jsonl")
    assert {record["policy_version"] for record in rollouts if record["source"] == "train"} == set(range(5))
    # Evaluated before the first step and after the last, token by token.
    evaluated = [record for record in rollouts if record["source"] == "eval/arithmetic"]
    assert {record["policy_version"] for record in evaluated} == {0, 5}
    for record in rollouts:
        lengths = {len(record["tokens"]), len(record["token_data"]["logprob"]), record["num_tokens"]}
        assert "".join(record["tokens"]) == record["response"] and len(lengths) == 1
    assert all(len(record["token_data"]["advantage"]) == record["num_tokens"] for record in rollouts if record["source"] == "train")
    assert "<html" in (straight / "report.html").read_text(encoding="utf-8")


def test_online_rl_resumed_after_kill_9_equals_the_straight_run(sft_run, straight, tmp_path):
    folder = tmp_path / "killed"
    process = run_until(4, folder, *words(sft_run, folder))  # an evaluation and three steps: one step past the checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    run(*words(sft_run, folder, "--run.resume"))
    assert comparable(folder) == comparable(straight)
    one, two = load_file(straight / "model/model.safetensors"), load_file(folder / "model/model.safetensors")
    assert all(one[name].equal(two[name]) for name in one)
    assert read_records(folder / "rollouts.jsonl") == read_records(straight / "rollouts.jsonl")


def test_one_update_per_step_is_on_policy_to_rounding(sft_run, tmp_path):
    """Ratio 1 and KL 0 at step 0; engine log-probs are the trainer's to 1e-4 after weight updates too. Separate bundles, two ranks."""
    folder = tmp_path / "on_policy"
    run(*words(sft_run, folder, "--algo.minibatches", "1", "--run.steps", "3", "--run.save_every", "0", "--max_logprob_difference", "1e-4",
               "--policy.num_ranks", "2", "--policy.zero_stage", "2", "--placement.colocate", "false", "--algo.advantage", "grpo"))  # fmt: skip
    train = [record for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]
    assert abs(train[0]["train/kl"]) < 1e-6
    for record in train:
        assert record["sampling/logprob_difference/mean"] < 1e-4 and record["sampling/logprob_difference/max"] < 1e-3
        assert record["train/clip_fraction/low"] == record["train/clip_fraction/high"] == 0
        assert record["train/ratio/max"] == record["train/ratio/min"] == 1


def test_the_log_prob_gate_stops_the_run_with_one_line(sft_run, tmp_path):
    from tests.e2e.conftest import command

    more = ["--max_logprob_difference", "1e-12", "--algo.kl.where", "none", "--run.eval_at_start", "false"]
    result = subprocess.run(command(*words(sft_run, tmp_path / "gated", *more)), capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 1 and "--max_logprob_difference" in result.stderr and "Traceback" not in result.stderr, result.stderr[-2000:]


def test_evaluate_and_export_take_what_a_run_leaves(straight, tmp_path):
    run("export", "--checkpoint", straight, "--output", tmp_path / "export", "--dtype", "float32")
    one, two = load_file(straight / "model/model.safetensors"), load_file(tmp_path / "export/model.safetensors")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    run("evaluate", "--model", tmp_path / "export", "--task.levels", "[1]", "--num_items", "16", "--num_samples", "2",
        "--sampling.temperature", "1.0", "--sampling.max_new_tokens", "32", "--rollout.max_model_len", "128",
        "--rollout.dtype", "float32", "--rollout.kv_cache_gib", "0.05",
        "--output", tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 <= result["eval/arithmetic/pass@1"] <= 1 and result["num_items"] == 16
    assert len((tmp_path / "result.samples.jsonl").read_text().splitlines()) == 32


def test_the_custom_driver_of_the_examples_runs(sft_run, tmp_path):
    words = [sys.executable, "examples/python/custom_driver.py", str(sft_run / "model"), str(tmp_path / "custom")]
    result = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "custom/model/config.json").exists() and "eval/arithmetic/pass@1" in result.stdout


def test_the_loop_without_ray_of_the_examples_runs(sft_run):
    words = [sys.executable, "examples/python/gym_loop.py", str(sft_run / "model"), "2"]
    result = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 1: reward" in result.stdout
