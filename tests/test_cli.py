"""The command line as users run it, where it starts no actors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

TINY = ["--tiny.hidden_size", "64", "--tiny.num_layers", "2", "--tiny.num_heads", "2", "--tiny.num_kv_heads", "1"]


def run(*words, **kwargs):
    return subprocess.run([sys.executable, "-m", "openrl_reason", *words], capture_output=True, text=True, env=ENV, timeout=120, **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    result = run("make-model", "--output", str(folder), *TINY)
    assert result.returncode == 0, result.stderr
    return folder


def test_help_lists_the_commands_and_an_unknown_one_gets_a_suggestion():
    assert "reinforce" in run("--help").stdout
    result = run("reinforc")
    assert result.returncode == 2 and "did you mean 'reinforce'" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["reinforce", "--policy.path", "/no/such/model"], "/no/such/model"),
        (["sft", "--policy.path", "MODEL", "--data.path", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["sft", "--polcy.path", "x"], "did you mean 'policy.path'"),
        (["evaluate", "--model", "MODEL", "--task.name", "arithmetics"], "arithmetic"),
        (["export", "--checkpoint", "/no/such/run", "--output", "x"], "--checkpoint is '/no/such/run'"),
        (["make-model", "--output", "MODEL"], "not empty"),
        (["make-model", "--kind", "smol"], "use tiny or smollm2"),
    ],
)
def test_bad_input_gives_one_error_without_a_traceback(words, expected, model, tmp_path):
    words = [str(model) if word == "MODEL" else word for word in words]
    if words[0] in ("sft", "reinforce"):
        words += ["--run.output_dir", str(tmp_path / "run")]
    result = run(*words, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error:") == 1 and expected in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\n"), "no safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]), "cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors weights"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    ],
)
def test_a_damaged_model_folder_is_told_before_anything_starts(damage, expected, model, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    damage(folder)
    result = run("reinforce", "--policy.path", str(folder), "--run.output_dir", str(tmp_path / "run"), "--run.dry_run")
    assert result.returncode == 2 and "Traceback" not in result.stderr and expected in result.stderr, result.stderr


def test_the_dry_run_prints_actors_bundles_and_batch_arithmetic_and_starts_nothing(model, tmp_path):
    result = run(
        "reinforce", "--policy.path", str(model), "--policy.num_ranks", "2", "--algo.kl.where", "loss", "--algo.minibatches", "4",
        "--run.output_dir", str(tmp_path / "run"), "--run.dry_run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for part in ("32 prompts x 8 samples = 256", "policy-0", "policy-1", "engine-0", "reference-0", "bundle 1", "GiB", "64 responses"):
        assert part in result.stdout, (part, result.stdout)
    assert not (tmp_path / "run").exists()


def test_make_model_twice_with_one_seed_gives_the_same_bytes(model, tmp_path):
    result = run("make-model", "--output", str(tmp_path / "again"), *TINY)
    assert result.returncode == 0, result.stderr
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (model / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert json.loads((model / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
