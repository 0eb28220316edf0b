"""Files and folders that are either complete or absent, whatever happens while they are written."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openrl_reason.errors import CheckpointError

_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
_HOST = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
"""Locks may not reach other machines, so what these left is not ours to delete on the strength of one."""


def _tag() -> str:
    return _HOST + uuid.uuid4().hex[:8]


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder which becomes ``path`` when the block ends well, and vanishes when it does not.

    Everything is fsynced before the rename. A folder already at ``path`` is replaced, and is untouched until the new one is complete.
    Raises CheckpointError, naming ``path``, if the disk refuses (full, read-only, no permission).
    """
    path = Path(os.path.realpath(path))  # a link to a folder on another disk stays one
    temporary = path.parent / f"{_UNFINISHED}{path.name}-{_tag()}"
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
    temporary = path.parent / f"{_UNFINISHED}{path.name}-{_tag()}"
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


@contextmanager
def sole_writer(path: str | Path) -> Iterator[bool]:
    """Waits until no other process on the machine writes ``path`` under this, and keeps others waiting until the block ends.

    Yields whether that can be relied on: some shared disks have no locks. A process that dies lets go. The lock is ``.<name>.lock`` beside ``path``.
    """
    path = Path(os.path.realpath(path))
    name, handle = path.parent / f".{path.name}.lock", None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = locked(name)
    except OSError:  # what is wrong with the disk is told by who writes to it
        pass
    try:
        yield handle is not None
    finally:
        if handle is not None:
            unlock(name, handle)


def locked(name: Path, *, wait: bool = True) -> int:
    """A handle of the locked file ``name``, which whoever holds the lock deletes at its end: what was waited for may be no longer the file.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
        OSError: the disk has no locks, or refuses the file.
    """
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), name.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def unlock(name: Path, handle: int) -> None:
    """Lets go of what ``locked`` returned."""
    with suppress(OSError):
        name.unlink(missing_ok=True)
    fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the handle, too
    os.close(handle)


def remove_unfinished(folder: str | Path, name: str = "") -> None:
    """Deletes what killed writers left in ``folder``, or only what this machine's left of its entry ``name``. A finished folder caught in
    mid-replacement is put back."""
    own = f"{glob.escape(name)}-{_HOST}{'[0-9a-f]' * 8}" if name else "*"
    for leftover in Path(folder).glob(f"{_REPLACED}{own}"):
        original = leftover.parent / leftover.name.removeprefix(_REPLACED).rsplit("-", 1)[0]
        if original.exists():
            _delete(leftover)
        else:
            os.rename(leftover, original)
    for leftover in Path(folder).glob(f"{_UNFINISHED}{own}"):
        _delete(leftover)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
        old = path.parent / f"{_REPLACED}{path.name}-{_tag()}"
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
