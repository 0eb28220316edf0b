"""Files and folders that are either complete or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openrl_reason.errors import CheckpointError

_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder which becomes ``path`` when the block ends well, and vanishes when it does not.

    Everything is fsynced before the rename. A folder already at ``path`` is replaced, and is untouched until the new one is complete.
    Raises CheckpointError, naming ``path``, if the disk refuses (full, read-only, no permission).
    """
    path = Path(path)
    temporary = path.parent / f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with naming_disk_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            _sync_tree(temporary)
            _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that ``path`` holds either the old or the new content, even after a power cut."""
    path = Path(path)
    temporary = path.parent / f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Deletes what killed writers left in ``folder``. A finished folder caught in mid-replacement is put back."""
    for leftover in Path(folder).glob(f"{_REPLACED}*"):
        original = leftover.parent / leftover.name.removeprefix(_REPLACED).rsplit("-", 1)[0]
        if original.exists():
            shutil.rmtree(leftover)
        else:
            os.rename(leftover, original)
    for leftover in Path(folder).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def naming_disk_errors(path: str | Path) -> Iterator[None]:
    """Turns what the disk refuses within the block into a CheckpointError that names ``path``."""
    try:
        yield
    except Exception as error:
        if is_disk_error(error):
            raise CheckpointError(f"could not write {path}: {error}. Nothing that was there before has been touched") from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """Whether writing failed because of the disk. safetensors wraps the system's error in its own type."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
    else:
        old = path.parent / f"{_REPLACED}{path.name}-{uuid.uuid4().hex[:8]}"
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
