"""``openrl-reason analyze-policy``: what training has changed. Distance of the weights, KL to the reference, noise of the policy gradient.

The weights are read from files; nothing is started for them. For the rest the policy's engines sample, end, and leave their memory to the models,
which run one after the other. VinePPO's analyses (Kazemnejad et al. 2024, arXiv 2410.01679) take the variance of the gradient over bootstraps of one
set of trajectories; here the batches are independent, which is what the variance of an optimiser step is about.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.algorithms.collect import Collector, check_failures
from openrl_reason.algorithms.common import checked_tokenizer, local_path
from openrl_reason.algorithms.sampling import rewarded_engines, running_group
from openrl_reason.atomic import atomic_folder, write_json
from openrl_reason.config import require, to_dict
from openrl_reason.core.batch import TokenBatch
from openrl_reason.evaluation.folders import check_output_folder, without_nan
from openrl_reason.evaluation.gradient_noise import gradient_noise, inner_products
from openrl_reason.evaluation.identity import model_identity, software_versions
from openrl_reason.evaluation.policy_config import AnalyzePolicyConfig
from openrl_reason.evaluation.policy_gradients import GradientStudy, add_critic, add_sketches, draw_batches, sample_batches
from openrl_reason.evaluation.policy_kl import kl_estimates, response_sums
from openrl_reason.evaluation.policy_tables import print_summary, write_gradients, write_kl, write_weights
from openrl_reason.evaluation.sets import EvalSet, SetDefaults, prepare_sets
from openrl_reason.evaluation.weight_distance import TensorDistance, grouped, summed, weight_distances
from openrl_reason.rewards.base import Rewarder
from openrl_reason.rewards.build import check_sources
from openrl_reason.tasks.base import Task, load_task
from openrl_reason.workers.model_config import ModelConfig, ScalarModelConfig
from openrl_reason.workers.placement import Placement, Role

if TYPE_CHECKING:
    from torch import Tensor

    from openrl_reason.workers.model_group import ModelGroup

FORMAT = "openrl_reason.policy.v1"


@dataclass
class KLStudy:
    """Responses of one model, and what both say of their tokens."""

    batch: TokenBatch
    task_ids: np.ndarray
    """[B]."""
    mean_reward: float
    logprobs: dict[str, Tensor] = field(default_factory=dict)
    """"policy" and "reference" -> [N]."""


@dataclass
class ModelStudy:
    """What is known of one policy; what was not asked for is empty."""

    path: str
    tensors: list[TensorDistance] = field(default_factory=list)
    kl: dict[str, KLStudy] = field(default_factory=dict)
    """Who sampled, "policy" or "reference" -> responses."""
    kl_sums: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """The same -> ``response_sums``."""
    gradient: GradientStudy | None = None
    products: dict[str, np.ndarray] = field(default_factory=dict)
    """Credit -> inner products [B, B] of the batches' gradients."""


