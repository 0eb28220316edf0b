"""Checkpoints that survive a full disk, Ctrl-C and ``kill -9``: each is complete or absent, and the previous one goes last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason.atomic import atomic_folder, naming_disk_errors, remove_unfinished, write_json
from openrl_reason.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    """Its folder: what the writer put there, and ``state.json``."""
    step: int
    """The optimiser step after which it was taken."""
    state: dict[str, Any]
    """What the driver wanted to remember: data position, controllers, counters."""


class CheckpointManager:
    """Numbered checkpoints in one folder: ``step-00000010/``, ..., and ``latest``, a JSON pointer to the newest.

    One process at a time writes to a folder. ``keep`` checkpoints remain; older ones are deleted only when a newer one is complete.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, writer: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Takes a checkpoint: ``writer(folder)`` writes its files into a temporary folder, which is fsynced and renamed.

        ``state`` must be JSON-able. Raises CheckpointError, naming the path, if the disk refuses; what was there before stays.
        """
        path = self.folder / f"step-{step:08d}"
        record = json.dumps({"format": FORMAT_VERSION, "step": step, "state": state})
        with naming_disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            with atomic_folder(path) as temporary:
                writer(temporary)
                (temporary / "state.json").write_text(record, encoding="utf-8")
            write_json(self.folder / "latest", {"step": step, "path": path.name})
            for old in self._complete_paths()[: -self.keep]:
                if old != path:
                    shutil.rmtree(old)
        return path

    def latest(self, *, clean: bool = False) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Leftovers of killed saves are not read.

        ``clean`` deletes them: for the owner of the folder alone, since a save under way looks just like one.
        """
        if not self.folder.is_dir():
            return None
        if clean:
            remove_unfinished(self.folder)
        pointer = self.folder / "latest"
        if pointer.is_file():
            named = self.folder / str(_read_json(pointer).get("path", ""))
            if (named / "state.json").is_file():
                return self._read(named)
        # A save was killed between the rename and the pointer, or the pointer's checkpoint was deleted by hand.
        complete = self._complete_paths()
        return self._read(complete[-1]) if complete else None

    def _complete_paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / "state.json").is_file())

    def _read(self, path: Path) -> Checkpoint:
        record = _read_json(path / "state.json")
        if record.get("format") != FORMAT_VERSION:
            raise CheckpointError(f"{path} has checkpoint format {record.get('format')}; this version reads format {FORMAT_VERSION}")
        if not isinstance(record.get("step"), int) or not isinstance(record.get("state"), dict):
            raise CheckpointError(f"cannot read {path / 'state.json'}: it lacks a step or a state")
        return Checkpoint(path=path, step=record["step"], state=record["state"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}: it does not hold a JSON object")
    return value
