"""Where a run of ``openrl-reason iterate`` stands: its choices, what each round trained from, and which stages are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openrl_reason.atomic import naming_disk_errors, remove_unfinished, write_json
from openrl_reason.config import to_dict
from openrl_reason.errors import CheckpointError

FORMAT = "openrl_reason.iterate.v1"
CHOICES = ("algorithm", "policy", "reference", "critic", "data")
MAY_CHANGE = ("rounds", "model", "output", "dry_run", "placement", "rollout", "collect.questions_in_flight", "collect.grader_processes")
"""Settings, and groups of them, that a run which goes on may change: none of them changes what comes of it."""
KEPT = ("rollout.dtype", "rollout.max_model_len")
"""Those among them that may not."""


class Manifest:
    """``manifest.json``, rewritten as a whole after each stage: it holds the old or the new state, whenever the process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest.json"
        self.state: dict[str, Any] = {}

    def begin(self, config: Any, model: Mapping[str, Any]) -> None:
        """Reads it, or writes the first one. ``model``: identity of the model to begin with.

        Raises:
            CheckpointError: it belongs to a run with other settings, which are named, or is none.
        """
        settings = json.loads(json.dumps(to_dict(config)))
        identity = {name: value for name, value in model.items() if name != "path"} or dict(model)
        if self.path.exists():
            self.state = self._read()
            before, now = _flat(self.state["settings"]), _flat(settings)
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name) and not _may_change(name)]
            changed += ["model"] if self.state["model"] != identity else []
            if changed:
                raise CheckpointError(
                    f"the run in {self.folder} has other settings ({', '.join(changed)}): go on with its own, which are in"
                    f" {self.folder / 'config.yaml'}, or choose another --output"
                )
        else:
            choices = {name: settings[name] for name in CHOICES}
            self.state = {"format": FORMAT, "choices": choices, "model": identity, "start": {}, "rounds": []}
        self.state["settings"] = settings
        with naming_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if state["format"] == FORMAT:
                return state
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise CheckpointError(f"{self.path} is no manifest of an iterated run: choose another --output")

    def stages(self, number: int | None) -> dict[str, Any]:
        """What is known of a round's finished stages, by name; None: of the model to begin with."""
        if number is None:
            return self.state["start"]
        while len(self.state["rounds"]) <= number:
            self.state["rounds"].append({"round": len(self.state["rounds"]), "inputs": {}, "stages": {}})
        return self.state["rounds"][number]["stages"]

    def finish(self, number: int | None, stage: str, about: Mapping[str, Any]) -> None:
        """A stage is finished."""
        self.stages(number)[stage] = dict(about)
        self._write()

    def note_inputs(self, number: int, inputs: Mapping[str, Any]) -> None:
        """What the round trains from."""
        self.stages(number)
        self.state["rounds"][number]["inputs"] = dict(inputs)
        self._write()

    def _write(self) -> None:
        with naming_disk_errors(self.path):
            write_json(self.path, self.state)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _may_change(name: str) -> bool:
    return name not in KEPT and any(name == group or name.startswith(f"{group}.") for group in MAY_CHANGE)
