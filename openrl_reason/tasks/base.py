"""Tasks: what a model is asked, how a solution is written, how an answer is graded.

A task is light: no ray, no torch. Everything that depends on a tokenizer takes it as an argument, and token ids of a prompt and of its
solution are concatenated, never tokenised together, so what a model is trained on is what it sees when it samples.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openrl_reason.core.seeds import content_id
from openrl_reason.data.token_text import continued_ids
from openrl_reason.errors import ConfigError, DataError, OpenRLError, did_you_mean
from openrl_reason.models.turn_end import turn_end_token
from openrl_reason.tasks.config import TaskConfig
from openrl_reason.tasks.few_shot import FewShot
from openrl_reason.tasks.graders import GradeResult, check_kind
from openrl_reason.tasks.prompts import SHOT_SEPARATOR, PromptStyle, render_chat, resolve_style

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "test")
_TASKS = {
    "arithmetic": "arithmetic:ArithmeticTask",
    "gsm8k": "gsm8k:GSM8KTask",
    "math": "math_task:MATHTask",
    "logiqa2": "multiple_choice:LogiQA2Task",
    "reclor": "multiple_choice:ReClorTask",
    "multiple_choice": "multiple_choice:MultipleChoiceTask",
    "file": "from_file:FileTask",
}


@dataclass(frozen=True)
class TaskItem:
    """One problem."""

    task_id: str
    """Content hash of task, prompt and gold answer."""
    prompt: str | tuple[dict[str, str], ...]
    """The question, or chat messages ``({"role": ..., "content": ...}, ...)``, before any template."""
    gold: str
    """The right answer, in the form that the grader takes."""
    solution: str | None = None
    """A reference solution, for SFT."""
    info: dict[str, Any] = field(default_factory=dict)
    """Anything else about the problem; JSON-able."""


class EncodedPrompts(NamedTuple):
    """The items whose prompts fit, and how many did not."""

    items: list[TaskItem]
    prompt_ids: list[list[int]]
    num_too_long: int


class SingleTurnEnv:
    """The gym-like face of one problem: ``reset() -> prompt``, ``step(text) -> (observation, reward, done, info)``; done after one step."""

    def __init__(self, task: Task, item: TaskItem) -> None:
        self.task, self.item, self._done = task, item, True

    def reset(self) -> str:
        """Start the episode and return the prompt text (without a chat template)."""
        self._done = False
        return self.task.prompt_text(self.item)

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Grade ``text`` as the answer. Raises RuntimeError when the episode is over (call reset first)."""
        if self._done:
            raise RuntimeError("the episode is over; call reset()")
        self._done = True
        result = self.task.grade(text, self.item)
        info = {"status": result.status, "parsed": result.parsed, "gold": self.item.gold, "task_id": self.item.task_id}
        return "", result.score, True, info


