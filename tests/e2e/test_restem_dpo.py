"""RestEM and DPO as users run them: two iterations, a kill -9 in the second, and preference learning on the samples they leave."""

import math
import signal

import pytest
from safetensors.torch import load_file

from openrl_reason.data.pairs import read_samples
from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import comparable, run, run_until

REWARD = """
def starts_with_a_digit(response):
    return float(response[:1].isdigit())
"""


@pytest.fixture(scope="module")
def restem_words(tiny_model, tmp_path_factory):
    function = tmp_path_factory.mktemp("reward") / "rewards.py"
    function.write_text(REWARD)
    return [
        "restem", "--policy.path", tiny_model, "--policy.dtype", "float32", "--policy.lr", "3e-3", "--rollout.dtype", "float32",
        "--rollout.max_model_len", "64", "--rollout.kv_cache_gib", "0.05", "--sampling.max_new_tokens", "6", "--sampling.temperature", "1.0",
        "--task.levels", "[1]", "--task.num_train", "40", "--reward.function", f"{function}:starts_with_a_digit", "--keep_truncated", "true",
        "--iterations", "2", "--samples_per_prompt", "4", "--epochs", "6", "--batch_size", "4", "--validation_items", "8",
        "--prompts_per_block", "16", "--selection", "best", "--eval.num_items", "0", "--run.eval_at_start", "false", "--run.eval_every", "3",
        "--run.save_every", "2", "--run.report", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(restem_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "restem"
    run(*restem_words, "--run.output_dir", folder)
    return folder


def test_both_iterations_learn_from_right_samples_alone_and_the_best_candidate_is_exported(straight):
    records = read_records(straight / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    firsts = [record for record in train if "restem/kept" in record]
    assert [record["restem/iteration"] for record in firsts] == [0, 1]
    for record in firsts:
        left_out = ("wrong", "ungraded", "truncated", "repeated", "over_limit")
        assert record["restem/samples"] == 128 == record["restem/kept"] + sum(record[f"restem/{name}"] for name in left_out)
        assert record["train/lr"] == pytest.approx(3e-3), "each iteration has a schedule of its own"
    scores = [record["eval/validation/pass@1"] for record in records if record["event"] == "eval"]
    assert max(scores) == 1.0, "starting with a digit is quickly learned"
    # The second iteration samples from the first one's choice, and trains from the base model again.
    versions = {sample.policy_version for sample in read_samples([straight / "samples/iteration-0001"])}
    best = next(record["step"] for record in records if record.get("eval/validation/pass@1") == max(scores[:3]))
    assert versions == {best} and firsts[0]["train/reward"] < firsts[1]["train/reward"]
    last = next(record for record in reversed(train) if record["restem/iteration"] == 0)
    assert last["train/loss"] < firsts[0]["train/loss"] - 0.5 and firsts[1]["train/loss"] > firsts[0]["train/loss"] - 0.2
    assert (straight / "model/model.safetensors").exists() and len(list(straight.glob("samples/*/samples-*.jsonl"))) == 4


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_second_iteration_goes_on_as_if_it_had_not_been(restem_words, straight, tmp_path):
    folder = tmp_path / "killed"
    words = [*restem_words, "--run.output_dir", folder]
    before = sum(record.get("restem/iteration") != 1 for record in read_records(straight / "metrics.jsonl")[:-1])
    process = run_until(before + 1, folder, *words)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert len(read_records(folder / "metrics.jsonl")) < len(read_records(straight / "metrics.jsonl"))
    written = {file: file.stat().st_mtime_ns for file in folder.glob("samples/*/samples-*.jsonl")}
    assert len(written) == 4
    run(*words, "--run.resume")
    assert comparable(folder) == comparable(straight)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("samples/*/samples-*.jsonl")} == written, "nothing was sampled again"
    one, two = load_file(straight / "model/model.safetensors"), load_file(folder / "model/model.safetensors")
    assert all(one[name].equal(two[name]) for name in one)


def test_dpo_positive_learns_from_the_samples(tiny_model, straight, tmp_path):
    folder = tmp_path / "dpo"
    run("dpo", "--policy.path", tiny_model, "--policy.dtype", "float32", "--policy.lr", "1e-3", "--policy.tokens_per_micro_batch", "150",
        "--pairs.trajectories", f'["{straight}/samples/iteration-0000"]', "--pairs.accept_truncated", "true",
        "--pairs.max_pairs_per_question", "4", "--batch_size", "8", "--epochs", "2", "--eval_fraction", "0.2", "--loss.beta", "0.3",
        "--loss.positive_weight", "50", "--run.output_dir", folder, "--run.report", "false")  # fmt: skip
    records = read_records(folder / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    evaluations = [record for record in records if record["event"] == "eval"]
    assert train[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-3) and evaluations[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train[-1]["dpo/reward_margin"] > 0.1 and train[-1]["train/loss"] < train[0]["train/loss"]
    for name in ("pairs.json", "reference.safetensors", "model/model.safetensors"):
        assert (folder / name).exists(), name
