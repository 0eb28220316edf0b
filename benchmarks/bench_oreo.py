"""One OREO step (critic's look, policy's update with the exact KL, critic's update, cached reference) against the bare forward and backward passes
of the two models on the same tokens.

The bare passes are plain PyTorch in this process: the same packed models and micro-batches, log-probs and values, any loss, no optimiser, no Ray. The
step is the trainer's, on one rank for each model. Both run in turns; CPU-seconds are those of the processes that compute (this one, or the two
ranks and this one). Without the cache the reference scores each batch, and the bare passes include its forward.

    python benchmarks/bench_oreo.py [--repeats 5] [--hidden_size 256] [--num_layers 4]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _record import write

SEQUENCES, PROMPT, RESPONSE, VOCABULARY = 64, (20, 60), (80, 240), 8192


def make_random_model(folder: Path, hidden_size: int, num_layers: int) -> str:
    """A Qwen2 with a vocabulary that is larger than a toy's, as the output head is what the exact KL costs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from openrl_reason.models.tiny import make_model

    make_model(folder, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=128, max_position=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128 or 1, intermediate_size=4 * hidden_size, max_position_embeddings=512, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def random_responses(count: int) -> list:
    from openrl_reason.core.trajectory import Trajectory

    rng = np.random.default_rng(0)
    return [
        Trajectory.from_completion(
            rng.integers(3, VOCABULARY, rng.integers(*PROMPT)), rng.integers(3, VOCABULARY, rng.integers(*RESPONSE)), None, task_id=str(number),
            group_id=str(number), sample_index=0, reward=float(number % 2),
        )
        for number in range(count)
    ]  # fmt: skip


class MemoryStore:
    """A token store of the responses."""

    kind, identity = "responses", "benchmark"

    def __init__(self, trajectories: list) -> None:
        self._trajectories = trajectories
        self.lengths = np.array([t.num_tokens for t in trajectories])
        self.rewards = np.array([t.reward for t in trajectories])
        self.labels, self.has_reward = self.rewards > 0, np.ones(len(trajectories), bool)
        self.questions = np.arange(len(trajectories), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._trajectories)

    def trajectories(self, rows) -> list:
        return [self._trajectories[row] for row in rows]


class BarePasses:
    """Forward and backward of policy and critic (and the reference's forward) over micro-batches of the trainer's size."""

    def __init__(self, path: str, tokens_per_micro_batch: int) -> None:
        from openrl_reason.models.attention import choose_attention
        from openrl_reason.models.loading import load_causal_lm
        from openrl_reason.models.policy import LanguageModel
        from openrl_reason.models.scalar_model import ScalarModel, load_scalar_model

        attention = choose_attention("auto", torch.device("cpu"))
        self.policy, self.reference = (
            LanguageModel(load_causal_lm(path, "float32", attn_implementation=attention), attn_impl=attention) for _ in range(2)
        )
        self.critic = ScalarModel(load_scalar_model(path, "float32", attn_implementation=attention), attn_impl=attention)
        self.policy.train(), self.critic.train()
        self.tokens_per_micro_batch = tokens_per_micro_batch

    def run(self, batch, *, with_reference: bool) -> None:
        from openrl_reason.core.partition import plan_micro_batches

        plan = plan_micro_batches(batch.lengths.tolist(), 1, self.tokens_per_micro_batch)[0]
        for part in batch.split(plan):
            self.policy(part.token_ids, part.cu_seqlens, 1.0, True, part.action_mask)[0].sum().backward()
            self.critic(part.token_ids, part.cu_seqlens).sum().backward()
            if with_reference:
                with torch.no_grad():
                    self.reference(part.token_ids, part.cu_seqlens, 1.0, False, part.action_mask)
        for model in (self.policy, self.critic):
            model.zero_grad()


def cpu_seconds(pids: list[int]) -> float:
    import psutil

    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    from openrl_reason.algorithms.oreo import OfflineReferenceConfig, OREOConfig, OREOTrainer
    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.data.offline_config import OfflineDataConfig
    from openrl_reason.workers.model_config import ScalarModelConfig, TrainedModelConfig
    from openrl_reason.workers.placement import PlacementConfig

    folder = Path(tempfile.mkdtemp())
    path = make_random_model(folder / "model", arguments.hidden_size, arguments.num_layers)
    store = MemoryStore(random_responses(SEQUENCES))
    bare_batch, rows = TokenBatch.from_trajectories(store.trajectories(range(SEQUENCES))), []
    policy = TrainedModelConfig(path=path, dtype="float32", zero_stage=0, lr=1e-5)
    bare = BarePasses(path, policy.tokens_per_micro_batch)
    for cache, bar in (("all", 1.25), ("none", 1.35)):
        config = OREOConfig(
            batch_size=SEQUENCES, epochs=100, eval_fraction=0.0, data=OfflineDataConfig(path=("given",), max_length=512), policy=policy,
            critic=ScalarModelConfig(path=path, dtype="float32", zero_stage=0, lr=1e-5), reference=OfflineReferenceConfig(cache=cache),
            placement=PlacementConfig(device="cpu"),
        )  # fmt: skip
        config = replace(config, run=replace(config.run, output_dir=str(folder / cache), report=False))
        walls, cpus = {"bare": [], "step": []}, {"bare": [], "step": []}
        with OREOTrainer(config, store=store) as trainer:
            groups = [group for group in (trainer.policy, trainer.critic, trainer.reference.group) if group is not None]
            pids = [os.getpid(), *(info["pid"] for group in groups for info in group._info)]
            for repeat in range(arguments.repeats + 1):  # the first one warms up
                for name, work in (("bare", lambda cache=cache: bare.run(bare_batch, with_reference=cache == "none")), ("step", trainer.step)):
                    started, before = time.perf_counter(), cpu_seconds(pids)
                    work()
                    if repeat:
                        walls[name].append(time.perf_counter() - started)
                        cpus[name].append(cpu_seconds(pids) - before)
        row = {"cache": cache, "bar": bar}
        for unit, times in (("wall", walls), ("cpu", cpus)):
            ratios = [step / one for step, one in zip(times["step"], times["bare"], strict=True)]
            row |= {f"{unit}_ratio": statistics.median(ratios), f"{unit}_ratio_min": min(ratios), f"{unit}_ratio_max": max(ratios)}
            row |= {f"{unit}_bare": statistics.median(times["bare"]), f"{unit}_step": statistics.median(times["step"])}
        rows.append(row)
        print(
            f"reference {'kept on disk' if cache == 'all' else 'scores each batch'}: an OREO step takes {row['cpu_ratio']:.3f} of the CPU-seconds"
            f" of the bare passes ({row['wall_ratio']:.3f} of the wall time; bar {bar})"
        )
    settings = {"sequences": SEQUENCES, "tokens": bare_batch.num_tokens, "vocabulary": VOCABULARY, **vars(arguments)}
    write("oreo", settings, rows)


if __name__ == "__main__":
    main()
