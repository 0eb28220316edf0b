"""``openrl-reason collect``: rewarded samples of a model to a task's training questions, on disk, as data for offline algorithms.

    samples/        every sample, block by block, as it was made: what a collection that was stopped goes on from
    trajectories/   what the mode keeps, token ids, log-probs and rewards; with --rows and --pairs_per_question also rows/ and pairs/, as text
    manifest.json   settings, statistics, and whether all of it is there

Everything in the last four is a function of the files in samples/, and is written when all of those are there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from openrl_reason.algorithms.collect import Collector
from openrl_reason.algorithms.collection_choice import Statistics, choose
from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.algorithms.common import checked_tokenizer, local_path, within_limit
from openrl_reason.algorithms.rounds import QuestionSampler
from openrl_reason.algorithms.samples import SampleBlocks
from openrl_reason.algorithms.sampling import RewardFunction, rewarded_engines, with_stops_of
from openrl_reason.atomic import atomic_folder, naming_disk_errors, remove_unfinished, write_json
from openrl_reason.config import require, save_config, to_dict
from openrl_reason.core.seeds import content_id
from openrl_reason.core.trajectory import Trajectory, write_jsonl, write_parquet
from openrl_reason.data.pairs import PairBuilder
from openrl_reason.errors import CheckpointError
from openrl_reason.evaluation.identity import code_of, model_identity, reward_identity, software_versions
from openrl_reason.folders import COLLECTION, claimed, refuse_others
from openrl_reason.rewards.build import check_sources
from openrl_reason.rewards.config import describe_rewards
from openrl_reason.tasks.base import Task, TaskItem, load_task
from openrl_reason.workers.placement import Placement, Role

FORMAT = "openrl_reason.collection.v1"
DATA = ("trajectories", "rows", "pairs")


def collect_samples(config: CollectConfig, *, task: Task | None = None, reward_function: RewardFunction | None = None) -> dict[str, Any]:
    """Runs the collection, or what is left of it, and returns its manifest; with ``dry_run`` it prints what would be done.

    Args:
        task: replaces the task that ``config.task`` names.
        reward_function: replaces ``config.reward``.

    Raises:
        ConfigError, DataError: a setting or a file cannot work.
        CheckpointError: the folder holds a collection with other settings, which are named.
        WorkerError: an engine failed too often, or more rewards than ``reward.max_failed_rate``.
    """
    require(bool(config.model), "model", config.model, "name a model folder; `openrl-reason make-model` writes a small one")
    config.check_room()
    path, folder = local_path(config.model), Path(config.output).absolute()
    refuse_others(folder, "output", COLLECTION)
    tokenizer = checked_tokenizer(path, config.rollout.max_model_len, named="model", trust_remote_code=config.rollout.trust_remote_code)
    task = task or load_task(config.task)
    limit = config.rollout.max_model_len - config.sampling.max_new_tokens
    items, num_overlong = within_limit(task, "train", tokenizer, limit, first=config.num_items or None)
    questions = list({item.task_id: item for item in items}.values())
    left_out = {"overlong_questions": num_overlong, "repeated_questions": len(items) - len(questions)}
    blocks = SampleBlocks(
        folder / "samples", questions, 0, with_stops_of(task, config.sampling), (config.seed, "collect"), config.questions_per_block,
        settings=settings_of(config, path, task, questions, tokenizer, reward_function), flag="output",
    )  # fmt: skip
    for line in plan(config, task, len(questions), left_out, reward_function):
        print(line)
    if config.dry_run:
        if reward_function is None:
            check_sources(config.reward)
        return {}
    with naming_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "output"):
        manifest = _begin(config, folder, blocks)
        if manifest is not None:
            print(f"the collection in {folder} is complete: nothing is sampled again")
        else:
            if blocks.missing:
                _sample(config, blocks, path, task, tokenizer, reward_function)
            manifest = write_data(config, blocks, folder, tokenizer, left_out) | {"model": dict(model_identity(path))}
            with naming_disk_errors(folder):
                write_json(folder / "manifest.json", manifest)
    print_statistics(manifest["statistics"])
    print(f"data: {folder / 'trajectories'}   manifest: {folder / 'manifest.json'}")
    return manifest


def settings_of(
    config: CollectConfig, path: str, task: Task, questions: Sequence[TaskItem], tokenizer: Any, reward_function: RewardFunction | None = None
) -> dict[str, Any]:
    """All that the result depends on, by name; of what is large, a hash. The number of engines is not in it."""
    by_mode = {
        "all": ("num_samples",),
        "balanced": ("rounds", "samples_per_round", "max_per_side"),
        "rejection": ("num_samples", "max_per_question", "choice", "dedup", "keep_truncated"),
    }[config.mode]
    names = ("mode", *by_mode, "threshold", "format", "rows", "pairs_per_question", "grader_deadline_s")
    identity = model_identity(path)
    prompts = (part for item in questions for part in (item.task_id, repr(task.encode_prompt(item, tokenizer))))
    own = {name: getattr(config, name) for name in names}
    return own | {
        "model": content_id(repr([value for name, value in identity.items() if name != "path"] or path)),
        "rollout.dtype": config.rollout.dtype, "questions": content_id(*prompts), "step_kind": content_id(code_of(task.step_kind)),
        "grader": sorted({task.grade_kind_of(item) for item in questions}),
        "reward": content_id(repr(reward_identity(config.reward, reward_function))),
    }  # fmt: skip


def plan(config: CollectConfig, task: Task, num_questions: int, left_out: dict[str, int], reward_function: RewardFunction | None) -> list[str]:
    """What will be done."""
    sampling, rollout = config.sampling, config.rollout
    by_mode = {
        "all": f"{config.num_samples} samples each, all graded ones are kept",
        "balanced": (
            f"up to {config.rounds} rounds of {config.samples_per_round} samples, until {config.max_per_side} are right and"
            f" {config.max_per_side} wrong; so many of each side are kept, never more right than wrong"
        ),
        "rejection": f"{config.num_samples} samples each, at most {config.max_per_question} right ones are kept",
    }[config.mode]
    counts = ", ".join(f"{count} {name.replace('_', ' ')} left out" for name, count in left_out.items() if count)
    return [
        f"questions: {num_questions} of {task.name}, training split{'; ' + counts if counts else ''}",
        f"{config.mode}: {by_mode}; right means a reward of at least {config.threshold:g}",
        f"sampling: temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}, at most {sampling.max_new_tokens} tokens;"
        f" reward: {'a Python function' if reward_function else describe_rewards(config.reward)}",
        f"engines: {rollout.num_engines} x {rollout.dtype}, context {rollout.max_model_len}; {config.in_flight} questions under way at a time",
    ]


def _begin(config: CollectConfig, folder: Path, blocks: SampleBlocks) -> dict[str, Any] | None:
    """Prepares the folder; the manifest, if the collection is complete. Whatever is half done has a manifest that says so."""
    path, unfinished = folder / "manifest.json", {"format": FORMAT, "finished": False, "config": to_dict(config)}
    with naming_disk_errors(folder):
        remove_unfinished(folder)
    manifest = read_manifest(path) if path.exists() else None
    strangers = [name for name in ("samples", *DATA) if (folder / name).exists()]
    if manifest is None and strangers:
        raise CheckpointError(f"{folder} has a folder {strangers[0]!r} that no collection wrote: choose another --output")
    with naming_disk_errors(folder):
        if manifest is None or config.overwrite:
            write_json(path, unfinished)
    blocks.begin(keep=not config.overwrite)
    complete = manifest is not None and manifest["finished"] and not config.overwrite
    if complete and all((folder / file).is_file() for files in manifest["files"].values() for file in files):
        return manifest
    with naming_disk_errors(folder):
        for name in DATA:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        save_config(config, folder / "config.yaml")
        write_json(path, unfinished)
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """A collection's manifest. Raises CheckpointError if the file is none."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is no manifest of a collection: choose another --output")


