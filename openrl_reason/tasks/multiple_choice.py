"""Multiple choice: a passage (or none), a question, 2 to 26 options. LogiQA 2.0 and ReClor in their published formats, others by columns.

The gold answer is the letter of the right option as shown. ``option_order`` shows the options in another order, and the letter moves along;
texts that refer to letters ("both A and B") are not rewritten. ``info`` holds the parts (``context``, ``question``, ``options`` as shown),
``order`` (which original option each letter shows), the row's ``id``, and ``type``, the names of the kinds it belongs to, as a list.
"""

from __future__ import annotations

import random
import re
import string

from openrl_reason.core.seeds import derive_seed
from openrl_reason.data.readers import Row
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.base import TaskConfig, TaskItem
from openrl_reason.tasks.leakage import choice_key, normalised
from openrl_reason.tasks.prompts import REACT_V2
from openrl_reason.tasks.rows import RowTask, own_id, text_of

LETTERS = string.ascii_uppercase
_PLACEHOLDER = re.compile(r"\{(context|question|options)\}")


def check_option_order(setting: str) -> None:
    """Raise ConfigError unless ``setting`` is empty, "random" or the first letters in some order."""
    if setting in ("", "random"):
        return
    if len(setting) < 2 or sorted(setting) != list(LETTERS[: len(setting)]):
        raise ConfigError(f"--task.option_order {setting!r}: use random, or the letters of the options in some order, each once, such as DCBA")


def options_text(options: list[str]) -> str:
    """``A. first``, ``B. second``, ... one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def question_text(context: str, question: str, options: list[str]) -> str:
    """The parts under their headings, as planning-based reasoning's template 8 has them; without a passage its heading is left out too."""
    passage = f"Context:\n{context}\n\n" if context else ""
    return f"{passage}Question:\n{question}\n\nOptions:\n{options_text(options)}"


