"""KTO through the command line, on the file that OREO learns from; a run that is killed goes on as if it had not been."""

import json
import random
import signal

import pytest
from safetensors.torch import load_file

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import comparable, run, run_until


@pytest.fixture(scope="module")
def words(tiny_model, tmp_path_factory):
    """Sums with right and wrong answers, four responses to a question."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("data") / "collected.jsonl"
    sums = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(24)]
    rows = [{"prompt": f"{a}+{b}=?\n", "response": f"#### {a + b + wrong}", "reward": float(not wrong)} for a, b in sums for wrong in (0, 1, 0, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["kto", "--policy.path", tiny_model, "--policy.dtype", "float32", "--policy.lr", "1e-3", "--policy.tokens_per_micro_batch", "150",
            "--data.path", f'["{file}"]', "--data.max_length", "64", "--batch_size", "16", "--epochs", "2", "--eval_fraction", "0.2",
            "--loss.beta", "0.5", "--run.save_every", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto") / "straight"
    run(*words, "--run.output_dir", folder)
    return folder


def test_the_labels_part_and_everything_promised_is_there(straight):
    records = read_records(straight / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    evaluations = [record for record in records if record["event"] == "eval"]
    assert train[0]["train/loss"] == pytest.approx(0.5, abs=1e-3) and evaluations[0]["eval/loss"] == pytest.approx(0.5, abs=1e-4)
    assert train[0]["kto/kl"] == pytest.approx(0.0, abs=1e-3) and train[-1]["kto/reward_margin"] > 0.1 and train[-1]["train/lr"] == 0
    counts = json.loads((straight / "labels.json").read_text())
    assert counts["rows"] == 96 == counts["training"] + counts["held_out"] and counts["desirable"] == counts["undesirable"]
    for name in ("reference.safetensors", "model/model.safetensors", "curves.png", "report.html"):
        assert (straight / name).exists(), name


@pytest.mark.slow
def test_kto_resumed_after_kill_9_equals_the_straight_run_bit_by_bit(words, straight, tmp_path):
    folder = tmp_path / "killed"
    process = run_until(5, folder, *words, "--run.output_dir", folder)  # an evaluation and four steps; the checkpoint of step 3 is written
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    run(*words, "--run.output_dir", folder, "--run.resume")
    assert comparable(folder) == comparable(straight)
    one, two = load_file(straight / "model/model.safetensors"), load_file(folder / "model/model.safetensors")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
