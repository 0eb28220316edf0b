"""Rows of local files and of the hub, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openrl_reason.errors import DataError, MissingDependencyError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Row(NamedTuple):
    """One record, and where it came from (``path:line`` or ``path, row n``), for error messages."""

    where: str
    values: dict[str, Any]


class Part(NamedTuple):
    """A stretch of a source that is read on its own: bytes of JSON lines, row groups of Parquet, rows of a saved folder or of the hub."""

    start: int = 0
    stop: int = -1
    """-1: to the end."""
    first: int = 0
    """Lines or rows before it, for error messages."""


WHOLE = Part()
"""All of a source; of JSON lists and CSV files there is no other part."""

OnBad = Callable[[DataError], None]
"""Told of a record that does not read; reading then goes on behind it."""


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


def iter_rows(
    path: str | os.PathLike[str], columns: Sequence[str] = (), *, split: str = "train", part: Part = WHOLE, on_bad: OnBad | None = None
) -> Iterator[Row]:
    """Rows one by one. ``path``: a .jsonl, .json, .txt (JSON lines), .csv or .parquet file, a folder saved by datasets, or a hub name
    ``org/name[:config]``.

    ``columns`` must be present in every row; ``split`` applies to the hub and to saved folders. A .json file may hold a list of objects
    or one object a line. ``on_bad`` takes the errors of single rows, which are otherwise raised. Raises DataError for a
    missing or malformed file or column, with the line and the nearest existing name."""
    for row in _rows(str(path), split, part, on_bad):
        missing = [column for column in columns if column not in row.values]
        if missing:
            names = list(row.values)
            hint = did_you_mean(missing[0], names)
            error = DataError(f"{row.where}: no column {missing[0]!r}{hint}; there are: {', '.join(map(str, names)) or 'none'}")
            if on_bad is None:
                raise error
            on_bad(error)
            continue
        yield row


def _rows(path: str, split: str, part: Part, on_bad: OnBad | None) -> Iterator[Row]:
    try:
        yield from _rows_of(path, split, part, on_bad)
    except OSError as error:  # no permission, a name that is too long, a disk that fails
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _rows_of(path: str, split: str, part: Part, on_bad: OnBad | None) -> Iterator[Row]:
    file = Path(path).expanduser()
    if file.is_dir():
        return _read_saved(file, split, part)
    if not file.exists():
        if file.is_symlink():
            raise DataError(f"{path} is a link to {os.readlink(file)}, which is not there")
        if _HUB_NAME.fullmatch(path) and file.suffix not in SUFFIXES:
            return _numbered(load_hub(path, split), f"{path}/{split}", part)
        siblings = os.listdir(file.parent) if file.parent.is_dir() else []
        raise DataError(f"there is no file {path}{did_you_mean(file.name, siblings)}")
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if file.suffix in (".jsonl", ".ndjson", ".txt"):  # LogiQA 2.0 and its like: one JSON object a line in a .txt file
        return _read_json_lines(file, part, on_bad)
    if file.suffix == ".json":
        return _read_json(file, on_bad)
    if file.suffix == ".csv":
        return _read_csv(file, on_bad)
    if file.suffix == ".parquet":
        return _read_parquet(file, part)
    raise DataError(f"{path}: files of type {file.suffix or 'no suffix'} are not read; use {', '.join(SUFFIXES)}")


def _as_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, found {type(value).__name__}: {str(value)[:80]}")
    return Row(where, value)


def _read_json_lines(file: Path, part: Part = WHOLE, on_bad: OnBad | None = None) -> Iterator[Row]:
    with file.open("rb") as lines:
        lines.seek(part.start)
        place = part.start
        for number, line in enumerate(lines, start=part.first + 1):
            if 0 <= part.stop <= place:
                return
            place += len(line)
            if not line.strip():
                continue
            try:
                yield _line_row(f"{file}:{number}", line.rstrip(b"\r\n"), number)
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(error)


def _line_row(where: str, line: bytes, number: int) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise DataError(f"{where}: malformed JSON: {error}") from None
    return _as_row(where, value)


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


_LISTS_OF_A_ROW = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "completions", "labels"}
"""A JSON file that holds one object with such a list holds one row, and not a table under a name."""


def _read_json(file: Path, on_bad: OnBad | None) -> Iterator[Row]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as the hub's .json files often are
            yield from _read_json_lines(file, WHOLE, on_bad)
            return
        where = f"{file}:{error.lineno}"
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise DataError(f"{file}: malformed JSON: {error}") from None
    if isinstance(value, dict):
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        if lists and not _LISTS_OF_A_ROW & set(lists):
            raise DataError(f"{file}: expected a list of objects, found an object with the lists {', '.join(lists)}; save one of them")
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{file}: expected a list of objects, found {type(value).__name__}")
    for number, entry in enumerate(value):
        value[number] = None  # read once: its memory is free again behind the reader
        try:
            yield _as_row(f"{file}, row {number}", entry)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)


_LONGEST_CSV_FIELD = 64 << 20
_TOO_MANY = "\0"
"""Where fields beyond the header go; no column has this name (pandas gives its index an empty one)."""


def _read_csv(file: Path, on_bad: OnBad | None) -> Iterator[Row]:
    line = 0
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey=_TOO_MANY, strict=True)
            for values in reader:
                line = reader.line_num
                where = f"{file}:{line}"
                if _TOO_MANY in values or None in values.values():
                    error = DataError(f"{where}: the number of fields differs from the header's {len(reader.fieldnames or ())}")
                    if on_bad is None:
                        raise error
                    on_bad(error)
                    continue
                yield Row(where, values)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}), in what follows line {line}") from None
    except csv.Error as error:
        raise DataError(f"{file}:{line + 1}: malformed CSV: {error}") from None


def _read_parquet(file: Path, part: Part) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = part.first
            groups = range(part.start, part.stop if part.stop >= 0 else table.num_row_groups)
            for batch in table.iter_batches(batch_size=1024, row_groups=list(groups)):
                for values in batch.to_pylist():
                    yield Row(f"{file}, row {number}", values)
                    number += 1
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: malformed Parquet: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # a date beyond what Python has, for instance, in whatever column
        raise DataError(f"{file}: a value that cannot be read: {error} ({type(error).__name__}); leave its column out of the file") from None


def _import_datasets(purpose: str):
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(f"{purpose} needs the package datasets; run: bash examples/scripts/install.sh") from None
    return datasets


def is_saved_folder(folder: Path) -> bool:
    """Whether datasets' ``save_to_disk`` wrote it."""
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _read_saved(folder: Path, split: str, part: Part) -> Iterator[Row]:
    if not is_saved_folder(folder):
        files = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
        hint = f"; it holds {', '.join(files[:5])}: name one of them" if files else ""
        raise DataError(f"{folder} is a folder, and not one saved by datasets{hint}")
    return _numbered(load_saved(folder, split), str(folder), part)


def load_saved(folder: Path, split: str) -> Any:
    """The ``datasets.Dataset`` of a folder. Raises DataError if it is damaged, or has several splits, and not this one."""
    datasets = _import_datasets(f"reading the folder {folder}")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{folder} looks like a folder saved by datasets, but cannot be read: {cause}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{folder} has no split {split!r}; there are: {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def _numbered(loaded: Any, name: str, part: Part) -> Iterator[Row]:
    if part != WHOLE:
        loaded = loaded.select(range(part.start, part.stop if part.stop >= 0 else len(loaded)))
    for number, values in enumerate(loaded, start=part.first):
        yield Row(f"{name}, row {number}", values)


def load_hub(name: str, split: str) -> Any:
    """The ``datasets.Dataset`` of a hub name ``org/name[:config]``. Raises DataError, with what to do without a network."""
    datasets = _import_datasets(f"reading {name} from the hub")
    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split)
    except (OSError, ValueError) as error:  # no network, offline mode, no such repository, configuration or split
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {name} (split {split}) from the hub: {cause}. Without network, give a local .jsonl, .json, .csv or .parquet file"
        ) from error
