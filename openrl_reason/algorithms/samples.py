"""Rewarded responses to many items, written to disk block by block, so that a run that is killed goes on from the blocks it has.

What the caller gets is read back from those files: metrics and choices are a function of the files, whether or not the run was interrupted.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import Collector, Rollouts, check_failures, rollout_metrics
from openrl_reason.atomic import naming_disk_errors, write_json
from openrl_reason.core.trajectory import Trajectory, read_jsonl, write_jsonl
from openrl_reason.errors import CheckpointError
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.rollout_config import SamplingConfig

BLOCKS = "samples-*.jsonl"
"""The files of a collection."""


@dataclass(frozen=True)
class SampleBlocks:
    """``num_samples`` responses to each of ``items``, ``items_per_block`` items a file, in ``folder``."""

    folder: Path
    items: Sequence[TaskItem]
    num_samples: int
    """0: as many as came for each item (``take``), of which no two may be alike."""
    sampling: SamplingConfig
    seed: tuple[int | str, ...]
    """Identity of the collection; each sample adds its block, place and task id."""
    items_per_block: int = 256
    identity: str = ""
    """What else the samples depend on (the policy, the data): files of another identity are not taken for these."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The same, by name, so that a refusal can say which one differs; JSON-able."""
    flag: str = "run.output_dir"
    """What names the folder, for that refusal."""

    @property
    def files(self) -> list[Path]:
        """One per block."""
        return [self.folder / f"samples-{number:05d}.jsonl" for number in range(-(-len(self.items) // self.items_per_block))]

    def begin(self, *, keep: bool) -> None:
        """Prepares the folder. ``keep``: complete blocks of this identity stay; otherwise the folder is emptied of samples.

        Raises:
            CheckpointError: with ``keep``, blocks of another identity are there.
        """
        with naming_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            about = self.folder / "samples.json"
            here = {"identity": self.identity, "num_samples": self.num_samples, "num_items": len(self.items), "block": self.items_per_block}
            here |= {"sampling": json.loads(json.dumps(vars(self.sampling))), "seed": list(self.seed)} | json.loads(json.dumps(self.settings))
            if keep and about.exists():
                before = json.loads(about.read_text(encoding="utf-8"))
                changed = [name for name in {**before, **here} if before.get(name) != here.get(name)]
                if "sampling" in changed:
                    old, new = before.get("sampling") or {}, here["sampling"]
                    changed[changed.index("sampling")] = ", ".join(f"sampling.{name}" for name in {**old, **new} if old.get(name) != new.get(name))
                if changed:
                    raise CheckpointError(
                        f"the samples in {self.folder} were made with other settings ({', '.join(changed)}): delete them, or choose another"
                        f" --{self.flag}"
                    )
                return
            for file in self.folder.glob(BLOCKS):
                file.unlink()
            write_json(about, here)

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks that are not there yet."""
        return [number for number, file in enumerate(self.files) if not file.exists()]

    def sample(self, collector: Collector, max_failed_rate: float, say: Callable[[str], None] = print) -> None:
        """Generates and rewards the missing blocks. Raises WorkerError if more than that share of a block's rewards failed."""
        for number in self.missing:
            started = time.perf_counter()
            items = self.block_items(number)
            rollouts = collector.collect(items, num_samples=self.num_samples, sampling=self.sampling, seed=(*self.seed, number))
            self._write(number, rollouts, max_failed_rate, say, started)

    def take(self, questions: Iterable[Rollouts], max_failed_rate: float, say: Callable[[str], None] = print) -> None:
        """Writes the missing blocks as the samples of their items come, which may be in any order: ``questions`` are the samples of one item each.

        Raises WorkerError as ``sample`` does."""
        block_of = {item.task_id: number for number in self.missing for item in self.block_items(number)}
        there: defaultdict[int, dict[str, Rollouts]] = defaultdict(dict)
        started = time.perf_counter()
        for question in questions:
            task_id = question.items[0].task_id
            number = block_of[task_id]
            there[number][task_id] = question
            items = self.block_items(number)
            if len(there[number]) == len(items):
                own = there.pop(number)
                self._write(number, joined([own[item.task_id] for item in items]), max_failed_rate, say, started)
                started = time.perf_counter()
        assert not self.missing, "some items have no samples"

    def _write(self, number: int, rollouts: Rollouts, max_failed_rate: float, say: Callable[[str], None], started: float) -> None:
        check_failures(rollouts, max_failed_rate)
        for trajectory, result in zip(rollouts.trajectories, rollouts.results, strict=True):
            trajectory.info |= _reward_info(result)
        with naming_disk_errors(self.files[number]):
            write_jsonl(self.files[number], rollouts.trajectories)
        right = float(np.nanmean(rollouts.rewards)) if np.isfinite(rollouts.rewards).any() else float("nan")
        taken = time.perf_counter() - started
        say(f"block {number + 1}/{len(self.files)}: {len(rollouts.trajectories)} samples, mean reward {right:.3g}, {taken:.1f} s")

    def read(self) -> Rollouts:
        """All samples, prompt-major, with ``rollout_metrics`` of them. Raises DataError naming a file and line that does not read."""
        rollouts = joined(list(self.read_blocks()))
        rollouts.metrics = rollout_metrics(rollouts, self.num_samples)
        return rollouts

    def read_blocks(self) -> Iterator[Rollouts]:
        """The samples of one block after the other, so that no more than a block is in memory; without metrics. Raises as ``read`` does."""
        for number in range(len(self.files)):
            yield self.read_block(number)

    def read_block(self, number: int) -> Rollouts:
        """The samples of one block, prompt-major; without metrics. Raises as ``read`` does."""
        file = self.files[number]
        trajectories = read_jsonl(file)
        items = self._items_of(number, trajectories)
        if items is None:
            raise CheckpointError(f"{file} has {len(trajectories)} samples, and not those that were written: delete it to sample them again")
        return Rollouts(trajectories, items, [_result(trajectory) for trajectory in trajectories])

    def _items_of(self, number: int, trajectories: Sequence[Trajectory]) -> list[TaskItem] | None:
        """The item of each trajectory of a block; None if these are not its samples."""
        block = self.block_items(number)
        if self.num_samples:
            items = [item for item in block for _ in range(self.num_samples)]
            return items if len(items) == len(trajectories) else None
        by_id = {item.task_id: item for item in block}
        came = list(dict.fromkeys(trajectory.task_id for trajectory in trajectories))
        return [by_id[trajectory.task_id] for trajectory in trajectories] if came == list(by_id) else None

    def block_items(self, number: int) -> Sequence[TaskItem]:
        """The items of one block."""
        return self.items[number * self.items_per_block : (number + 1) * self.items_per_block]

    def spanning(self) -> set[str]:
        """Task ids that are in more than one block: data may hold a question twice."""
        first: dict[str, int] = {}
        blocks = ((item.task_id, place // self.items_per_block) for place, item in enumerate(self.items))
        return {task_id for task_id, block in blocks if first.setdefault(task_id, block) != block}


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Several collections in a row, without metrics."""
    return Rollouts(
        [trajectory for part in parts for trajectory in part.trajectories],
        [item for part in parts for item in part.items],
        [result for part in parts for result in part.results],
    )


def _reward_info(result: RewardResult) -> dict[str, Any]:
    """What a trajectory's own fields do not say about its reward; JSON has no NaN."""
    terms = {name: float(score) if np.isfinite(score) else None for name, score in result.terms.items()}
    return {"has_reward": bool(np.isfinite(result.score)), "reward_terms": terms, "grade_detail": result.detail}


def _result(trajectory: Trajectory) -> RewardResult:
    info, steps = trajectory.info, tuple(float(reward) for reward in trajectory.rewards)
    terms = {name: float("nan") if score is None else score for name, score in info["reward_terms"].items()}
    return RewardResult(
        trajectory.reward if info["has_reward"] else float("nan"), info["grade_status"], info["parsed"], info["grade_detail"],
        steps if len(steps) > 1 else None, terms,
    )  # fmt: skip
