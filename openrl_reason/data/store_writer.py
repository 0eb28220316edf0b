"""Writing a token store: tasks write shards side by side, then one process joins their indexes and computes the statistics."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.data.offline_encode import Encoded
from openrl_reason.data.token_store import ARRAYS, INDEX, MANIFEST, STOP_REASONS, VERSION, FlatFile, save_flat

_MAX_ROWS, _MAX_TOKENS = 4096, 1 << 22
"""Of a shard: what its writer holds in memory."""


class ShardWriter:
    """Sequences of one part of a source, as shards ``<part>-<number>`` below ``folder``; records are never divided."""

    def __init__(self, folder: Path, part: int, *, max_rows: int = _MAX_ROWS) -> None:
        self._folder, self._part, self._max_rows = folder, part, max_rows
        self._rows: list[Encoded] = []
        self._num_tokens = 0
        self.shards: list[dict[str, Any]] = []
        """Name and array lengths of each shard that was written."""

    def add(self, record: Sequence[Encoded]) -> None:
        """The sequences of one record."""
        self._rows += record
        self._num_tokens += sum(len(sequence.token_ids) for sequence in record)
        if len(self._rows) >= self._max_rows or self._num_tokens >= _MAX_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what is there as a shard."""
        if not self._rows:
            return
        name = f"{self._part:06d}-{len(self.shards):04d}"
        folder = self._folder / "shards" / name
        folder.mkdir(parents=True, exist_ok=True)
        infos = [_info(row) for row in self._rows]
        arrays = {
            "token_ids": np.concatenate([row.token_ids for row in self._rows]), "step_ids": np.concatenate([row.step_ids for row in self._rows]),
            "rewards": np.concatenate([row.rewards for row in self._rows]), "info": np.frombuffer(b"".join(infos), np.uint8),
        }  # fmt: skip
        for array, dtype in ARRAYS.items():
            save_flat(folder / f"{array}.npy", arrays[array].astype(dtype, copy=False))
        has_logprobs = any(row.behaviour_logprobs is not None for row in self._rows)
        if has_logprobs:
            unknown = [np.full(len(row.token_ids), np.nan) if row.behaviour_logprobs is None else row.behaviour_logprobs for row in self._rows]
            save_flat(folder / "behaviour_logprobs.npy", np.concatenate(unknown).astype(np.float32))
        for column, values in _index(self._rows, infos).items():
            save_flat(folder / f"index-{column}.npy", values)
        sizes = {array: len(values) for array, values in arrays.items()}
        self.shards.append({"name": name, "rows": len(self._rows), "logprobs": has_logprobs, **sizes})
        self._rows, self._num_tokens = [], 0


def _info(row: Encoded) -> bytes:
    record: dict[str, Any] = {"info": row.info}
    if row.ids:
        record["ids"] = row.ids
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()


def _index(rows: Sequence[Encoded], infos: Sequence[bytes]) -> dict[str, np.ndarray]:
    values: dict[str, list[Any]] = {
        "tokens": [len(row.token_ids) for row in rows], "prompt_tokens": [row.num_prompt_tokens for row in rows],
        "steps": [len(row.rewards) for row in rows], "info_bytes": [len(info) for info in infos], "reward": [row.rewards.sum() for row in rows],
        "question": [_hash(row.question.encode("utf-8", "surrogatepass")) for row in rows],
        "content": [_hash(row.token_ids.tobytes(), row.step_ids.tobytes(), row.rewards.tobytes()) for row in rows],
        "has_reward": [row.has_reward for row in rows], "label": [row.label for row in rows],
        "stop_reason": [STOP_REASONS.index(row.stop_reason) for row in rows], "policy_version": [row.policy_version for row in rows],
    }  # fmt: skip
    arrays = {name: np.array(column, INDEX[name]) for name, column in values.items()}
    for start, size in (("token_start", "tokens"), ("step_start", "steps"), ("info_start", "info_bytes")):
        arrays[start] = arrays[size].cumsum(dtype=np.int64) - arrays[size]
    return arrays


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(digest.digest(), "big")


# ---- the whole ---------------------------------------------------------------------------------------------------------------------------


def finish_store(folder: Path, shards: Sequence[dict[str, Any]], counts: Mapping[str, int], kind: str, key: dict[str, Any]) -> None:
    """Joins the shards' indexes, one column and shard at a time, and writes the manifest."""
    num_rows = sum(shard["rows"] for shard in shards)
    (folder / "index").mkdir()
    for name, dtype in INDEX.items():
        with FlatFile(folder / "index" / f"{name}.npy", dtype, num_rows) as file:
            for number, shard in enumerate(shards):
                if name == "shard":
                    file.append(np.full(shard["rows"], number, dtype))
                    continue
                part = folder / "shards" / shard["name"] / f"index-{name}.npy"
                with part.open("rb") as stream:
                    file.append(np.lib.format.read_array(stream, allow_pickle=False))
                part.unlink()
    index = {name: np.lib.format.open_memmap(folder / "index" / f"{name}.npy", mode="r") for name in INDEX}
    manifest = {
        "token_store": VERSION, "kind": kind, "num_rows": num_rows, "identity": _identity(index), "key": key,
        "statistics": statistics(index, counts, kind), "shards": list(shards),
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _identity(index: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("content", "question", "has_reward", "label", "stop_reason"):
        digest.update(np.ascontiguousarray(index[name]).data)
    return digest.hexdigest()


def statistics(index: Mapping[str, np.ndarray], counts: Mapping[str, int], kind: str) -> dict[str, Any]:
    """Counts of rows by what became of them, and what the kept sequences look like. Lengths in tokens."""
    rewards = index["reward"][index["has_reward"]].astype(np.float64)
    content = np.sort(index["content"])
    found: dict[str, Any] = {
        "kind": kind,
        "counts": {name: counts[name] for name in sorted(counts) if counts[name] or name in ("rows", "kept")},
        "sequences": len(content),
        "tokens": int(index["tokens"].sum(dtype=np.int64)),
        "questions": len(np.unique(index["question"])),
        "duplicates": int((content[1:] == content[:-1]).sum()),
        "prompt_length": _spread(index["prompt_tokens"]),
        "response_length": _spread(index["tokens"] - index["prompt_tokens"]),
        "steps": _spread(index["steps"]),
    }
    if len(rewards):
        values, times = np.unique(index["reward"][index["has_reward"]], return_counts=True)
        found["reward"] = {"mean": rewards.mean(), "std": rewards.std(), "positive_rate": float((rewards > 0).mean())}
        if len(values) <= 8:
            found["reward"]["values"] = {f"{value:g}": int(count) for value, count in zip(values, times, strict=True)}
        found["reward"] = {name: _plain(value) for name, value in found["reward"].items()}
    return found


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    half, most = np.percentile(values, (50, 95))
    return {"mean": _plain(values.mean(dtype=np.float64)), "p50": _plain(half), "p95": _plain(most), "max": _plain(values.max())}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    return float(value) if math.isfinite(value) else None


def total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of the parts' counts."""
    whole: Counter[str] = Counter(rows=0, kept=0)
    for part in counts:
        whole.update(part)
    return whole
