"""``openrl-reason export``: the model inside a checkpoint (or a run's newest checkpoint) as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason.errors import ConfigError


@dataclass(frozen=True)
class ExportConfig:
    """Turn a checkpoint into a Hugging Face folder."""

    checkpoint: str = ""
    """A run's output folder (its newest checkpoint is taken), or one checkpoint folder (.../checkpoints/step-00000010)."""
    output: str = ""
    """Folder to write; must be new or empty."""
    dtype: str = "bfloat16"
    """float32, bfloat16, or keep (as trained)."""


def find_model(path: str) -> Path:
    """The Hugging Face folder inside a run or checkpoint folder.

    Raises:
        ConfigError: ``path`` is neither.
    """
    from openrl_reason.workers.checkpoint import CheckpointManager

    folder = Path(path)
    if (folder / "model" / "config.json").is_file() and (folder / "state.json").is_file():
        return folder / "model"
    newest = CheckpointManager(folder / "checkpoints").latest() if (folder / "checkpoints").is_dir() else None
    if path and newest is not None and (newest.path / "model" / "config.json").is_file():
        return newest.path / "model"
    raise ConfigError(
        f"--checkpoint is {path!r}: give a run's output folder that has checkpoints/, or one checkpoint folder (it holds state.json and model/)"
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():
                yield name, stream.get_tensor(name)


def export_checkpoint(config: ExportConfig) -> Path:
    """Writes the folder (complete or not at all) and returns it."""
    from transformers import AutoConfig, GenerationConfig

    from openrl_reason.models.export import export_hf
    from openrl_reason.models.loading import load_tokenizer

    if config.dtype not in ("float32", "bfloat16", "keep"):
        raise ConfigError(f"--dtype is {config.dtype!r}: use float32, bfloat16 or keep")
    source, output = find_model(config.checkpoint), Path(config.output)
    if not config.output or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigError(f"--output is {config.output!r}: give a folder that is new or empty")
    generation = GenerationConfig.from_pretrained(source) if (source / "generation_config.json").is_file() else None
    dtype = None if config.dtype == "keep" else config.dtype
    export_hf(
        _tensors(source), AutoConfig.from_pretrained(source), load_tokenizer(str(source)), output, generation_config=generation, dtype=dtype
    )
    print(f"{source} -> {output} ({config.dtype})")
    return output
