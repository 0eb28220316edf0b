"""Trajectories for the report: an evenly spread sample of ``rollouts.jsonl``, packed small enough to travel inside a page.

The file may be far larger than memory. One pass notes where each group of siblings (lines in a row with one step, source and task) lies; a
second reads only the groups that are shown. Groups stay whole, sources get equal shares, and within a source the sample is spread evenly.

A page holds, per run: an index of columns (what the list and the filters need), and chunks of trajectories, each a text part and a part of
token numbers, all gzipped; the browser unpacks a chunk when it is looked at. Numbers are float16 where that is exact to a thousandth (plus
1e-7), else float32, with their bytes in planes, which gzip likes.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.observe.redact import HIDDEN, secret_values
from openrl_reason.observe.report_data import Record, compact, number, parse_line

CHUNK = 100
MAX_GROUP = 64
MAX_CHARACTERS = 200_000
"""A longer prompt or response is cut in the page (and says so)."""
CHANNELS = ("advantage", "value", "logprob_ratio", "logprob")
PREVIEW = 90
_STEP = re.compile(rb'"step": ?(-?\d+)')
_SOURCE = re.compile(rb'"source": ?"((?:[^"\\]|\\.)*)"')
_TASK = re.compile(rb'"task_id": ?"((?:[^"\\]|\\.)*)"')
_HEAD = 600


@dataclass
class GroupIndex:
    """Where the groups of a rollouts file lie, in file order."""

    offsets: array = field(default_factory=lambda: array("q"))
    counts: array = field(default_factory=lambda: array("q"))
    sources: array = field(default_factory=lambda: array("q"))
    names: list[str] = field(default_factory=list)
    """Source names; ``sources`` counts into it."""

    @property
    def total(self) -> int:
        """Lines in the file."""
        return sum(self.counts)


@dataclass
class Sample:
    """The trajectories of a run that the page shows."""

    records: list[Record]
    total: int
    """Lines in the file."""
    num_damaged: int = 0
    """Chosen lines that are no JSON objects."""


def index_groups(path: Path) -> GroupIndex:
    """One quick pass over the file. Lines are not parsed: step, source and task stand in their first characters."""
    index, last_key, offset = GroupIndex(), None, 0
    known: dict[bytes, int] = {}
    if not path.exists():
        return index
    with path.open("rb") as file:
        for line in file:
            start, offset = offset, offset + len(line)
            if not line.strip() or (not line.endswith(b"\n") and parse_line(line) is None):
                continue  # a writer's unfinished last line
            key = tuple(match[1] if (match := pattern.search(line, 0, _HEAD)) else b"" for pattern in (_STEP, _SOURCE, _TASK))
            if key == last_key and key[2] and index.counts[-1] < MAX_GROUP:
                index.counts[-1] += 1
                continue
            last_key = key
            index.offsets.append(start)
            index.counts.append(1)
            index.sources.append(known.setdefault(key[1], len(known)))
    index.names = [name.decode("utf-8", "replace") or "train" for name in known]
    return index


def spread(count: int) -> np.ndarray:
    """0 .. count-1 in an order of which every beginning is spread evenly (bit reversal)."""
    bits = max(1, (count - 1).bit_length())
    numbers = np.arange(count, dtype=np.int64)
    reverse = np.zeros(count, dtype=np.int64)
    for bit in range(bits):
        reverse |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return np.argsort(reverse, kind="stable")


def choose_groups(index: GroupIndex, max_trajectories: int) -> list[int]:
    """Groups to show, in an order of which every beginning is a fair sample: the sources take turns, each evenly spread."""
    sources = np.array(index.sources)
    queues = [np.flatnonzero(sources == source) for source in range(len(index.names))]
    turns = [iter(queue[spread(len(queue))].tolist()) for queue in queues]
    chosen, total = [], 0
    for group in itertools.chain.from_iterable(itertools.zip_longest(*turns)):
        if group is None:
            continue
        if chosen and total + index.counts[group] > max_trajectories:
            break
        chosen.append(group)
        total += index.counts[group]
    return chosen


def sample_rollouts(path: Path, max_trajectories: int) -> tuple[Sample, list[int]]:
    """The chosen trajectories in file order, and for each the rank of its group: dropping the highest ranks leaves a fair sample again."""
    index = index_groups(path)
    chosen = choose_groups(index, max_trajectories) if max_trajectories else []
    sample, ranks = Sample([], index.total), []
    rank_of = {group: rank for rank, group in enumerate(chosen)}
    if not chosen:
        return sample, ranks
    secrets = [json.dumps(value)[1:-1].encode() for value in secret_values()]
    with path.open("rb") as file:
        for group in sorted(chosen):
            file.seek(index.offsets[group])
            read = 0
            while read < index.counts[group] and len(sample.records) < max_trajectories:
                line = file.readline()
                if not line.strip():
                    continue
                read += 1
                for secret in secrets:
                    line = line.replace(secret, HIDDEN.encode())
                record = parse_line(line)
                if record is None:
                    sample.num_damaged += 1
                    continue
                sample.records.append(clean(record))
                ranks.append(rank_of[group])
    return sample, ranks


def clean(record: Record) -> Record:
    """The record with every field of the type that the page counts on; what does not fit is left out. Old files have fewer fields."""
    length = record.get("num_tokens")
    tokens = record.get("tokens")
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)) or sum(map(len, tokens)) > MAX_CHARACTERS:
        tokens = None
    data = record.get("token_data") if isinstance(record.get("token_data"), dict) and tokens else {}
    starts = record.get("step_starts")
    valid_starts = tokens and isinstance(starts, list) and all(isinstance(start, int) and 0 <= start < len(tokens) for start in starts)
    terms = record.get("reward_terms") if isinstance(record.get("reward_terms"), dict) else {}
    rewards = record.get("step_rewards") if isinstance(record.get("step_rewards"), list) else []
    return {
        "step": int(step) if math.isfinite(step := number(record.get("step"))) else 0,
        "source": text(record.get("source")) or "train",
        "reward": number(record.get("reward")),
        "status": text(record.get("status")),
        "stop_reason": text(record.get("stop_reason")),
        "length": length if isinstance(length, int) else len(tokens) if tokens else None,
        "version": record["policy_version"] if isinstance(record.get("policy_version"), int) else None,
        "task_id": text(record.get("task_id")),
        "trajectory_id": text(record.get("trajectory_id")),
        "prompt": text(record.get("prompt")),
        "response": text(record.get("response")) if record.get("response") is not None else "".join(tokens or []),
        "gold": text(record.get("gold")),
        "parsed": text(record.get("parsed")),
        "detail": text(record.get("detail")),
        "terms": {str(name): _finite(value) for name, value in terms.items()},
        "tokens": tokens,
        "data": {name: _numbers(data[name]) for name in CHANNELS if isinstance(data.get(name), list) and len(data[name]) == len(tokens or [])},
        "starts": sorted(set(starts)) if valid_starts else [],
        "step_rewards": [_finite(value) for value in rewards],
    }


def text(value: Any) -> str:
    """A field as text: chat messages with their roles, anything else that is no text as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(entry, dict) and "content" in entry for entry in value):
        return "\n\n".join(f"[{entry.get('role', '')}]\n{text(entry['content'])}" for entry in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _finite(value: Any) -> float | None:
    value = number(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _numbers(values: Sequence[Any]) -> np.ndarray:
    return np.array([number(value) for value in values], dtype=np.float32)


# ---- packing -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A sample as the page holds it."""

    index: dict[str, Any]
    texts: list[bytes]
    """Gzipped JSON of each chunk."""
    numbers: list[bytes]
    """Gzipped token numbers of each chunk."""

    @property
    def size(self) -> int:
        """Characters of base64, without the index."""
        return sum(4 * math.ceil(len(part) / 3) for part in (*self.texts, *self.numbers))


def pack(sample: Sample) -> Packed:
    """Columns and chunks of a sample."""
    chunks = [sample.records[first : first + CHUNK] for first in range(0, len(sample.records), CHUNK)]
    packed = [pack_chunk(chunk) for chunk in chunks]
    return Packed(columns(sample), [text_part for text_part, _ in packed], [number_part for _, number_part in packed])


def columns(sample: Sample) -> dict[str, Any]:
    """What the list, the filters and the distributions need of every trajectory."""
    records = sample.records
    index: dict[str, Any] = {"total": sample.total, "shown": len(records), "damaged": sample.num_damaged, "chunk": CHUNK}
    for key in ("source", "status", "stop_reason"):
        names = list(dict.fromkeys(record[key] for record in records))
        position = {name: place for place, name in enumerate(names)}
        index[key] = [position[record[key]] for record in records]
        index[key + "_names"] = names
    groups: dict[tuple, int] = {}
    index["group"] = [groups.setdefault((record["step"], record["source"], record["task_id"] or record["prompt"]), len(groups)) for record in records]
    index["task_ids"] = [key[2][:40] for key in groups]
    index["reward"] = compact(np.array([record["reward"] for record in records], dtype=float))
    for key in ("step", "length", "version"):
        index[key] = [record[key] for record in records]
    index["preview"] = [" ".join(record["response"][: 3 * PREVIEW].split())[:PREVIEW] for record in records]
    index["scales"] = scales(records)
    return index


def scales(records: Iterable[Record]) -> dict[str, float]:
    """For each channel the 98th percentile of its absolute values: where a colour is full."""
    found = {}
    for name in CHANNELS:
        values = [record["data"][name] for record in records if name in record["data"]]
        size = np.abs(np.concatenate(values)) if values else np.empty(0)
        size = size[np.isfinite(size)]
        if len(size):
            found[name] = float(f"{np.percentile(size, 98):.4g}")
    return found


def pack_chunk(records: Sequence[Record]) -> tuple[bytes, bytes]:
    """``(texts, numbers)`` of one chunk, gzipped. A channel that is constant over a response is a single number in the text part."""
    entries, streams = [], {name: [] for name in CHANNELS}
    for record in records:
        cut = {key: record[key][:MAX_CHARACTERS] for key in ("prompt", "response", "gold", "parsed", "detail", "trajectory_id", "task_id")}
        entry = {key: value for key, value in cut.items() if value}
        entry |= {key: record[key] for key in ("terms", "starts", "step_rewards") if record[key]}
        missing = sum(max(0, len(record[key]) - MAX_CHARACTERS) for key in ("prompt", "response"))
        if missing:
            entry["cut"] = missing
        if record["tokens"]:
            entry["tokens"] = record["tokens"]
            if "".join(record["tokens"]) == record["response"]:
                entry.pop("response", None)  # an empty one is not there
        for name, values in record["data"].items():
            if np.isfinite(values).all() and (values == values[0]).all():
                entry.setdefault("constant", {})[name] = _finite(float(values[0]))
            else:
                entry.setdefault("channels", []).append(name)
                streams[name].append(values)
        entries.append(entry)
    tables, parts, offset = {}, [], 0
    for name, pieces in streams.items():
        if pieces:
            values = np.concatenate(pieces)
            width, planes = to_planes(values)
            tables[name] = {"width": width, "offset": offset, "count": len(values)}
            parts.append(planes)
            offset += len(planes)
    chunk = json.dumps({"entries": entries, "numbers": tables}, separators=(",", ":"))
    return _gzip(chunk.encode("ascii")), _gzip(b"".join(parts))


def to_planes(values: np.ndarray) -> tuple[int, bytes]:
    """``(bytes per value, all lowest bytes, then the next ones, ...)`` of little-endian floats."""
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    wide = half.astype(np.float32)
    known = np.isfinite(values)
    exact = np.abs(wide[known] - values[known]) <= 1e-3 * np.abs(values[known]) + 1e-7
    stored = half if exact.all() else values.astype("<f4")
    return stored.itemsize, np.ascontiguousarray(stored.view(np.uint8).reshape(-1, stored.itemsize).T).tobytes()


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=6, mtime=0)


def fit(path: Path, max_trajectories: int, max_bytes: int) -> Packed:
    """The largest sample of at most ``max_trajectories`` that packs into ``max_bytes`` of page."""
    sample, ranks = sample_rollouts(path, max_trajectories)
    packed = pack(sample)
    while packed.size > max_bytes and len(sample.records) > 1:
        keep = max(1, int(len(sample.records) * 0.97 * max_bytes / packed.size))
        kept = sorted(sorted(range(len(ranks)), key=lambda place: (ranks[place], place))[:keep])
        sample = Sample([sample.records[place] for place in kept], sample.total, sample.num_damaged)
        ranks = [ranks[place] for place in kept]
        packed = pack(sample)
    return packed


def chunk_entries(packed: Packed) -> Iterator[dict[str, Any]]:
    """The entries of all chunks, read back (for tests and tools)."""
    for part in packed.texts:
        yield from json.loads(gzip.decompress(part))["entries"]
