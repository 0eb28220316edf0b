"""The files behind a list of paths: which they are, what tells that they changed, and the stretches in which they are read side by side."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason.data.readers import SUFFIXES, WHOLE, Part, Row, is_saved_folder, iter_rows, load_hub, load_saved
from openrl_reason.errors import DataError

FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv")
"""Files that are read of a folder; .json files only where none of these is there, since runs keep settings and counts in such files."""
_LINES = (".jsonl", ".ndjson", ".txt")
_HASHED_WHOLE = 64 << 20
_SAMPLE, _NUM_SAMPLES = 1 << 20, 32
_ROWS_PER_PART = 16_384
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")


@dataclass(frozen=True)
class Source:
    """A file, saved folder or hub name."""

    path: str
    folder: str = ""
    """The folder that was asked for, where the file is one of several in it."""


def expand(paths: Sequence[str]) -> list[Source]:
    """The sources in their order; the files of a folder by name. Raises DataError for a folder without any, or that cannot be read."""
    sources: list[Source] = []
    for path in paths:
        try:
            sources += _expanded(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return sources


def _expanded(path: str) -> list[Source]:
    folder = Path(path).expanduser()
    if not folder.is_dir() or is_saved_folder(folder):
        return [Source(str(folder.absolute()) if folder.exists() else str(path))]  # tasks have another working directory
    folder = folder.absolute()
    _refuse_unreadable(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in FOLDER_SUFFIXES and not file.name.startswith("."))
    files = files or sorted(file for file in folder.iterdir() if file.suffix == ".json" and not file.name.startswith("."))
    if not files:
        raise DataError(f"there is no data file ({', '.join((*FOLDER_SUFFIXES, '.json'))}) in the folder {path}: name other files one by one")
    return [Source(str(file), str(folder)) for file in files]


def _refuse_unreadable(folder: Path) -> None:
    """Raises DataError for data in a folder that would be passed over: half of it compressed, or under another name, would halve the data unseen."""
    lines = any(file.suffix in FOLDER_SUFFIXES for file in folder.iterdir())
    for file in sorted(folder.iterdir()):
        suffixes = [suffix.lower() for suffix in file.suffixes]
        if not suffixes or not file.is_file() or file.name.startswith("."):
            continue
        packed = suffixes[-1] in _PACKED and len(suffixes) > 1 and suffixes[-2] in SUFFIXES
        other_case = suffixes[-1] in (*FOLDER_SUFFIXES, *(() if lines else (".json",))) and file.suffix != suffixes[-1]
        if packed or other_case:
            remedy = "unpack it" if packed else f"rename it to end in {suffixes[-1]}"
            raise DataError(f"{file} would not be read, while other files of the folder are: {remedy}, move it away, or name the files one by one")


def first_row(source: Source, split: str) -> Any:
    """The first record that reads, which tells a source's format. Raises DataError if there is none."""
    errors: list[DataError] = []
    if source.path.endswith(".json") and Path(source.path).is_file() and (values := _first_entry(Path(source.path))) is not None:
        return Row(f"{source.path}, row 0", values)
    for row in iter_rows(source.path, split=split, on_bad=errors.append):
        return row
    raise errors[0] if errors else DataError(f"{source.path} has no rows")


def first_rows(source: Source, split: str, count: int) -> list[Row]:
    """The first records that read, at most so many."""
    return list(itertools.islice(iter_rows(source.path, split=split, on_bad=lambda error: None), count))


def _first_entry(path: Path) -> dict[str, Any] | None:
    """The first object of a JSON list, without reading the list; None where it is something else."""
    size = 1 << 20
    while True:
        try:
            with path.open("rb") as stream:
                data = stream.read(size)
        except OSError:
            return None  # reading it as it should be tells what is wrong
        text = data.decode("utf-8-sig", errors="ignore").lstrip()
        start = len(text) - len(text[1:].lstrip()) if text.startswith("[") else -1
        if start < 0 or not text.startswith("{", start):
            return None
        try:
            return json.JSONDecoder().raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            if len(data) < size:  # all of the file: reading it as it should be tells what is wrong
                return None
        size *= 8


def source_identity(source: Source, split: str) -> list[Any]:
    """JSON that changes when the content does. Of files up to 64 MiB that is their hash; of larger ones size, time of change and the hash of 32
    samples of a MiB each; of a hub data set that of its files on this disk."""
    try:
        return _identity(source, split)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}") from None


def _identity(source: Source, split: str) -> list[Any]:
    path = Path(source.path).expanduser()
    if path.is_file():
        return [source.path, *_file_identity(path)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        return [source.path, split, *(_file_identity(file) for file in files)]
    cached = [Path(entry["filename"]) for entry in load_hub(source.path, split).cache_files]
    return [source.path, split, *(_file_identity(file) for file in cached)]


def _file_identity(file: Path) -> list[Any]:
    status, digest = file.stat(), hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if status.st_size <= _HASHED_WHOLE:
            while block := stream.read(_SAMPLE):
                digest.update(block)
            return [status.st_size, digest.hexdigest()]
        for number in range(_NUM_SAMPLES):
            stream.seek((status.st_size - _SAMPLE) * number // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def source_bytes(source: Source) -> int:
    """Size on disk; 0 where that is not known without a network."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def plan_parts(source: Source, split: str, part_bytes: int) -> list[Part]:
    """Stretches of about ``part_bytes`` that make up the source, in order. JSON lists and CSV files are one part."""
    path = Path(source.path).expanduser()
    if path.is_file() and path.suffix in _LINES:
        return _line_parts(path, part_bytes)
    if path.is_file() and path.suffix == ".parquet":
        return _row_group_parts(path, part_bytes)
    if path.is_file():
        return [WHOLE]
    num_rows = len(load_saved(path, split) if path.is_dir() else load_hub(source.path, split))
    return [Part(start, min(start + _ROWS_PER_PART, num_rows), start) for start in range(0, num_rows, _ROWS_PER_PART)] or [WHOLE]


def _line_parts(path: Path, part_bytes: int) -> list[Part]:
    """One pass over the file, since a line's number is how many stand before it."""
    parts, start, first, lines, place = [], 0, 0, 0, 0
    with path.open("rb") as stream:
        while block := stream.read(min(1 << 20, part_bytes)):
            if place + len(block) - start >= part_bytes and (cut := block.rfind(b"\n") + 1):
                through = lines + block.count(b"\n", 0, cut)
                parts.append(Part(start, place + cut, first))
                start, first = place + cut, through
            lines += block.count(b"\n")
            place += len(block)
    if start < place or not parts:
        parts.append(Part(start, place, first))
    return parts


def _row_group_parts(path: Path, part_bytes: int) -> list[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: malformed Parquet: {str(error).splitlines()[0]}") from None
    parts, start, first, rows, size = [], 0, 0, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if size >= part_bytes or number + 1 == metadata.num_row_groups:
            parts.append(Part(start, number + 1, first))
            start, first, size = number + 1, rows, 0
    return parts or [WHOLE]
