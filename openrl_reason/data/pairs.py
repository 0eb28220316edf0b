"""Preference pairs: a chosen and a rejected response to one prompt, from rewarded samples or from files in TRL's layout.

Every sample, question and pair that does not end up in a pair is counted, by reason (``PairData.counts``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.config import require
from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import StopReason, Trajectory, iter_jsonl, iter_parquet, iter_task_ids
from openrl_reason.data.readers import Row, iter_rows
from openrl_reason.data.sft import SFTDataConfig, encode_row
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.graders import STATUSES
from openrl_reason.tasks.leakage import TEST_QUESTION, asks_a_test_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAILED = frozenset(STATUSES) - {"ok", "no_answer"}
"""Statuses that mean that the grading failed, not the answer."""


@dataclass(frozen=True)
class PairsConfig:
    """Where preference pairs come from: a file of pairs, or rewarded samples that are paired here."""

    path: str = ""
    """Pairs as rows {prompt, chosen, rejected}: text, or chat messages (also without a prompt, which is what chosen and rejected begin with
    alike). A .jsonl, .json, .csv or .parquet file, a folder saved by datasets, or a hub name org/name[:config]."""
    split: str = "train"
    """Of a hub name or saved folder."""
    prompt_key: str = "prompt"
    """path: column of the prompt. '': there is none, and chosen and rejected begin with it alike (TRL's implicit prompt), texts too."""
    chosen_key: str = "chosen"
    """path: column of the better response."""
    rejected_key: str = "rejected"
    """path: column of the worse response."""
    bad_rows: str = "error"
    """path: a row that cannot be used (a token in it that ends responses, for instance): error (stop, naming file and line) or skip (counted)."""
    allow_test_data: bool = False
    """path: learn pairs whose prompt is a question of GSM8K's or MATH's published test split, too; otherwise they are an error."""
    apply_chat_template: bool = False
    """path: put text through the chat template as a user and an assistant message. Messages always go through it."""
    trajectories: tuple[str, ...] = ()
    """Rewarded samples to pair: trajectory files (.jsonl, .parquet), or folders of them such as runs/restem/samples/iteration-0000."""
    threshold: float = 0.5
    """Samples with at least this reward are accepted, the others rejected; a question's pairs are accepted x rejected."""
    max_pairs_per_question: int = 64
    """If a question has more pairs, so many are drawn without replacement, by the run's seed and the question's identity."""
    accept_truncated: bool = False
    """Let a response that the length limit cut off be chosen if its reward says so. False: it counts as rejected, since it never ended."""
    dedup: bool = True
    """Of equal responses (token by token) to a question keep one. False: as sampled, so that a frequent response weighs more."""

    def __post_init__(self) -> None:
        require(self.max_pairs_per_question >= 1, "pairs.max_pairs_per_question", self.max_pairs_per_question, "at least 1")
        require(self.bad_rows in ("error", "skip"), "pairs.bad_rows", self.bad_rows, "use error or skip")
        require(np.isfinite(self.threshold), "pairs.threshold", self.threshold, "use a finite reward")
        keys = (self.prompt_key, self.chosen_key, self.rejected_key)
        require(len(set(keys)) == 3, "pairs.chosen_key", self.chosen_key, "prompt_key, chosen_key and rejected_key must be three columns")
        require(not (self.path and self.trajectories), "pairs.path", self.path, "with --pairs.trajectories there are two sources: give one of them")


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    pair_id: str
    """Identity of this pair, made of its tokens."""
    task_id: str
    """Identity of the question."""
    chosen: Trajectory
    rejected: Trajectory

    @property
    def num_tokens(self) -> int:
        """Of both sequences, prompts included."""
        return self.chosen.num_tokens + self.rejected.num_tokens


@dataclass
class PairData:
    """Pairs, and what became of everything else."""

    pairs: list[Pair] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """By name; see ``build_pairs`` and ``read_pairs`` for which."""

    def describe(self) -> str:
        """The counts that are not zero, in one line."""
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items() if count)


