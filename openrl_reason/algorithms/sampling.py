"""What commands with rollout engines wire together: graders, rewards, engines, the evaluator. Each closes what it opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from openrl_reason.config import require
from openrl_reason.evaluation.config import EvalConfig
from openrl_reason.evaluation.sets import Evaluator
from openrl_reason.rewards.base import Rewarder
from openrl_reason.rewards.build import build_rewarder
from openrl_reason.rewards.config import RewardConfig, RewardTermConfig
from openrl_reason.tasks.base import Task
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.placement import Placement
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup
    from openrl_reason.workers.rollout import RolloutPool

RewardFunction = Callable[..., Any]
"""Any form of docs/rewards.md as a Python callable."""


class RewardSettings(Protocol):
    """What a config must have for its responses to be rewarded."""

    reward: RewardConfig
    grader_processes: int
    grader_deadline_s: float


class SamplingSettings(RewardSettings, Protocol):
    """What a config must have to sample."""

    rollout: RolloutConfig


class TrainingSettings(RewardSettings, Protocol):
    """What a config must have for held-out answers to be judged while it trains."""

    eval: EvalConfig


def with_stops_of(task: Task, sampling: SamplingConfig) -> SamplingConfig:
    """With the stop strings that the task's prompt style needs, or the model goes on to write the next question."""
    return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *task.stop))))


def start_grader(config: RewardSettings, stack: contextlib.ExitStack) -> GraderPool:
    """Grading processes, closed with ``stack``."""
    grader = GraderPool(config.grader_processes, deadline_s=config.grader_deadline_s)
    stack.callback(grader.close)
    return grader


def start_rewarder(
    config: RewardSettings, grader: GraderPool, stack: contextlib.ExitStack, *, task: Task, tokenizer: Any,
    reward_function: RewardFunction | None = None, make_judge: Callable[[RewardTermConfig], Rewarder] | None = None,
) -> Rewarder:  # fmt: skip
    """The rewards of a config (``build_rewarder``), closed with ``stack``."""
    rewarder = build_rewarder(config.reward, task=task, grader=grader, tokenizer=tokenizer, reward_function=reward_function, make_judge=make_judge)
    stack.callback(rewarder.close)
    return rewarder


@contextlib.contextmanager
def rewarded_engines(
    config: SamplingSettings, model_path: str, *, task: Task, tokenizer: Any, placement: Placement, seed: int,
    reward_function: RewardFunction | None = None,
) -> Iterator[tuple[RolloutPool, Rewarder]]:  # fmt: skip
    """Engines with the weights of ``model_path``, and rewards; when the block ends they end, so that their memory is free for something else.

    The rewards start first: a function that does not import shows before any actor is there."""
    from openrl_reason.workers.rollout import RolloutPool

    with contextlib.ExitStack() as stack:
        grader = start_grader(config, stack)
        rewarder = start_rewarder(config, grader, stack, task=task, tokenizer=tokenizer, reward_function=reward_function)
        yield stack.enter_context(RolloutPool(config.rollout, model_path, placement=placement, seed=seed)), rewarder


@contextlib.contextmanager
def running_group(config: ModelConfig, role: str, placement: Placement, seed: int) -> Iterator[ModelGroup]:
    """A model that is only run. It may still load when the block begins; when it ends the model ends."""
    from openrl_reason.workers.model_group import ModelGroup

    group = ModelGroup.start(config, role=role, placement=placement, seed=seed, timeout_s=config.timeout_s, wait=False)
    try:
        yield group
    finally:
        group.close()


def training_evaluator(
    config: TrainingSettings, grader: GraderPool, rewarder: Rewarder, *, pool: Any, tokenizer: Any, reward_function: RewardFunction | None
) -> Evaluator:
    """Held-out answers are judged by the task's grader; a reward that does not ask it at all is the only judge there is."""
    asks_task = reward_function is None and any(term.source == "task" for term in config.reward.all_terms)
    return Evaluator(tokenizer=tokenizer, pool=pool, grader=grader, rewarder=None if asks_task else rewarder, intervals=config.eval.intervals)


def check_transport(rollout: RolloutConfig, take_turns: bool) -> None:
    """Refuses to broadcast weights between engines and ranks that are never awake together."""
    broadcast = take_turns and rollout.weight_transport in ("gloo", "nccl")
    require(not broadcast, "rollout.weight_transport", rollout.weight_transport, "colocated on GPUs use auto, or --placement.colocate false")
