"""``openrl-reason analyze-values``: how accurate estimates of the values of states between reasoning steps are.

The truth of a state is the mean reward of many rollouts from it. Against it stand Monte-Carlo estimates of K rollouts of their own (other samples
than the truth's: the published analyzer of VinePPO predicts from a subsample of the same ones, which flatters it), critics, and, where next steps
are ranked, the advantages that a policy implies against its reference (Kazemnejad et al. 2024, arXiv 2410.01679, section 7).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import Collector, check_failure_rate, check_failures
from openrl_reason.algorithms.common import checked_tokenizer, local_path
from openrl_reason.algorithms.sampling import rewarded_engines, running_group
from openrl_reason.atomic import atomic_folder, write_json
from openrl_reason.config import require, to_dict
from openrl_reason.errors import DataError
from openrl_reason.evaluation.folders import check_output_folder, without_nan
from openrl_reason.evaluation.identity import model_identity, software_versions
from openrl_reason.evaluation.sets import EvalSet, SetDefaults, prepare_sets
from openrl_reason.evaluation.table import print_table
from openrl_reason.evaluation.value_accuracy import truths
from openrl_reason.evaluation.value_config import MIN_DISTINCT, AnalyzeValuesConfig
from openrl_reason.evaluation.value_estimators import PrefixValues, StepScores, implicit_advantages, scalar_values
from openrl_reason.evaluation.value_partial import Partial
from openrl_reason.evaluation.value_states import State, StateRollouts, draw_states, find_states, next_steps
from openrl_reason.evaluation.value_study import (
    ValueStudy,
    accuracy_rows,
    position_rows,
    ranking_rows,
    summarise,
    write_ranking,
    write_states,
)
from openrl_reason.rewards.base import Rewarder
from openrl_reason.rewards.build import check_sources
from openrl_reason.tasks.base import Task, load_task
from openrl_reason.workers.model_config import ModelConfig, ScalarModelConfig
from openrl_reason.workers.placement import Placement, Role

FORMAT = "openrl_reason.values.v1"
IMPLICIT = "implicit advantage"


def analyze_values(
    config: AnalyzeValuesConfig,
    task: Task | None = None,
    *,
    reward_function: Callable[..., Any] | None = None,
    estimators: Mapping[str, PrefixValues] | None = None,
    step_scores: Mapping[str, StepScores] | None = None,
) -> dict[str, Any]:
    """Runs the analysis and returns its summary (what ``summary.json`` holds).

    ``estimators`` and ``step_scores`` are further ones, by name (see ``value_estimators``); they are asked when the engines have ended.

    Raises:
        ConfigError, DataError: a setting or a folder cannot work, or no response has two steps.
        WorkerError: an engine or model failed, or more rewards than ``reward.max_failed_rate``.
    """
    require(bool(config.model), "model", config.model, "name a model folder; `openrl-reason make-model` writes a small one")
    some = config.mc or config.critic or config.oreo_critic or config.reference or estimators or step_scores
    require(bool(some), "mc", list(config.mc), "there is nothing to analyze: give --mc, --critic, --oreo_critic or --reference")
    check_output_folder(config.output, overwrite=config.overwrite)
    path = local_path(config.model)
    tokenizer = checked_tokenizer(path, config.rollout.max_model_len, named="model", trust_remote_code=config.rollout.trust_remote_code)
    check_models(config, tokenizer)
    task = task or load_task(config.task)
    task = task.cut_by(config.step_kind) if config.step_kind else task
    defaults = SetDefaults(config.split, config.num_items, config.samples_per_prompt, config.sampling)
    (chosen,) = prepare_sets((), default_task=task, tokenizer=tokenizer, defaults=defaults, max_model_len=config.rollout.max_model_len)
    for line in plan(config, chosen):
        print(line)
    if config.dry_run and reward_function is None:
        check_sources(config.reward)
    partial = Partial(config, path, chosen, tokenizer, reward_function)
    study = partial.read()
    if config.dry_run:
        return {}
    started, spent = time.perf_counter(), 0.0 if study is None else study.counts["seconds"]
    with contextlib.ExitStack() as stack:
        wanted = roles(config) if study is None else model_roles(config)
        placement = stack.enter_context(Placement(config.placement, wanted)) if wanted else None
        if study is None:
            with rewarded_engines(
                config, path, task=task, tokenizer=tokenizer, placement=placement, seed=config.seed, reward_function=reward_function
            ) as (pool, rewarder):
                study = sample_study(config, chosen, tokenizer, pool, rewarder)
                study.counts["seconds"] = round(time.perf_counter() - started, 1)
                partial.write(study)
        for name, values in (estimators or {}).items():
            study.add_values(name, values)
        for name, scores in (step_scores or {}).items():
            study.add_step_scores(name, scores)
        add_models(study, config, placement)
    study.counts["seconds"] = round(spent + time.perf_counter() - started, 1)
    summary = summarise(
        study, delta=config.delta, num_position_bins=config.position_bins, num_calibration_bins=config.calibration_bins, intervals=config.intervals
    )
    summary = {"format": FORMAT, "model": dict(model_identity(path)), "versions": software_versions(), "config": to_dict(config)} | summary
    print_summary(summary, config)
    if config.output:
        write_output(study, summary, config)
        partial.delete()
    return summary


# ---- before anything starts --------------------------------------------------------------------------------------------------------


def check_models(config: AnalyzeValuesConfig, tokenizer: Any) -> None:
    """Refuses folders that do not belong to the policy; reads no weights."""
    from openrl_reason.models.loading import load_config
    from openrl_reason.models.scalar_model import check_scalar_folder

    for flag, path in (("critic", config.critic), ("oreo_critic", config.oreo_critic), ("reference", config.reference)):
        if not path:
            continue
        check_scalar_folder(path, tokenizer, config.rollout.max_model_len, flag=flag, trust_remote_code=config.rollout.trust_remote_code)
        kinds = load_config(path, trust_remote_code=config.rollout.trust_remote_code).architectures or ()
        has_head = any(kind.endswith(("ForTokenClassification", "ForSequenceClassification")) for kind in kinds)
        if flag == "reference":
            require(not has_head, "reference", path, "it has a scalar head; the reference is a language model")
        elif not has_head:
            print(f"note: --{flag} {path} is a language model without a scalar head: with a new head, all its values are 0")


def roles(config: AnalyzeValuesConfig) -> list[Role]:
    """Everything that is ever started."""
    return [Role("engine", config.rollout.num_engines, config.rollout.tensor_parallel), *model_roles(config)]


def model_roles(config: AnalyzeValuesConfig) -> list[Role]:
    """What scores states. The models come one after the other, so they share a seat."""
    wanted = [("critic", config.critic or config.oreo_critic), ("policy", config.reference), ("reference", config.reference)]
    return [Role(name, config.scoring.num_ranks) for name, path in wanted if path]


def plan(config: AnalyzeValuesConfig, chosen: EvalSet) -> list[str]:
    """What will be done, with the largest number of rollouts that it may take."""
    left_out = f"; {chosen.num_overlong} prompts too long, left out" if chosen.num_overlong else ""
    sampling, k = chosen.sampling, max(config.mc, default=0)
    lines = [
        f"responses: {len(chosen.items)} {chosen.split} items of {chosen.task.name} x {chosen.num_samples}, temperature {sampling.temperature:g},"
        f" top-p {sampling.top_p:g}, at most {sampling.max_new_tokens} tokens, steps cut by {chosen.task.step_kind!r}{left_out}",
        f"values: {config.num_states} states x ({config.truth_rollouts} rollouts for the truth + {k} for estimates)"
        f" = {config.num_states * (config.truth_rollouts + k)} rollouts at most",
    ]
    if config.ranking_states:
        each = config.ranking_truth_rollouts + k
        most = config.ranking_states * config.ranking_actions
        lines.append(
            f"ranking: {config.ranking_states} states x {config.ranking_actions} next steps x ({config.ranking_truth_rollouts} + {k}) rollouts"
            f" = {most * each} at most"
        )
    models = [f"{name} {path}" for name, path in (("critic", config.critic), ("OREO critic", config.oreo_critic), ("reference", config.reference))
              if path]  # fmt: skip
    return [*lines, f"estimators: {', '.join([*(mc_name(k) for k in config.mc), *models])}"]


def mc_name(k: int) -> str:
    return f"MC K={k}"


# ---- engines -----------------------------------------------------------------------------------------------------------------------


def sample_study(config: AnalyzeValuesConfig, chosen: EvalSet, tokenizer: Any, pool: Any, rewarder: Rewarder) -> ValueStudy:
    """Responses, states, truths and Monte-Carlo estimates: all that needs the engines."""
    seed, task = (config.seed, "values"), chosen.task
    collector = Collector(task, tokenizer, pool, rewarder)
    responses = collector.collect(chosen.items, num_samples=chosen.num_samples, sampling=chosen.sampling, seed=(*seed, "responses"))
    check_failures(responses, config.reward.max_failed_rate)
    found = find_states(responses, tokenizer, task.step_kind, chosen.sampling.max_new_tokens)
    if not found.num_stepped:
        raise DataError(
            f"none of the {len(responses.trajectories)} responses has two steps (cut by {task.step_kind!r}), so there are no states between steps:"
            f" use another --step_kind, a longer --sampling.max_new_tokens, or a model that writes its steps down"
        )
    states = draw_states(found.states, config.num_states, config.position_bins, (*seed, "states"))
    print(f"{len(responses.trajectories)} responses, {found.num_stepped} of two steps or more; {len(found.states)} states, {len(states)} drawn")
    rollouts = StateRollouts(pool, rewarder, tokenizer, chosen.sampling, step_kind=task.step_kind, seed=seed)
    timed = _Timer(rollouts)
    truth = truths(timed.rewards(states, config.truth_rollouts, "truth"))
    study = ValueStudy(states, truth, [], truth.take(slice(0, 0)))
    study.predictions = monte_carlo(timed.rewards(states, max(config.mc), "estimate"), config.mc) if config.mc else {}
    if config.ranking_states:
        _add_ranking(study, found.states, rollouts, timed, config)
    check_failure_rate(rollouts.failures, rollouts.counts["rollouts"], config.reward.max_failed_rate, what="rewards of rollouts")
    graded = responses.rewards[np.isfinite(responses.rewards)]
    study.counts |= {
        "responses": len(responses.trajectories), "responses_without_reward": len(responses.rewards) - len(graded),
        "mean_reward": float(graded.mean()) if len(graded) else float("nan"), "responses_with_two_steps": found.num_stepped,
        "responses_not_split": found.num_unsplit, "distinct_states": len(found.states), "states": len(states),
        "states_without_truth": int(np.isnan(truth.values).sum()), **rollouts.counts, "rollouts_failed": len(rollouts.failures),
    }  # fmt: skip
    return study


def monte_carlo(rewards: Sequence[np.ndarray], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """For each K the mean of the first K rollouts of each state. The estimates share rollouts with one another, and none with the truth."""
    return {mc_name(k): truths([own[:k] for own in rewards]).values for k in ks}


def _add_ranking(study: ValueStudy, candidates: Sequence[State], rollouts: StateRollouts, timed: _Timer, config: AnalyzeValuesConfig) -> None:
    """Next steps at other states drawn for it, their truths and estimates. A state before its response's last step mostly has next steps that
    end the response, after which there is nothing to value: none of those is drawn."""
    inner = [state for state in candidates if state.step < state.num_steps - 1]
    chosen = draw_states(inner, config.ranking_states, config.position_bins, (config.seed, "values", "ranking states"))
    sampled = [
        next_steps(state, continuations, rollouts.tokenizer, rollouts.step_kind)
        for state, continuations in zip(chosen, rollouts.continuations(chosen, config.ranking_actions, "next steps"), strict=True)
    ]
    study.ranking = [steps for steps in sampled if len(steps.after) >= MIN_DISTINCT]
    later = study.next_states
    study.ranking_truth = truths(timed.rewards(later, config.ranking_truth_rollouts, "ranking truth"))
    if config.mc:
        study.ranking_predictions = monte_carlo(timed.rewards(later, max(config.mc), "ranking estimate"), config.mc)
    study.counts |= {
        "ranking_states": len(study.ranking), "ranking_states_skipped": len(sampled) - len(study.ranking), "ranking_next_steps": len(later),
        "ranking_last_steps": sum(steps.num_last for steps in sampled),
    }  # fmt: skip


class _Timer:
    """``StateRollouts.rewards`` with a line of progress for each call."""

    def __init__(self, rollouts: StateRollouts) -> None:
        self._rollouts = rollouts

    def rewards(self, states: Sequence[State], num_rollouts: int, purpose: str) -> list[np.ndarray]:
        started, before = time.perf_counter(), self._rollouts.counts["generated_tokens"]
        found = self._rollouts.rewards(states, num_rollouts, purpose)
        seconds, tokens = time.perf_counter() - started, self._rollouts.counts["generated_tokens"] - before
        print(f"{purpose}: {len(states)} states x {num_rollouts} rollouts, {tokens} tokens in {seconds:.1f} s", flush=True)
        return found


# ---- models ------------------------------------------------------------------------------------------------------------------------


def add_models(study: ValueStudy, config: AnalyzeValuesConfig, placement: Placement | None) -> None:
    """Critics and implicit advantages; each model is started, asked and ended before the next."""
    settings = vars(config.scoring) | {"trust_remote_code": config.rollout.trust_remote_code}
    scale, shift = config.oreo_affine
    for name, path, a, b in (("critic", config.critic, 1.0, 0.0), ("OREO critic", config.oreo_critic, scale, shift)):
        if path:
            with running_group(ScalarModelConfig(path=local_path(path), **settings), "critic", placement, config.seed) as group:
                study.add_values(name, scalar_values(group, scale=a, shift=b))
    if config.reference:
        policy, reference = (ModelConfig(path=local_path(path), **settings) for path in (config.model, config.reference))
        with (  # neither waits for the other to load
            running_group(policy, "policy", placement, config.seed) as first,
            running_group(reference, "reference", placement, config.seed) as second,
        ):
            study.add_step_scores(IMPLICIT, implicit_advantages(first, second, beta=config.beta))


# ---- results -----------------------------------------------------------------------------------------------------------------------


def print_summary(summary: Mapping[str, Any], config: AnalyzeValuesConfig) -> None:
    """The tables."""
    level = f"[{100 * config.intervals.confidence:g} % interval, bootstrap over problems]"
    if summary["estimators"]:
        print_table(accuracy_rows(summary, config.delta), f"values of {summary['truth']['num_states']} states {level}")
        print_table(position_rows(summary), "mean absolute error by relative position of the state")
    counts = summary["counts"]
    if config.ranking_states:
        skipped = counts["ranking_states_skipped"]
        print_table(ranking_rows(summary), f"ranking of next steps; {skipped} states skipped: fewer than {MIN_DISTINCT} distinct ones")
    if counts["without_reward"] or counts["responses_without_reward"]:
        print(f"without a reward, left out: {counts['without_reward']} of {counts['rollouts']} rollouts ({counts['rollouts_failed']} failed),"
              f" {counts['responses_without_reward']} of {counts['responses']} responses")  # fmt: skip


def write_output(study: ValueStudy, summary: Mapping[str, Any], config: AnalyzeValuesConfig) -> None:
    """The folder, complete or not at all."""
    from openrl_reason.evaluation.value_page import write_page
    from openrl_reason.evaluation.value_plots import write_plots

    plain = without_nan(summary)
    with atomic_folder(config.output) as folder:
        write_states(study, folder / "states.csv")
        write_ranking(study, folder / "ranking.csv")
        write_json(folder / "summary.json", plain)
        write_plots(study, summary, folder)
        write_page(study, summary, folder / "values.html")
    print(f"analysis: {config.output}")
