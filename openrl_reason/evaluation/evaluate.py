"""``openrl-reason evaluate``: n samples for each held-out item from the rollout engines, graded; accuracies with intervals."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrl_reason.algorithms.common import checked_tokenizer, local_path
from openrl_reason.algorithms.trainer import PlacementConfig
from openrl_reason.atomic import write_json
from openrl_reason.config import require, to_dict
from openrl_reason.core.seeds import content_id
from openrl_reason.evaluation.compare import RESULT_FORMAT, compare_results, label, print_comparisons, read_result
from openrl_reason.evaluation.config import EvalSetConfig, check_intervals, check_ks, check_not_repeated, check_output_file
from openrl_reason.evaluation.identity import model_identity, software_versions
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.recording import RecordingPool
from openrl_reason.evaluation.sets import EvalSet, Evaluator, SetDefaults, SetResult, prepare_sets, refuse_overlap
from openrl_reason.evaluation.table import print_results
from openrl_reason.tasks.base import SPLITS, Task, TaskConfig, load_task
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.placement import Placement, Role
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of a model on held-out items, with intervals."""

    model: str = ""
    """Model folder."""
    output: str = ""
    """File for the result as JSON; the graded samples go beside it as .samples.jsonl (empty: only print)."""
    overwrite: bool = False
    """Replace an existing result at output."""
    resume: bool = True
    """Go on with what a killed evaluation left beside the output file (.partial.jsonl): nothing is generated twice. false: start anew."""
    compare_to: str = ""
    """Result file of another model: the paired comparison on the same items is printed at the end (see openrl-reason compare)."""
    split: str = "test"
    """test or train."""
    num_items: int = 0
    """The first so many items (0: all)."""
    num_samples: int = 1
    """Samples per item."""
    ks: tuple[int, ...] = ()
    """pass@k and maj@k for these k; pass@1 is always there. Empty: k = num_samples."""
    ids: tuple[str, ...] = ()
    """Only these items: task ids, or ids in the data. Without sets."""
    ids_file: str = ""
    """A file with one id a line, added to ids. Without sets."""
    greedy: bool = False
    """Besides num_samples at temperature > 0, one greedy response to each item (eval/<task>/greedy/...). Without sets."""
    also_grade: tuple[str, ...] = ()
    """Grade the same responses by these graders too, for instance gsm8k_lenient beside gsm8k. Without sets."""
    sets: tuple[EvalSetConfig, ...] = ()
    """Several sets at once: a list of objects with name, task, split, num_items, ids, num_samples, temperature, ..., each with settings of its
    own where this command's should not hold."""
    group_by: tuple[str, ...] = ("level", "type")
    """Tables by these entries of the items' info, where there are any."""
    seed: int = 0
    """Seed of the samples."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence intervals."""
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
        require(not self.ids_file or Path(self.ids_file).is_file(), "ids_file", self.ids_file, "there is no such file")
        repeated = self.greedy and not self.sets and self.sampling.temperature == 0
        require(not repeated, "greedy", True, "every response is greedy already, with --sampling.temperature 0: leave it out, or raise that")
        budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
        require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
        require(self.split in SPLITS, "split", self.split, "use train or test")
        if not self.sets:
            check_not_repeated(self.num_samples, self.sampling.temperature, "num_samples")
        for name in ("ids", "ids_file", "greedy", "also_grade"):
            value = getattr(self, name)
            require(not (self.sets and value), name, value, "with --sets it belongs to each set: write it there")
        check_ks(self.ks, [self.num_samples, *(one.num_samples or 1 for one in self.sets)], "ks")
        check_intervals(self.intervals, "intervals")

    def eval_sets(self, task: Task, tokenizer: Any) -> list[EvalSet]:
        """The sets, with their items."""
        own = EvalSetConfig(ids=self.ids, ids_file=self.ids_file, greedy=self.greedy, also_grade=self.also_grade)
        defaults = SetDefaults(self.split, self.num_items, self.num_samples, self.sampling, self.ks)
        limit = self.rollout.max_model_len
        return prepare_sets(self.sets or (own,), default_task=task, tokenizer=tokenizer, defaults=defaults, max_model_len=limit)


def beside(output: str, kind: str) -> Path:
    """The file of samples that belongs to a result file: ``a.json`` has ``a.samples.jsonl``, and ``a-v1.0`` has ``a-v1.0.samples.jsonl``."""
    path = Path(output)
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.{kind}.jsonl")


def refuse_leaks(sets: Sequence[EvalSet]) -> None:
    """Raises DataError if a task names its training data (``train_path``) and a held-out set of it has a question in common with that."""
    for one in sets:
        config = one.task.config
        if one.split == "test" and config.train_path and not config.allow_test_data_in_training:
            refuse_overlap(one.task.items("train"), [one], config.train_path)


