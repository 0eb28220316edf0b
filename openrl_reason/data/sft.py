"""Rows of text to trajectories for supervised fine-tuning, token-exact.

Context and reply are tokenised apart and their ids joined, the way the policy meets them when it samples; the mask is true on the reply
and the token that ends it. Of a conversation every assistant turn is a reply, and each is one step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.config import require
from openrl_reason.core.seeds import content_id
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.readers import Row, iter_rows
from openrl_reason.data.templates import incremental_turns, refuse_what_is_lost
from openrl_reason.data.token_text import ANCHOR_CHARACTERS, continued_ids
from openrl_reason.errors import ConfigError, DataError, did_you_mean
from openrl_reason.models.turn_end import early_end, turn_end_token, without_end
from openrl_reason.tasks.leakage import TEST_QUESTION, asks_a_test_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("skip", "truncate")


@dataclass(frozen=True)
class SFTDataConfig:
    """Supervised rows: {prompt, completion}, {messages}, or other columns by name. Or rewarded responses, of which the right ones are learned."""

    path: str = ""
    """A .jsonl, .json, .csv or .parquet file, a folder saved by datasets, or a hub name org/name[:config]. Rewarded responses are {prompt, response,
    reward}, conversations with a reward, and this library's trajectories (also a folder of such files)."""
    split: str = "train"
    """Of a hub name or saved folder."""
    prompt_key: str = "prompt"
    """Column of the prompt: text, or chat messages."""
    completion_key: str = "completion"
    """Column of the completion: text, or chat messages."""
    messages_key: str = "messages"
    """Column of a conversation [{role, content}, ...]; used where a row has it."""
    apply_chat_template: bool = False
    """Put text prompts and completions through the chat template as a user and an assistant message. Conversations always go through it."""
    max_length: int = 1024
    """Longest sequence in tokens. (The sft command sets it from --max_length.)"""
    overlong: str = "skip"
    """What happens to a longer one: skip (left out, counted) or truncate (its end is cut off, counted)."""
    bad_rows: str = "error"
    """A row that cannot be used (a missing column, an empty reply, a token in it that ends replies): error (stop, naming file and line) or skip
    (left out, counted)."""
    allow_test_data: bool = False
    """Learn rows whose prompt is a question of GSM8K's or MATH's published test split, too; otherwise they are an error."""
    num_rows: int = 0
    """Use the first so many rows; 0: all. (Of rewarded responses: of those that are not too long.)"""
    min_reward: float | None = None
    """Rewarded responses: learn those of at least this reward (rejection sampling), and count the others. A label is a reward of 1 or 0.
    null: no filter."""
    keep_truncated: bool = False
    """Rewarded responses: learn those, too, that the length limit cut off when they were sampled, which teaches the policy not to end."""
    dedup: bool = False
    """Rewarded responses: of equal ones (token by token) to a question learn one."""
    max_per_question: int = 0
    """Rewarded responses: learn at most so many of a question, drawn by the run's seed (0: all)."""

    def __post_init__(self) -> None:
        require(self.max_per_question >= 0, "data.max_per_question", self.max_per_question, "0 for all, or a number")
        require(
            self.min_reward is None or math.isfinite(self.min_reward), "data.min_reward", self.min_reward, "a finite reward, or null for no filter"
        )
        require(self.bad_rows in ("error", "skip"), "data.bad_rows", self.bad_rows, "use error or skip")
        if self.overlong not in OVERLONG:
            raise ConfigError(f"overlong={self.overlong!r} is unknown; use skip or truncate{did_you_mean(self.overlong, OVERLONG)}")
        if self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length} must be at least 2")


@dataclass(frozen=True)
class SFTData:
    """Trajectories and what happened to the rows that did not fit."""

    trajectories: list[Trajectory]
    """One per kept row, in the order of the file."""
    num_overlong: int
    """Rows longer than max_length that were left out (with "truncate": those of which no reply token was left)."""
    num_truncated: int
    """Rows that were cut."""
    num_bad: int = 0
    """Rows that could not be used (with bad_rows "skip")."""