# ---- from rewarded samples -----------------------------------------------------------------------------------------------------------


def build_pairs(
    trajectories: Iterable[Trajectory],
    *,
    threshold: float = 0.5,
    max_per_question: int = 64,
    seed: int = 0,
    max_length: int = 0,
    accept_truncated: bool = False,
    dedup: bool = True,
) -> PairData:
    """Pairs of each question's accepted (reward >= ``threshold``) with its rejected samples, as VinePPO's DPO-Positive makes them.

    A question is a task id with one prompt, token by token. A pair never comes twice; the order of the questions is that of their first
    sample. ``max_length``: tokens of the longest sequence (0: no limit).

    Counts. Of samples: ``samples`` = accepted + rejected + ungraded (grading failed: nothing is known) + empty (no response) + too_long +
    repeated (equal to another one) + contradictory (a response that is both accepted and rejected); ``truncated_rejected`` are those of the
    rejected whose reward reached the threshold. Of questions: ``questions`` = paired + all_accepted + all_rejected + no_samples_left.
    Of pairs: ``possible_pairs`` = pairs + pairs_not_drawn.
    """
    builder = PairBuilder(threshold, max_per_question, seed, max_length, accept_truncated, dedup)
    builder.add(trajectories)
    return builder.finish()


_Question = tuple[str, bytes]
"""Task id and prompt."""


