"""MATH: competition problems (Hendrycks et al., arXiv 2103.03874), from local files or the hub; MATH-500 is read the same way.

Rows are {problem, solution, level, type} with an optional answer. The gold answer is what the last ``\\boxed{}`` of the solution holds; of a
row without a box, ``answer``. (In that order: some files' ``answer`` was normalised with losses, degrees and the line breaks of matrices among
them. In MATH-500 both agree everywhere.) ``info["level"]`` is a number, ``info["type"]`` the subject. Training data with problems of the published
test split (of which MATH-500 is a part) or of ``test_path`` is refused.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from openrl_reason.data.readers import Row
from openrl_reason.errors import DataError
from openrl_reason.tasks.base import TaskItem
from openrl_reason.tasks.from_file import checked_gold
from openrl_reason.tasks.grade_extract import last_boxed
from openrl_reason.tasks.leakage import question_hash, unpack
from openrl_reason.tasks.math_test_hashes import PACKED
from openrl_reason.tasks.prompts import BOXED_INSTRUCTION, DEEPSEEK_MATH, OREO_MATH, VINEPPO
from openrl_reason.tasks.rows import RowTask, own_id, text_of

HUB_NAME = "EleutherAI/hendrycks_math"
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")
# Two published training solutions end in an empty box. Both ask how many primes there are in a stretch in which there is none.
_EMPTY_BOXES = dict.fromkeys((bytes.fromhex("ce756f00685c"), bytes.fromhex("022ac6322672")), "0")
_NUMBER = re.compile(r"[0-9]+")


@functools.cache
def published_test_hashes() -> frozenset[bytes]:
    """Hashes of the problems of the published test split: 5000 problems, one of them twice."""
    return unpack(PACKED)


class MATHTask(RowTask):
    """``train_path`` and ``test_path`` default to the seven subjects of EleutherAI/hendrycks_math on the hub, 7500 and 5000 problems."""

    name = "math"
    grade_kind = "math"
    step_kind = "newline_sentence"
    default_prompt_template = "Problem: {question}\nSolution:\n"
    default_chat_prompt = "{question}\n" + BOXED_INSTRUCTION
    prompt_styles = {"oreo_qwen": OREO_MATH, "deepseek_math": DEEPSEEK_MATH, "vineppo": VINEPPO}
    hub_names = tuple(f"{HUB_NAME}:{subject}" for subject in SUBJECTS)

    def columns(self) -> tuple[str, ...]:
        return ("problem",)

    def sources(self, split: str) -> tuple[str, ...]:
        sources = super().sources(split)
        return self.hub_names if sources == (HUB_NAME,) else sources  # the hub's repository has no configuration of all subjects

    def published_test_hashes(self) -> frozenset[bytes]:
        return published_test_hashes()

    def question_of(self, row: Row) -> str:
        return text_of(row, "problem", "problem")

    def item_of(self, row: Row) -> TaskItem:
        solution = text_of(row, "solution", "solution") if row.values.get("solution") is not None else None
        gold = last_boxed(solution or "") or row.values.get("answer")
        if gold is None or gold == "":
            gold = _EMPTY_BOXES.get(question_hash(self.question_of(row)))
        if gold is None:
            raise DataError(f"{row.where}: no gold answer: the solution has no \\boxed{{}} and there is no column 'answer'")
        gold = checked_gold(row.where, gold, self.grade_kind)
        info = own_id(row, "unique_id", "id", "idx") | _level_and_type(row.values)
        return self.make_item(self.question_of(row), gold=gold, solution=solution, info=info)


def _level_and_type(values: dict[str, Any]) -> dict[str, Any]:
    """``level`` as a number ("Level 5" and 5 alike; "Level ?" is left out) and ``type`` (MATH-500 calls it subject)."""
    found: dict[str, Any] = {}
    number = _NUMBER.search(str(values.get("level", "")))
    if number:
        found["level"] = int(number[0])
    kind = values.get("type", values.get("subject"))
    if kind:
        found["type"] = str(kind)
    return found
