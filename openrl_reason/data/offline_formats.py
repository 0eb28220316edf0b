"""What a row of offline data is: the formats, which of them a file has, and a row as examples that do not know their format any more."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from openrl_reason.core.trajectory import SCHEMA_VERSION, Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.pairs import PairsConfig, has_reward, pair_texts
from openrl_reason.data.readers import Row
from openrl_reason.data.templates import Message
from openrl_reason.errors import DataError, did_you_mean
from openrl_reason.tasks.prompts import BOXED_INSTRUCTION

KINDS = {
    "responses": "responses", "conversations": "responses", "trajectories": "responses", "sft": "sft", "pairs": "pairs", "labels": "labels",
    "stepwise": "steps",
}  # fmt: skip
"""What each format's rows are to an algorithm."""
KEYS = ("prompt", "response", "reward", "label", "chosen", "rejected", "messages")
"""What the settings may name a column for (``prompt_key`` and so on)."""
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
_CONSTANT = re.compile(r"ok(ay)?[.!]?(\s+i'll follow your instructions.*)?", re.IGNORECASE | re.DOTALL)
"""What ALFWorld conversations have the assistant say first: OREO's and ETO's data, and AgentInstruct's."""
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class BadRow(DataError):
    """A row that cannot be used. ``reason`` is what it is counted under."""

    def __init__(self, reason: str, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One sequence to be: what the policy was given, what it said, and what that earned."""

    where: str
    """File and line."""
    question: str
    """Equal for examples with the same prompt."""
    prompt: str
    """Text before the response; of chats empty."""
    response: str
    """Text; of chats empty."""
    messages: tuple[Message, ...] = ()
    """A chat, prompt and replies."""
    first_turn: int = 0
    """The assistant's messages from this index on are the policy's."""
    read_only: int = 0
    """Messages of the assistant in a conversation that are context by the settings."""
    whole_turns: bool = False
    """Each of the policy's messages is one step."""
    steps: tuple[str, ...] = ()
    """The response in its given steps, where the file has them."""
    rewards: tuple[float, ...] = ()
    """One for each of ``steps``, or one for the whole; none: not known."""
    label: bool = False
    """Whether the file calls it good: the chosen one, a true label, a positive reward."""


class Columns(NamedTuple):
    """The names of the columns that a file has for each purpose; empty where it has none."""

    prompt: str = ""
    response: str = ""
    messages: str = ""
    reward: str = ""
    label: str = ""
    chosen: str = ""
    rejected: str = ""
    completions: str = ""
    labels: str = ""


def find_columns(names: Sequence[str], config: OfflineDataConfig) -> Columns:
    """Which of a file's columns is which: the names that the settings give, else the usual ones."""

    def pick(own: str, *usual: str) -> str:
        return next((name for name in ((own,) if own else usual) if name in names), "")

    return Columns(
        prompt=pick(config.prompt_key, "prompt"), response=pick(config.response_key, "response", "completion"),
        messages=pick(config.messages_key, "conversations", "messages"), reward=pick(config.reward_key, "reward"),
        label=pick(config.label_key, "label"), chosen=pick(config.chosen_key, "chosen"), rejected=pick(config.rejected_key, "rejected"),
        completions=pick("", "completions"), labels=pick("", "labels"),
    )  # fmt: skip


class Layout(NamedTuple):
    """The format of a file, and its columns."""

    format: str
    columns: Columns

    @property
    def kind(self) -> str:
        """What its rows are to an algorithm."""
        return KINDS[self.format]


def detect_layout(names: Sequence[str], config: OfflineDataConfig, where: str) -> Layout:
    """The layout of a file whose first rows have these columns. Raises DataError if none fits."""
    found = find_columns(names, config)
    for purpose in KEYS:
        wanted = getattr(config, f"{purpose}_key")
        if wanted and wanted not in names and not _is_trajectory(names):
            there = ", ".join(map(str, names)) or "none"
            raise DataError(f"{where}: --data.{purpose}_key is {wanted!r}: no such column{did_you_mean(wanted, map(str, names))}; there are: {there}")
    return Layout(config.format if config.format != "auto" else _format(names, found, config, where), found)


def _format(names: Sequence[str], found: Columns, config: OfflineDataConfig, where: str) -> str:
    if _is_trajectory(names):
        return "trajectories"
    if found.chosen and found.rejected:
        return "pairs"
    if found.completions and found.labels:
        return "stepwise"
    if found.messages and found.prompt and found.response and not (config.messages_key or config.response_key):
        raise DataError(
            f"{where}: there are {found.prompt!r} and {found.response!r}, and a conversation in {found.messages!r}: say which are to be learned, by"
            f" --data.messages_key {found.messages} or --data.response_key {found.response}"
        )
    if found.messages and not config.response_key:
        return "conversations" if found.reward else "sft"
    if found.prompt and found.response:
        return "responses" if found.reward else "labels" if found.label else "sft"
    raise DataError(
        f"{where}: no format has the columns {', '.join(map(str, names)) or 'none'}. Known: prompt, response (or completion), reward;"
        " conversations (or messages), with or without reward; prompt, chosen, rejected; prompt, completion, label; prompt, completions, labels;"
        " prompt, response; trajectory files. For other names: --data.prompt_key, --data.response_key, --data.reward_key, --data.label_key,"
        " --data.messages_key, --data.chosen_key, --data.rejected_key"
    )


def _is_trajectory(names: Sequence[str]) -> bool:
    return {"token_ids", "action_mask", "step_ids"} <= set(names)


def parse_row(row: Row, layout: Layout, config: OfflineDataConfig) -> list[Example] | Trajectory:
    """The examples of a row: two of a pair (chosen, rejected), else one; or the finished trajectory it is.

    Raises BadRow where the row is not of this layout."""
    format, columns = layout
    reward = config.reward_key or "reward"
    if format == "sft" and config.format == "auto" and row.values.get(reward) is not None:
        what = f"this row has a column {reward!r}, and the first ones of its file have none, so it was read as rows without rewards"
        raise BadRow("reward_unexpected", row.where, f"{what}: name --data.format (responses or conversations; sft to leave rewards out)")
    if format == "trajectories":
        return _trajectory(row)
    if format == "pairs":
        return _pair(row, columns, config)
    if format == "conversations" or (format == "sft" and columns.messages and not config.response_key):
        return [_conversation(row, columns, config, rewarded=format == "conversations")]
    if format == "stepwise":
        return [_stepwise(row, columns, config)]
    prompt = _need(row, columns, "prompt", config.prompt_key or "prompt")
    response = _need(row, columns, "response", config.response_key or "response")
    rewards: tuple[float, ...] = ()
    label = False
    if format == "responses":
        rewards = (_number(row, _need_name(row, columns.reward, config.reward_key or "reward")),)
        label = rewards[0] > 0
    if format == "labels":
        label = _label(row, row.values[name := _need_name(row, columns.label, config.label_key or "label")], name)
        rewards = (float(label),)
    return [_example(row, columns, prompt, response, rewards=rewards, label=label)]


# ---- one row -----------------------------------------------------------------------------------------------------------------------------


MAX_REWARD = 1e30
"""Beyond it sums of rewards leave float32."""


def _need_name(row: Row, name: str, wanted: str) -> str:
    wanted = name or wanted
    if wanted not in row.values:
        there = ", ".join(map(str, row.values)) or "none"
        raise BadRow("missing_column", row.where, f"no column {wanted!r}{did_you_mean(wanted, map(str, row.values))}; there are: {there}")
    return wanted


def _need(row: Row, columns: Columns, purpose: str, wanted: str) -> Any:
    name = _need_name(row, getattr(columns, purpose), wanted)
    value = row.values[name]
    if value is None:
        raise BadRow("missing_value", row.where, f"column {name!r} is empty (null)")
    if not isinstance(value, str | list):
        raise BadRow("not_text", row.where, f"column {name!r} holds {str(value)[:80]!r}; expected text or a list of messages")
    return value


def _is_csv_text(row: Row, value: Any) -> bool:
    """In CSV files everything is text; elsewhere text is no number."""
    return isinstance(value, str) and Path(row.where.rpartition(":")[0]).suffix == ".csv"


def _number(row: Row, name: str) -> float:
    value = row.values[name]
    if _is_csv_text(row, value):
        with contextlib.suppress(ValueError):
            value = _TRUTH[value.strip().lower()] if value.strip().lower() in _TRUTH else float(value)
    if not isinstance(value, int | float) or not abs(value) <= MAX_REWARD:  # not of NaN
        shown = "an integer of more than 80 digits" if isinstance(value, int) and abs(value) >= 10**80 else repr(str(value)[:80])
        raise BadRow("reward_not_a_number", row.where, f"column {name!r} holds {shown}; expected a finite number of at most {MAX_REWARD:g}")
    return float(value)


def _label(row: Row, value: Any, name: str) -> bool:
    if _is_csv_text(row, value):
        value = _TRUTH.get(value.strip().lower(), value)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise BadRow("label_not_true_or_false", row.where, f"column {name!r} holds {str(value)[:80]!r}; expected true or false, 1 or 0")
    return bool(value)


def _example(row: Row, columns: Columns, prompt: Any, response: Any, **rest: Any) -> Example:
    if isinstance(prompt, str) and isinstance(response, str):
        return Example(row.where, prompt, prompt, response, **rest)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(_messages(row, prompt, columns.prompt))
    after = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(_messages(row, response, columns.response))
    if not any(message["role"] == "assistant" for message in after):
        raise BadRow("no_reply", row.where, f"column {columns.response!r} has no message of the assistant")
    return Example(row.where, _question(before), "", "", messages=(*before, *after), first_turn=len(before), **rest)


def _question(messages: Sequence[Message]) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def _messages(row: Row, value: Any, name: str) -> Iterator[Message]:
    """Messages as {role, content}, also from {from, value}."""
    if not isinstance(value, list) or not value:
        raise BadRow("not_messages", row.where, f"column {name!r} holds {str(value)[:80]!r}; expected text or a list of messages")
    for number, message in enumerate(value):
        if isinstance(message, Mapping) and message.get("role") is None and message.get("from") is not None:
            message = {"role": message["from"], "content": message.get("value")}
        if not isinstance(message, Mapping) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            need = "needs the texts 'role' and 'content' (or 'from' and 'value')"
            raise BadRow("not_messages", row.where, f"column {name!r}, message {number}: a message {need}: {str(message)[:80]}")
        if message["role"] not in _ROLES:
            hint = f"{message['role']!r}; known: {', '.join(_ROLES)}{did_you_mean(message['role'], _ROLES)}"
            raise BadRow("unknown_role", row.where, f"column {name!r}, message {number}: unknown role {hint}")
        lost = [part for part in ("tool_calls", "function_call", "reasoning_content") if message.get(part)]
        if _ROLES[message["role"]] == "assistant" and lost:
            what = f"has {lost[0]}, which the policy wrote and which would be lost: write it into 'content' as the policy is to write it"
            raise BadRow("more_than_text", row.where, f"column {name!r}, message {number}: {what}")
        yield {"role": _ROLES[message["role"]], "content": message["content"]}


def _conversation(row: Row, columns: Columns, config: OfflineDataConfig, *, rewarded: bool) -> Example:
    name = _need_name(row, columns.messages, config.messages_key or "conversations")
    messages = tuple(_messages(row, row.values[name], name))
    first = config.first_action_turn if config.first_action_turn >= 0 else _behind_constant(messages)
    actions = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    if not actions:
        hint = f" at index {first} or later (--data.first_action_turn {config.first_action_turn}; 0 learns all of them)" if first else ""
        raise BadRow("no_reply", row.where, f"column {name!r} has {len(messages)} messages, and none of the assistant{hint}")
    rewards = (_number(row, _need_name(row, columns.reward, config.reward_key or "reward")),) if rewarded else ()
    question = _question(messages[: actions[0]])
    return Example(
        row.where, question, "", "", messages=messages, first_turn=actions[0], whole_turns=not config.split_turns, rewards=rewards,
        label=bool(rewards and rewards[0] > 0), read_only=sum(message["role"] == "assistant" for message in messages[:first]),
    )  # fmt: skip


def _behind_constant(messages: Sequence[Message]) -> int:
    """Where actions may begin in a conversation that begins as those of ALFWorld do: an instruction, the constant "OK", the task. Else 0."""
    system = sum(1 for _ in itertools.takewhile(lambda message: message["role"] == "system", messages))
    start = messages[system : system + 3]
    constant = [message["role"] for message in start] == ["user", "assistant", "user"] and _CONSTANT.fullmatch(start[1]["content"].strip())
    return system + 3 if constant else 0


def _pair(row: Row, columns: Columns, config: OfflineDataConfig) -> list[Example]:
    chosen = _need_name(row, columns.chosen, config.chosen_key or "chosen")
    rejected = _need_name(row, columns.rejected, config.rejected_key or "rejected")
    try:
        texts = pair_texts(row, PairsConfig(prompt_key=columns.prompt, chosen_key=chosen, rejected_key=rejected))
    except DataError as error:
        raise BadRow("not_a_pair", row.where, _without_flags(row, error)) from None
    return [
        _example(row, columns._replace(response=name), texts[0], texts[side], rewards=(reward,), label=bool(reward))
        for side, name, reward in ((1, chosen, 1.0), (2, rejected, 0.0))
    ]


def _without_flags(row: Row, error: DataError) -> str:
    """The message without its place and the flags of another command."""
    return re.sub(r" \(--pairs[^)]*\)", "", str(error).removeprefix(f"{row.where}: "))


def _stepwise(row: Row, columns: Columns, config: OfflineDataConfig) -> Example:
    prompt = _need(row, columns, "prompt", config.prompt_key or "prompt")
    steps = row.values[_need_name(row, columns.completions, "completions")]
    labels = row.values[_need_name(row, columns.labels, "labels")]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not isinstance(labels, list):
        raise BadRow("not_steps", row.where, "expected lists: texts in 'completions', true or false in 'labels'")
    if len(steps) != len(labels):
        raise BadRow("not_steps", row.where, f"there are {len(steps)} completions and {len(labels)} labels; each step needs one")
    rewards = tuple(float(_label(row, label, "labels")) for label in labels)
    texts = tuple(step + config.step_separator for step in steps[:-1]) + tuple(steps[-1:])
    return _example(row, columns, prompt, "".join(texts), steps=texts, rewards=rewards, label=all(rewards))


def _trajectory(row: Row) -> Trajectory:
    values = {"schema_version": SCHEMA_VERSION, **row.values}
    try:
        if isinstance(values.get("info"), str):  # of Parquet files
            values["info"] = json.loads(values["info"])
        if not isinstance(values.get("info"), dict):
            raise ValueError(f"info must be an object, not {str(values.get('info'))[:40]!r}")
        for name in ("trajectory_id", "task_id", "group_id"):
            if not isinstance(values.get(name), str):
                raise ValueError(f"{name} must be text, not {str(values.get(name))[:40]!r}")
        version = values.get("policy_version")
        if not isinstance(version, int) or abs(version) >= 2**31:
            raise ValueError(f"policy_version must be a whole number of 32 bits, not {str(version)[:40]!r}")
        trajectory = Trajectory.from_record(values)
        if not has_reward(trajectory):
            trajectory.info["has_reward"] = False
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRow("not_a_trajectory", row.where, f"not a trajectory: {error}") from None
    return trajectory


def asks_for_box(example: Example) -> bool:
    """Whether the prompt has MATH's instruction to box the answer, which decides how published OREO cuts the response."""
    return any(BOXED_INSTRUCTION in text for text in (example.prompt, *(m["content"] for m in example.messages[: example.first_turn])))


def prompts_of(example: Example) -> list[str]:
    """What the policy was asked: the text before its response, or each message of the others."""
    return [message["content"] for message in example.messages if message["role"] != "assistant"] or [example.prompt]
