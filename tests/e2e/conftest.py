"""Whole runs through the command line, as users start them: real Ray, real vLLM, real DeepSpeed, on a model made on the spot."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openrl_reason.observe.run_log import read_records

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = ["--tiny.hidden_size", "64", "--tiny.num_layers", "2", "--tiny.num_heads", "2", "--tiny.num_kv_heads", "1", "--tiny.intermediate_size", "128"]


def command(*words):
    return [sys.executable, "-m", "openrl_reason", *map(str, words)]


def run(*words, timeout=400):
    result = subprocess.run(command(*words), capture_output=True, text=True, env=ENV, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(map(str, words))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def run_until(records, folder, *words, timeout=400):
    """Starts a run and returns the process once ``folder``/metrics.jsonl has that many records."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    deadline = time.monotonic() + timeout
    while len(read_records(folder / "metrics.jsonl")) < records:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run is too slow"
        time.sleep(0.02)
    return process


def comparable(folder):
    """The records of a run without wall-clock figures."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("timing/", "perf/"))}
        for record in read_records(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="session")
def tiny_model(made_once):
    return made_once("tiny", lambda folder: run("make-model", "--output", folder, *TINY))


@pytest.fixture(scope="session")
def sft_words(tiny_model):
    return ["sft", "--policy.path", tiny_model, "--policy.dtype", "float32", "--policy.lr", "3e-3", "--batch_size", "32", "--task.num_train", "512",
            "--task.levels", "[1]", "--eval_items", "16", "--run.steps", "6", "--run.save_every", "2", "--run.log_rollouts", "4"]  # fmt: skip


@pytest.fixture(scope="session")
def sft_run(sft_words, made_once):
    """A straight SFT run of 6 steps; its model is the start of the RL tests."""
    return made_once("sft", lambda folder: run(*sft_words, "--run.output_dir", folder))
