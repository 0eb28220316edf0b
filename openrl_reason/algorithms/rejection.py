"""Rejection sampling on given data: which rewarded responses supervised fine-tuning learns from, and what became of the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from openrl_reason.algorithms.restem_selection import keep_right
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.offline_formats import detect_layout
from openrl_reason.data.pair_store import rows_by_question
from openrl_reason.data.sft import SFTDataConfig
from openrl_reason.data.sources import expand, first_row
from openrl_reason.data.token_store import TokenStore
from openrl_reason.errors import DataError

REWARDED = ("responses", "conversations", "trajectories")


def has_rewards(config: SFTDataConfig) -> bool:
    """Whether the rows are rewarded responses, which a token store reads: those that are to be filtered, and those that ``load_sft_trajectories``
    does not know. Raises DataError if there is no such file, or not a row in it."""
    if config.min_reward is not None:
        return True
    path = Path(config.path).expanduser()
    row = first_row(expand([config.path])[0] if path.is_dir() else expand([str(path)])[0], config.split)
    if config.messages_key in row.values or {config.prompt_key, config.completion_key} <= set(row.values):
        return False
    try:
        return detect_layout(list(row.values), offline_data(config), row.where).format in REWARDED
    except DataError:
        return False  # the other reader says what columns it needs


def _columns(config: SFTDataConfig) -> list[str]:
    try:
        return list(first_row(expand([config.path])[0], config.split).values)
    except DataError:
        return []  # whoever reads it tells why


def offline_data(config: SFTDataConfig) -> OfflineDataConfig:
    """The same settings for a token store, columns of the usual names left to be found."""
    keys = {"prompt_key": config.prompt_key, "response_key": config.completion_key, "messages_key": config.messages_key}
    usual = SFTDataConfig()
    named = {"prompt_key": usual.prompt_key, "response_key": usual.completion_key, "messages_key": usual.messages_key}
    if config.messages_key in _columns(config):  # a conversation comes first, as in rows without rewards
        named["messages_key"] = ""
    return OfflineDataConfig(
        path=(config.path,), split=config.split, template="tokenizer" if config.apply_chat_template else "auto", max_length=config.max_length,
        allow_test_data=config.allow_test_data, bad_rows=config.bad_rows,
        overlong="drop" if config.overlong == "skip" else "truncate", **{name: key for name, key in keys.items() if key != named[name]},
    )  # fmt: skip


def choose_rows(store: TokenStore, config: SFTDataConfig, seed: int) -> tuple[np.ndarray, Counter[str]]:
    """(rows to learn from, ascending; counts). A response that the length limit cut off when it was sampled is not learned, unless asked for.

    Counts: samples = kept + wrong + ungraded + truncated (right, but cut off) + repeated + over_limit, questions, and of them none_right.
    Raises DataError for data without rewards, and where nothing is kept.
    """
    if store.kind not in ("responses", "labels"):
        raise DataError(f"{config.path}: there are no rewards to filter by (rows of the kind {store.kind!r}): leave --data.min_reward out")
    counts: Counter[str] = Counter()
    chosen: list[int] = []
    limit = config.num_rows or len(store)
    for rows in rows_by_question(store):
        rows = rows[rows < limit]
        if not len(rows):
            continue
        samples = store.trajectories(rows)
        kept, found = keep_right(
            samples, threshold=-np.inf if config.min_reward is None else config.min_reward, max_per_prompt=config.max_per_question or len(rows),
            choice="random", dedup=config.dedup, keep_truncated=config.keep_truncated, seed=seed,
        )  # fmt: skip
        places = {id(sample) for sample in kept}
        chosen += [int(row) for row, sample in zip(rows, samples, strict=True) if id(sample) in places]
        counts.update({name.removeprefix("restem/"): int(count) for name, count in found.items()})
    if not chosen:
        rewards = store.rewards[:limit]
        raise DataError(
            f"{config.path}: nothing is left to learn from ({describe(counts)}; rewards from {rewards.min():g} to {rewards.max():g}): see"
            " --data.min_reward, --data.keep_truncated"
        )
    return np.sort(np.asarray(chosen)), counts


def describe(counts: Counter[str]) -> str:
    """The counts that are not zero, in one line."""
    names = ("samples", "questions", "kept", "wrong", "ungraded", "truncated", "repeated", "over_limit")
    line = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in names if counts[name])
    return line + (f"; {counts['none_right']} questions without a right one" if counts["none_right"] else "")