@dataclass
class PairBuilder:
    """``build_pairs`` for samples that come in parts: of each part only the samples that are in pairs are kept."""

    threshold: float = 0.5
    max_per_question: int = 64
    seed: int = 0
    max_length: int = 0
    accept_truncated: bool = False
    dedup: bool = True
    _counts: Counter[str] = field(default_factory=lambda: Counter(samples=0, questions=0))
    _open: dict[str, dict[bytes, list[Trajectory]]] = field(default_factory=dict)
    """Samples by task id and prompt."""
    _pairs: dict[_Question, list[Pair]] = field(default_factory=dict)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Takes samples; ``close`` or ``finish`` pairs them."""
        for trajectory in trajectories:
            prompt = trajectory.prompt_ids.tobytes()
            self._pairs.setdefault((trajectory.task_id, prompt), [])  # in the order of the questions' first samples
            self._open.setdefault(trajectory.task_id, {}).setdefault(prompt, []).append(trajectory)
            self._counts["samples"] += 1

    def close(self, unfinished: Collection[str] = ()) -> None:
        """Pairs the questions whose samples are all there: those whose task ids are not among ``unfinished``."""
        for task_id in [task_id for task_id in self._open if task_id not in unfinished]:
            self.close_task(task_id)

    def close_task(self, task_id: str) -> None:
        """Pairs the questions of one task id, whose samples are all there. The pairs' trajectories lose ``info``: its texts are much of their
        memory, and nothing that learns from pairs reads them."""
        for prompt, samples in self._open.pop(task_id).items():
            self._pairs[task_id, prompt] = self._question_pairs((task_id, prompt), samples)
            for pair in self._pairs[task_id, prompt]:
                pair.chosen.info, pair.rejected.info = {}, {}

    def finish(self) -> PairData:
        """All pairs, and what became of everything else."""
        for task_id, prompts in self._open.items():
            for prompt, samples in prompts.items():
                self._pairs[task_id, prompt] = self._question_pairs((task_id, prompt), samples)
        self._open = {}
        return PairData([pair for pairs in self._pairs.values() for pair in pairs], self._counts)

    def _question_pairs(self, question: _Question, samples: Sequence[Trajectory]) -> list[Pair]:
        (task_id, prompt), counts = question, self._counts
        counts["questions"] += 1
        usable = list(_usable(samples, self.max_length, counts))
        accepted, rejected = _split_by_reward(usable, self.threshold, self.accept_truncated, self.dedup, counts)
        if not (accepted and rejected):
            one_sided = "all_accepted" if accepted else "all_rejected" if rejected else "no_samples_left"
            counts[f"questions_{one_sided}"] += 1
            return []
        counts["questions_paired"] += 1
        possible, most = len(accepted) * len(rejected), self.max_per_question
        rng = np.random.default_rng(derive_seed(self.seed, "pairs", task_id, content_id(prompt.hex())))
        drawn = np.sort(rng.choice(possible, most, replace=False)) if possible > most else range(possible)
        counts.update(possible_pairs=possible, pairs=len(drawn), pairs_not_drawn=possible - len(drawn))
        places = [divmod(int(place), len(rejected)) for place in drawn]
        return [_pair(accepted[chosen], rejected[lost], "") for chosen, lost in places]


def _usable(samples: Sequence[Trajectory], max_length: int, counts: Counter[str]) -> Iterator[Trajectory]:
    for sample in samples:
        if not has_reward(sample):
            counts["ungraded"] += 1
        elif not sample.num_actions:
            counts["empty"] += 1
        elif max_length and sample.num_tokens > max_length:
            counts["too_long"] += 1
        else:
            yield sample


def _split_by_reward(
    samples: Sequence[Trajectory], threshold: float, accept_truncated: bool, dedup: bool, counts: Counter[str]
) -> tuple[list[Trajectory], list[Trajectory]]:
    sides: tuple[list[Trajectory], list[Trajectory]] = ([], [])
    for sample in samples:
        right = reaches(sample, threshold)
        cut = right and not accept_truncated and sample.stop_reason == StopReason.LENGTH
        counts["truncated_rejected"] += cut
        sides[0 if right and not cut else 1].append(sample)
    both = {response_key(sample) for sample in sides[0]} & {response_key(sample) for sample in sides[1]}
    kept: list[list[Trajectory]] = []
    for name, side in zip(("accepted", "rejected"), sides, strict=True):
        sure = [sample for sample in side if response_key(sample) not in both]
        counts["contradictory"] += len(side) - len(sure)
        distinct = list({response_key(sample): sample for sample in reversed(sure)}.values())[::-1] if dedup else sure
        counts["repeated"] += len(sure) - len(distinct)
        counts[name] += len(distinct)
        kept.append(distinct)
    return kept[0], kept[1]


def has_reward(trajectory: Trajectory) -> bool:
    """Whether the sample was graded. Runs that sample note it; in other files the status of the grading tells."""
    return bool(trajectory.info.get("has_reward", trajectory.info.get("grade_status", "ok") not in FAILED))


def reaches(trajectory: Trajectory, threshold: float) -> bool:
    """Whether the reward is at least ``threshold``, both as float32, which rewards are."""
    return bool(np.float32(trajectory.reward) >= np.float32(threshold))


def response_key(trajectory: Trajectory) -> bytes:
    """Equal for equal responses, token by token."""
    return trajectory.response_ids.tobytes()


def _pair(chosen: Trajectory, rejected: Trajectory, salt: str) -> Pair:
    return Pair(content_id("pair", chosen.trajectory_id, rejected.trajectory_id, salt), chosen.task_id, chosen, rejected)


def pair_samples(paths: Sequence[str], builder: PairBuilder) -> PairData:
    """The pairs of the samples in files and folders (see ``read_samples``). Of samples that are in no pair, those of a question are in memory from
    its first row to its last, wherever these are: the files are gone through twice, for the task ids alone at first.

    Counts beside ``build_pairs``'s: ``questions_spread``, task ids whose rows do not stand together, which is what takes memory.
    """
    last: dict[str, int] = {}
    spread: set[str] = set()
    task_ids = (task_id for file in _sample_files(paths) for task_id in iter_task_ids(file))
    for row, task_id in enumerate(task_ids):
        if last.get(task_id, row - 1) != row - 1:
            spread.add(task_id)
        last[task_id] = row
    for row, trajectory in enumerate(read_samples(paths)):
        builder.add([trajectory])
        if last[trajectory.task_id] == row:
            builder.close_task(trajectory.task_id)
    data = builder.finish()
    data.counts["questions_spread"] = len(spread)
    return data


def read_samples(paths: Sequence[str]) -> Iterator[Trajectory]:
    """Trajectories of files and folders (all .jsonl and .parquet files of a folder, by name). Raises DataError, naming file and line."""
    for file in _sample_files(paths):
        yield from iter_parquet(file) if file.suffix == ".parquet" else iter_jsonl(file)


def _sample_files(paths: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"--pairs.trajectories: there is no .jsonl or .parquet file in {path}")
        yield from files


# ---- from files of pairs -------------------------------------------------------------------------------------------------------------


def read_pairs(config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 0) -> PairData:
    """The rows of ``config.path``, encoded: the prompt's tokens are those the policy sees when it samples, and an EOS ends each response.

    Counts: ``rows`` = pairs + bad (left out with bad_rows "skip") + empty (a response without text) + identical (chosen equals rejected) +
    too_long (one of them). Rows that come twice stay twice. Raises DataError for rows of another form, naming file and line; ConfigError where
    a chat template is missing.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so no response could ever end; set eos_token in its tokenizer_config.json")
    data = PairData(counts=Counter(rows=0))

    def bad(error: DataError) -> None:
        if config.bad_rows == "error":
            raise DataError(f"{error} (--pairs.bad_rows skip leaves such rows out, counted)") from error
        data.counts.update(rows=1, bad=1)

    for index, row in enumerate(iter_rows(config.path, (config.chosen_key, config.rejected_key), split=config.split, on_bad=bad)):
        try:
            sides = _sides(row, config, tokenizer)
        except DataError as error:
            bad(error)
            continue
        data.counts["rows"] += 1
        if sides is None:
            data.counts["empty"] += 1
            continue
        if np.array_equal(sides[0].token_ids, sides[1].token_ids):
            data.counts["identical"] += 1
        elif max_length and max(side.num_tokens for side in sides) > max_length:
            data.counts["too_long"] += 1
        else:
            data.counts["pairs"] += 1
            data.pairs.append(_pair(*sides, str(index)))
    return data


