"""From settings to a source of rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from openrl_reason.config import require
from openrl_reason.rewards.base import Rewarder
from openrl_reason.rewards.combine import CombinedRewards
from openrl_reason.rewards.config import RewardConfig, RewardTermConfig, split_function
from openrl_reason.rewards.functions import callable_rewards, function_rewards
from openrl_reason.rewards.penalties import PENALTIES, Penalty
from openrl_reason.rewards.server import ServerRewards
from openrl_reason.rewards.task_reward import TaskReward
from openrl_reason.tasks.base import Task
from openrl_reason.workers.grading import GraderPool


def build_rewarder(
    config: RewardConfig,
    *,
    task: Task,
    grader: GraderPool,
    tokenizer: Any = None,
    reward_function: Callable[..., Any] | None = None,
    make_judge: Callable[[RewardTermConfig], Rewarder] | None = None,
) -> Rewarder:
    """The rewards that ``config`` describes. Functions are loaded here, each in its first process.

    Args:
        grader: grades for the term "task"; closing the rewards leaves it open.
        tokenizer: for judges.
        reward_function: a Python callable instead of the config's terms; it runs in a thread of this process, and cannot be killed.
        make_judge: makes the source of each term "judge"; without it ``rewards.judge.build_judge(term, config, task=, tokenizer=)`` does.

    Raises:
        ConfigError: a file, module or function that does not exist or does not import, or whose parameters do not say how to call it.
    """
    with contextlib.ExitStack() as stack:
        if reward_function is not None:
            given = config.function or [term.source for term in config.terms]
            require(not given, "reward.function" if config.function else "reward.terms", given, "a reward_function was given, too: give one of them")
            name = getattr(reward_function, "__name__", "")
            term = RewardTermConfig(source="function:call", name=name if name.isidentifier() else "function")
            terms = [(term, callable_rewards(reward_function, config))]
        else:
            terms = []
            for term in config.all_terms:
                is_made = term.source == "judge" and make_judge is not None
                source = make_judge(term) if is_made else _source(term, config, task, grader, tokenizer)
                stack.callback(source.close)
                terms.append((term, source))
        stack.pop_all()
    return CombinedRewards(config, terms)


def check_sources(config: RewardConfig) -> None:
    """Loads every function once, and checks what servers need: what would end a run at its start ends a dry run, too. Asks no server."""
    for term in config.all_terms:
        if term.urls:
            ServerRewards(term.urls, config.server).close()
        elif split_function(term.source)[0]:
            function_rewards(term.source, config, form=term.form, options=term.options).close()


def _source(term: RewardTermConfig, config: RewardConfig, task: Task, grader: GraderPool, tokenizer: Any) -> Rewarder:
    if term.source == "task":
        return TaskReward(task, grader)
    if term.source in PENALTIES:
        return Penalty(term.source, term.options)
    if term.source == "format":
        # A pattern that backtracks is ended like any function that hangs, only sooner: no honest one takes seconds.
        deadline_s = min(config.deadline_s, 5.0)
        return function_rewards("openrl_reason.rewards.penalties:match_format", config, form="sample", options=term.options, deadline_s=deadline_s)
    if term.source == "judge":
        from openrl_reason.rewards.judge import build_judge

        return build_judge(term, config, task=task, tokenizer=tokenizer)
    if term.urls:
        return ServerRewards(term.urls, config.server, term.options.get("send", ()))
    return function_rewards(term.source, config, form=term.form, options=term.options)
