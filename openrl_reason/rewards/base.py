"""The two records every reward source speaks in, and the interface of a source. Standard library only."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from openrl_reason.tasks.base import TaskItem


@dataclass(frozen=True)
class RewardSample:
    """One response, as a reward source sees it."""

    prompt: str
    """Text of the prompt as the model got it."""
    response: str
    """Text of the response, special tokens left out."""
    item: TaskItem
    """The problem: gold answer, info and all."""
    num_tokens: int
    """Tokens of the response."""
    stop_reason: str
    """A ``StopReason`` value; "length" means that the response was cut off."""
    steps: tuple[str, ...] = ()
    """The response cut into reasoning steps; ``"".join(steps)`` is the response decoded from its ids."""

    @property
    def query(self) -> str:
        """Prompt and response in one text."""
        return self.prompt + self.response


@dataclass(frozen=True)
class RewardResult:
    """What became of one response."""

    score: float
    """The reward; NaN: it has none (its grading failed and the configured worth of that status is null), so it must not train."""
    status: str = "ok"
    """One of ``openrl_reason.tasks.graders.STATUSES``."""
    parsed: str | None = None
    """The answer that the grader found."""
    detail: str = ""
    """For a failure, its cause in words."""
    step_scores: tuple[float, ...] | None = None
    """One reward per step, when the source gives them; ``score`` is their sum."""
    terms: dict[str, float] = field(default_factory=dict)
    """Unweighted score of each reward by name; NaN where it failed."""
    logs: dict[str, float] = field(default_factory=dict)
    """Further numbers that the source wants to see in the metrics."""


class Rewarder(Protocol):
    """A source of rewards. Thread-safe; results come back as futures so that scoring overlaps generation."""

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response. The future fails only for errors that must stop the run (a source that cannot be loaded)."""
        ...

    def flush(self) -> None:
        """All responses of this collection were submitted: start the last, partly filled batches."""
        ...

    def metrics(self) -> dict[str, Any]:
        """``reward/...`` numbers of what was finished since the last call (status rates, mean of each term, seconds, retries)."""
        ...

    def close(self) -> None:
        """End processes and connections. May be called twice."""
        ...
