"""Evaluation sets: which items, how many samples of what kind, and what came of them. The command and the trainers' evaluations share this."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.algorithms.collect import Collector, Rollouts, logged_places, readable
from openrl_reason.core.seeds import content_id
from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.config import GREEDY_REMEDY, EvalConfig, EvalSetConfig
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.metrics import GRADED, GradedSamples, as_json, estimates, group_tables, summary
from openrl_reason.rewards.base import Rewarder, RewardResult
from openrl_reason.rewards.task_reward import TaskReward
from openrl_reason.tasks.base import Task, TaskItem, load_task, select_items
from openrl_reason.tasks.graders import GradeResult, check_kind
from openrl_reason.tasks.leakage import overlap
from openrl_reason.workers.rollout_config import SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.workers.grading import GraderPool


@dataclass(frozen=True)
class SetDefaults:
    """What a set takes where its config is silent."""

    split: str = "test"
    num_items: int = 0
    num_samples: int = 1
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    ks: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalSet:
    """A set ready to run: its items are fixed."""

    name: str
    task: Task
    split: str
    items: list[TaskItem]
    num_overlong: int
    """Items left out because their prompt and a full response do not fit the engines."""
    num_samples: int
    sampling: SamplingConfig
    ks: tuple[int, ...]
    also_grade: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash of the items' ids in order: equal for two evaluations of the same items."""
        return content_id(*(item.task_id for item in self.items))


def prepare_sets(configs: Sequence[EvalSetConfig], *, default_task: Task, tokenizer: Any, defaults: SetDefaults, max_model_len: int) -> list[EvalSet]:
    """The sets of ``configs`` (none: one set of the default task) with their items chosen and too long prompts left out and counted.

    A set with ``greedy`` becomes two: ``name`` and ``name/greedy``.

    Raises:
        ConfigError: a setting cannot work, or two sets have one name. The message names the set.
        DataError: a set has no items, or ids that do not exist.
    """
    prepared: list[EvalSet] = []
    for config in configs or (EvalSetConfig(),):
        with _naming_set(config.name):
            task = load_task(config.task) if config.task is not None else default_task
        name = config.name or task.name
        with _naming_set(name):
            one = _prepare(config, name, task, tokenizer, defaults, max_model_len)
        prepared.append(one)
        if config.greedy and one.sampling.temperature == 0:
            raise ConfigError(f"evaluation set {name!r}: greedy is true at temperature 0, where every response is greedy already: leave it out")
        if config.greedy:
            greedy = replace(one.sampling, temperature=0.0, top_p=1.0, top_k=-1)
            prepared.append(replace(one, name=f"{name}/greedy", num_samples=1, sampling=greedy, ks=()))
    repeated = [name for name, count in Counter(one.name for one in prepared).items() if count > 1]
    if repeated:
        raise ConfigError(f"two evaluation sets are called {repeated[0]!r}: give each a name of its own")
    names = {one.name for one in prepared}
    for alike in (grader_name(one.name, kind) for one in prepared for kind in one.also_grade):
        if alike in names:
            raise ConfigError(f"a set is called {alike!r}, and another set's metrics by that grader would be, too: rename one of the sets")
    return prepared


def training_sets(config: EvalConfig, *, task: Task, tokenizer: Any, sampling: SamplingConfig, max_model_len: int) -> list[EvalSet]:
    """The sets that a trainer evaluates on: ``config.sets``, or the first ``config.num_items`` test items of its task."""
    if not config.sets and not config.num_items:
        return []
    own = replace(sampling, temperature=config.temperature, top_p=config.top_p)
    defaults = SetDefaults("test", config.num_items, config.num_samples, own, config.ks)
    return prepare_sets(config.sets, default_task=task, tokenizer=tokenizer, defaults=defaults, max_model_len=max_model_len)


def refuse_overlap(train_items: Iterable[TaskItem], sets: Sequence[EvalSet], source: str) -> None:
    """Raises DataError if a question of the training data ``source`` is among the items of a held-out set, compared by normalised hash."""
    train_items = list(train_items)
    for one in sets:
        leaked = overlap(train_items, one.items) if one.split == "test" else []
        if leaked:
            raise DataError(
                f"evaluation set {one.name!r}: {len(leaked)} training questions of {source} are among its {len(one.items)} items (first:"
                f" {leaked[0].task_id}): its accuracy would flatter a model trained on them. Take them out of the training data, or pass"
                " --task.allow_test_data_in_training true if this is meant"
            )