def _sides(row: Row, config: PairsConfig, tokenizer: PreTrainedTokenizerBase) -> list[Trajectory] | None:
    """Chosen and rejected; None where one of them says nothing."""
    prompt, chosen, rejected = pair_texts(row, config)
    asked = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt if isinstance(message, dict)]
    if not config.allow_test_data and any(map(asks_a_test_question, asked)):
        raise DataError(f"{row.where}: {TEST_QUESTION}. --pairs.allow_test_data true if this is meant")
    if is_empty(chosen) or is_empty(rejected):
        return None
    named = {config.chosen_key: chosen, config.rejected_key: rejected}
    return [_encode(row, prompt, key, response, config, tokenizer) for key, response in named.items()]


def pair_texts(row: Row, config: PairsConfig) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): three texts, or three lists of messages. Of ``config`` the names of the columns count alone.

    Without a prompt it is what both sides begin with. Raises DataError, naming the row, for anything else."""
    chosen, rejected = row.values[config.chosen_key], row.values[config.rejected_key]
    prompt = row.values.get(config.prompt_key) if config.prompt_key else None
    for key, value in ((config.chosen_key, chosen), (config.rejected_key, rejected), (config.prompt_key, prompt)):
        if not (isinstance(value, str | list) or (value is None and key == config.prompt_key)):
            raise DataError(f"{row.where}: column {key!r} holds {str(value)[:80]!r}; expected text or a list of messages")
    if type(chosen) is not type(rejected):
        raise DataError(f"{row.where}: {config.chosen_key!r} is a {type(chosen).__name__}, {config.rejected_key!r} a {type(rejected).__name__}")
    if isinstance(prompt, list) and isinstance(chosen, list):
        size = len(prompt)
        if size and chosen[:size] == prompt == rejected[:size] and min(len(chosen), len(rejected)) > size:  # whole conversations beside their prompt
            return prompt, chosen[size:], rejected[size:]
        return prompt, chosen, rejected
    if isinstance(chosen, list):  # no prompt, or its text beside whole conversations
        found = _shared_beginning(row, config, chosen, rejected)
        said = [str(message.get("content")).strip() for message in found[0] if isinstance(message, dict)]
        if isinstance(prompt, str) and prompt.strip() not in ("", *said):
            names = f"{config.chosen_key!r} and {config.rejected_key!r}"
            raise DataError(f"{row.where}: column {config.prompt_key!r} holds {prompt[:80]!r}, which {names} do not begin with: which is the prompt?")
        return found
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    if not config.prompt_key:
        return _shared_text(row, config, chosen, rejected)
    found = "is missing" if prompt is None else "is a list of messages, and the responses are text"
    hint = " (--pairs.prompt_key '' if the two texts begin with the prompt)" if prompt is None else ""
    raise DataError(f"{row.where}: column {config.prompt_key!r} {found}{hint}; there are: {', '.join(map(str, row.values))}")


def _shared_text(row: Row, config: PairsConfig, chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt ends where the texts part, at the last white space before that, so that no word is in it half. A space there begins the
    response, as tokenizers have it; a line break ends the prompt."""
    shared = os.path.commonprefix([chosen, rejected])
    end = max((place for place, character in enumerate(shared, start=1) if character.isspace()), default=0)
    end -= shared[:end].endswith(" ")
    if not shared[:end].strip():
        names = f"{config.chosen_key!r} and {config.rejected_key!r}"
        raise DataError(f"{row.where}: without a prompt column (--pairs.prompt_key '') {names} must begin with the same words, the prompt")
    return shared[:end], chosen[end:], rejected[end:]


