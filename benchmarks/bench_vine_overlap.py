"""What it saves to sample a response's states while other responses still generate, against generating all first and branching then.

Both ways collect the same prompts with the same seeds through the same pool of engines and the same graders, in one run, in turns; weights are synced
before each, so that no prefix cache survives. The samples are the same ones, which is checked. The model is random: its responses end at random or at
the limit, and steps are runs of characters.

    python benchmarks/bench_vine_overlap.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _record import write

PROMPTS, SAMPLES, ROLLOUTS, MAX_NEW_TOKENS, STEP = 16, 8, 9, 160, "fixed:30"


class Weights:
    """Stands for a model group: publishes a model's weights from this process."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def publish_weights(self, sender, version):
        return sender.send(self.model.named_parameters(), version)


def make_random_model(folder: Path) -> str:
    """Two million parameters; the end-of-sequence token is likely enough that responses have all lengths."""
    from transformers import AutoModelForCausalLM

    from openrl_reason.models.tiny import make_model

    make_model(folder, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=1024, max_position=512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openrl_reason.algorithms.collect import Collector
    from openrl_reason.algorithms.vine import StepValues, VineConfig
    from openrl_reason.models.loading import load_tokenizer
    from openrl_reason.rewards.build import build_rewarder
    from openrl_reason.rewards.config import RewardConfig
    from openrl_reason.tasks.base import load_task
    from openrl_reason.tasks.config import TaskConfig
    from openrl_reason.workers.branching import BranchCall
    from openrl_reason.workers.grading import GraderPool
    from openrl_reason.workers.placement import Placement, PlacementConfig, Role
    from openrl_reason.workers.rollout import RolloutPool
    from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

    path = make_random_model(Path(tempfile.mkdtemp()) / "model")
    tokenizer, task = load_tokenizer(path), load_task(TaskConfig(name="arithmetic", num_train=PROMPTS))
    sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
    config = RolloutConfig(num_engines=2, dtype="float32", max_model_len=256, kv_cache_gib=0.5)
    items, weights = list(task.items("train"))[:PROMPTS], Weights(path)
    rows, times = [], {"overlapped": [], "two phases": []}
    with Placement(PlacementConfig(device="cpu"), [Role("engine", 2)]) as placement, RolloutPool(config, path, placement=placement) as pool:
        grader = GraderPool(1, deadline_s=5.0)
        rewarder = build_rewarder(RewardConfig(), task=task, grader=grader)
        collector = Collector(task, tokenizer, pool, rewarder)

        def values() -> StepValues:
            call, vine = BranchCall(pool, sampling=sampling, seed=(0, "branch")), VineConfig(num_rollouts=ROLLOUTS)
            own = rewarder.with_own_numbers()
            return StepValues(vine, call, own, tokenizer, step_kind=STEP, gamma=1.0, max_new_tokens=MAX_NEW_TOKENS)

        def overlapped():
            beside = values()
            return collector.collect(items, num_samples=SAMPLES, sampling=sampling, seed=(0, "train"), beside=beside), beside

        def two_phases():
            rollouts, beside = collector.collect(items, num_samples=SAMPLES, sampling=sampling, seed=(0, "train")), values()
            for index, trajectory in enumerate(rollouts.trajectories):
                beside.start(index, trajectory, rollouts.items[index], f"0/train/{index // SAMPLES}")
            beside.drain()
            return rollouts, beside

        version = 0
        for repeat in range(repeats + 1):  # the first round warms up
            texts = {}
            for name, way in (("overlapped", overlapped), ("two phases", two_phases)):
                version += 1
                pool.sync_weights(weights, version)
                busy, started = pool.stats(), time.perf_counter()
                rollouts, beside = way()
                seconds, now = time.perf_counter() - started, pool.stats()
                idle = 1 - sum(now[k] - busy[k] for k in now if k.startswith("seconds_busy/")) / (2 * seconds)
                texts[name] = [t.token_ids.tolist() for t in rollouts.trajectories], beside.call.counts["generated_tokens"]
                if repeat:
                    times[name].append(seconds)
                    metrics = beside.metrics(1)
                    rows.append({
                        "way": name, "seconds": seconds, "engines idle": idle, "hidden share": metrics["perf/branch_hidden_share"],
                        "rollouts": beside.call.counts["requests"], "rollout tokens": beside.call.counts["generated_tokens"],
                        "prefix cache hit": metrics["credit/prefix_cache_hit"], "unique prefixes": metrics["credit/unique_prefix_share"],
                    })  # fmt: skip
            assert texts["overlapped"] == texts["two phases"], "both ways sample the same"
        rewarder.close()
        grader.close()
    ratio = statistics.median(a / b for a, b in zip(times["overlapped"], times["two phases"], strict=True))
    rows.append({"way": "overlapped / two phases (median of pairs)", "seconds": ratio})
    settings = {"prompts": PROMPTS, "samples": SAMPLES, "rollouts": ROLLOUTS, "max_new_tokens": MAX_NEW_TOKENS, "step_kind": STEP, "engines": 2}
    write("vine_overlap", settings, rows)


if __name__ == "__main__":
    main()