@contextlib.contextmanager
def _naming_set(name: str) -> Iterator[None]:
    """Errors within the block name the set."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"evaluation set {name!r}: {error}" if name else str(error)) from error


def _prepare(config: EvalSetConfig, name: str, task: Task, tokenizer: Any, defaults: SetDefaults, max_model_len: int) -> EvalSet:
    own = {key: getattr(config, key) for key in ("temperature", "top_p", "top_k", "max_new_tokens", "stop")}
    sampling = replace(defaults.sampling, **{key: value for key, value in own.items() if value is not None})
    sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *task.stop))))  # a prompt style may need some of its own
    num_samples = defaults.num_samples if config.num_samples is None else config.num_samples
    if num_samples > 1 and sampling.temperature == 0:
        raise ConfigError(f"num_samples is {num_samples} at temperature 0: {GREEDY_REMEDY.format(greedy='greedy: true')}")
    if any(k > num_samples for k in config.ks):
        raise ConfigError(f"ks is {list(config.ks)}: with num_samples {num_samples} use k from 1 to {num_samples}, or more samples")
    ks = config.ks or tuple(k for k in defaults.ks if k <= num_samples) or (num_samples,)
    also_grade = _other_graders(config.also_grade, task.grade_kind)
    limit = max_model_len - sampling.max_new_tokens
    if limit < 1:
        raise ConfigError(f"max_new_tokens is {sampling.max_new_tokens}: it leaves no room for a prompt below rollout.max_model_len {max_model_len}")
    split = config.split or defaults.split
    items, ids = task.items(split), config.wanted_ids()
    items = select_items(items, ids) if ids else items
    first = config.num_items if config.num_items is not None else 0 if ids else defaults.num_items
    encoded = task.encode_prompts(items[: first or None], tokenizer, limit)
    return EvalSet(name, task, split, encoded.items, encoded.num_too_long, num_samples, sampling, ks, also_grade)


def _other_graders(kinds: Sequence[str], own: str) -> tuple[str, ...]:
    """The kinds that differ from the set's own, each of which must have a name of its own in the metrics."""
    others = tuple(kind for kind in dict.fromkeys(kinds) if kind != own)
    for kind in others:
        try:
            check_kind(kind)
        except ValueError as error:
            raise ConfigError(f"also_grade: {error}") from None
    names = [grader_name("", kind) for kind in (own, *others)]
    if len(set(names)) < len(names):
        raise ConfigError(f"also_grade is {list(kinds)}: two graders would be called alike in the metrics ({', '.join(names)}): rename a function")
    return others


@dataclass
class SetResult:
    """What came of one set."""

    eval_set: EvalSet
    rollouts: Rollouts
    graded: dict[str, GradedSamples]
    """By grader: "" is the set's own, the others are ``also_grade``."""
    details: dict[str, list[GradeResult]]
    """Results of the ``also_grade`` graders, one per trajectory."""
    intervals: IntervalConfig

    @property
    def metrics(self) -> dict[str, float]:
        """Flat numbers, ``eval/<set>/...`` and ``eval/<set>/<grader>/...``."""
        flat: dict[str, float] = {}
        for kind, samples in self.graded.items():
            numbers = summary(samples, self.eval_set.ks, self.intervals, f"eval/{grader_name(self.eval_set.name, kind)}")
            lengths = ("response_length", "response_length_median", "truncated_rate")
            flat |= {name: value for name, value in numbers.items() if not kind or name.rpartition("/")[2] not in lengths}
        return flat

    def records(self, *, step: int = 0, limit: int = -1, tokenizer: Any = None) -> list[dict[str, Any]]:
        """One per sample, in the form of ``rollouts.jsonl``: all, or ``limit`` evenly spaced ones; with a ``tokenizer``, token by token."""
        records = readable(self.rollouts, step, limit, source=f"eval/{self.eval_set.name}", tokenizer=tokenizer)
        places = logged_places([t.group_id for t in self.rollouts.trajectories], limit)
        for place, record in zip(places, records, strict=True):
            record["sample_index"] = place % self.eval_set.num_samples
            if self.details:
                graded = {kind: results[place] for kind, results in self.details.items()}
                record["also_graded"] = {kind: {"score": one.score, "parsed": one.parsed, "status": str(one.status)} for kind, one in graded.items()}
        return records

    def as_json(self, group_by: Sequence[str]) -> dict[str, Any]:
        """Everything but the texts: settings, estimates with their intervals and methods, tables, and each item's verdicts."""
        one, own = self.eval_set, self.graded[""]
        return {
            "name": one.name, "task": one.task.name, "split": one.split, "num_items": len(one.items), "num_overlong": one.num_overlong,
            "items_hash": one.identity,
            "prompts_hash": content_id(*(t.info["prompt"] for t in self.rollouts.trajectories[:: one.num_samples])),
            "num_samples": one.num_samples, "sampling": vars(one.sampling) | {"stop": list(one.sampling.stop)},
            "estimates": {
                grader_name("", kind) or one.task.grade_kind: {name: as_json(mean) for name, mean in found.items()}
                for kind, samples in self.graded.items()
                for found in [estimates(samples, one.ks, self.intervals)]
            },
            "statuses": dict(Counter(status for row in own.statuses for status in row)),
            "tables": group_tables(own, group_by, one.ks, self.intervals),
            "items": [
                {"id": item.task_id, "scores": [None if np.isnan(score) else float(score) for score in scores], "votes": _votes(answers)}
                for item, scores, answers in zip(one.items, own.scores, own.answers, strict=True)
            ],
        }  # fmt: skip


