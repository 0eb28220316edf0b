"""The task's own grader as a source of rewards."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.tasks.base import Task
from openrl_reason.tasks.graders import GradeResult
from openrl_reason.workers.grading import GraderPool


class TaskReward:
    """What the task's grader says, in the pool's processes. The pool belongs to the caller."""

    def __init__(self, task: Task, grader: GraderPool) -> None:
        self._task, self._grader = task, grader
        self._seen_restarts = grader.num_respawns

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response in the pool."""
        future: Future[RewardResult] = Future()
        graded = self._grader.submit(sample.response, sample.item.gold, self._task.grade_kind_of(sample.item))
        graded.add_done_callback(lambda done: _pass_on(done, future))
        return future

    def flush(self) -> None:
        """The pool fills no batches."""

    def metrics(self) -> dict[str, Any]:
        """``restarts``: processes of the pool that were replaced since the last call."""
        before, self._seen_restarts = self._seen_restarts, self._grader.num_respawns
        return {"restarts": float(self._seen_restarts - before)}

    def close(self) -> None:
        """The pool is its owner's to close."""


def _pass_on(graded: Future[GradeResult], future: Future[RewardResult]) -> None:
    error = RuntimeError("the grader was closed before this answer was graded") if graded.cancelled() else graded.exception()
    if error is not None:
        future.set_exception(error)
        return
    result = graded.result()
    has_score = result.status in ("ok", "no_answer")
    future.set_result(RewardResult(result.score if has_score else float("nan"), result.status, result.parsed, result.detail))
