"""RestEM's choices: which samples are kept, which candidate of an iteration, and when the run is over. Pure: no models, no actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.pairs import has_reward, reaches, response_key

START = "start"
"""Name of the state that training began with."""


def keep_right(
    samples: Sequence[Trajectory], *, threshold: float, max_per_prompt: int, choice: str = "first", dedup: bool = False,
    keep_truncated: bool = False, seed: int = 0,
) -> tuple[list[Trajectory], dict[str, float]]:  # fmt: skip
    """(the right samples, at most ``max_per_prompt`` of a question (a task id), in the order given; counts ``restem/...``).

    samples = kept + wrong + ungraded + truncated (right, but cut off) + repeated (with ``dedup``) + over_limit. Questions without a single
    right sample are counted as ``none_right``.
    """
    counts = Counter(dict.fromkeys(("wrong", "ungraded", "truncated", "repeated", "over_limit", "none_right"), 0))
    questions: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        right = questions.setdefault(sample.task_id, [])
        if not has_reward(sample):
            counts["ungraded"] += 1
        elif not reaches(sample, threshold):
            counts["wrong"] += 1
        elif sample.stop_reason == StopReason.LENGTH and not keep_truncated:
            counts["truncated"] += 1
        elif dedup and any(response_key(samples[other]) == response_key(sample) for other in right):
            counts["repeated"] += 1
        else:
            right.append(place)
    kept: list[int] = []
    for task_id, right in questions.items():
        counts["none_right"] += not right
        if len(right) > max_per_prompt:
            counts["over_limit"] += len(right) - max_per_prompt
            if choice == "random":
                rng = np.random.default_rng(derive_seed(seed, "restem keep", task_id))
                right = [right[index] for index in np.sort(rng.choice(len(right), max_per_prompt, replace=False))]
            right = right[:max_per_prompt]
        kept += right
    counts.update(samples=len(samples), questions=len(questions), kept=len(kept))
    return [samples[place] for place in sorted(kept)], {f"restem/{name}": float(count) for name, count in counts.items()}


@dataclass
class Progress:
    """Where the run stands: JSON-able, and all that decides how it goes on."""

    iteration: int = 0
    step: int = 0
    """Optimiser steps of this iteration that are done."""
    best: str = START
    """State of the best model so far."""
    best_score: float | None = None
    """Its validation accuracy; None: never evaluated, so that the first iteration counts as an improvement."""
    best_version: int = 0
    """The run's optimiser steps when it was taken."""
    choice: str = ""
    """State of the candidate that this iteration has chosen so far."""
    choice_score: float | None = None
    choice_version: int = 0
    exhausted: bool = False
    """No later candidate of this iteration can be chosen."""
    outcome: str = ""
    """Why the run is over; empty: it is not."""

    def iteration_is_open(self, total: int) -> bool:
        """Whether there are steps left, of ``total``, whose candidates could still be chosen."""
        return self.step < total and not self.exhausted

    def offer(self, state: str, score: float, version: int, selection: str) -> bool:
        """Takes note of a candidate; whether it is now the iteration's choice."""
        if self.choice_score is None or score > self.choice_score:
            self.choice, self.choice_score, self.choice_version = state, score, version
            return True
        self.exhausted = selection == "paper"
        return False

    def end_iteration(self, iterations: int) -> None:
        """The choice becomes the best model if it is better; otherwise, and after the last iteration, the run is over."""
        improved = self.best_score is None or self.choice_score > self.best_score
        if improved:
            self.best, self.best_score, self.best_version = self.choice, self.choice_score, self.choice_version
        else:
            self.outcome = f"iteration {self.iteration} did not improve: {self.choice_score:.4g} after {self.best_score:.4g}"
        self.iteration, self.step = self.iteration + 1, 0
        self.choice, self.choice_score, self.choice_version, self.exhausted = "", None, 0, False
        if improved and self.iteration == iterations:
            self.outcome = f"all {iterations} iterations are done"

    def reopen(self, *, iterations: int, steps_left: int) -> None:
        """A resumed run that nothing but its limits had ended goes on, if they have been raised."""
        if self.outcome.endswith("are done") and self.iteration < iterations and steps_left > 0:
            self.outcome = ""
