"""Which samples of a collection are kept, and its statistics. Pure: no models, no actors.

Every sample is kept or counted: samples = kept + ungraded + wrong + truncated + repeated + over_limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from openrl_reason.algorithms.collect import FAILED, Rollouts
from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.algorithms.restem_selection import keep_right
from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.pairs import has_reward, reaches


def choose(config: CollectConfig, samples: Sequence[Trajectory]) -> tuple[list[Trajectory], Counter[str]]:
    """(what ``config.mode`` keeps of the samples of some questions, in the order given; counts by reason)."""
    if config.mode == "rejection":
        kept, numbers = keep_right(
            samples, threshold=config.threshold, max_per_prompt=config.max_per_question, choice=config.choice, dedup=config.dedup,
            keep_truncated=config.keep_truncated, seed=config.seed,
        )  # fmt: skip
        names = ("samples", "kept", "ungraded", "wrong", "truncated", "repeated", "over_limit")
        return kept, Counter({name: int(numbers[f"restem/{name}"]) for name in names})
    graded = [sample for sample in samples if has_reward(sample)]
    kept = graded
    if config.mode == "balanced":
        kept = keep_balanced(graded, threshold=config.threshold, max_per_side=config.max_per_side, seed=config.seed)
    return kept, Counter(samples=len(samples), kept=len(kept), ungraded=len(samples) - len(graded), over_limit=len(graded) - len(kept))


def keep_balanced(samples: Sequence[Trajectory], *, threshold: float, max_per_side: int, seed: int) -> list[Trajectory]:
    """Of each question (task id) with r right and w wrong samples min(r, max(w, 1), k) right and min(w, k) wrong ones, for k = ``max_per_side``:
    never more right than wrong, but one right if there is any (OREO, Wang et al. 2024, arXiv 2412.16145, appendix A.1). They are drawn without
    replacement, by the seed and the question; their order is kept."""
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for place, sample in enumerate(samples):
        sides.setdefault(sample.task_id, ([], []))[0 if reaches(sample, threshold) else 1].append(place)
    kept: list[int] = []
    for task_id, (right, wrong) in sides.items():
        rng = np.random.default_rng(derive_seed(seed, "balanced", task_id))
        for side, count in ((right, min(len(right), max(len(wrong), 1))), (wrong, len(wrong))):
            kept += [side[place] for place in rng.choice(len(side), min(count, max_per_side), replace=False)] if side else []
    return [samples[place] for place in sorted(kept)]


class Statistics:
    """Counts over the blocks of a collection."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._counts: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._kept: Counter[str] = Counter(dict.fromkeys(("kept", "ungraded", "wrong", "truncated", "repeated", "over_limit"), 0))
        self._pairs: Counter[str] = Counter()

    def add(self, block: Rollouts, kept: Sequence[Trajectory], counts: Counter[str], pairs: Counter[str]) -> None:
        """A block, what is kept of it, by which counts, and those of its pairs."""
        samples = block.trajectories
        self._statuses.update(block.statuses)
        self._counts.update(
            samples=len(samples), truncated=sum(sample.stop_reason == StopReason.LENGTH for sample in samples),
            prompt_tokens=sum(sample.num_tokens - sample.num_actions for sample in samples),
            response_tokens=sum(sample.num_actions for sample in samples),
        )  # fmt: skip
        for right, wrong, ungraded in _per_question(samples, self._threshold):
            self._counts.update(
                questions=1, right=right, wrong=wrong, ungraded=ungraded, questions_none_right=wrong > 0 and not right,
                questions_all_right=right > 0 and not wrong, questions_ungraded=not (right or wrong),
            )  # fmt: skip
        self._kept.update({name: count for name, count in counts.items() if name != "samples"})
        own = [reaches(sample, self._threshold) for sample in kept]
        self._kept.update(kept_right=sum(own), kept_wrong=len(own) - sum(own), questions=len({sample.task_id for sample in kept}))
        self._pairs.update(pairs)

    def as_json(self) -> dict[str, Any]:
        """``questions`` = none_right + all_right + ungraded + mixed ones; ``samples`` = right + wrong + ungraded. ``failed``: gradings that
        failed, by status; unless the reward's settings give them a worth, those are the ungraded ones."""
        graded = self._counts["right"] + self._counts["wrong"]
        found: dict[str, Any] = {name: int(count) for name, count in self._counts.items()}
        found |= {
            "right_rate": self._counts["right"] / graded if graded else None,
            "no_answer": self._statuses["no_answer"],
            "failed": {status: self._statuses[status] for status in FAILED if self._statuses[status]},
            "kept": {name: int(count) for name, count in self._kept.items()},
        }
        return found | ({"pairs": {name: int(count) for name, count in self._pairs.items()}} if self._pairs else {})


def _per_question(samples: Iterable[Trajectory], threshold: float) -> Iterable[tuple[int, int, int]]:
    """(right, wrong, ungraded) of each question."""
    tallies: dict[str, list[int]] = {}
    for sample in samples:
        tally = tallies.setdefault(sample.task_id, [0, 0, 0])
        tally[2 if not has_reward(sample) else 0 if reaches(sample, threshold) else 1] += 1
    return [(right, wrong, ungraded) for right, wrong, ungraded in tallies.values()]