def _shared_beginning(row: Row, config: PairsConfig, chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected) and shared:  # the same conversation twice: its last turn is the response, equal in both
        shared -= 1
    if not 0 < shared < min(len(chosen), len(rejected)):
        names = f"{config.chosen_key!r} and {config.rejected_key!r}"
        raise DataError(f"{row.where}: {names} must begin with the same messages, the prompt, and each go on with a response")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def is_empty(response: str | list[Any]) -> bool:
    """Whether a response, text or messages, says nothing."""
    if isinstance(response, str):
        return not response.strip()
    contents = [message.get("content") for message in response if isinstance(message, dict) and message.get("role") == "assistant"]
    return bool(contents) and all(isinstance(content, str) and not content.strip() for content in contents)


def _encode(row: Row, prompt: Any, key: str, response: Any, config: PairsConfig, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    prompt_key = config.prompt_key or "prompt"
    keys = {"prompt_key": prompt_key, "completion_key": key, "messages_key": ""}  # the columns' own names, for error messages
    layout = SFTDataConfig(apply_chat_template=config.apply_chat_template, **keys)
    token_ids, turns = encode_row(Row(row.where, {prompt_key: prompt, key: response}), layout, tokenizer)
    steps = np.asarray(turns, np.int32)
    task_id = content_id("pair prompt", str(prompt))
    return Trajectory(
        trajectory_id=content_id(task_id, " ".join(map(str, token_ids))), task_id=task_id, group_id=task_id,
        token_ids=np.asarray(token_ids, np.int32), action_mask=steps >= 0, step_ids=steps,
        behaviour_logprobs=np.full(len(token_ids), np.nan, np.float32), rewards=np.zeros(int(steps.max()) + 1, np.float32),
        stop_reason=StopReason.OFFLINE, info={"source": row.where},
    )  # fmt: skip