def _sample(config: CollectConfig, blocks: SampleBlocks, path: str, task: Task, tokenizer: Any, reward_function: RewardFunction | None) -> None:
    """The missing blocks, from the engines."""
    started, missing = time.perf_counter(), blocks.missing
    if len(missing) < len(blocks.files):
        print(f"going on: {len(blocks.files) - len(missing)} of {len(blocks.files)} blocks are there")
    roles = [Role("engine", config.rollout.num_engines, gpus_per_actor=config.rollout.tensor_parallel)]
    with contextlib.ExitStack() as stack:
        placement = stack.enter_context(Placement(config.placement, roles))
        engines = rewarded_engines(
            config, path, task=task, tokenizer=tokenizer, placement=placement, seed=config.seed, reward_function=reward_function
        )
        pool, rewarder = stack.enter_context(engines)
        sample_blocks(config, blocks, Collector(task, tokenizer, pool, rewarder))
        tokens, seconds = pool.stats()["generated_tokens"], time.perf_counter() - started
    print(f"sampled {tokens:.0f} tokens in {seconds:.1f} s")


def sample_blocks(config: CollectConfig, blocks: SampleBlocks, collector: Collector, say: Callable[[str], None] = print) -> None:
    """Samples the missing blocks of a collection."""
    sampler = QuestionSampler(collector, config.rule, blocks.sampling, blocks.seed, config.threshold, config.in_flight)
    items = [item for number in blocks.missing for item in blocks.block_items(number)]
    with contextlib.closing(sampler.run(items)) as questions:
        blocks.take(questions, config.reward.max_failed_rate, say)


