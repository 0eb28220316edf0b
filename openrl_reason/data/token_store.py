"""Sequences on disk as flat arrays of token ids: what offline training reads, a row at a time, without a list in the driver's memory.

A store is a folder: ``manifest.json`` (what it was made of, statistics, shards), ``index/*.npy`` (one entry a row) and ``shards/*/*.npy`` (tokens,
steps, rewards and the rows' texts as JSON, end to end). All arrays are one-dimensional .npy files that ``numpy.load(..., mmap_mode="r")`` maps.
"""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.errors import DataError

VERSION = 2
"""Of the layout on disk and of what rows become. Stores of another one are built again."""
MANIFEST = "manifest.json"
INDEX = {
    "shard": np.int32, "tokens": np.int32, "prompt_tokens": np.int32, "steps": np.int32, "token_start": np.int64, "step_start": np.int64,
    "info_start": np.int64, "info_bytes": np.int32, "reward": np.float32, "question": np.uint64, "content": np.uint64, "has_reward": np.bool_,
    "label": np.bool_, "stop_reason": np.uint8, "policy_version": np.int32,
}  # fmt: skip
"""Per row: its shard, how much it has of everything and where that begins in the shard, and what is needed of it without reading it."""
ARRAYS = {"token_ids": np.int32, "step_ids": np.int32, "rewards": np.float32, "info": np.uint8}
"""Of a shard. One with known log-probs has ``behaviour_logprobs`` (float32), too; the action mask is ``step_ids >= 0``."""
STOP_REASONS = tuple(StopReason)
_HEADER = 128
"""Bytes before the data of a one-dimensional .npy file of format 1.0."""

_REPLACED = "the token store in {} was replaced by another one while it was in use: give each choice of settings a --data.store of its own"
_DAMAGED = "the token store in {} is damaged ({}): delete it, it will be built again"