Piece = tuple[str, bool]
"""Some text, and whether the policy is to learn it."""


def load_sft_trajectories(config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase) -> SFTData:
    """Read and encode ``config.path``. Raises DataError for bad rows (file and line) and when no row is left, ConfigError without a chat
    template where one is needed."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so no reply could ever end; set eos_token in its tokenizer_config.json")
    kept: list[Trajectory] = []
    num_overlong = num_truncated = num_bad = 0

    def bad(error: DataError) -> None:
        nonlocal num_bad
        if config.bad_rows == "error":
            raise DataError(f"{error} (--data.bad_rows skip leaves such rows out, counted)") from error
        num_bad += 1

    rows = itertools.islice(iter_rows(config.path, split=config.split, on_bad=bad), config.num_rows or None)
    for index, row in enumerate(rows):
        try:
            token_ids, turns = encode_row(row, config, tokenizer)
            if not config.allow_test_data and any(map(asks_a_test_question, _prompts(row, config))):
                raise DataError(f"{row.where}: {TEST_QUESTION}. --data.allow_test_data true if this is meant")
        except DataError as error:
            bad(error)
            continue
        if len(token_ids) > config.max_length:
            token_ids, turns = token_ids[: config.max_length], turns[: config.max_length]
            if config.overlong == "skip" or max(turns) < 0:
                num_overlong += 1
                continue
            num_truncated += 1
        kept.append(_trajectory(index, row, token_ids, turns))
    if not kept:
        if not (num_overlong or num_bad):
            raise DataError(f"{config.path} has no rows")
        others = f" ({num_bad} others cannot be used)" if num_bad else ""
        raise DataError(f"{config.path}: all {num_overlong} rows are longer than max_length={config.max_length}{others}")
    return SFTData(kept, num_overlong, num_truncated, num_bad)


def encode_row(row: Row, config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """``(token_ids, turns)`` of a row: the reply number (0, 1, ...) that each token belongs to, -1 for context."""
    pieces, is_chat = _pieces(row, config, tokenizer)
    token_ids: list[int] = []
    turns: list[int] = []
    turn, carried, before = 0, "", ""
    for number, (text, learned) in enumerate(pieces):
        _check_text(row, text)
        if not learned:
            text = carried + text
            ids = continued_ids(text, tokenizer, before) if is_chat or token_ids else _prompt_ids(text, tokenizer)
            before = (before + text)[-ANCHOR_CHARACTERS:]
            token_ids += ids
            turns += [-1] * len(ids)
            continue
        # A template may write more after the token that ends the turn (a newline, mostly). Nobody samples that: it belongs to the context.
        reply, end, carried = _split_end(text, tokenizer) if is_chat else (*without_end(text, tokenizer), "")
        if found := early_end(reply, tokenizer):
            raise DataError(f"{row.where}: {found}")
        ids = continued_ids(reply + end, tokenizer, before)
        before = (before + reply + end)[-ANCHOR_CHARACTERS:]
        if not end and (number + 1 == len(pieces) or not is_chat):
            ids.append(tokenizer.eos_token_id)
        token_ids += ids
        turns += [turn] * len(ids)
        turn += 1
    if turn == 0 or max(turns) < 0:
        raise DataError(f"{row.where}: there is no reply to learn from (no assistant message, or an empty one)")
    if turns[0] >= 0:
        raise DataError(f"{row.where}: the prompt is empty, so nothing stands before the first token of the reply: there is no state to act in")
    return token_ids, turns


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers close every text; a prompt is not closed
    return ids


def _check_text(row: Row, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes that
        cut = ascii(text[max(error.start - 20, 0) : error.end])
        raise DataError(f"{row.where}: half of a character (a lone surrogate): ...{cut}") from None


def _split_end(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """(reply, the token that ends it, rest) of what a template made of the assistant's message."""
    end = turn_end_token(tokenizer)
    return text.rpartition(end) if end and end in text else (text, "", "")


