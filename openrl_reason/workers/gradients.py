"""The gradient of a batch as a sketch: one parameter's gradient exists at a time, and nothing is stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openrl_reason.core.sketch import CountSketch
from openrl_reason.models.policy import ModelOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.workers.model_worker import LossFunction


@dataclass
class GradientSketch:
    """What is kept of a gradient."""

    sketch: Tensor
    """float32 [k], on the CPU; sketches with the same ``size`` and ``seed`` have the gradients' inner products (``core/sketch.py``)."""
    norm_error: float
    """Largest relative error of the sketched squared norm over the micro-batches, whose exact norms are known."""

    @classmethod
    def total(cls, parts: Sequence[GradientSketch]) -> GradientSketch:
        """Of a gradient whose parts were computed by several ranks."""
        return cls(torch.stack([part.sketch for part in parts]).sum(dim=0), max(part.norm_error for part in parts))


def sketched_gradient(
    model: nn.Module,
    micro_batches: Sequence[TokenBatch],
    loss_fn: LossFunction,
    denominators: Mapping[str, float],
    temperature: float = 1.0,
    with_entropy: bool = False,
    *,
    size: int,
    seed: int,
) -> GradientSketch:
    """The gradient, by all parameters of ``model`` (a ``LanguageModel``, or anything with its ``forward``), of the loss summed over micro-batches.

    As soon as the backward pass has a parameter's gradient it is sketched and dropped, so beyond the weights and one micro-batch's activations
    the largest parameter's gradient and two sketches are in memory. The sketch is exact for models of at most ``size`` parameters.
    """
    parameters = dict(model.named_parameters())
    sketch = CountSketch({name: p.numel() for name, p in parameters.items()}, size=size, seed=seed)
    device = next(iter(parameters.values())).device
    total, part = sketch.zeros(device).double(), sketch.zeros(device)
    squared = torch.zeros((), dtype=torch.float64, device=device)
    norm_error = 0.0

    def take(name: str, parameter: Tensor) -> None:
        sketch.add(name, parameter.grad, part)
        squared.add_(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) ** 2)
        parameter.grad = None

    with _gradients_taken(model, parameters, take):
        for batch in micro_batches:
            batch = batch.to(device)
            logprobs, entropy = model(batch.token_ids, batch.cu_seqlens, temperature, with_entropy, batch.action_mask)
            loss, _ = loss_fn(ModelOutput(logprobs=logprobs, entropy=entropy), batch, denominators)
            if not loss.requires_grad:  # a micro-batch without actions
                continue
            loss.backward()
            exact = float(squared)
            if exact:
                norm_error = max(norm_error, abs(float(part.double().square().sum()) / exact - 1.0))
            total += part
            part.zero_()
            squared.zero_()
    return GradientSketch(total.float().cpu(), norm_error)


@contextmanager
def _gradients_taken(model: nn.Module, parameters: Mapping[str, nn.Parameter], take: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the block every parameter has a gradient, and ``take`` gets it when it is complete. The model is left as it was."""
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    training = [(module, module.training) for module in model.modules()]
    model.requires_grad_(True).train()
    handles = [p.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(wanted[name])
        for module, was in training:
            module.training = was