def analyze_policy(config: AnalyzePolicyConfig, task: Task | None = None, *, reward_function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Runs the analyses and returns their summary (what ``summary.json`` holds).

    Raises:
        ConfigError, DataError: a setting or a folder cannot work, or a batch has no reward at all.
        WorkerError: an engine or model failed, or more rewards than ``reward.max_failed_rate``.
    """
    require(bool(config.models), "models", list(config.models), "name one or more model folders, as in '[\"runs/ppo/model\"]'")
    compares = [name for name in config.analyses if name != "gradient"]
    require(bool(config.reference) or not compares, "reference", config.reference, f"name the model to compare with, for {' and '.join(compares)}")
    check_output_folder(config.output, overwrite=config.overwrite)
    chosen, tokenizer = _prepare(config, task) if config.samples else (None, None)
    for line in plan(config, chosen):
        print(line)
    if config.dry_run:
        if config.samples and reward_function is None:
            check_sources(config.reward)
        return {}
    started = time.perf_counter()
    studies = [ModelStudy(path) for path in config.models]
    if "weights" in config.analyses:
        for study in studies:
            study.tensors = weight_distances(study.path, config.reference)
    if chosen is not None:
        with Placement(config.placement, roles(config)) as placement:
            measure(studies, config, chosen, tokenizer, placement, reward_function)
    summary = summarise(studies, config) | {"seconds": round(time.perf_counter() - started, 1)}
    print_summary(summary)
    if config.output:
        write_output(studies, summary, config.output)
    return summary


# ---- before anything starts --------------------------------------------------------------------------------------------------------


def _prepare(config: AnalyzePolicyConfig, task: Task | None) -> tuple[EvalSet, Any]:
    """Items and tokenizer; models that do not belong together are refused."""
    from openrl_reason.models.scalar_model import check_scalar_folder

    length, trust = config.rollout.max_model_len, config.rollout.trust_remote_code
    tokenizer = checked_tokenizer(local_path(config.models[0]), length, named="models", trust_remote_code=trust)
    flags = [("models", path) for path in config.models]
    flags += [("reference", config.reference)] if "kl" in config.analyses else []
    for flag, path in flags:
        check_scalar_folder(path, tokenizer, length, flag=flag, trust_remote_code=trust)
        require(not _has_head(path, trust), flag, path, "it has a scalar head; a language model is needed")
    if "gradient" in config.analyses and config.gradient.critic:
        check_scalar_folder(config.gradient.critic, tokenizer, length, flag="gradient.critic", trust_remote_code=trust)
        if not _has_head(config.gradient.critic, trust):
            print(
                f"note: --gradient.critic {config.gradient.critic} is a language model without a scalar head: with a new head, all its values are 0"
            )
    task = task or load_task(config.task)
    if "gradient" in config.analyses and "vine" in config.gradient.credits and config.gradient.vine.step_kind:
        task = task.cut_by(config.gradient.vine.step_kind)
    defaults = SetDefaults(config.split, config.num_items, config.kl.samples_per_prompt, config.sampling)
    (chosen,) = prepare_sets((), default_task=task, tokenizer=tokenizer, defaults=defaults, max_model_len=length)
    if "gradient" in config.analyses:
        draw_batches(chosen.items, 1, config.gradient.prompts_per_batch, (config.seed,))
    return chosen, tokenizer


def _has_head(path: str, trust_remote_code: bool) -> bool:
    from openrl_reason.models.loading import load_config

    kinds = load_config(path, trust_remote_code=trust_remote_code).architectures or ()
    return any(kind.endswith(("ForTokenClassification", "ForSequenceClassification")) for kind in kinds)


def roles(config: AnalyzePolicyConfig) -> list[Role]:
    """Everything that is ever started. Engines and models come one after the other, so they share a seat."""
    engines, ranks = config.rollout.num_engines, config.scoring.num_ranks
    wanted = [("reference", "kl" in config.analyses), ("critic", bool(config.gradient.critic) and "gradient" in config.analyses)]
    return [Role("engine", engines, config.rollout.tensor_parallel), Role("policy", ranks), *(Role(name, ranks) for name, on in wanted if on)]


def plan(config: AnalyzePolicyConfig, chosen: EvalSet | None) -> list[str]:
    """What will be done."""
    against = f" against {config.reference}" if config.reference else ""
    lines = [f"{', '.join(config.analyses)} of {', '.join(config.models)}{against}"]
    if chosen is None:
        return lines
    sampling, own = chosen.sampling, config.gradient
    left_out = f"; {chosen.num_overlong} prompts too long, left out" if chosen.num_overlong else ""
    lines.append(
        f"responses to {len(chosen.items)} {chosen.split} items of {chosen.task.name}, temperature {sampling.temperature:g},"
        f" top-p {sampling.top_p:g}, at most {sampling.max_new_tokens} tokens{left_out}"
    )
    if "kl" in config.analyses:
        who = "each model and the reference" if config.kl.reverse else "each model"
        lines.append(f"kl: {config.kl.samples_per_prompt} responses of {who} to each item")
    if "gradient" in config.analyses:
        responses = own.num_batches * own.prompts_per_batch * own.samples_per_prompt
        rollouts = f"; vine: {own.vine.num_rollouts} rollouts or more of each state between steps" if "vine" in own.credits else ""
        lines.append(
            f"gradient: {own.num_batches} batches x {own.prompts_per_batch} prompts x {own.samples_per_prompt} = {responses} responses of each model;"
            f" credits {', '.join(own.credits)}, {own.loss_reduction} reduction, advantages whitened: {own.whiten}{rollouts}"
        )
    return lines


# ---- engines and models ------------------------------------------------------------------------------------------------------------


def measure(
    studies: Sequence[ModelStudy], config: AnalyzePolicyConfig, chosen: EvalSet, tokenizer: Any, placement: Placement,
    reward_function: Callable[..., Any] | None,
) -> None:  # fmt: skip
    """Fills in what needs engines and models: the policies one after the other, the reference's engines first and its scores last."""

    def engines(path: str) -> contextlib.AbstractContextManager[tuple[Any, Rewarder]]:
        return rewarded_engines(
            config, local_path(path), task=chosen.task, tokenizer=tokenizer, placement=placement, seed=config.seed, reward_function=reward_function
        )

    by_reference = None
    if "kl" in config.analyses and config.kl.reverse:
        with engines(config.reference) as (pool, rewarder):
            by_reference = sample_responses(config, chosen, tokenizer, pool, rewarder, "reference")
    for study in studies:
        with engines(study.path) as (pool, rewarder):
            if "kl" in config.analyses:
                study.kl["policy"] = sample_responses(config, chosen, tokenizer, pool, rewarder, "policy")
            if "gradient" in config.analyses:
                study.gradient = sample_batches(config, chosen, tokenizer, pool, rewarder)
        if by_reference is not None:
            study.kl["reference"] = KLStudy(by_reference.batch, by_reference.task_ids, by_reference.mean_reward)
        run_models(study, config, chosen, placement)
    if "kl" in config.analyses:
        with running_group(_settings(config, config.reference), "reference", placement, config.seed) as group:
            score_by_reference(studies, group, config)


def sample_responses(config: AnalyzePolicyConfig, chosen: EvalSet, tokenizer: Any, pool: Any, rewarder: Rewarder, who: str) -> KLStudy:
    """Responses to all items. Those without a reward count as any other."""
    collector = Collector(chosen.task, tokenizer, pool, rewarder)
    seed = (config.seed, "policy", "kl", who)
    rollouts = collector.collect(chosen.items, num_samples=config.kl.samples_per_prompt, sampling=chosen.sampling, seed=seed)
    check_failures(rollouts, config.reward.max_failed_rate)
    graded = rollouts.rewards[np.isfinite(rollouts.rewards)]
    batch = TokenBatch.from_trajectories(rollouts.trajectories)
    print(f"kl: {batch.num_sequences} responses of the {who}, {batch.num_actions} tokens", flush=True)
    return KLStudy(batch, np.array([item.task_id for item in rollouts.items]), float(graded.mean()) if len(graded) else float("nan"))


def run_models(study: ModelStudy, config: AnalyzePolicyConfig, chosen: EvalSet, placement: Placement) -> None:
    """The critic's values, then the policy's log-probs and gradients."""
    if study.gradient is not None and config.gradient.critic:
        settings = vars(_settings(config, config.gradient.critic)) | {"gradient_checkpointing": False}
        with running_group(ScalarModelConfig(**settings), "critic", placement, config.seed) as critic:
            add_critic(study.gradient, critic)
    with running_group(_settings(config, study.path), "policy", placement, config.seed) as policy:
        for one in study.kl.values():
            one.logprobs["policy"] = policy.logprobs(one.batch, chosen.sampling.temperature)["logprobs"]
        if study.gradient is not None:
            add_gradients(study, policy, config, chosen)


def add_gradients(study: ModelStudy, policy: ModelGroup, config: AnalyzePolicyConfig, chosen: EvalSet) -> None:
    """Sketches and their inner products."""
    started = time.perf_counter()
    add_sketches(study.gradient, policy, config.gradient, chosen.sampling, config.seed)
    sketches = study.gradient.sketches
    study.products = {credit: inner_products([one.sketch for one in own]) for credit, own in sketches.items()}
    study.gradient.counts["sketch_error"] = max(one.norm_error for own in sketches.values() for one in own)
    sketches.clear()
    count = len(study.gradient.batches) * len(study.products)
    print(f"{count} gradients in {time.perf_counter() - started:.1f} s", flush=True)


def score_by_reference(studies: Sequence[ModelStudy], reference: ModelGroup, config: AnalyzePolicyConfig) -> None:
    """The reference's log-probs of all responses, its own ones once, and the estimates of each response."""
    of_its_own = None
    for study in studies:
        for who, one in study.kl.items():
            if who == "reference" and of_its_own is not None:
                one.logprobs["reference"] = of_its_own
            else:
                one.logprobs["reference"] = reference.logprobs(one.batch, config.sampling.temperature)["logprobs"]
            of_its_own = one.logprobs["reference"] if who == "reference" else of_its_own
            other = "reference" if who == "policy" else "policy"
            study.kl_sums[who] = response_sums(one.batch, one.logprobs[who], one.logprobs[other])


def _settings(config: AnalyzePolicyConfig, path: str) -> ModelConfig:
    return ModelConfig(path=local_path(path), **vars(config.scoring), trust_remote_code=config.rollout.trust_remote_code)


# ---- results -----------------------------------------------------------------------------------------------------------------------


def summarise(studies: Sequence[ModelStudy], config: AnalyzePolicyConfig) -> dict[str, Any]:
    """All numbers with the settings and identities that they belong to."""
    return {
        "format": FORMAT, "reference": model_identity(local_path(config.reference)) if config.reference else None,
        "models": [
            {"path": study.path, "identity": model_identity(local_path(study.path))} | _weights(study) | _kl(study, config) | _gradient(study, config)
            for study in studies
        ],
        "versions": software_versions(), "config": to_dict(config),
    }  # fmt: skip


def _weights(study: ModelStudy) -> dict[str, Any]:
    if not study.tensors:
        return {}
    groups = {"by_layer": lambda one: one.layer, "by_module": lambda one: one.module}
    return {
        "weights": {"total": summed("all", study.tensors).as_json()}
        | {name: [one.as_json() for one in grouped(study.tensors, key)] for name, key in groups.items()}
    }


def _kl(study: ModelStudy, config: AnalyzePolicyConfig) -> dict[str, Any]:
    found = {}
    for who, sums in study.kl_sums.items():
        one = study.kl[who]
        mask = one.batch.action_mask
        sampled, scored = one.batch.behaviour_logprobs[mask], one.logprobs[who][mask]
        found[who] = kl_estimates(sums, one.task_ids, config.intervals) | {
            "responses": one.batch.num_sequences, "tokens": one.batch.num_actions, "mean_reward": one.mean_reward,
            "logprob_difference": float((sampled - scored).abs().mean()),
        }  # fmt: skip
    return {"kl": found} if found else {}


def _gradient(study: ModelStudy, config: AnalyzePolicyConfig) -> dict[str, Any]:
    if study.gradient is None:
        return {}
    first = next(iter(study.products))
    credits = {}
    for credit, products in study.products.items():
        found = gradient_noise(products, study.products[first] if credit != first else None)
        ratio = found["noise_to_signal"]
        found["noise_scale_prompts"] = {name: number * config.gradient.prompts_per_batch for name, number in ratio.items()}
        credits[credit] = found
    return {"gradient": {"credits": credits, "num_batches": len(study.gradient.batches), "counts": study.gradient.counts}}


def write_output(studies: Sequence[ModelStudy], summary: Mapping[str, Any], output: str) -> None:
    """The folder, complete or not at all."""
    with atomic_folder(output) as folder:
        files: dict[str, tuple[bool, Callable[[Sequence[ModelStudy], Path], None]]] = {
            "weights.csv": (any(study.tensors for study in studies), write_weights),
            "kl.csv": (any(study.kl for study in studies), write_kl),
            "gradients.csv": (any(study.products for study in studies), write_gradients),
        }
        for name, (wanted, write) in files.items():
            if wanted:
                write(studies, folder / name)
        write_json(folder / "summary.json", without_nan(summary))
    print(f"analysis: {output}")
