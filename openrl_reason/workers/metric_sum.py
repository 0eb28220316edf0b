"""Metrics of one optimiser step, over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetricSum:
    """Adds metrics up over micro-batches on the device, and over ranks in one exchange."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach().to(torch.float64)
            self.values[name] = value if name not in self.values else _combine(name, self.values[name], value)

    def reduce(self, world_size: int) -> dict[str, float]:
        local = {name: float(value) for name, value in self.values.items()}
        if world_size == 1:
            return local
        # Names travel with the values, so a rank that reports other metrics than its neighbours cannot shift theirs.
        gathered_metrics: list[dict[str, float]] = [{}] * world_size
        torch.distributed.all_gather_object(gathered_metrics, local)
        total: dict[str, float] = {}
        for metrics in gathered_metrics:
            for name, value in metrics.items():
                total[name] = value if name not in total else float(_combine(name, total[name], value))
        return total


def _combine(name: str, left: Any, right: Any) -> Any:
    if name.endswith("/max"):
        return torch.maximum(torch.as_tensor(left), torch.as_tensor(right))
    if name.endswith("/min"):
        return torch.minimum(torch.as_tensor(left), torch.as_tensor(right))
    return left + right