class TokenStore:
    """Rows of a finished store, in the order of the files they came from. Arrays with a few numbers a row are mapped, nothing else is resident."""

    folder: Path
    """Where it is."""
    manifest: dict[str, Any]
    """What it was made of, and its shards."""
    kind: str
    """responses, pairs (rows 2i chosen, 2i + 1 rejected), labels (reward 1 or 0 before the affine map), sft, or steps."""
    identity: str
    """Hash of the rows' content in their order."""
    statistics: dict[str, Any]
    """What became of the rows, and of what lengths and rewards they are (JSON)."""
    lengths: np.ndarray
    """int32 [rows]: tokens of each sequence."""
    prompt_lengths: np.ndarray
    """int32 [rows]: of them before the first action."""
    rewards: np.ndarray
    """float32 [rows]: reward of each sequence (of steps: their sum), the affine map applied. 0 where there is none."""
    has_reward: np.ndarray
    """bool [rows]: false where no reward is known (sft, and cut-off responses with truncated_reward mask): leave it out of losses on rewards."""
    labels: np.ndarray
    """bool [rows]: pairs: whether it is the chosen one; labels: the label; steps: whether all are right; else whether the reward in the file was
    positive."""
    questions: np.ndarray
    """uint64 [rows]: equal for rows with the same question."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        # The folder itself is held: another run may build another store under the same name, whose rows lie elsewhere.
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._directory)
        self.kind, self.identity, self.statistics = manifest["kind"], manifest["identity"], manifest["statistics"]
        index = {name: np.asarray(np.lib.format.open_memmap(folder / "index" / f"{name}.npy", mode="r")) for name in INDEX}
        self._index = index
        self.lengths, self.prompt_lengths, self.rewards = index["tokens"], index["prompt_tokens"], index["reward"]
        self.has_reward, self.labels, self.questions = index["has_reward"], index["label"], index["question"]

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """The store in ``folder``. Raises DataError if there is none, or if it is damaged."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(f"there is no token store in {folder}: it has no {MANIFEST} of this version")
        folder = Path(folder).absolute()
        try:
            for file, size in _expected_sizes(folder, manifest):
                if not file.is_file() or file.stat().st_size != size:
                    raise DataError(_DAMAGED.format(folder, f"{file.name} of {file.parent.name}"))
            return cls(folder, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a manifest or an index with other things in it
            raise DataError(_DAMAGED.format(folder, f"{type(error).__name__}: {error}")) from error

    def __reduce__(self) -> tuple[Any, tuple[Path, str]]:
        return TokenStore._again, (self.folder, self.identity)

    @classmethod
    def _again(cls, folder: Path, identity: str) -> TokenStore:
        store = cls.open(folder)
        if store.identity != identity:
            raise DataError(_REPLACED.format(folder))
        return store

    def __len__(self) -> int:
        return self.manifest["num_rows"]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(shard["token_ids"] for shard in self.manifest["shards"])

    def trajectory(self, row: int) -> Trajectory:
        """One row; negative numbers count from the end. Its ``info`` has ``source`` (file and line) and, where false, ``has_reward``."""
        return self.trajectories([row])[0]

    def trajectories(self, rows: Sequence[int]) -> list[Trajectory]:
        """Several rows, in the given order. Raises IndexError beyond the last one."""
        wrong = [row for row in rows if not -len(self) <= row < len(self)]
        if wrong:
            raise IndexError(f"row {wrong[0]} of a store of {len(self)}")
        places = [int(row) % len(self) for row in rows]
        found: dict[int, Trajectory] = {}
        open_shard, shard = -1, None
        try:
            for row in sorted(set(places), key=lambda row: (int(self._index["shard"][row]), row)):
                number = int(self._index["shard"][row])
                if number != open_shard:
                    if shard is not None:
                        shard.close()
                    open_shard, shard = number, _Shard(self._directory, self.folder, self.manifest["shards"][number])
                assert shard is not None
                found[row] = self._read(row, shard)
        finally:
            if shard is not None:
                shard.close()
        repeated = len(places) > len(found)  # two rows never share storage
        return [copy.deepcopy(found[row]) if repeated else found[row] for row in places]

    def _read(self, row: int, shard: _Shard) -> Trajectory:
        index = {name: column[row] for name, column in self._index.items()}
        token_start, num_tokens = int(index["token_start"]), int(index["tokens"])
        record = json.loads(shard.read("info", int(index["info_start"]), int(index["info_bytes"])).tobytes())
        step_ids = shard.read("step_ids", token_start, num_tokens)
        trajectory_id, task_id, group_id = record.get("ids") or self._own_ids(index)
        info = record["info"] if index["has_reward"] else {**record["info"], "has_reward": False}
        return Trajectory(
            trajectory_id=trajectory_id, task_id=task_id, group_id=group_id, token_ids=shard.read("token_ids", token_start, num_tokens),
            action_mask=step_ids >= 0, step_ids=step_ids, behaviour_logprobs=shard.logprobs(token_start, num_tokens),
            rewards=shard.read("rewards", int(index["step_start"]), int(index["steps"])), policy_version=int(index["policy_version"]),
            stop_reason=STOP_REASONS[index["stop_reason"]], info=info,
        )  # fmt: skip

    @staticmethod
    def _own_ids(index: dict[str, Any]) -> tuple[str, str, str]:
        """Identities of a row whose file has none: equal rows, and rows with one prompt, have one."""
        question = f"{int(index['question']):016x}"
        return f"{int(index['content']):016x}", question, question


class _Shard:
    """Open files of a shard. Read by position, not mapped: pages that were mapped would count as memory of this process."""

    def __init__(self, directory: int, folder: Path, shard: dict[str, Any]) -> None:
        self._directory, self._store, self._folder, self._has_logprobs = directory, folder, Path("shards", shard["name"]), shard["logprobs"]
        self._files: dict[str, int] = {}

    def read(self, name: str, start: int, count: int, dtype: Any = None) -> np.ndarray:
        """[count] entries from ``start`` on."""
        kind = np.dtype(dtype or ARRAYS[name])
        if name not in self._files:
            try:
                self._files[name] = os.open(self._folder / f"{name}.npy", os.O_RDONLY, dir_fd=self._directory)
            except FileNotFoundError:
                raise DataError(_REPLACED.format(self._store)) from None
        data = os.pread(self._files[name], count * kind.itemsize, _HEADER + start * kind.itemsize)
        if len(data) != count * kind.itemsize:
            raise DataError(f"{self._store / self._folder / name}.npy is cut short: delete the store, it will be built again")
        return np.frombuffer(data, kind)

    def logprobs(self, start: int, count: int) -> np.ndarray:
        """float32 [count]: NaN where unknown."""
        if not self._has_logprobs:
            return np.full(count, np.nan, np.float32)
        return self.read("behaviour_logprobs", start, count, np.float32)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}


def is_store(folder: str | Path) -> bool:
    """Whether the folder is a token store, of whatever version, or a damaged one: nothing else may be replaced by one."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and "token_store" in manifest:
        return True
    index = {file.name for file in (folder / "index").iterdir()} if (folder / "index").is_dir() else set()
    own_files = index and index <= {f"{name}.npy" for name in INDEX}  # a damaged manifest: known by its files, and by there being no others
    return bool(own_files) and {file.name for file in folder.iterdir()} <= {MANIFEST, "index", "shards"}


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of the store in ``folder``; None if there is none of this version."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("token_store") == VERSION else None


def _expected_sizes(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, int]]:
    for name, dtype in INDEX.items():
        yield folder / "index" / f"{name}.npy", _HEADER + manifest["num_rows"] * np.dtype(dtype).itemsize
    for shard in manifest["shards"]:
        files = {name: shard[name] * np.dtype(dtype).itemsize for name, dtype in ARRAYS.items()}
        if shard["logprobs"]:
            files["behaviour_logprobs"] = shard["token_ids"] * 4
        for name, size in files.items():
            yield folder / "shards" / shard["name"] / f"{name}.npy", _HEADER + size


def save_flat(path: Path, array: np.ndarray) -> None:
    """A one-dimensional .npy file with a header of 128 bytes."""
    with FlatFile(path, array.dtype, len(array)) as file:
        file.append(array)


class FlatFile:
    """A one-dimensional .npy file of ``length`` entries, written piece by piece."""

    def __init__(self, path: Path, dtype: Any, length: int) -> None:
        self._file, self._dtype = path.open("wb"), np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == _HEADER
        self._missing = length

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array, self._dtype).data)
        self._missing -= len(array)

    def __enter__(self) -> FlatFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._missing == 0
