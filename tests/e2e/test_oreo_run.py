"""OREO through the command line: a run killed and resumed equals the straight one, on one rank and on two; the critic serves PPO."""

import json
import os
import random
import signal

import pytest

from openrl_reason.config import parse_config
from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import comparable, run, run_until


@pytest.fixture(scope="module")
def words(tiny_model, tmp_path_factory):
    """Sums with right and wrong answers, four responses to a question."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("data") / "responses.jsonl"
    rows = []
    for _ in range(24):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        for wrong in (0, 0, 1, 2):
            answer = f"{a} and {b}\n{a + b + wrong}"
            rows.append({"prompt": f"{a} + {b} = ", "response": answer, "reward": float(not wrong)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["oreo", "--policy.path", tiny_model, "--policy.dtype", "float32", "--policy.lr", "1e-3", "--critic.dtype", "float32",
            "--critic.lr", "1e-3", "--data.path", f'["{file}"]', "--data.max_length", "64", "--batch_size", "16", "--algo.level", "step",
            "--algo.beta", "0.1", "--eval_fraction", "0.1", "--run.save_every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oreo") / "straight"
    run(*words, "--run.output_dir", folder)
    return folder


def test_oreo_resumed_after_kill_9_equals_the_straight_run_bit_by_bit(words, straight, tmp_path):
    folder = tmp_path / "killed"
    process = run_until(4, folder, *words, "--run.output_dir", folder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(*words, "--run.output_dir", folder, "--run.resume", "true")
    assert comparable(folder) == comparable(straight)
    for name in ("model", "critic"):
        for file in (straight / name).glob("*.safetensors"):
            assert file.read_bytes() == (folder / name / file.name).read_bytes(), file
    records = read_records(straight / "metrics.jsonl")
    trained = [record for record in records if record["event"] == "train"]
    assert trained[0]["train/kl"] == pytest.approx(0, abs=1e-5) and trained[0]["offline/value_max"] == 0
    assert trained[-1]["critic/value_loss"] < trained[0]["critic/value_loss"] and trained[-1]["train/lr"] == 0
    assert (straight / "report.html").is_file()
    assert json.loads((straight / "critic" / "values.json").read_text()) == {"algorithm": "oreo", "level": "step"}


@pytest.mark.slow
def test_two_ranks_of_each_model_learn_what_one_does(words, straight, tmp_path):
    folder = tmp_path / "ranks"
    run(*words, "--run.output_dir", folder, "--policy.num_ranks", "2", "--critic.num_ranks", "2", "--policy.zero_stage", "2",
        "--critic.zero_stage", "3")  # fmt: skip
    trained = [[record for record in comparable(run) if "train/policy_loss" in record] for run in (straight, folder)]
    assert trained[0]
    for one, two in zip(*trained, strict=True):
        for name in ("train/policy_loss", "critic/value_loss", "train/kl", "train/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_the_critic_is_the_start_of_ppo(straight):
    from openrl_reason.algorithms.ppo import PPOConfig, PPOTrainer
    from openrl_reason.models.loading import load_tokenizer
    from openrl_reason.models.scalar_model import check_scalar_folder

    config = parse_config(PPOConfig, ["--policy.path", str(straight / "model"), "--critic.path", str(straight / "critic")], prog="ppo")
    critic = PPOTrainer(config).critic_config()
    check_scalar_folder(critic.path, load_tokenizer(str(straight / "model")), 64, flag="critic.path")
