"""What an output folder holds, so that no command writes into that of another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openrl_reason.atomic import locked, unlock
from openrl_reason.errors import ConfigError

COLLECTION, ITERATED, RUN = "a collection of samples", "an iterated training", "a training run"
VALUE_NOTE = "values.json"
"""In the folder of a critic: how it learned its values."""
_FORMATS = {"openrl_reason.collection.v1": COLLECTION, "openrl_reason.iterate.v1": ITERATED}


def occupant(folder: Path) -> str | None:
    """What ``folder`` holds at its top, as far as this library knows it; None for anything else, and for nothing."""
    if (folder / "manifest.json").is_file():
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = None
        manifest = manifest if isinstance(manifest, dict) else {}
        if manifest.get("format") in _FORMATS:
            return _FORMATS[manifest["format"]]
        return "a token store" if "token_store" in manifest else None
    if (folder / "metrics.jsonl").is_file() or any(folder.glob("checkpoints/step-*")):
        return RUN
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a model"
    return None


def refuse_others(folder: Path, flag: str, own: str) -> None:
    """Raises ConfigError, naming ``--flag``, if ``folder`` holds something else than ``own``: its settings and files would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--{flag} is {folder}, which is a file: name a folder")
    found = occupant(folder)
    if found not in (None, own):
        raise ConfigError(f"--{flag} is {folder}, which holds {found}: choose another folder")


@contextmanager
def claimed(folder: Path, flag: str) -> Iterator[None]:
    """Keeps other processes out of ``folder``, which exists, until the block ends or this process does. Raises ConfigError if one is there.

    Does nothing on a disk without locks.
    """
    name, handle = folder / ".in-use", None
    try:
        handle = locked(name, wait=False)
    except BlockingIOError:
        raise ConfigError(f"--{flag} is {folder}, where another process is at work: wait for its end, or choose another folder") from None
    except OSError:  # what is wrong with the disk is told by who writes to it
        pass
    try:
        yield
    finally:
        if handle is not None:
            unlock(name, handle)
