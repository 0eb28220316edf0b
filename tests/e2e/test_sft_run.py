"""SFT as users run it."""

import signal
import subprocess

import pytest
from safetensors.torch import load_file

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import comparable, run, run_until


def test_the_loss_falls_and_everything_promised_is_there(sft_run):
    records = read_records(sft_run / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    evaluations = [record["eval/loss"] for record in records if record["event"] == "eval"]
    assert [record["step"] for record in train] == list(range(6)) and train[-1]["train/loss"] < train[0]["train/loss"]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    assert train[-1]["train/lr"] < train[1]["train/lr"]
    for name in ("config.yaml", "curves.png", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "checkpoints/latest"):
        assert (sft_run / name).exists(), name
    assert sorted(path.name for path in (sft_run / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]


def test_the_export_loads_in_transformers_as_it_is(sft_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft_run / "model"), AutoTokenizer.from_pretrained(sft_run / "model")
    assert tokenizer.decode(model.generate(**tokenizer("1+2=?\n", return_tensors="pt"), max_new_tokens=4, do_sample=False)[0])


def test_sft_resumed_after_kill_9_equals_the_straight_run_bit_by_bit(sft_words, sft_run, tmp_path):
    words = [*sft_words, "--run.output_dir", tmp_path / "killed"]
    process = run_until(4, tmp_path / "killed", *words)  # an evaluation and three steps; the checkpoint of step 2 is written
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert len(read_records(tmp_path / "killed" / "metrics.jsonl")) < 8
    run(*words, "--run.resume")
    assert comparable(tmp_path / "killed") == comparable(sft_run)
    straight, resumed = load_file(sft_run / "model/model.safetensors"), load_file(tmp_path / "killed/model/model.safetensors")
    assert all(straight[name].equal(resumed[name]) for name in straight) and straight.keys() == resumed.keys()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_with_one_line_and_leaves_no_half_written_checkpoint(stop, sft_words, tmp_path):
    folder = tmp_path / "interrupted"
    words = [*sft_words, "--run.output_dir", folder, "--run.steps", "100000", "--run.save_every", "1"]
    process = run_until(4, folder, *words)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output, output[-3000:]
    assert all((path / "state.json").exists() for path in (folder / "checkpoints").glob("step-*"))
    leftovers = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    assert not leftovers


def test_two_ranks_and_zero_3_log_the_same_losses_as_one_rank(sft_words, sft_run, tmp_path):
    more = ["--policy.num_ranks", "2", "--policy.zero_stage", "3", "--policy.tokens_per_micro_batch", "256"]
    run(*sft_words, "--run.output_dir", tmp_path / "two", *more)
    for one, two in zip(comparable(sft_run), comparable(tmp_path / "two"), strict=True):
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            if name in one:
                assert abs(one[name] - two[name]) <= 2e-4 * abs(one[name]), (one["step"], name)