class MultipleChoiceTask(RowTask):
    """Any file with questions and options: ``input_key``, ``options_key``, ``label_key``, and ``context_key`` and ``id_key`` if it has them."""

    name = "multiple_choice"
    grade_kind = "choice4"
    step_kind = "newline"
    default_prompt_template = "{question}\n\nAnswer:\n"
    default_chat_prompt = "{question}\n\nReason step by step, and end with a line 'The answer is X.', X being the letter of the right option."
    prompt_styles = {"react_v2": REACT_V2}
    context_key = type_key = ""
    question_key, options_key, label_key, id_key = "question", "options", "answer", ""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        check_option_order(config.option_order)
        self.take_keys(config)

    def take_keys(self, config: TaskConfig) -> None:
        """The columns that the settings name. (Tasks of a published format have their own.)"""
        self.context_key, self.question_key, self.options_key = config.context_key, config.input_key, config.options_key
        self.label_key, self.id_key = config.label_key, config.id_key

    def columns(self) -> tuple[str, ...]:
        names = (self.context_key, self.question_key, self.options_key, self.id_key)
        return tuple(name for name in names if name)

    def grade_kind_of(self, item: TaskItem) -> str:
        return self.grade_kind if self.config.grader else f"choice{len(item.info['options'])}"

    def question_head(self) -> str:
        return super().question_head() or ("Context:" if self.context_key else "Question:")

    def fill(self, item: TaskItem) -> str:
        """A template with ``{options}`` in it is given the parts, any other the question as one text."""
        template = self.style.template
        if "{options}" not in template:
            return super().fill(item)
        parts = {**item.info, "options": options_text(item.info["options"])}
        return _PLACEHOLDER.sub(lambda match: parts[match[1]], template)

    def question_of(self, row: Row) -> str:
        return choice_key(self._context(row), text_of(row, self.question_key, "question"), self._options(row)[0])

    def item_of(self, row: Row) -> TaskItem:
        context, question = self._context(row), text_of(row, self.question_key, "question")
        options, names = self._options(row)
        right = self._label(row, names)
        order = self._order(row, context, question, options)
        shown = [options[index] for index in order]
        gold = LETTERS[order.index(right)]
        kinds = row.values.get(self.type_key) if self.type_key else None
        info = own_id(row, self.id_key) | {
            "context": context, "question": question, "options": shown, "order": "".join(LETTERS[index] for index in order),
        }  # fmt: skip
        if isinstance(kinds, dict):
            kinds = [str(name) for name, holds in kinds.items() if holds]
        if kinds:
            info["type"] = kinds
        return self.make_item(question_text(context, question, shown), gold=gold, solution=self._solution(row, gold), info=info)

    def _context(self, row: Row) -> str:
        value = row.values[self.context_key] if self.context_key else ""
        if value is not None and not isinstance(value, str):
            raise DataError(f"{row.where}: the context is {str(value)[:80]!r}; expected text in column {self.context_key!r}")
        return value or ""

    def _options(self, row: Row) -> tuple[list[str], list[str]]:
        """The options in the row's order, and the names by which its label may call them."""
        value = row.values[self.options_key]
        texts, names = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{row.where}: column {self.options_key!r} holds {str(value)[:80]!r}; expected a list of texts")
        if not 2 <= len(texts) <= len(LETTERS):
            raise DataError(f"{row.where}: there are {len(texts)} options; 2 to {len(LETTERS)} are possible")
        names = [str(name) for name in names] if isinstance(names, list) else list(LETTERS[: len(texts)])
        if len(names) != len(texts):
            raise DataError(f"{row.where}: {len(texts)} options have {len(names)} labels")
        return texts, names

    def _label(self, row: Row, names: list[str]) -> int:
        value = row.values.get(self.label_key)
        if value is None or value == "" or value in (-1, "-1"):
            raise DataError(
                f"{row.where}: there is no label in column {self.label_key!r}. Published test files may hide theirs; answers to it cannot be "
                "graded here: use a labelled split (ReClor: val.json) as --task.test_path"
            )
        text = str(value).strip()
        if text in names:
            return names.index(text)
        if len(text) == 1 and text.upper() in names:
            return names.index(text.upper())
        if not isinstance(value, bool) and re.fullmatch(r"[0-9]{1,2}", text) and int(text) < len(names):
            return int(text)
        raise DataError(f"{row.where}: the label {value!r} is none of the options: use {', '.join(names)} or an index from 0 to {len(names) - 1}")

    def _order(self, row: Row, context: str, question: str, options: list[str]) -> list[int]:
        """For each place, which of the row's options stands there."""
        setting, order = self.config.option_order, list(range(len(options)))
        if setting == "random":  # by content: an item's order does not depend on its neighbours
            random.Random(derive_seed(self.config.seed, "options", normalised("\n".join([context, question, *options])))).shuffle(order)
        elif setting:
            if len(setting) != len(options):
                raise DataError(f"{row.where}: --task.option_order {setting} is for {len(setting)} options, and there are {len(options)}")
            order = [LETTERS.index(letter) for letter in setting]
        return order

    def _solution(self, row: Row, gold: str) -> str | None:
        if self.config.solution_key:  # a test file need not have the column
            return text_of(row, self.config.solution_key, "solution") if self.config.solution_key in row.values else None
        return None if self.config.prompt_style else f"The answer is {gold}."


class LogiQA2Task(MultipleChoiceTask):
    """LogiQA 2.0 (Liu et al. 2023): one object a line, {id, text, question, options, answer: index, type: {kind: true}}."""

    name = "logiqa2"
    context_key, question_key, options_key, label_key, id_key, type_key = "text", "question", "options", "answer", "id", "type"

    def take_keys(self, config: TaskConfig) -> None:
        pass


class ReClorTask(MultipleChoiceTask):
    """ReClor (Yu et al., arXiv 2002.04326): a JSON list of {id_string, context, question, answers, label: index}; its test split has no labels."""

    name = "reclor"
    context_key, question_key, options_key, label_key, id_key = "context", "question", "answers", "label", "id_string"

    def take_keys(self, config: TaskConfig) -> None:
        pass
