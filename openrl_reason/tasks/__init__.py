"""What is being solved, and how it is graded."""

from __future__ import annotations

import importlib

_WHERE = {
    "Task": "openrl_reason.tasks.base",
    "TaskConfig": "openrl_reason.tasks.base",
    "TaskItem": "openrl_reason.tasks.base",
    "load_task": "openrl_reason.tasks.base",
    "GradeResult": "openrl_reason.tasks.graders",
    "GraderPool": "openrl_reason.workers.grading",
    "grade": "openrl_reason.workers.grading",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> object:
    # Lazy: grading processes import openrl_reason.tasks.graders and must stay small.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(_WHERE[name]))[name]
