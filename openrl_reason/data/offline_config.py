"""Settings of offline data: which files, how rows become token ids, and what happens to rows that do not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openrl_reason.config import require
from openrl_reason.core.steps import check_step_kind
from openrl_reason.errors import ConfigError, did_you_mean

FORMATS = ("auto", "responses", "conversations", "trajectories", "sft", "pairs", "labels", "stepwise")
TEMPLATES = ("auto", "tokenizer", "chatml", "llama3", "minicpm", "plain")


@dataclass(frozen=True)
class OfflineDataConfig:
    """Offline data: files of responses, conversations, pairs or labels, read and tokenised once into a store on disk."""

    path: tuple[str, ...] = ()
    """Files (.jsonl, .ndjson, .json, .csv, .parquet), folders of them, folders saved by datasets, or hub names org/name[:config]."""
    split: str = "train"
    """Of a hub name or saved folder."""
    format: str = "auto"
    """What the rows are: responses {prompt, response, reward}, conversations (with a reward), trajectories (this library's own files), sft, pairs
    {prompt, chosen, rejected}, labels {prompt, completion, label}, stepwise {prompt, completions, labels}; auto: by each file's columns."""
    prompt_key: str = ""
    """Column of the prompt: text, or chat messages. Empty: prompt."""
    response_key: str = ""
    """Column of the response (responses, sft, labels). Empty: response or completion, whichever is there."""
    reward_key: str = ""
    """Column of the reward (responses, conversations). Empty: reward."""
    label_key: str = ""
    """Column of the label (labels). Empty: label."""
    chosen_key: str = ""
    """Column of the better response (pairs). Empty: chosen."""
    rejected_key: str = ""
    """Column of the worse response (pairs). Empty: rejected."""
    messages_key: str = ""
    """Column of a whole conversation. Empty: conversations or messages, whichever is there."""
    template: str = "auto"
    """How chats become text: tokenizer (its own chat template), chatml, llama3, minicpm, or plain (no role markers). auto: text as it is, and
    messages by the tokenizer's template. Named outright, text too becomes a user's and an assistant's message (but for plain)."""
    first_action_turn: int = -1
    """Conversations: assistant messages before this index (from 0) are read, not learned, and counted. -1: 3 where a conversation begins as
    published for ALFWorld (an instruction, the constant "OK", the task, then actions), else 0."""
    train_turn_end: bool = True
    """Chats: the end-of-turn token is the policy's, too, so it learns to end its turns. (Published OREO: false.)"""
    eos: str = "eos"
    """What ends a response that is plain text, and the last message of a template without an end-of-turn token: eos (the EOS token), space_eos
    (a space and the EOS token, as published OREO has it) or none."""
    step_kind: str = "newline"
    """How a response is cut into reasoning steps (docs/steps.md), or oreo: lines, and after sentences where the prompt asks for a boxed answer,
    as published. A trajectory of several steps keeps them."""
    split_turns: bool = False
    """Conversations: cut the messages of the assistant into steps, too. false: each of them is one step."""
    step_separator: str = "\n"
    """stepwise: what stands between one completion and the next."""
    max_length: int = 2048
    """Longest sequence in tokens, prompt and response."""
    overlong: str = "drop"
    """What happens to a longer one: drop (left out, counted), truncate (its end is cut off, counted, and it is marked as cut off) or error. A
    prompt that leaves no room for a response is always left out (or an error)."""
    truncated_reward: str = "keep"
    """The reward of a response that was cut off, here or when it was sampled: keep (as in the file), mask (it counts as unknown), or drop (the row
    is left out)."""
    empty: str = "drop"
    """Responses without text: drop (left out, counted) or keep (they consist of their end token)."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this ..."""
    reward_shift: float = 0.0
    """... and then this is added. (Published OREO: 2 and -1 by default, 1 and 0 in its scripts.)"""
    bad_rows: str = "error"
    """A row that cannot be read (malformed JSON, a missing column, a reward that is no number): error (stop, naming file and line) or skip (counted
    by reason)."""
    allow_test_data: bool = False
    """Learn rows whose prompt is a question of GSM8K's or MATH's published test split, too; otherwise such a row is a bad row."""
    store: str = ""
    """Folder of the token store. Empty: in the folder of the run. It is used again while files, tokenizer and settings are the same."""
    parallel: str = "auto"
    """Read and tokenise in Ray tasks: always, never (in this process), or auto (when there are more than a few megabytes)."""

    def __post_init__(self) -> None:
        for name, known in (
            ("format", FORMATS), ("template", TEMPLATES), ("eos", ("eos", "space_eos", "none")), ("overlong", ("drop", "truncate", "error")),
            ("truncated_reward", ("keep", "mask", "drop")), ("empty", ("drop", "keep")), ("bad_rows", ("error", "skip")),
            ("parallel", ("auto", "always", "never")),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value in known, f"data.{name}", value, f"use {', '.join(known)}{did_you_mean(str(value), known)}")
        if self.step_kind != "oreo":
            try:
                check_step_kind(self.step_kind)
            except ConfigError as error:
                raise ConfigError(f"--data.step_kind: {error}, or oreo") from None
        require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2 tokens")
        require(self.first_action_turn >= -1, "data.first_action_turn", self.first_action_turn, "an index from 0, or -1 for the published rule")
        require(math.isfinite(self.reward_scale) and self.reward_scale != 0, "data.reward_scale", self.reward_scale, "a finite number, not 0")
        require(math.isfinite(self.reward_shift), "data.reward_shift", self.reward_shift, "a finite number")
