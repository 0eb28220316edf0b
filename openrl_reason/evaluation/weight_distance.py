"""How far a checkpoint's weights are from another's: norms of differences, read piece by piece from safetensors, so that no model is in memory.

Everything is summed in float64. A weight that is tied to another is counted once, as the model has it once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrl_reason.algorithms.common import count_parameters
from openrl_reason.errors import DataError
from openrl_reason.models.loading import check_model_folder

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 24
"""Entries of a tensor that are in memory at a time (a row at least)."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


@dataclass(frozen=True)
class TensorDistance:
    """Of one weight, or summed over several."""

    name: str
    num_parameters: int
    difference: float
    """Sum of (weight - reference)^2."""
    reference: float
    """Sum of reference^2."""
    own: float
    """Sum of weight^2."""
    product: float
    """Sum of weight x reference."""
    largest: float
    """Largest |weight - reference|."""

    @property
    def distance(self) -> float:
        """L2 norm of the difference."""
        return math.sqrt(self.difference)

    @property
    def relative(self) -> float:
        """``distance`` over the reference's norm; NaN where that is 0."""
        return math.sqrt(self.difference / self.reference) if self.reference else math.nan

    @property
    def cosine(self) -> float:
        """Of the angle between both; NaN where one is 0. Equal weights have 1 exactly."""
        if not self.own or not self.reference:
            return math.nan
        return 1.0 if self.difference == 0 else self.product / math.sqrt(self.own * self.reference)

    @property
    def layer(self) -> str:
        """``layer 3``; what is in no layer has its module's name."""
        found = _LAYER.search(self.name)
        return f"layer {found[1]}" if found else self.name.rpartition(".")[0]

    @property
    def module(self) -> str:
        """The name with ``*`` for the layer's number: the same weight of all layers."""
        return _LAYER.sub(lambda found: found[0].replace(found[1], "*"), self.name)

    def as_json(self) -> dict[str, Any]:
        """The numbers to report."""
        return {
            "name": self.name, "num_parameters": self.num_parameters, "distance": self.distance, "relative": self.relative, "cosine": self.cosine,
            "reference_norm": math.sqrt(self.reference), "largest_change": self.largest,
        }  # fmt: skip


def summed(name: str, parts: Sequence[TensorDistance]) -> TensorDistance:
    """Of all ``parts`` as one vector."""
    sums = [math.fsum(getattr(part, field) for part in parts) for field in ("difference", "reference", "own", "product")]
    return TensorDistance(name, sum(part.num_parameters for part in parts), *sums, max(part.largest for part in parts))


def grouped(tensors: Sequence[TensorDistance], key: Callable[[TensorDistance], str]) -> list[TensorDistance]:
    """Summed by layer, by module, ...; in the order of the first of each."""
    groups: dict[str, list[TensorDistance]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return [summed(name, parts) for name, parts in groups.items()]


def weight_distances(model: str, reference: str) -> list[TensorDistance]:
    """Of every weight of two folders, in the order of their names, layers by their number.

    Raises:
        DataError: a folder holds no whole model in safetensors (none at all, a LoRA adapter, quantised weights, a file cut short), the two differ in
            names or shapes, or a weight is not finite.
    """
    own, other = WeightFolder(model), WeightFolder(reference)
    _check_alike(own, other)
    return [_distance(name, own, other) for name in sorted(own.shapes, key=_natural)]


class WeightFolder:
    """Names and shapes of the weights of a model folder, and their values piece by piece."""

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        self.path = path
        _check_whole(path)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    if ".lora_" in name:
                        raise DataError(f"{path} holds LoRA adapters ({name}): {_MERGE}")
                    if name in self._files:
                        raise DataError(f"{path} has {name} twice, in {self._files[name].name} and {file.name}")
                    self._files[name], self.shapes[name] = file, tuple(stream.get_slice(name).get_shape())
        if self._ties_head():
            self.shapes.pop("lm_head.weight", None)

    def _ties_head(self) -> bool:
        settings = json.loads((Path(self.path) / "config.json").read_text(encoding="utf-8"))
        inner = settings.get("text_config")
        tied = settings.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
        return bool(tied) and any(name.endswith("embed_tokens.weight") for name in self.shapes)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """float64 [n] runs of a weight's entries, end to end, of about ``PIECE`` entries."""
        from safetensors import safe_open

        shape = self.shapes[name]
        rows = max(1, PIECE // max(1, math.prod(shape[1:])))
        with safe_open(self._files[name], framework="pt") as stream:
            if not shape:
                yield self._checked(name, stream.get_tensor(name))
                return
            entries = stream.get_slice(name)
            for first in range(0, shape[0], rows):
                yield self._checked(name, entries[first : min(first + rows, shape[0])])

    def _checked(self, name: str, piece: Tensor) -> Tensor:
        if not piece.is_floating_point():
            kind = str(piece.dtype).removeprefix("torch.")
            raise DataError(f"{self.path}: {name} is of type {kind}: weights that are quantised, or no weights, cannot be compared")
        piece = piece.double().flatten()
        if not bool(piece.isfinite().all()):
            raise DataError(f"{self.path}: {name} holds numbers that are not finite")
        return piece


_MERGE = "merge them first (checkpoints of this library hold merged weights: openrl-reason export)"


def _check_whole(path: str) -> None:
    if (Path(path) / "adapter_config.json").is_file():
        raise DataError(f"{path} is a LoRA adapter, not a model: {_MERGE}")
    check_model_folder(path)
    if not Path(path).is_dir():
        raise DataError(f"no model at {path}: weights are compared between folders on this machine")
    try:
        settings = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f"{path}/config.json is no JSON object")
    if settings.get("quantization_config"):
        raise DataError(f"{path} is quantised (quantization_config in its config.json): compare weights as they were trained")
    count_parameters(path)  # names a file that is cut short


def _check_alike(own: WeightFolder, other: WeightFolder) -> None:
    for one, two in ((own, other), (other, own)):
        lacking = sorted(one.shapes.keys() - two.shapes.keys())
        if lacking == ["lm_head.weight"]:
            raise DataError(f"{one.path} has an output head of its own (lm_head.weight), {two.path} ties it to its embeddings: they are two models")
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise DataError(f"{one.path} has the weight {lacking[0]}{more}, {two.path} has not: only models of one architecture can be compared")
    for name, shape in own.shapes.items():
        if other.shapes[name] != shape:
            raise DataError(
                f"{name} is {list(shape)} in {own.path} and {list(other.shapes[name])} in {other.path}: only models of one architecture can be"
                " compared"
            )


def _distance(name: str, own: WeightFolder, other: WeightFolder) -> TensorDistance:
    sums, largest = [0.0] * 4, 0.0
    for weight, reference in zip(own.pieces(name), other.pieces(name), strict=True):
        difference = weight - reference
        pairs = ((difference, difference), (reference, reference), (weight, weight), (weight, reference))
        sums = [total + float(left.dot(right)) for total, (left, right) in zip(sums, pairs, strict=True)]
        largest = max(largest, float(difference.abs().max()) if len(difference) else 0.0)
    return TensorDistance(name, math.prod(own.shapes[name]), *sums, largest)


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
