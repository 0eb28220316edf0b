"""Few-shot examples: solved training items before the question, the same ones for every question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openrl_reason.core.seeds import derive_seed
from openrl_reason.errors import DataError
from openrl_reason.tasks.leakage import item_hash

if TYPE_CHECKING:
    from openrl_reason.tasks.base import TaskItem


class FewShot:
    """``count`` examples and a spare one, which steps in where an example is the question itself: every prompt has ``count`` of them."""

    def __init__(self, items: Sequence[TaskItem], count: int, seed: int, task: str) -> None:
        distinct: dict[bytes, TaskItem] = {}
        for item in items:
            if item.solution is not None:
                distinct.setdefault(item_hash(item), item)
        if len(distinct) <= count:
            raise DataError(
                f"task {task}: num_few_shot={count} needs {count + 1} different training items with a reference solution, and there are "
                f"{len(distinct)} (of {len(items)}); lower --task.num_few_shot, raise --task.num_train, or name a --task.solution_key"
            )
        self._count = count
        self._examples = random.Random(derive_seed(seed, "few-shot")).sample(list(distinct.items()), count + 1)

    def examples_for(self, item: TaskItem) -> list[TaskItem]:
        """The examples to put before ``item``."""
        question = item_hash(item)
        return [example for found, example in self._examples if found != question][: self._count]