def _pieces(row: Row, config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece], bool]:
    """The row as pieces of text, and whether a chat template made them."""
    values = row.values
    if config.messages_key in values:
        return _chat_pieces(row, _messages(row, config.messages_key), 0, tokenizer), True
    for key in (config.prompt_key, config.completion_key):
        if key not in values:
            raise DataError(
                f"{row.where}: neither {config.messages_key!r} nor {config.prompt_key!r} and {config.completion_key!r}: "
                f"no column {key!r}{did_you_mean(key, map(str, values))}; there are: {', '.join(map(str, values))}"
            )
    prompt, completion = (_text_or_messages(row, key) for key in (config.prompt_key, config.completion_key))
    if isinstance(completion, str) and not completion.strip():
        raise DataError(f"{row.where}: column {config.completion_key!r} has no text, so there is no reply to learn from")
    if isinstance(prompt, str) and isinstance(completion, str) and not config.apply_chat_template:
        return [(prompt, False), (completion, True)], False
    context = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(row, config.prompt_key)
    reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else _messages(row, config.completion_key)
    return _chat_pieces(row, [*context, *reply], len(context), tokenizer), True


def _prompts(row: Row, config: SFTDataConfig) -> list[str]:
    """What the policy is asked: the texts that are not the assistant's."""
    values = [row.values.get(config.messages_key), row.values.get(config.prompt_key)]
    texts = [value for value in values if isinstance(value, str)]
    messages = [message for value in values if isinstance(value, list) for message in value if isinstance(message, dict)]
    return texts + [str(message.get("content")) for message in messages if message.get("role") != "assistant"]


def _text_or_messages(row: Row, key: str) -> Any:
    value = row.values[key]
    if not isinstance(value, str | list):
        raise DataError(f"{row.where}: column {key!r} holds {str(value)[:80]!r}; expected text or a list of messages")
    return value


def _messages(row: Row, key: str) -> list[dict[str, str]]:
    value = row.values[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {key!r} holds {str(value)[:80]!r}; expected text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise DataError(f"{row.where}: column {key!r}: a message needs the texts 'role' and 'content': {str(message)[:80]}")
    return value


def _chat_pieces(row: Row, messages: Sequence[dict[str, Any]], first_learned: int, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Cut the rendered conversation where replies begin and end, by rendering it up to there: what the model sees when it replies."""

    pieces: list[Piece] = []
    unended = [{**one, "content": without_end(one["content"], tokenizer)[0]} if one["role"] == "assistant" else one for one in messages]
    for index, message in enumerate(unended):
        if message["role"] == "assistant" and index >= first_learned and (found := early_end(message["content"], tokenizer)):
            raise DataError(f"{row.where}: message {index}: {found}")
    for index, context, reply in incremental_turns(unended, first_learned, tokenizer, row.where):
        refuse_what_is_lost(messages[index], reply, f"{row.where}: message {index}")
        pieces += [(context, False), (reply, True)]
    return pieces


def _trajectory(index: int, row: Row, token_ids: list[int], turns: list[int]) -> Trajectory:
    identity = content_id("sft", " ".join(map(str, token_ids)))
    steps = np.asarray(turns, np.int32)
    return Trajectory(
        trajectory_id=content_id(identity, str(index)),
        task_id=identity,
        group_id=identity,
        token_ids=np.asarray(token_ids, np.int32),
        action_mask=steps >= 0,
        step_ids=steps,
        behaviour_logprobs=np.full(len(token_ids), np.nan, np.float32),
        rewards=np.zeros(int(steps.max()) + 1, np.float32),
        stop_reason=StopReason.OFFLINE,
        info={"source": row.where},
    )