# ---- from samples to data ----------------------------------------------------------------------------------------------------------


def write_data(config: CollectConfig, blocks: SampleBlocks, folder: Path, tokenizer: Any, left_out: dict[str, int]) -> dict[str, Any]:
    """Writes what the mode keeps, a file for each block; each folder is complete or absent. Returns the manifest."""
    statistics = Statistics(config.threshold)
    wanted = [name for name, asked in zip(DATA, (True, config.rows, config.pairs_per_question), strict=True) if asked]
    with contextlib.ExitStack() as stack:
        folders = {name: stack.enter_context(atomic_folder(folder / name)) for name in wanted}
        for number, block in enumerate(blocks.read_blocks()):
            kept, counts = choose(config, block.trajectories)
            pairs: Counter[str] = Counter()
            _write_part(folders["trajectories"] / f"part-{number:05d}.{config.format}", kept)
            if config.rows:
                _write_rows(folders["rows"] / f"part-{number:05d}.jsonl", map(_row, kept), tokenizer)
            if config.pairs_per_question:
                rows, pairs = _pair_rows(config, kept)
                _write_rows(folders["pairs"] / f"part-{number:05d}.jsonl", rows, tokenizer)
            statistics.add(block, kept, counts, pairs)
    return {
        "format": FORMAT, "finished": True, "statistics": statistics.as_json() | left_out,
        "files": {name: [str(file.relative_to(folder)) for file in sorted((folder / name).iterdir())] for name in wanted},
        "versions": software_versions(), "config": to_dict(config),
    }  # fmt: skip


def _write_part(file: Path, kept: Sequence[Trajectory]) -> None:
    if kept:  # readers take an empty file for a mistake
        (write_parquet if file.suffix == ".parquet" else write_jsonl)(file, kept)


def _row(sample: Trajectory) -> dict[str, Any]:
    return {"prompt": sample.info["prompt"], "response": sample.info["response"], "reward": sample.reward}


def _pair_rows(config: CollectConfig, kept: Sequence[Trajectory]) -> tuple[list[dict[str, Any]], Counter[str]]:
    builder = PairBuilder(threshold=config.threshold, max_per_question=config.pairs_per_question, seed=config.seed)
    builder.add(kept)
    data = builder.finish()
    rows = [
        {"prompt": pair.chosen.info["prompt"], "chosen": pair.chosen.info["response"], "rejected": pair.rejected.info["response"]}
        for pair in data.pairs
    ]
    return rows, data.counts


def _write_rows(file: Path, rows: Iterable[dict[str, Any]], tokenizer: Any) -> None:
    lines = [json.dumps(row | {"prompt": without_bos(row["prompt"], tokenizer)}, ensure_ascii=False) + "\n" for row in rows]
    if lines:
        file.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")


def without_bos(prompt: str, tokenizer: Any) -> str:
    """The text without the BOS that a chat template wrote, where the tokenizer will add its own to it."""
    bos = getattr(tokenizer, "bos_token", None)
    if not (bos and prompt.startswith(bos)):
        return prompt
    added = list(tokenizer(prompt)["input_ids"])[:2] == [tokenizer.bos_token_id] * 2
    return prompt.removeprefix(bos) if added else prompt


def print_statistics(found: dict[str, Any]) -> None:
    """The numbers that tell whether the data is worth training on."""
    rate = "no sample was graded" if found["right_rate"] is None else f"{100 * found['right_rate']:.1f} % right"
    failed = ", ".join(f"{count} {status}" for status, count in found["failed"].items()) or "none"
    print(
        f"samples: {found['samples']} to {found['questions']} questions, {rate}; {found['truncated']} cut off; failed gradings: {failed};"
        f" {found['response_tokens']} tokens"
    )
    print(
        f"questions: {found['questions_none_right']} with none right, {found['questions_all_right']} with all right,"
        f" {found['questions_ungraded']} without a graded sample"
    )
    kept = found["kept"]
    print(f"kept: {kept['kept_right']} right and {kept['kept_wrong']} wrong samples of {kept['questions']} questions")
    if "pairs" in found:
        print(f"pairs: {found['pairs'].get('pairs', 0)}")
