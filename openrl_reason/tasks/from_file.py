"""Your own prompts and answers, from a file or the hub: name the columns with ``input_key`` and ``label_key``."""

from __future__ import annotations

from typing import Any

from openrl_reason.data.readers import Row
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.base import TaskConfig, TaskItem
from openrl_reason.tasks.grade_extract import after_mark, last_boxed
from openrl_reason.tasks.graders import canonical_number, check_gold
from openrl_reason.tasks.prompts import DEEPSEEK_MATH, VINEPPO
from openrl_reason.tasks.rows import RowTask, own_id

NUMBER_GRADERS = ("arithmetic", "gsm8k", "gsm8k_lenient", "gsm8k_parity")
MATH_GRADERS = ("math", "math_lenient", "math_parity")


def checked_gold(where: str, value: Any, kind: str) -> str:
    """A gold answer as text, or DataError. For the number graders it is what follows a ``####``, if there is one, and must be a number; for the
    math graders what stands in the last box or after a ``####``."""
    if value is None or isinstance(value, (dict, list)):
        raise DataError(f"{where}: the gold answer is {value!r}; expected text or a number")
    gold = str(value)
    if kind in NUMBER_GRADERS:
        gold = gold.rpartition("####")[2].strip()
        number = canonical_number(gold)
        if number is None:
            raise DataError(f"{where}: the gold answer {gold[:80]!r} is not a number, which grader {kind!r} needs; see --task.grader")
        return number
    if kind in MATH_GRADERS:
        gold = last_boxed(gold) or after_mark(gold) or gold
    try:
        check_gold(kind, gold)
    except ValueError as error:
        raise DataError(f"{where}: {error}; grader {kind!r} needs another (see --task.grader)") from None
    return gold


class FileTask(RowTask):
    """Prompts, gold answers and (for SFT) solutions from named columns. Prompts may be chat messages."""

    name = "file"
    default_prompt_template = "{question}"
    prompt_styles = {"deepseek_math": DEEPSEEK_MATH, "vineppo": VINEPPO}

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if not config.train_path and not config.test_path:
            raise ConfigError("task file: set --task.train_path, --task.test_path or both")

    def columns(self) -> tuple[str, ...]:
        config = self.config
        return tuple(name for name in (config.input_key, config.label_key, config.solution_key, config.id_key) if name)

    def question_of(self, row: Row) -> str:
        prompt = row.values[self.config.input_key]
        return prompt if isinstance(prompt, str) else "\n".join(str(entry["content"]) for entry in prompt if entry["role"] != "system")

    def item_of(self, row: Row) -> TaskItem:
        prompt = row.values[self.config.input_key]
        messages = isinstance(prompt, list) and all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in prompt)
        if not (isinstance(prompt, str) and prompt.strip()) and not (messages and prompt):
            raise DataError(f"{row.where}: column {self.config.input_key!r} holds {str(prompt)[:80]!r}; expected text or chat messages")
        solution = row.values[self.config.solution_key] if self.config.solution_key else None
        if solution is not None and not isinstance(solution, str):
            raise DataError(f"{row.where}: column {self.config.solution_key!r} holds {str(solution)[:80]!r}; expected text")
        gold = checked_gold(row.where, row.values[self.config.label_key], self.grade_kind)
        return self.make_item(prompt, gold=gold, solution=solution, info=own_id(row, self.config.id_key))
