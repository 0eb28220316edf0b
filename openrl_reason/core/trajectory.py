"""The record every algorithm learns from: one episode, in token ids, with who wrote each token and what it earned.

Text is never re-tokenised to find out what the policy did; the ids that were sampled are the truth. On disk a trajectory is one
JSON line (to read) or one Parquet row (at scale); both carry ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.core.seeds import content_id
from openrl_reason.errors import DataError

SCHEMA_VERSION = 1


class StopReason(StrEnum):
    """Why an episode ended."""

    EOS = "eos"
    """The policy sampled its end-of-sequence token, which is the last of ``token_ids``."""
    STOP_STRING = "stop_string"
    """A stop string of the sampling settings appeared; its tokens are kept, because the policy sampled them."""
    LENGTH = "length"
    """The token budget or the context ran out. The answer is unfinished, which is not the same as wrong."""
    ENVIRONMENT = "environment"
    """The environment said that the episode is over (solved, lost, or out of turns)."""
    ABORTED = "aborted"
    """Generation was cancelled on purpose (shutdown, or a stale request)."""
    ERROR = "error"
    """The environment or the engine failed; ``info`` says how."""
    OFFLINE = "offline"
    """The text came from a file: nobody sampled it here, so nothing is known about how it ended."""


@dataclass(eq=False)
class Trajectory:
    """One episode. T tokens, S steps. Arrays are converted to the stated dtypes; anything inconsistent raises ``ValueError``."""

    trajectory_id: str
    """Identity of this very sample (a content hash, see ``from_completion``)."""
    task_id: str
    """Identity of the problem."""
    group_id: str
    """Samples that share a group are compared with one another (same prompt, same collection step)."""
    token_ids: np.ndarray
    """int32 [T]: the whole episode, prompt, model turns and observations."""
    action_mask: np.ndarray
    """bool [T]: true where the policy produced the token."""
    step_ids: np.ndarray
    """int32 [T]: the reasoning step (or agent turn) of an action token, never decreasing; -1 elsewhere."""
    behaviour_logprobs: np.ndarray
    """float32 [T]: log-prob of each action token under the distribution it was sampled from; NaN where unknown."""
    rewards: np.ndarray
    """float32 [S]: reward of each step. A step may own no token (a token belongs to the step of its first character)."""
    policy_version: int = -1
    """Version of the weights that sampled it; -1 when no policy of this run did."""
    stop_reason: StopReason = StopReason.OFFLINE
    """Why the episode ended."""
    info: dict = field(default_factory=dict)
    """Anything JSON can hold: task fields, messages, gold answer, parsed answer, grader status."""

    def __post_init__(self):
        self.token_ids = _vector(self.token_ids, np.int32, "token_ids")
        self.action_mask = _vector(self.action_mask, np.bool_, "action_mask")
        self.step_ids = _vector(self.step_ids, np.int32, "step_ids")
        self.behaviour_logprobs = _vector(self.behaviour_logprobs, np.float32, "behaviour_logprobs")
        self.rewards = _vector(self.rewards, np.float32, "rewards")
        self.stop_reason = StopReason(self.stop_reason)
        self.policy_version = int(self.policy_version)
        num_tokens = len(self.token_ids)
        for name in ("action_mask", "step_ids", "behaviour_logprobs"):
            entries = len(getattr(self, name))
            if entries != num_tokens:
                raise ValueError(f"trajectory {self.trajectory_id}: {name} has {entries} entries, token_ids has {num_tokens}")
        self._check_values()

    def _check_values(self) -> None:
        where = f"trajectory {self.trajectory_id}"
        if self.token_ids.size and self.token_ids.min() < 0:
            raise ValueError(f"{where}: negative token id {self.token_ids.min()}")
        steps = self.step_ids[self.action_mask]
        if (self.step_ids[~self.action_mask] != -1).any() or (steps < 0).any():
            raise ValueError(f"{where}: step_ids must be -1 outside the actions and at least 0 on them")
        if (np.diff(steps) < 0).any():
            raise ValueError(f"{where}: step_ids decrease from one action token to a later one")
        if steps.size and steps[-1] >= len(self.rewards):
            raise ValueError(f"{where}: the last step is number {steps[-1]}, but there are rewards for {len(self.rewards)} steps only")
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"{where}: rewards are not finite: {self.rewards}")
        if np.isinf(self.behaviour_logprobs).any():
            raise ValueError(f"{where}: an infinite behaviour log-prob; a token that was sampled has a finite one (NaN means unknown)")

    @classmethod
    def from_completion(
        cls,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        *,
        task_id: str,
        group_id: str,
        sample_index: int,
        step_ids: Sequence[int] | None = None,
        reward: float = 0.0,
        rewards: Sequence[float] | None = None,
        policy_version: int = -1,
        stop_reason: StopReason = StopReason.OFFLINE,
        info: dict | None = None,
    ) -> Trajectory:
        """A single-turn episode: a prompt, then tokens that are all actions.

        ``step_ids`` [len(completion)] defaults to one step; ``logprobs`` None means unknown (NaN). ``reward`` is an outcome reward: it
        goes on the last step, unless ``rewards`` [S] are given.
        """
        num_prompt, num_completion = len(prompt_ids), len(completion_ids)
        token_ids = np.concatenate([np.asarray(prompt_ids, np.int32), np.asarray(completion_ids, np.int32)])
        steps = np.zeros(num_completion, np.int32) if step_ids is None else np.asarray(step_ids, np.int32)
        unknown = np.full(num_completion, np.nan, np.float32)
        if rewards is None:
            rewards = np.zeros(int(steps.max(initial=0)) + 1, np.float32)
            rewards[-1] = reward
        return cls(
            trajectory_id=content_id(task_id, group_id, str(sample_index), str(policy_version), token_ids.tobytes().hex()),
            task_id=task_id,
            group_id=group_id,
            token_ids=token_ids,
            action_mask=np.arange(num_prompt + num_completion) >= num_prompt,
            step_ids=np.concatenate([np.full(num_prompt, -1, np.int32), steps]),
            behaviour_logprobs=np.concatenate(
                [np.full(num_prompt, np.nan, np.float32), unknown if logprobs is None else np.asarray(logprobs, np.float32)]
            ),
            rewards=np.asarray(rewards, np.float32),
            policy_version=policy_version,
            stop_reason=stop_reason,
            info={} if info is None else info,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.sum())

    @property
    def num_steps(self) -> int:
        return len(self.rewards)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first action (all of them, if there is none)."""
        return int(self.action_mask.argmax()) if self.action_mask.any() else self.num_tokens

    @property
    def prompt_ids(self) -> np.ndarray:
        """Everything before the first action."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def response_ids(self) -> np.ndarray:
        """Everything from the first action on, observations included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def reward(self) -> float:
        """Undiscounted return."""
        return float(self.rewards.sum())

    def to_record(self) -> dict:
        """A JSON-able dict; unknown log-probs become None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "trajectory_id": self.trajectory_id,
            "task_id": self.task_id,
            "group_id": self.group_id,
            "token_ids": self.token_ids.tolist(),
            "action_mask": self.action_mask.astype(np.int8).tolist(),
            "step_ids": self.step_ids.tolist(),
            "behaviour_logprobs": [None if np.isnan(value) else _short(value) for value in self.behaviour_logprobs],
            "rewards": [_short(value) for value in self.rewards],
            "policy_version": self.policy_version,
            "stop_reason": str(self.stop_reason),
            "info": self.info,
        }

    @classmethod
    def from_record(cls, record: dict) -> Trajectory:
        """Inverse of ``to_record``. Raises ``ValueError`` on a missing or unknown field, or on a schema from the future."""
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version!r}; this version of openrl_reason reads {SCHEMA_VERSION}")
        fields = {name: value for name, value in record.items() if name != "schema_version"}
        missing, unknown = set(cls.__dataclass_fields__) - set(fields), set(fields) - set(cls.__dataclass_fields__)
        if missing or unknown:
            raise ValueError(f"missing fields: {sorted(missing) or 'none'}; unknown fields: {sorted(unknown) or 'none'}")
        fields["behaviour_logprobs"] = [np.nan if value is None else value for value in fields["behaviour_logprobs"]]
        return cls(**fields)


def _vector(values, dtype, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, its shape is {array.shape}")
    if dtype == np.int32 and array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    if dtype == np.int32 and array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"{name} holds {int(max(array, key=abs))}, beyond 32 bits")
    if dtype == np.bool_ and array.size and array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must hold true and false, not {str(array[~np.isin(array, (0, 1))][0])[:40]!r}")
    return array.astype(dtype)  # a copy: two trajectories never share storage, so nobody edits another's arrays through a view


def _short(value: np.float32) -> float:
    """The shortest decimal that reads back as the same float32 (-0.1, not -0.10000000149011612)."""
    return float(str(value))


def _encode_json(value: object, trajectory_id: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be UTF-8: escape it
        return json.dumps(value, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"trajectory {trajectory_id} cannot be written as JSON: {error}") from error
    return text


def write_jsonl(path: str | Path, trajectories: Iterable[Trajectory], append: bool = False) -> None:
    """One JSON object per line. Without ``append`` the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path if append else path.with_name(path.name + ".tmp")
    with open(target, "ab" if append else "wb") as file:
        for trajectory in trajectories:
            file.write(_encode_json(trajectory.to_record(), trajectory.trajectory_id).encode() + b"\n")
    if not append:
        os.replace(target, path)


