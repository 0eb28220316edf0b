"""SFT tokens per CPU-second: this library against bare padded PyTorch and against TRL, on one thread.

    python benchmarks/bench_sft_throughput.py --trl_python /path/to/a/venv/with/trl/bin/python

Same Qwen2 architecture and random weights (7.9 M parameters), same ragged random sequences (16 to 512 tokens), same optimiser
(AdamW, fused), same global batch (32 sequences), float32, loss on every token. Systems run in turns, each in its own process; a round's first
step is not counted. CPU time, so that a busy machine disturbs little. Written to benchmarks/results/sft_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES_PER_STEP = 32
LEARNING_RATE = 1e-4


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    config = Qwen2Config(
        vocab_size=6144, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<|endoftext|>": 1} | {f"t{index}": index for index in range(2, 6144)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token="<|endoftext|>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def sequences(num_steps: int) -> list[list[list[int]]]:
    """[step][sequence] token ids; the same for every system."""
    import random

    source = random.Random(1)
    return [
        [[source.randrange(2, 6144) for _ in range(source.randint(16, 512))] for _ in range(SEQUENCES_PER_STEP)]
        for _ in range(num_steps)
    ]


def run_ours(folder: str, steps: list[list[list[int]]], zero_stage: int, tokens_per_micro_batch: int, dtype: str) -> list[float]:
    """CPU seconds of each step, with cutting the batch into micro-batches."""
    import torch

    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.core.partition import plan_micro_batches
    from openrl_reason.workers.model_config import TrainedModelConfig
    from openrl_reason.workers.model_worker import ModelWorker

    def loss_fn(outputs, batch, denominators):
        loss = -(outputs.logprobs * batch.action_mask).sum() / denominators["tokens"]
        return loss, {"loss": loss.detach()}

    config = TrainedModelConfig(
        path=folder, dtype=dtype, zero_stage=zero_stage, lr=LEARNING_RATE, schedule="constant", warmup_ratio=0.0,
        tokens_per_micro_batch=tokens_per_micro_batch, betas=(0.9, 0.999), attention="packed",
    )  # fmt: skip
    worker = ModelWorker(config, total_steps=len(steps))
    times, losses = [], []
    for step in steps:
        lengths = [len(sequence) for sequence in step]
        num_tokens = sum(lengths)
        mask = torch.ones(num_tokens, dtype=torch.bool)
        batch = TokenBatch(
            token_ids=torch.tensor([token for sequence in step for token in sequence]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            action_mask=mask,
            step_ids=torch.zeros(num_tokens, dtype=torch.int64),
            behaviour_logprobs=torch.zeros(num_tokens),
        )
        start = time.process_time()
        pieces = batch.split(plan_micro_batches(lengths, 1, tokens_per_micro_batch)[0])
        metrics = worker.update(pieces, loss_fn, {"tokens": float(num_tokens - len(lengths))})
        times.append(time.process_time() - start)
        losses.append(metrics["loss"])
    print("losses", [round(value, 4) for value in losses], file=sys.stderr)
    return times


def run_padded(folder: str, steps: list[list[list[int]]], micro_batch: int, dtype: str) -> list[float]:
    """The usual loop: pad, forward, cross-entropy, AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    times, losses = [], []
    for step in steps:
        start = time.process_time()
        num_tokens, total = sum(len(sequence) - 1 for sequence in step), 0.0
        for first in range(0, len(step), micro_batch):
            rows = [torch.tensor(sequence) for sequence in step[first : first + micro_batch]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            keep = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = model(input_ids=ids, attention_mask=keep).logits[:, :-1].float()
            targets = torch.where(keep[:, 1:] == 1, ids[:, 1:], -100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
        losses.append(total)
    print("losses", [round(value, 4) for value in losses], file=sys.stderr)
    return times


def run_trl(folder: str, steps: list[list[list[int]]], micro_batch: int, dtype: str) -> list[float]:
    """TRL's SFTTrainer as it comes: padded, micro-batches of ``micro_batch``, the same sequences in the same order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = self.start if hasattr(self, "start") and self.start is not None else time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.process_time()
            times.append(now - self.start)
            self.start = now  # fetching and collating the next batch belongs to the next step

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(
            output_dir=output, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=SEQUENCES_PER_STEP // micro_batch,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=len(steps), max_length=1024, report_to="none",
            save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
            optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, disable_tqdm=True, dataloader_num_workers=0, packing=False,
        )  # fmt: skip
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)),
            args=args,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_dict({"input_ids": [sequence for step in steps for sequence in step]}),
            callbacks=[Clock()],
        )
        result = trainer.train()
    print("mean loss", round(result.training_loss, 4), file=sys.stderr)
    return times


def run_system(name: str, folder: str, num_steps: int, dtype: str) -> None:
    import torch

    torch.set_num_threads(1)
    steps = sequences(num_steps)
    kind, _, setting = name.partition("-")
    if kind == "ours":
        stage, tokens = setting.split("-")
        times = run_ours(folder, steps, int(stage.removeprefix("zero")), int(tokens), dtype)
    else:
        times = {"padded": run_padded, "trl": run_trl}[kind](folder, steps, int(setting), dtype)
    tokens = sum(len(sequence) for step in steps[1:] for sequence in step)
    print(json.dumps({"tokens_per_cpu_second": tokens / sum(times[1:])}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default="", help="Python of an environment with trl; TRL is left out without it")
    parser.add_argument("--systems", default="ours-zero0-4096,ours-zero1-4096,padded-8,padded-4,trl-8,trl-4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="per round; the first is not counted")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "sft_throughput.json"))
    parser.add_argument("--run", nargs=2, metavar=("SYSTEM", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_system(*args.run, args.steps, args.dtype)
        return
    systems = [name for name in args.systems.split(",") if args.trl_python or not name.startswith("trl")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    figures: dict[str, list[float]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _ in range(args.rounds):
            for name in systems:
                python = args.trl_python if name.startswith("trl") else sys.executable
                command = [python, __file__, "--run", name, folder, "--steps", str(args.steps), "--dtype", args.dtype]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                figures[name].append(json.loads(done.stdout.splitlines()[-1])["tokens_per_cpu_second"])
                loss_line = [line for line in done.stderr.splitlines() if "loss" in line][-1:]
                print(f"{name:18} {figures[name][-1]:8.0f} tokens/CPU-s   {loss_line}", flush=True)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ours = max(value for name, value in medians.items() if name.startswith("ours"))
    from _record import machine

    report = machine() | {
        "what": "SFT, 8-layer Qwen2 of 7.9 M parameters, lengths 16-512, 32 sequences per step, one thread",
        "dtype": args.dtype,
        "tokens_per_cpu_second": figures,
        "median": medians,
        "best_of_ours_over": {name: ours / value for name, value in medians.items() if not name.startswith("ours")},
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"median": medians, "best_of_ours_over": report["best_of_ours_over"]}, indent=1))


if __name__ == "__main__":
    main()
