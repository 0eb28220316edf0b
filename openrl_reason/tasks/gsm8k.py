"""GSM8K: grade-school word problems (Cobbe et al., arXiv 2110.14168), from the hub or from local files with columns question and answer.

The gold answer is what follows ``####``. Training data with questions of the published test split, or of ``test_path``, is refused.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re

from openrl_reason.data.readers import Row, read_rows
from openrl_reason.errors import DataError
from openrl_reason.tasks.base import Task, TaskItem
from openrl_reason.tasks.from_file import checked_gold
from openrl_reason.tasks.gsm8k_test_hashes import HASH_BYTES, PACKED

HUB_NAME = "openai/gsm8k:main"
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_LAYOUT = re.compile(r"[\W_]+")


def question_hash(question: str) -> bytes:
    """Hash of the letters and digits of a question: case, spacing and punctuation do not hide a copy."""
    normal = _LAYOUT.sub(" ", question.casefold()).strip()
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


@functools.cache
def published_test_hashes() -> frozenset[bytes]:
    """Hashes of the 1319 questions of the published test split."""
    packed = base64.b85decode(PACKED)
    return frozenset(packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES))


def strip_calculations(solution: str) -> str:
    """The solution without its ``<<48/2=24>>`` calculator annotations."""
    return _CALCULATION.sub("", solution)


class GSM8KTask(Task):
    """``train_path`` and ``test_path`` default to openai/gsm8k on the hub; ``num_train`` and ``num_test`` keep the first rows, 0 all."""

    name = "gsm8k"
    grade_kind = "gsm8k"
    step_kind = "newline"
    default_prompt_template = "Question: {question}\nAnswer:\n"
    default_chat_prompt = "{question}\nReason step by step, one step per line, and end with a line '#### <number>'."

    def load_split(self, split: str) -> list[TaskItem]:
        path, limit = (self.config.train_path, self.config.num_train) if split == "train" else (self.config.test_path, self.config.num_test)
        rows = self._rows(path, split, limit)
        if split == "train" and not self.config.allow_test_data_in_training:
            self._refuse_leak(path, rows)
        return [self._item(row) for row in rows]

    def _rows(self, path: str, split: str, limit: int) -> list[Row]:
        try:
            return read_rows(path or HUB_NAME, ("question", "answer"), split=split, limit=limit)
        except DataError as error:
            if path:
                raise
            raise DataError(f"{error}: --task.{split}_path path/to/{split}.jsonl") from error

    def _refuse_leak(self, path: str, rows: list[Row]) -> None:
        held_out = published_test_hashes()
        if self.config.test_path:
            held_out |= {question_hash(str(row.values["question"])) for row in self._rows(self.config.test_path, "test", 0)}
        leaked = [row for row in rows if question_hash(str(row.values["question"])) in held_out]
        if leaked:
            raise DataError(
                f"{len(leaked)} of the {len(rows)} training questions in {path or HUB_NAME} are held-out test questions (first: "
                f"{leaked[0].where}). Train on the training split, or pass --task.allow_test_data_in_training true if this is meant"
            )

    def _item(self, row: Row) -> TaskItem:
        question, answer = row.values["question"], row.values["answer"]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{row.where}: the question is {question!r}; expected text")
        if not isinstance(answer, str) or "####" not in answer:
            raise DataError(f"{row.where}: the answer has no '#### number' line: {str(answer)[-80:]!r}")
        gold = checked_gold(row.where, answer, self.grade_kind)
        solution = strip_calculations(answer) if self.config.strip_calculations else answer
        return self.make_item(question, gold=gold, solution=solution, info={"source": row.where})
