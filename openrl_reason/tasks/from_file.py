"""Your own prompts and answers, from a file or the hub: name the columns with ``input_key`` and ``label_key``."""

from __future__ import annotations

from typing import Any

from openrl_reason.data.readers import Row, read_rows
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.base import Task, TaskConfig, TaskItem
from openrl_reason.tasks.graders import canonical_number

NUMBER_GRADERS = ("arithmetic", "gsm8k", "gsm8k_lenient")


def checked_gold(where: str, value: Any, kind: str) -> str:
    """A gold answer as text. For the number graders it is what follows a ``####``, if there is one, and must be a number (DataError)."""
    if value is None or isinstance(value, (dict, list)):
        raise DataError(f"{where}: the gold answer is {value!r}; expected text or a number")
    gold = str(value)
    if kind in NUMBER_GRADERS:
        gold = gold.rpartition("####")[2].strip()
        number = canonical_number(gold)
        if number is None:
            raise DataError(f"{where}: the gold answer {gold[:80]!r} is not a number, which grader {kind!r} needs; see --task.grader")
        return number
    return gold


class FileTask(Task):
    """Prompts, gold answers and (for SFT) solutions from named columns. Prompts may be chat messages."""

    name = "file"
    default_prompt_template = "{question}"

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if not config.train_path and not config.test_path:
            raise ConfigError("task file: set --task.train_path, --task.test_path or both")

    def load_split(self, split: str) -> list[TaskItem]:
        path = self.config.train_path if split == "train" else self.config.test_path
        if not path:
            raise ConfigError(f"task file: there is no {split} data; set --task.{split}_path")
        keys = [self.config.input_key, self.config.label_key, *([self.config.solution_key] if self.config.solution_key else [])]
        limit = self.config.num_train if split == "train" else self.config.num_test
        return [self._item(row) for row in read_rows(path, keys, split=split, limit=limit)]

    def _item(self, row: Row) -> TaskItem:
        prompt = row.values[self.config.input_key]
        messages = isinstance(prompt, list) and all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in prompt)
        if not (isinstance(prompt, str) and prompt.strip()) and not (messages and prompt):
            raise DataError(f"{row.where}: column {self.config.input_key!r} holds {str(prompt)[:80]!r}; expected text or chat messages")
        solution = row.values[self.config.solution_key] if self.config.solution_key else None
        if solution is not None and not isinstance(solution, str):
            raise DataError(f"{row.where}: column {self.config.solution_key!r} holds {str(solution)[:80]!r}; expected text")
        gold = checked_gold(row.where, row.values[self.config.label_key], self.grade_kind)
        return self.make_item(prompt, gold=gold, solution=solution, info={"source": row.where})
