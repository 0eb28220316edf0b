"""Tasks: what a model is asked, how a solution is written, how an answer is graded.

A task is light: no ray, no torch. Everything that depends on a tokenizer takes it as an argument, and token ids of a prompt and of its
solution are concatenated, never tokenised together, so what a model is trained on is what it sees when it samples.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openrl_reason.core.seeds import content_id
from openrl_reason.errors import ConfigError, DataError, OpenRLError, did_you_mean
from openrl_reason.tasks.graders import GradeResult, check_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "test")


@dataclass(frozen=True)
class TaskConfig:
    """Which task, where its data lies, and how its prompts are written."""

    name: str = "arithmetic"
    """arithmetic (generated), gsm8k, file (your own prompts and answers, see input_key), or path/to/file.py:ClassName."""
    train_path: str = ""
    """Training data: a local .jsonl, .json, .csv or .parquet file, or a hub name. Empty: the task's own (gsm8k: the hub's openai/gsm8k)."""
    test_path: str = ""
    """Held-out data, as train_path."""
    levels: tuple[int, ...] = (1, 2)
    """arithmetic: difficulty levels, 1 to 5, mixed in equal parts."""
    styles: tuple[str, ...] = ("expression",)
    """arithmetic: some of expression, word and columns (addition of two numbers of level + 1 digits, column by column)."""
    direct_share: float = 0.0
    """arithmetic: share of the reference solutions that are the bare answer, without steps. A model fine-tuned on both kinds does not know
    that working a problem out pays; reinforcement learning finds out."""
    num_train: int = 0
    """Number of training items, at most: the first ones. 0: all there are; of generated ones a few thousand."""
    num_test: int = 0
    """Number of held-out items; as num_train."""
    seed: int = 0
    """Seed of the generator. Train and test are disjoint whatever the seeds."""
    prompt_template: str = ""
    """How a question becomes a prompt; {question} is replaced. Empty: the task's own."""
    apply_chat_template: bool = False
    """Send the question as a user message through the tokenizer's chat template."""
    system_prompt: str = ""
    """With apply_chat_template: the system message. Empty: none."""
    input_key: str = "question"
    """file: the column of the prompt (a string, or a list of chat messages)."""
    label_key: str = "answer"
    """file: the column of the gold answer."""
    solution_key: str = ""
    """file: the column of a reference solution, for SFT. Empty: none."""
    grader: str = ""
    """How answers are graded: arithmetic, gsm8k (strict ####), gsm8k_lenient (last number), module:function or path.py:function."""
    strip_calculations: bool = True
    """gsm8k: remove the <<calc>> spans from the reference solutions."""
    allow_test_data_in_training: bool = False
    """Switch off the guard that refuses training data which contains held-out questions."""


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

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        if config.grader:
            self.grade_kind = config.grader
        try:
            check_kind(self.grade_kind)
        except ValueError as error:
            raise ConfigError(f"--task.grader: {error}") from None
        default = self.default_chat_prompt if config.apply_chat_template else self.default_prompt_template
        self.prompt_template = config.prompt_template or default
        if "{question}" not in self.prompt_template:
            raise ConfigError(f"prompt_template={config.prompt_template!r} must contain {{question}}")
        if config.system_prompt and not config.apply_chat_template:
            raise ConfigError("system_prompt is set, but apply_chat_template is false; set --task.apply_chat_template true")
        for flag, value in (("num_train", config.num_train), ("num_test", config.num_test)):
            if value < 0:
                raise ConfigError(f"{flag}={value} must not be negative")
        self._splits: dict[str, list[TaskItem]] = {}

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

    def messages(self, item: TaskItem) -> list[dict[str, str]]:
        """The item as chat messages, with the configured system prompt first."""
        system = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        if isinstance(item.prompt, str):
            return [*system, {"role": "user", "content": self.prompt_template.replace("{question}", item.prompt)}]
        return [*system, *item.prompt]

    def prompt_text(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text of the prompt as the model gets it; the tokenizer is needed when a chat template is asked for.

        Raises ConfigError when it has none, or when the item is a list of messages and apply_chat_template is off."""
        if self.config.apply_chat_template and tokenizer is not None:
            return render_chat(self.messages(item), tokenizer)
        if isinstance(item.prompt, str):
            return self.prompt_template.replace("{question}", item.prompt)
        if self.config.apply_chat_template:
            return "\n".join(message["content"] for message in self.messages(item))
        raise ConfigError(f"task {self.name}: prompts are chat messages; set --task.apply_chat_template true")

    def encode_prompt(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt. BOS is added as the tokenizer does, except after a chat template, which holds its own."""
        text = self.prompt_text(item, tokenizer)
        ids = list(tokenizer(text, add_special_tokens=not self.config.apply_chat_template)["input_ids"])
        if not ids:
            raise DataError(f"task {self.name}: item {item.task_id} has an empty prompt")
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not self.config.apply_chat_template:
            ids.pop()  # some tokenizers close every text; a prompt is not closed
        return ids

    def encode_solution(self, item: TaskItem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the reference solution and the EOS token: what SFT trains on, to be appended to :meth:`encode_prompt`."""
        if item.solution is None:
            raise DataError(f"task {self.name}: item {item.task_id} has no reference solution to train on")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so no solution could ever end; set eos_token in its tokenizer_config.json")
        return [*tokenizer(item.solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def encode_prompts(self, items: Sequence[TaskItem], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> EncodedPrompts:
        """Encode many prompts; those longer than ``max_prompt_tokens`` are left out and counted. Raises DataError if none is left."""
        kept, ids = [], []
        for item in items:
            prompt_ids = self.encode_prompt(item, tokenizer)
            if len(prompt_ids) <= max_prompt_tokens:
                kept.append(item)
                ids.append(prompt_ids)
        if items and not kept:
            raise DataError(f"task {self.name}: all {len(items)} prompts are longer than max_prompt_tokens={max_prompt_tokens}")
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
            f"{did_you_mean(unknown[0], by_id)}; an id is a task_id (rollouts.jsonl has them) or the id in the data"
        )
    chosen: dict[int, TaskItem] = {}
    for name in wanted:
        chosen |= by_id[name]
    return list(chosen.values())


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = True) -> str:
    """Chat messages as text by the tokenizer's template. Raises ConfigError if it has none, DataError if it refuses the messages."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "apply_chat_template=true, but the tokenizer has no chat template; set --task.apply_chat_template false, "
            "use an instruction-tuned model, or put a chat_template.jinja into the model's folder"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages ({error}): {str(list(messages))[:200]}") from None


def load_task(config: TaskConfig) -> Task:
    """The task that ``config.name`` stands for. Raises ConfigError for an unknown name or a file without such a class."""
    if config.name == "arithmetic":
        from openrl_reason.tasks.arithmetic import ArithmeticTask

        return ArithmeticTask(config)
    if config.name == "gsm8k":
        from openrl_reason.tasks.gsm8k import GSM8KTask

        return GSM8KTask(config)
    if config.name == "file":
        from openrl_reason.tasks.from_file import FileTask

        return FileTask(config)
    if ":" in config.name:
        return _load_user_task(config)
    names = ("arithmetic", "gsm8k", "file")
    hint = did_you_mean(config.name, names)
    raise ConfigError(f"task {config.name!r} is unknown; use {', '.join(names)} or path/to/file.py:ClassName{hint}")


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
