"""An exponential moving average of a model's trained weights, to score with: a slowly moving policy as the target of a critic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from openrl_reason.errors import CheckpointError, ConfigError


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after each optimiser step. Kept in float32: a step of 0.5 % of a small change
    would be lost in bfloat16.

    Raises:
        ConfigError: the parameters are partitioned (ZeRO-3), so that no rank has them whole.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            raise ConfigError("a moving average of the weights needs policy.zero_stage 0, 1 or 2; under stage 3 no rank has them whole")
        self.parameters, self.decay = list(parameters), decay
        self.averages = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter.detach().float(), 1.0 - self.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the parameters hold the average; their own tensors come back untouched, at the addresses the optimiser knows."""
        own = [parameter.data for parameter in self.parameters]
        try:
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for tensor, parameter in zip(own, self.parameters, strict=True):
                parameter.data = tensor

    def save(self, path: Path) -> None:
        """Alike on every rank, so one writes."""
        from safetensors.torch import save_file

        save_file({str(place): average.cpu() for place, average in enumerate(self.averages)}, path)

    def load(self, path: Path) -> None:
        """Raises CheckpointError if the file is not there or of another model."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the moving average of the weights cannot be read: {path}: {error}") from error
        if [tuple(found[key].shape) for key in sorted(found, key=int)] != [tuple(average.shape) for average in self.averages]:
            raise CheckpointError(f"{path} is the moving average of another model")
        for place, average in enumerate(self.averages):
            average.copy_(found[str(place)])