def _votes(answers: Sequence[str | None]) -> list[int | None]:
    """Each answer as the number of its first appearance: what a vote needs to know, without the texts."""
    numbers: dict[str, int] = {}
    return [None if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]


def grader_name(prefix: str, kind: str) -> str:
    """``prefix``, and the grader's short name for those of ``also_grade``."""
    return "/".join(part for part in (prefix, kind.rpartition(":")[2]) if part)


class Evaluator:
    """Runs sets on a pool of engines.

    Args:
        grader: grades by the tasks' graders.
        rewarder: scores the responses instead of the tasks' graders (a run whose reward function is all the verdict there is).
    """

    def __init__(
        self, *, tokenizer: Any, pool: Any, grader: GraderPool, rewarder: Rewarder | None = None, intervals: IntervalConfig | None = None
    ) -> None:
        self.tokenizer, self.pool, self.grader, self.rewarder = tokenizer, pool, grader, rewarder
        self.intervals = intervals or IntervalConfig()

    def run(self, eval_set: EvalSet, seed: tuple[int | str, ...]) -> SetResult:
        """Generate and grade every sample of a set. Samples are a function of (seed, set, place in the set, item, sample) alone."""
        task = eval_set.task
        collector = Collector(task, self.tokenizer, self.pool, self.rewarder or TaskReward(task, self.grader))
        rollouts = collector.collect(eval_set.items, num_samples=eval_set.num_samples, sampling=eval_set.sampling, seed=(*seed, eval_set.name))
        futures = {
            kind: [self.grader.submit(t.info["response"], t.info["gold"], kind) for t in rollouts.trajectories] for kind in eval_set.also_grade
        }
        details = {kind: [future.result() for future in pending] for kind, pending in futures.items()}
        graded = {"": graded_samples(rollouts, rollouts.results, eval_set.num_samples)}
        graded |= {kind: graded_samples(rollouts, results, eval_set.num_samples) for kind, results in details.items()}
        return SetResult(eval_set, rollouts, graded, details, self.intervals)


def graded_samples(rollouts: Rollouts, results: Sequence[RewardResult | GradeResult], num_samples: int) -> GradedSamples:
    """A collection as arrays, item by item."""

    def rows(values: list[Any]) -> list[list[Any]]:
        return [values[first : first + num_samples] for first in range(0, len(values), num_samples)]

    scores = [result.score if result.status in GRADED else float("nan") for result in results]
    return GradedSamples(
        scores=np.array(rows(scores), dtype=np.float64),
        answers=rows([result.parsed for result in results]),
        statuses=rows([str(result.status) for result in results]),
        lengths=np.array(rows([t.num_actions for t in rollouts.trajectories])),
        truncated=np.array(rows([t.stop_reason == StopReason.LENGTH for t in rollouts.trajectories])),
        infos=[item.info for item in rollouts.items[::num_samples]],
    )
