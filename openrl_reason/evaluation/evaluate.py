"""``openrl-reason evaluate``: n samples for each held-out item from the rollout engines, graded; mean accuracy."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from openrl_reason.algorithms.collect import Collector, readable
from openrl_reason.algorithms.common import checked_tokenizer, local_path, within_limit
from openrl_reason.algorithms.trainer import PlacementConfig
from openrl_reason.config import require
from openrl_reason.evaluation.accuracy import accuracy_metrics
from openrl_reason.tasks.base import Task, TaskConfig, load_task
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.placement import Placement, Role
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of a model on a task's held-out items."""

    model: str = ""
    """Model folder."""
    output: str = ""
    """File for the result as JSON; the graded samples go beside it as .samples.jsonl (empty: only print)."""
    split: str = "test"
    """test or train."""
    num_items: int = 0
    """The first so many items (0: all)."""
    num_samples: int = 1
    """Samples per item."""
    seed: int = 0
    """Seed of the samples."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """How responses are sampled; temperature 0 is greedy."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        require(self.grader_processes >= 1, "grader_processes", self.grader_processes, "at least 1")
        require(self.grader_deadline_s > 0, "grader_deadline_s", self.grader_deadline_s, "must be positive")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        require(self.num_items >= 0, "num_items", self.num_items, "use 0 for all items")
        budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
        require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
        require(self.split in ("train", "test"), "split", self.split, "use train or test")


def check_output_file(path: Path) -> None:
    """Refuses a place where the result could not be written, before it is computed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    require(writable and not path.is_dir(), "output", str(path), "give a file name in a folder that can be written")


def evaluate_model(config: EvaluateConfig, task: Task | None = None) -> dict[str, float]:
    """Runs the evaluation and returns its metrics (``eval/<task>/...``)."""
    from openrl_reason.workers.rollout import RolloutPool

    if config.output:
        check_output_file(Path(config.output))
    path = local_path(config.model)
    tokenizer = checked_tokenizer(path, config.rollout.max_model_len, trust_remote_code=config.rollout.trust_remote_code)
    task = task or load_task(config.task)
    limit = config.rollout.max_model_len - config.sampling.max_new_tokens
    items, overlong = within_limit(task, config.split, tokenizer, limit, first=config.num_items or None)
    print(f"{task.name}: {len(items)} {config.split} items x {config.num_samples} samples, temperature {config.sampling.temperature:g};"
          f" {overlong} prompts longer than {limit} tokens left out")  # fmt: skip
    if config.dry_run:
        return {}
    with contextlib.ExitStack() as stack:
        placement = stack.enter_context(
            Placement(config.placement, [Role("engine", config.rollout.num_engines, config.rollout.tensor_parallel)])
        )
        grader = GraderPool(config.grader_processes, deadline_s=config.grader_deadline_s)
        stack.callback(grader.close)
        pool = RolloutPool(config.rollout, path, placement=placement, seed=config.seed)
        stack.callback(pool.close)
        collector = Collector(task, tokenizer, pool, grader)
        rollouts = collector.collect(
            items, num_samples=config.num_samples, sampling=replace(config.sampling), seed=(config.seed, "evaluate")
        )
    metrics = accuracy_metrics(rollouts, config.num_samples, name=task.name)
    metrics |= {
        "num_items": len(items),
        "num_overlong": overlong,
        "generated_tokens_per_second": rollouts.metrics["perf/generated_tokens_per_second"],
    }
    for name, value in metrics.items():
        print(f"  {name:40s} {value:.4g}")
    if config.output:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics, indent=1))
        samples = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in readable(rollouts, 0, -1))
        path.with_suffix(".samples.jsonl").write_text(samples, encoding="utf-8", errors="surrogatepass")
    return metrics
