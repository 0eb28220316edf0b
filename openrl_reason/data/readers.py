"""Rows of local files and of the hub, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openrl_reason.errors import DataError, MissingDependencyError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Row(NamedTuple):
    """One record, and where it came from (``path:line`` or ``path, row n``), for error messages."""

    where: str
    values: dict[str, Any]


def read_rows(path: str | os.PathLike[str], columns: Sequence[str] = (), *, split: str = "train", limit: int = 0) -> list[Row]:
    """All rows (at most ``limit``; 0: no limit) of :func:`iter_rows`. Raises DataError also when there are none."""
    rows = []
    for row in iter_rows(path, columns, split=split):
        rows.append(row)
        if limit and len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def iter_rows(path: str | os.PathLike[str], columns: Sequence[str] = (), *, split: str = "train") -> Iterator[Row]:
    """Rows one by one. ``path``: a .jsonl, .json, .txt (JSON lines), .csv or .parquet file, a folder saved by datasets, or a hub name
    ``org/name[:config]``.

    ``columns`` must be present in every row; ``split`` applies to the hub and to saved folders. A .json file may hold a list of objects
    or one object a line. Raises DataError for a missing or malformed file or column, with the line and the nearest existing name."""
    for row in _rows(str(path), split):
        missing = [column for column in columns if column not in row.values]
        if missing:
            names = list(row.values)
            hint = did_you_mean(missing[0], names)
            raise DataError(f"{row.where}: no column {missing[0]!r}{hint}; there are: {', '.join(map(str, names)) or 'none'}")
        yield row


def _rows(path: str, split: str) -> Iterator[Row]:
    file = Path(path).expanduser()
    if file.is_dir():
        return _read_saved(file, split)
    if not file.exists():
        if _HUB_NAME.fullmatch(path) and file.suffix not in SUFFIXES:
            return _read_hub(path, split)
        siblings = os.listdir(file.parent) if file.parent.is_dir() else []
        raise DataError(f"there is no file {path}{did_you_mean(file.name, siblings)}")
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if file.suffix in (".jsonl", ".ndjson", ".txt"):  # LogiQA 2.0 and its like: one JSON object a line in a .txt file
        return _read_json_lines(file)
    if file.suffix == ".json":
        return _read_json(file)
    if file.suffix == ".csv":
        return _read_csv(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    raise DataError(f"{path}: files of type {file.suffix or 'no suffix'} are not read; use {', '.join(SUFFIXES)}")


def _as_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, found {type(value).__name__}: {str(value)[:80]}")
    return Row(where, value)


def _read_json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}") from None
            except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                raise DataError(f"{where}: malformed JSON: {error}") from None
            yield _as_row(where, value)


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


def _read_json(file: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as the hub's .json files often are
            yield from _read_json_lines(file)
            return
        where = f"{file}:{error.lineno}"
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}") from None
    if isinstance(value, dict):
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        if lists:
            raise DataError(f"{file}: expected a list of objects, found an object with the lists {', '.join(lists)}; save one of them")
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{file}: expected a list of objects, found {type(value).__name__}")
    for number, entry in enumerate(value):
        yield _as_row(f"{file}, row {number}", entry)


def _read_csv(file: Path) -> Iterator[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey="", strict=True)
            for values in reader:
                where = f"{file}:{reader.line_num}"
                if "" in values or None in values.values():
                    raise DataError(f"{where}: the number of fields differs from the header's {len(reader.fieldnames or ())}")
                yield Row(where, values)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise DataError(f"{file}: malformed CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(f"{file}, row {number}", values)
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: malformed Parquet: {str(error).splitlines()[0]}") from None


def _import_datasets(purpose: str):
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(f"{purpose} needs the package datasets; run: bash examples/scripts/install.sh") from None
    return datasets


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        files = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
        hint = f"; it holds {', '.join(files[:5])}: name one of them" if files else ""
        raise DataError(f"{folder} is a folder, and not one saved by datasets{hint}")
    loaded = _import_datasets(f"reading the folder {folder}").load_from_disk(str(folder))
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{folder} has no split {split!r}; there are: {', '.join(loaded)}")
        loaded = loaded[split]
    for number, values in enumerate(loaded):
        yield Row(f"{folder}, row {number}", values)


def _read_hub(name: str, split: str) -> Iterator[Row]:
    datasets = _import_datasets(f"reading {name} from the hub")
    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None, split=split)
    except (OSError, ValueError) as error:  # no network, offline mode, no such repository, configuration or split
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {name} (split {split}) from the hub: {cause}. Without network, give a local .jsonl, .json, .csv or .parquet file"
        ) from error
    for number, values in enumerate(loaded):
        yield Row(f"{name}/{split}, row {number}", values)