def iter_jsonl(path: str | Path) -> Iterator[Trajectory]:
    """Trajectories of a file, one at a time. Raises ``DataError`` naming the file and the line."""
    return _iter_lines(path, Trajectory.from_record)


def iter_task_ids(path: str | Path) -> Iterator[str]:
    """The ``task_id`` of each trajectory of a .jsonl or .parquet file, in order: what it takes to know which of them belong together before any
    is read. Raises ``DataError`` as reading does."""
    if Path(path).suffix == ".parquet":
        for row in _iter_rows(path, ["task_id"]):
            yield row["task_id"]
    else:
        yield from _iter_lines(path, lambda record: record["task_id"])


def _iter_lines(path: str | Path, read: Callable[[dict], Any]) -> Iterator[Any]:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read trajectories from {path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield read(_object(line))
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                detail = f"there is no {error}" if isinstance(error, KeyError) else error
                raise DataError(f"{path}:{number}: not a trajectory: {detail}") from error


def _object(line: bytes) -> dict:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    return record


def read_jsonl(path: str | Path) -> list[Trajectory]:
    """All trajectories of a file; see ``iter_jsonl``."""
    return list(iter_jsonl(path))


def _parquet_schema():
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("trajectory_id", "task_id", "group_id")]
    arrays = [
        ("token_ids", pa.list_(pa.int32())),
        ("action_mask", pa.list_(pa.bool_())),
        ("step_ids", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("rewards", pa.list_(pa.float32())),
    ]
    rest = [("policy_version", pa.int64()), ("stop_reason", pa.string()), ("info", pa.string())]
    return pa.schema(texts + arrays + rest, metadata={"openrl_reason.schema_version": str(SCHEMA_VERSION)})


def write_parquet(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """One row per trajectory, ``info`` as JSON text, the schema version in the file's metadata. Whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, schema = Path(path), _parquet_schema()
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list] = {name: [] for name in schema.names}
    for trajectory in trajectories:
        for name in schema.names:
            value = getattr(trajectory, name)
            columns[name].append(_encode_json(value, trajectory.trajectory_id) if name == "info" else value)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)


def read_parquet(path: str | Path) -> list[Trajectory]:
    """Inverse of ``write_parquet``; see ``iter_parquet``."""
    return list(iter_parquet(path))


def iter_parquet(path: str | Path) -> Iterator[Trajectory]:
    """Trajectories of a file, a few hundred in memory at a time. Raises ``DataError`` naming the file and, where there is one, the row."""
    for number, row in enumerate(_iter_rows(path, None)):
        try:
            yield Trajectory(**{**row, "info": json.loads(row["info"])})
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: row {number}: not a trajectory: {error}") from error


def _iter_rows(path: str | Path, columns: list[str] | None) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, path)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read trajectories from {path}: {error}") from error


def _check_schema(schema: Any, path: str | Path) -> None:
    version = (schema.metadata or {}).get(b"openrl_reason.schema_version", b"").decode()
    if version != str(SCHEMA_VERSION):
        raise DataError(f"{path}: schema version is {version or 'missing'}; this version of openrl_reason reads {SCHEMA_VERSION}")
    if schema.names != _parquet_schema().names:
        raise DataError(f"{path}: columns are {schema.names}, expected {_parquet_schema().names}")