def describe(one: EvalSet) -> str:
    """A line of the plan."""
    sampling = one.sampling
    left_out = f"; {one.num_overlong} prompts too long, left out" if one.num_overlong else ""
    also = f"; also graded by {', '.join(one.also_grade)}" if one.also_grade else ""
    return (
        f"{one.name}: {len(one.items)} {one.split} items of {one.task.name} x {one.num_samples} samples, temperature {sampling.temperature:g},"
        f" top-p {sampling.top_p:g}, at most {sampling.max_new_tokens} tokens{also}{left_out}"
    )


def evaluate_model(config: EvaluateConfig, task: Task | None = None) -> dict[str, float]:
    """Runs the evaluation and returns its metrics (``eval/<set>/...``)."""
    require(bool(config.model), "model", config.model, "name a model folder; `openrl-reason make-model` writes a small one")
    if config.output:
        check_output_file(Path(config.output))
        taken = Path(config.output).exists() and not config.overwrite
        require(not taken, "output", config.output, "there is a result of that name: choose another, or pass --overwrite true")
        same = bool(config.compare_to) and Path(config.output).resolve() == Path(config.compare_to).resolve()
        require(not same, "compare_to", config.compare_to, "that is also the --output, which would take its place: give another --output")
    other = read_result(config.compare_to) if config.compare_to else None
    path = local_path(config.model)
    tokenizer = checked_tokenizer(path, config.rollout.max_model_len, named="model", trust_remote_code=config.rollout.trust_remote_code)
    sets = config.eval_sets(task or load_task(config.task), tokenizer)
    refuse_leaks(sets)
    for one in sets:
        print(describe(one))
    if config.dry_run:
        return {}
    identity = model_identity(path)
    with contextlib.ExitStack() as stack:
        evaluator, recording = _start(config, path, sets, tokenizer, identity, stack)
        results = [evaluator.run(one, (config.seed, "evaluate")) for one in sets]
        metrics = _metrics(results)
        result = result_record(config, identity, results, metrics)
        print_results(result["sets"], metrics, config.intervals.confidence)
        if recording is not None:
            write_result(Path(config.output), result, results)
            recording.finish()
    if other is not None:
        comparisons = compare_results(result, other, config=config.intervals)
        print_comparisons(comparisons, f"{config.model} (this evaluation)", label(other, config.compare_to))
    return metrics


def _start(
    config: EvaluateConfig, path: str, sets: Sequence[EvalSet], tokenizer: Any, identity: Mapping[str, Any], stack: contextlib.ExitStack
) -> tuple[Evaluator, RecordingPool | None]:
    """Engines and graders; with an output file, completions are written down beside it as they come."""
    from openrl_reason.workers.rollout import RolloutPool

    recording = None
    if config.output:
        samples = [repr((one.name, one.num_samples, one.sampling, [one.task.prompt_text(item, tokenizer) for item in one.items])) for one in sets]
        asked = content_id(repr(identity), str(config.seed), config.rollout.dtype, *samples)
        recording = RecordingPool(beside(config.output, "partial"), asked, resume=config.resume)
        stack.callback(recording.close)
        if recording.known:
            print(f"{len(recording.known)} samples of an evaluation that was cut short are in {recording.path}: they are used")
    roles = [Role("engine", config.rollout.num_engines, config.rollout.tensor_parallel)]
    placement = stack.enter_context(Placement(config.placement, roles))
    grader = GraderPool(config.grader_processes, deadline_s=config.grader_deadline_s)
    stack.callback(grader.close)
    pool = RolloutPool(config.rollout, path, placement=placement, seed=config.seed)
    stack.callback(pool.close)
    if recording is not None:
        recording.pool = pool
    return Evaluator(tokenizer=tokenizer, pool=recording or pool, grader=grader, intervals=config.intervals), recording


def _metrics(results: Sequence[SetResult]) -> dict[str, float]:
    rates = [result.rollouts.metrics for result in results]  # of what was generated now, not of what an evaluation cut short had left
    seconds = sum(rate["timing/generate"] for rate in rates)
    tokens = sum(rate["perf/generated_tokens_per_second"] * rate["timing/generate"] for rate in rates)
    flat = {name: value for result in results for name, value in result.metrics.items()}
    return flat | {
        "num_items": sum(len(result.eval_set.items) for result in results),
        "num_overlong": sum(result.eval_set.num_overlong for result in results),
        "generated_tokens_per_second": tokens / seconds,
    }


def result_record(config: Any, identity: Mapping[str, Any], results: Sequence[SetResult], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The result file: the flat metrics, and what they are about. ``config``: of this command or of another that evaluates."""
    flat = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return flat | {
        "format": RESULT_FORMAT, "model": dict(identity), "versions": software_versions(), "seed": config.seed, "config": to_dict(config),
        "sets": [result.as_json(config.group_by) for result in results],
    }  # fmt: skip


def write_result(path: Path, result: Mapping[str, Any], results: Sequence[SetResult]) -> None:
    """The samples first: a result file is there only when everything is."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for one in results for record in one.records())
    samples = beside(str(path), "samples")
    unfinished = samples.with_name(f".unfinished-{samples.name}")
    with open(unfinished, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(lines)
    os.replace(unfinished, samples)
    write_json(path, result)