class Task:
    """Base of all tasks. A subclass sets the class attributes and writes :meth:`load_split`; nothing else is required."""

    name = "task"
    grade_kind = "gsm8k"
    step_kind = "newline"
    """How :func:`openrl_reason.core.steps.split_steps` cuts a solution into steps."""
    default_prompt_template = "{question}\n"
    default_chat_prompt = "{question}"
    prompt_styles: Mapping[str, PromptStyle] = {}
    """The published prompts that ``--task.prompt_style`` may name."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        default = self.default_chat_prompt if config.apply_chat_template else self.default_prompt_template
        self.style = resolve_style(config, self.prompt_styles, PromptStyle(default), self.name)
        self.step_kind = self.style.step_kind or self.step_kind
        self.grade_kind = config.grader or self.style.grader or self.grade_kind
        try:
            check_kind(self.grade_kind)
        except ValueError as error:
            raise ConfigError(f"--task.grader: {error}") from None
        for flag, value in (("num_train", config.num_train), ("num_test", config.num_test), ("num_few_shot", config.num_few_shot)):
            if value < 0:
                raise ConfigError(f"--task.{flag} is {value}: must not be negative")
        self._splits: dict[str, list[TaskItem]] = {}
        self._few_shot: FewShot | None = None

    @property
    def chat(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return self.style.chat

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings that sampling needs with these prompts: the style's, and after plain few-shot examples the head of a next question."""
        head = self.question_head()
        more = (SHOT_SEPARATOR + head,) if self.config.num_few_shot and not self.chat and head else ()
        return (*self.style.stop, *more)

    def cut_by(self, step_kind: Any) -> Task:
        """This task with its solutions cut by another ``step_kind``: a copy that shares the items, so that whoever holds this one sees no change."""
        other = copy.copy(self)
        other.step_kind = step_kind
        return other

    def question_head(self) -> str:
        """What every plain question begins with, if anything: a model that goes on writes it."""
        return self.style.template.partition("{question}")[0].rstrip()

    def load_split(self, split: str) -> list[TaskItem]:
        """Make or read the items of "train" or "test"."""
        raise NotImplementedError

    def items(self, split: str) -> Sequence[TaskItem]:
        """The items of a split, loaded once. Raises ConfigError for another split, DataError if there are none."""
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} does not exist; use 'train' or 'test'")
        if split not in self._splits:
            loaded = self._load_checked(split)
            if not loaded:
                raise DataError(f"task {self.name}: the {split} split is empty")
            self._splits[split] = loaded
        return self._splits[split]

    def _load_checked(self, split: str) -> list[TaskItem]:
        """``load_split``, with a user's mistakes in it told as such."""
        try:
            loaded = list(self.load_split(split) or [])
        except (OpenRLError, KeyboardInterrupt):
            raise
        except NotImplementedError:
            raise ConfigError(f"task {self.name}: {type(self).__name__} has no load_split(split)") from None
        except Exception as error:
            raise DataError(f"task {self.name}: load_split({split!r}) raised {type(error).__name__}: {error}") from error
        for item in loaded:
            if not isinstance(item, TaskItem):
                raise DataError(f"task {self.name}: load_split returned a {type(item).__name__}; make items with self.make_item(prompt, gold=...)")
        return loaded

    def make_item(
        self, prompt: str | Sequence[dict[str, str]], *, gold: str, solution: str | None = None, info: dict[str, Any] | None = None
    ) -> TaskItem:
        """A TaskItem with its content hash."""
        fixed = prompt if isinstance(prompt, str) else tuple(dict(message) for message in prompt)
        return TaskItem(content_id(self.name, repr(fixed), gold), fixed, gold, solution, info or {})

    def few_shot_examples(self, item: TaskItem) -> list[TaskItem]:
        """The ``num_few_shot`` solved training items that stand before this one. Raises DataError if there are too few."""
        if not self.config.num_few_shot:
            return []
        if self._few_shot is None:
            self._few_shot = FewShot(self.items("train"), self.config.num_few_shot, self.config.seed, self.name)
        return self._few_shot.examples_for(item)

    def fill(self, item: TaskItem) -> str:
        """The style's template with the item's question in it."""
        assert isinstance(item.prompt, str)
        return self.style.template.replace("{question}", item.prompt)

    def messages(self, item: TaskItem) -> list[dict[str, str]]:
        """The item as chat messages: the configured system prompt, the few-shot examples as turns, the question."""
        system = [{"role": "system", "content": self.style.system}] if self.style.system else []
        turns = []
        for example in self.few_shot_examples(item):
            asked = [message for message in self._user_messages(example) if message["role"] != "system"]
            turns += [*asked, {"role": "assistant", "content": str(example.solution)}]
        own = self._user_messages(item)
        first = [own.pop(0)] if turns and own[0]["role"] == "system" else []  # a system message stands before the examples
        return [*system, *first, *turns, *own]

    def _user_messages(self, item: TaskItem) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.fill(item)}] if isinstance(item.prompt, str) else list(item.prompt)

    def _plain_pieces(self, item: TaskItem) -> list[str]:
        """A plain prompt in the pieces that are tokenised apart, so that the boundaries look as they will where the model answers."""
        pieces = []
        for example in self.few_shot_examples(item):
            pieces += [self.fill(example), self.style.glue + str(example.solution), SHOT_SEPARATOR]
        pieces.append(self.fill(item))
        return [self.style.instruction + pieces[0], *pieces[1:]]

    def prompt_text(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text of the prompt as the model gets it; the tokenizer is needed when a chat template is asked for.

        Raises ConfigError when it has none, or when the item is a list of messages and apply_chat_template is off."""
        if self.chat and tokenizer is not None:
            return render_chat(self.messages(item), tokenizer)
        if self.chat:
            return "\n".join(message["content"] for message in self.messages(item))
        if isinstance(item.prompt, str):
            return "".join(self._plain_pieces(item))
        raise ConfigError(f"task {self.name}: prompts are chat messages; set --task.apply_chat_template true")

    def encode_prompt(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt. BOS is added as the tokenizer does, except after a chat template, which holds its own.

        Few-shot examples of plain prompts are tokenised apart: the ids end with those of the question alone, whatever stands before it."""
        if self.chat:
            ids = list(tokenizer(self.prompt_text(item, tokenizer), add_special_tokens=False)["input_ids"])
        else:
            self.prompt_text(item)  # refuses chat messages
            ids = []
            for number, piece in enumerate(self._plain_pieces(item)):
                ids += tokenizer(piece, add_special_tokens=number == 0)["input_ids"]
                if number == 0 and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                    ids.pop()  # some tokenizers close every text; a prompt is not closed
        if not ids:
            raise DataError(f"task {self.name}: item {item.task_id} has an empty prompt")
        return ids

    def encode_solution(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the reference solution and the token that ends it (EOS, or a chat template's end of turn): what SFT trains on, to be appended
        to :meth:`encode_prompt`."""
        if item.solution is None:
            raise DataError(f"task {self.name}: item {item.task_id} has no reference solution to train on")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so no solution could ever end; set eos_token in its tokenizer_config.json")
        end = turn_end_token(tokenizer) if self.chat else ""
        end_id = tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id
        return [*continued_ids(self.style.glue + item.solution, tokenizer, "\n"), end_id]

    def encode_prompts(self, items: Sequence[TaskItem], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> EncodedPrompts:
        """Encode many prompts; those longer than ``max_prompt_tokens`` are left out and counted. Raises DataError if none is left."""
        kept, ids = [], []
        for item in items:
            prompt_ids = self.encode_prompt(item, tokenizer)
            if len(prompt_ids) <= max_prompt_tokens:
                kept.append(item)
                ids.append(prompt_ids)
        if items and not kept:
            raise DataError(
                f"task {self.name}: all {len(items)} prompts are longer than {max_prompt_tokens} tokens, the room for a prompt: raise"
                " --rollout.max_model_len (sft: --max_length), lower --sampling.max_new_tokens, or ask for less (--task.num_few_shot)"
            )
        return EncodedPrompts(kept, ids, len(items) - len(kept))

    def grade(self, text: str, item: TaskItem) -> GradeResult:
        """Grade one answer in the default pool of killable processes."""
        from openrl_reason.workers.grading import grade

        return grade(text, item.gold, self.grade_kind_of(item))

    def grade_kind_of(self, item: TaskItem) -> str:
        """The grader of one item: the task's own, unless a task grades its items differently (by their number of options, say)."""
        return self.grade_kind

    def env(self, item: TaskItem) -> SingleTurnEnv:
        """A gym-like environment around one item."""
        return SingleTurnEnv(self, item)


def select_items(items: Sequence[TaskItem], ids: Sequence[str]) -> list[TaskItem]:
    """The items that ``ids`` name, in the order of ``ids``. An id is a ``task_id`` or the item's own ``info["id"]`` in its data.

    Published data repeats some ids and some questions: such an id stands for all of its items. An item that is named twice comes once.
    Raises DataError naming the ids that no item has."""
    by_id: dict[str, dict[int, TaskItem]] = {}
    for number, item in enumerate(items):
        for name in {item.task_id, str(item.info.get("id", item.task_id))}:
            by_id.setdefault(name, {})[number] = item
    wanted = [str(name) for name in ids]
    unknown = [name for name in dict.fromkeys(wanted) if name not in by_id]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"{len(unknown)} of the {len(set(wanted))} ids name none of the {len(items)} items: {', '.join(map(repr, unknown[:5]))}{more}"
            f"{did_you_mean(unknown[0], by_id)}; an id is a task_id (rollouts.jsonl has them) or the id in the data (of your own file: --task.id_key)"
        )
    chosen: dict[int, TaskItem] = {}
    for name in wanted:
        chosen |= by_id[name]
    return list(chosen.values())


def load_task(config: TaskConfig) -> Task:
    """The task that ``config.name`` stands for. Raises ConfigError for an unknown name or a file without such a class."""
    if config.name in _TASKS:
        if config.option_order and config.name in ("arithmetic", "gsm8k", "math", "file"):
            raise ConfigError(f"--task.option_order is {config.option_order!r}, but task {config.name} has no options to show in another order")
        module, _, class_name = _TASKS[config.name].partition(":")
        return vars(importlib.import_module(f"openrl_reason.tasks.{module}"))[class_name](config)
    if ":" in config.name:
        return _load_user_task(config)
    hint = did_you_mean(config.name, _TASKS)
    raise ConfigError(f"task {config.name!r} is unknown; use {', '.join(_TASKS)} or path/to/file.py:ClassName{hint}")


def _load_user_task(config: TaskConfig) -> Task:
    source, _, class_name = config.name.rpartition(":")
    path = Path(source)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"task {config.name!r}: there is no Python file {source!r}; the form is path/to/file.py:ClassName")
    module_name = f"openrl_reason_user_task_{content_id(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; what matters is where
        del sys.modules[module_name]
        raise ConfigError(f"task {config.name!r}: {source} does not import: {type(error).__name__}: {error}") from error
    found = vars(module).get(class_name)
    if not (inspect.isclass(found) and issubclass(found, Task)):
        members = vars(module).items()
        classes = [name for name, value in members if inspect.isclass(value) and issubclass(value, Task) and value is not Task]
        listing = f"it has: {', '.join(classes)}" if classes else "it has no Task subclass at all"
        hint = did_you_mean(class_name, classes)
        raise ConfigError(f"task {config.name!r}: {source} has no Task subclass {class_name!r}; {listing}{hint}")
    return found(config)
