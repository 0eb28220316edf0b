"""What the trainer exports, the engine serves as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers_models import random_batch, supervised_loss, write_tiny_model

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=64 << 20, disable_log_stats=True)
out = llm.generate([{"prompt_token_ids": [5, 9, 3]}], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_vllm_and_transformers_agree_on_an_exported_lora_model(tmp_path, tied):
    pytest.importorskip("vllm")
    from transformers import AutoModelForCausalLM

    from openrl_reason.workers.model_config import LoraConfig, TrainedModelConfig
    from openrl_reason.workers.model_worker import ModelWorker

    path = write_tiny_model(tmp_path / "m", tied=tied, hidden_size=128, intermediate_size=128)  # the engine wants heads of 32
    config = TrainedModelConfig(path=path, dtype="float32", zero_stage=3, lr=1e-2, warmup_ratio=0.0, lora=LoraConfig(rank=4))
    worker = ModelWorker(config, total_steps=4)
    batch = random_batch([20, 30])
    for _ in range(4):
        worker.update([batch], supervised_loss, {"actions": float(batch.num_actions)})
    worker.export_hf(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    expected = model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 3:].tolist()
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | quiet | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "export")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"TOKENS {expected}" in done.stdout
