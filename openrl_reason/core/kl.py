"""The distance from the reference policy: per-token estimators, a loss, and controllers of the coefficient.

Estimators of KL(pi || ref) from a token drawn from pi (Schulman 2020, "Approximating KL divergence"), with d = logprob - ref_logprob:
    k1 = d              unbiased, may be negative
    k2 = d^2 / 2        biased, positive; **as a loss** its on-policy gradient is the exact gradient of KL(pi || ref)
    k3 = e^-d + d - 1   unbiased, positive; as a loss its on-policy gradient is that of KL(ref || pi)
    abs = |d|           not below the KL on average, positive; as a loss its on-policy gradient is that of sum |pi - ref|, twice the total variation
k1 belongs into rewards (detached); as a loss its expected gradient is zero.
"""

from __future__ import annotations

from math import exp, isfinite, log

import torch
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3", "abs")
_MAX_EXPONENT = 40.0  # e^40 is finite in float32 and bfloat16: one absurd token must not turn the whole update into inf


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str, mask: Tensor | None = None) -> Tensor:
    """[N] -> [N]: the estimator ``kind`` ("k1", "k2", "k3", "abs") of each token; 0 where ``mask`` is false, whatever stands there.

    Differentiable in both. Raises ``ValueError`` for another kind.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KL_KINDS)}")
    log_ratio = logprobs - ref_logprobs
    if mask is not None:  # before anything non-linear, so that a NaN behind the mask reaches neither value nor gradient
        log_ratio = torch.where(mask, log_ratio, 0.0)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "abs":
        return log_ratio.abs()
    return torch.exp((-log_ratio).clamp(max=_MAX_EXPONENT)) + log_ratio - 1.0


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kind: str, denominator: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of ``kl_penalty`` over ``mask`` / denominator (default: tokens in ``mask``). The caller multiplies by its coefficient."""
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    loss = kl_penalty(logprobs, ref_logprobs.detach(), kind=kind, mask=mask).sum() / denominator
    return loss, {"kl": loss.detach()}


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coefficient: float):
        self.coefficient = coefficient

    def update(self, kl: float, num_samples: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


class AdaptiveKL(FixedKL):
    """Proportional control towards a target (Ziegler et al. 2019, section 2.2): c *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon."""

    def __init__(self, coefficient: float, target: float, horizon: float = 10_000):
        super().__init__(coefficient)
        if target <= 0 or horizon <= 0 or coefficient <= 0:
            raise ValueError(f"coefficient ({coefficient}), target ({target}) and horizon ({horizon}) must be positive")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        """``kl``: mean KL of the last ``num_samples`` samples, in the unit of the target (per token or per sequence).

        A KL that is not finite changes nothing. One update counts for one horizon at most, so the factor stays within 0.8 .. 1.2.
        """
        if kl != kl or kl in (float("inf"), float("-inf")):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * min(num_samples / self.horizon, 1.0)


class DualKL(FixedKL):
    """Gradient steps on the logarithm of the coefficient until the KL meets a target (OREO's ``kl_targ``): Adam ascends log c * (KL - target).

    Adam makes a step as large as ``lr`` whatever the KL's size, so the coefficient moves by about a factor of e^lr at each update.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, coefficient: float, target: float, lr: float = 1e-3):
        super().__init__(coefficient)
        if coefficient <= 0 or target <= 0 or lr <= 0:
            raise ValueError(f"coefficient ({coefficient}), target ({target}) and lr ({lr}) must be positive")
        self.target, self.lr, self.log_coefficient = target, lr, log(coefficient)
        self.first, self.second, self.updates = 0.0, 0.0, 0

    def update(self, kl: float, num_samples: int = 1) -> None:
        """``kl``: mean KL of the last batch, in the unit of the target. One that is not finite changes nothing."""
        if not isfinite(kl):
            return
        gradient, (beta1, beta2) = kl - self.target, self.BETAS
        self.updates += 1
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        first, second = self.first / (1 - beta1**self.updates), self.second / (1 - beta2**self.updates)
        self.log_coefficient += self.lr * first / (second**0.5 + self.EPS)
        self.coefficient = exp(self.log_coefficient)

    def state_dict(self) -> dict[str, float]:
        names = ("log_coefficient", "first", "second", "updates")
        return super().state_dict() | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        for name in ("log_coefficient", "first", "second", "updates"):
            setattr(self, name, state[name])
