"""GSM8K: grade-school word problems (Cobbe et al., arXiv 2110.14168), from the hub or from local files with columns question and answer.

The gold answer is the number after ``####``. Training data with questions of the published test split, or of ``test_path``, is refused.
"""

from __future__ import annotations

import functools
import re

from openrl_reason.data.readers import Row
from openrl_reason.errors import DataError
from openrl_reason.tasks.base import TaskItem
from openrl_reason.tasks.from_file import checked_gold
from openrl_reason.tasks.gsm8k_test_hashes import PACKED
from openrl_reason.tasks.leakage import unpack
from openrl_reason.tasks.prompts import DEEPSEEK_MATH, OREO_GSM8K, VINEPPO
from openrl_reason.tasks.rows import RowTask, own_id, text_of

_CALCULATION = re.compile(r"<<[^<>\n]*>>")


@functools.cache
def published_test_hashes() -> frozenset[bytes]:
    """Hashes of the 1319 questions of the published test split."""
    return unpack(PACKED)


def strip_calculations(solution: str) -> str:
    """The solution without its ``<<48/2=24>>`` calculator annotations."""
    return _CALCULATION.sub("", solution)


class GSM8KTask(RowTask):
    """``train_path`` and ``test_path`` default to openai/gsm8k on the hub; ``num_train`` and ``num_test`` keep the first rows, 0 all."""

    name = "gsm8k"
    grade_kind = "gsm8k"
    step_kind = "newline"
    default_prompt_template = "Question: {question}\nAnswer:\n"
    default_chat_prompt = "{question}\nReason step by step, one step per line, and end with a line '#### <number>'."
    prompt_styles = {"oreo_qwen": OREO_GSM8K, "deepseek_math": DEEPSEEK_MATH, "vineppo": VINEPPO}
    hub_names = ("openai/gsm8k:main",)

    def columns(self) -> tuple[str, ...]:
        return ("question", "answer")

    def published_test_hashes(self) -> frozenset[bytes]:
        return published_test_hashes()

    def question_of(self, row: Row) -> str:
        return text_of(row, "question", "question")

    def item_of(self, row: Row) -> TaskItem:
        question, answer = self.question_of(row), row.values["answer"]
        if not isinstance(answer, str) or "####" not in answer:
            raise DataError(f"{row.where}: the answer has no '#### number' line: {str(answer)[-80:]!r}")
        gold = checked_gold(row.where, answer, "gsm8k")
        solution = strip_calculations(answer) if self.config.strip_calculations else answer
        return self.make_item(question, gold=gold, solution=solution, info=own_id(row, "id", "idx"))
