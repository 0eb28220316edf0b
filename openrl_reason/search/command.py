"""``openrl-reason search``: decoding guided by a critic on held-out items, against plain samples of as many tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrl_reason.algorithms.common import checked_tokenizer, local_path
from openrl_reason.config import require
from openrl_reason.core.seeds import content_id
from openrl_reason.core.steps import stop_strings
from openrl_reason.data.token_text import token_pieces
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.compare import Comparison, compare_results, print_comparisons
from openrl_reason.evaluation.config import EvalSetConfig, check_output_file
from openrl_reason.evaluation.evaluate import beside, describe, refuse_leaks, result_record, write_result
from openrl_reason.evaluation.identity import model_identity
from openrl_reason.evaluation.metrics import as_json
from openrl_reason.evaluation.recording import RecordingPool
from openrl_reason.evaluation.sets import EvalSet, SetDefaults, prepare_sets
from openrl_reason.evaluation.table import print_results, print_table
from openrl_reason.folders import VALUE_NOTE
from openrl_reason.rewards.task_reward import TaskReward
from openrl_reason.search.config import SearchConfig
from openrl_reason.search.results import Grader, SearchResult, search_rows
from openrl_reason.search.run import SearchRun, step_reader
from openrl_reason.search.serving import STATES_PER_CALL, BatchedValuer, refuse_without_head
from openrl_reason.tasks.base import Task, load_task
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.model_config import ScalarModelConfig
from openrl_reason.workers.placement import Placement, Role
from openrl_reason.workers.prefix_values import PrefixValues

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


def search_model(config: SearchConfig, task: Task | None = None) -> dict[str, float]:
    """Runs the searches and returns their metrics (``eval/<set>/<method>/...`` and ``search/<set>/<method>/...``).

    Raises:
        ConfigError, DataError: a setting or a folder cannot work.
        WorkerError: an engine or the critic failed.
    """
    require(bool(config.policy), "policy", config.policy, "name a model folder; `openrl-reason make-model` writes a small one")
    if config.output:
        check_output_file(Path(config.output))
        taken = Path(config.output).exists() and not config.overwrite
        require(not taken, "output", config.output, "there is a result of that name: choose another, or pass --overwrite true")
    path = local_path(config.policy)
    tokenizer = checked_tokenizer(path, config.rollout.max_model_len, named="policy", trust_remote_code=config.rollout.trust_remote_code)
    _check_critic(config, tokenizer)
    task = task or load_task(config.task)
    task = task.cut_by(config.step_kind or task.step_kind)
    _check_tokenizer(config, task.step_kind, tokenizer)
    defaults = SetDefaults(config.split, config.num_items, 1, config.sampling)
    own = EvalSetConfig(ids=config.ids, ids_file=config.ids_file)
    limit = config.rollout.max_model_len
    (chosen,) = prepare_sets((own,), default_task=task, tokenizer=tokenizer, defaults=defaults, max_model_len=limit)
    refuse_leaks([chosen])
    for line in plan(config, chosen):
        print(line)
    if config.dry_run:
        return {}
    identity = model_identity(path)
    with contextlib.ExitStack() as stack:
        recording = _recording(config, chosen, tokenizer, identity, stack)
        run, grader = _start(config, path, chosen, tokenizer, recording, stack)
        pairs = list(_search(config, run, grader))
        results = [result for pair in pairs for result in pair]
        metrics = _metrics(results)
        result = result_record(config, identity, results, metrics)
        comparisons = [_compare(*pair, config) for pair in pairs if len(pair) == 2]
        result |= {"critic": model_identity(local_path(config.critic)) if config.critic else None, "comparisons": [_as_json(c) for c in comparisons]}
        print_results(result["sets"], metrics, config.intervals.confidence)
        print_table(search_rows(results, metrics), "per cent correct, and what it took")
        if comparisons:
            print_comparisons(comparisons, "search", "most frequent answer of plain samples of as many tokens")
        if recording is not None:
            write_result(Path(config.output), result, results)
            recording.finish()
    return metrics


def _check_critic(config: SearchConfig, tokenizer: Any) -> None:
    """Refuses folders that cannot value what the policy writes; reads no weights."""
    from openrl_reason.models.scalar_model import check_scalar_folder

    if config.method == "majority":
        return
    require(bool(config.critic), "critic", config.critic, f"--method {config.method} ranks by values: name a critic, as PPO leaves it in critic/")
    trusted = config.rollout.trust_remote_code
    check_scalar_folder(config.critic, tokenizer, config.rollout.max_model_len, flag="critic", trust_remote_code=trusted)
    refuse_without_head(config.critic, "critic", trust_remote_code=trusted)
    note = Path(local_path(config.critic)) / VALUE_NOTE
    if note.is_file() and json.loads(note.read_text()).get("level") == "step":
        print(
            f"WARNING: --critic {config.critic} was trained at the level of steps (oreo --algo.level step): it has learned states between steps, not"
            " those before the end of a response, by which finished ones are ranked here. Prefer a critic of --algo.level token"
        )


def _check_tokenizer(config: SearchConfig, kind: Any, tokenizer: Any) -> None:
    """Refuses to cut steps where nobody says which token wrote what: whole responses would be taken for steps."""
    cut_here = config.method == "beam" and (stop_strings(kind) is None or config.step_tokens > 0)
    cut_here |= config.method == "best_of_n" and config.aggregate in ("min", "mean")
    ids = tokenizer("a\nb", add_special_tokens=False)["input_ids"] if cut_here else []
    if ids and token_pieces(tokenizer, ids, tokenizer.decode(ids, skip_special_tokens=True)) is None:
        raise ConfigError(
            f"--step_kind is {kind!r}, but this tokenizer's decoder does not say which token wrote what, so steps cannot be cut here: use newline or"
            " newline_sentence without --step_tokens, where the engine stops at their end, and --aggregate last"
        )


def plan(config: SearchConfig, chosen: EvalSet) -> list[str]:
    """What will be done."""
    lines = [describe(chosen)]
    kind = chosen.task.step_kind
    if config.method == "beam":
        for beams in config.beams:
            shape = config.beam(beams)
            lines.append(
                f"beam-{beams}: {shape.first_expansions} candidates for the first step, then {beams} beams x {shape.expansions or beams}; at most"
                f" {shape.max_steps} steps, cut by {kind!r}"
            )
        if stop_strings(kind) is None:
            lines.append(
                f"note: steps of kind {kind!r} end where what follows them shows it: what is written beyond is discarded. --step_tokens"
                f" {config.step_tokens} (0: the rest of the response) bounds it"
            )
    else:
        how = f"value {config.aggregate}, answer by {config.answer}" if config.method == "best_of_n" else "the most frequent answer"
        lines.append(f"{config.method}: {', '.join(map(str, sorted(config.samples)))} samples; {how}")
    return lines


def _recording(
    config: SearchConfig, chosen: EvalSet, tokenizer: Any, identity: Mapping[str, Any], stack: contextlib.ExitStack
) -> RecordingPool | None:
    """With an output file, completions are written down beside it. Requests are told apart by what they continue, so the file serves a search of
    other beams, or with another critic, as well."""
    if not config.output:
        return None
    prompts = [chosen.task.encode_prompt(item, tokenizer) for item in chosen.items]
    asked = repr((identity, config.seed, config.rollout.dtype, chosen.sampling, step_reader(config, chosen, tokenizer).stop, prompts))
    recording = RecordingPool(beside(config.output, "partial"), content_id(asked), resume=config.resume)
    stack.callback(recording.close)
    if recording.known:
        print(f"{len(recording.known)} samples of a search that was cut short are in {recording.path}: they are used")
    return recording


def _start(
    config: SearchConfig, path: str, chosen: EvalSet, tokenizer: Any, recording: RecordingPool | None, stack: contextlib.ExitStack
) -> tuple[SearchRun, Grader]:
    """Engines, critic and graders."""
    from openrl_reason.workers.model_group import ModelGroup
    from openrl_reason.workers.rollout import RolloutPool

    roles = [Role("engine", config.rollout.num_engines, config.rollout.tensor_parallel)]
    roles += [Role("critic", config.scoring.num_ranks)] if config.critic else []
    placement = stack.enter_context(Placement(config.placement, roles))
    valuer = None
    if config.critic:
        settings = vars(config.scoring) | {"trust_remote_code": config.rollout.trust_remote_code}
        model = ScalarModelConfig(path=local_path(config.critic), **settings)
        group = ModelGroup.start(model, role="critic", placement=placement, seed=config.seed, timeout_s=model.timeout_s, wait=False)
        valuer = BatchedValuer(PrefixValues(group, round(config.value_cache_gib * 2**30)), STATES_PER_CALL * group.num_ranks)
        stack.callback(valuer.close)
        stack.callback(group.close)  # before the valuer's thread, which may be waiting for it
    graders = GraderPool(config.grader_processes, deadline_s=config.grader_deadline_s)
    stack.callback(graders.close)
    pool = stack.enter_context(RolloutPool(config.rollout, path, placement=placement, seed=config.seed))
    if recording is not None:
        recording.pool = pool
    run = SearchRun(config, chosen, tokenizer, recording or pool, valuer)
    return run, Grader(chosen, tokenizer, TaskReward(chosen.task, graders), config.intervals)


def _search(config: SearchConfig, run: SearchRun, grader: Grader) -> Iterator[tuple[SearchResult, ...]]:
    """Each search, where it has one with its baseline of as many tokens; then the greedy responses."""
    if config.method == "beam":
        found = {beams: run.beam(config.beam(beams)) for beams in config.beams}
        for beams, one in found.items():
            results = [grader.result(f"beam-{beams}", one, config.answer)]
            if config.baseline:
                results.append(grader.result(f"beam-{beams}/majority", run.matching(one.cost.generated_tokens), "majority"))
            yield tuple(results)
    for count in sorted(config.samples) if config.method != "beam" else ():
        one = run.samples(count)
        uncritical = replace(one, cost=replace(one.cost, value_calls=0, states_valued=0, value_tokens=0))  # a vote asks no critic
        majority = grader.result(f"majority-{count}", uncritical, "majority")
        yield (grader.result(f"best-of-{count}", one, config.answer), majority) if config.method == "best_of_n" else (majority,)
    if config.greedy and config.sampling.temperature > 0:
        yield (grader.result("greedy", run.greedy(), "majority", **GREEDY),)


def _metrics(results: Sequence[SearchResult]) -> dict[str, float]:
    flat = {name: value for result in results for name, value in result.metrics.items()}
    one = results[0].eval_set
    return flat | {"num_items": len(one.items), "num_overlong": one.num_overlong}


def _compare(search: SearchResult, baseline: SearchResult, config: SearchConfig) -> Comparison:
    """The paired comparison of two methods of this run, under the name of the first."""
    first, second = search.as_json(()), baseline.as_json(())
    (comparison,) = compare_results({"sets": [first]}, {"sets": [second | {"name": first["name"]}]}, config=config.intervals)
    return comparison


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return vars(comparison) | {"difference": as_json(comparison.difference), "notes": list(comparison.notes)}
