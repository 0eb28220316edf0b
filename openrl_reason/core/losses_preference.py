"""Losses on whole responses that are better and worse: DPO on pairs, KTO on single ones. Conventions as in ``losses``."""

from __future__ import annotations

import torch
from torch import Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
    positive_weight: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation on P pairs of summed log-probs, all [P]. With z = (chosen - rejected) - (ref_chosen - ref_rejected):

    * "sigmoid": -(1 - e) log sigma(beta z) - e log sigma(-beta z), e = ``label_smoothing`` (Rafailov et al. 2023, eq. 7; Mitchell 2023);
    * "ipo": (z - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17), on z as given: pass means instead of sums for a length-normalised variant.

    DPO-Positive (Pal et al. 2024, arXiv 2402.13228) is "sigmoid" with ``positive_weight`` L > 0: z - L max(0, ref_chosen - chosen) in place
    of z, so that a pair is not won by making the chosen response less likely than the reference has it.

    Sum over pairs / ``denominator`` (default P). A tie counts one half in the accuracy. Rewards and accuracy are DPO's, without L.
    """
    if kind not in ("sigmoid", "ipo"):
        raise ValueError(f"kind must be 'sigmoid' or 'ipo', it is {kind!r}")
    if beta <= 0.0 or not 0.0 <= label_smoothing < 0.5 or (kind == "ipo" and label_smoothing):
        raise ValueError(f"beta ({beta}) must be positive, label_smoothing ({label_smoothing}) in [0, 0.5) and 0 for 'ipo'")
    if positive_weight < 0.0 or (positive_weight and kind != "sigmoid"):
        raise ValueError(f"positive_weight ({positive_weight}) must not be negative, and is for 'sigmoid' only")
    if denominator is None:
        denominator = max(len(chosen), 1)
    chosen_ratio, rejected_ratio = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    margin, shortfall = chosen_ratio - rejected_ratio, (-chosen_ratio).clamp(min=0.0)
    if kind == "sigmoid":
        log_sigmoid, z = torch.nn.functional.logsigmoid, margin - positive_weight * shortfall
        terms = -(1.0 - label_smoothing) * log_sigmoid(beta * z) - label_smoothing * log_sigmoid(-beta * z)
    else:
        terms = (margin - 0.5 / beta) ** 2
    loss = terms.sum() / denominator
    margin = margin.detach()
    return loss, {
        "dpo_loss": loss.detach(),
        "dpo/reward_chosen": beta * chosen_ratio.detach().sum() / denominator,
        "dpo/reward_rejected": beta * rejected_ratio.detach().sum() / denominator,
        "dpo/reward_margin": beta * margin.sum() / denominator,
        "dpo/accuracy": ((margin > 0) + 0.5 * (margin == 0)).sum() / denominator,
        "dpo/chosen_shortfall": shortfall.detach().sum() / denominator,
    }


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    reference_point: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimisation on B labelled responses (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), all [B]: summed log-probs,
    the reference's, and ``desirable`` (bool). With r = logprob - ref_logprob and z0 = max(0, ``reference_point``), of lambda_y - v(x, y):

    * desirable:   lambda_D (1 - sigma(beta (r - z0))), lambda_D = ``desirable_weight``;
    * undesirable: lambda_U (1 - sigma(beta (z0 - r))), lambda_U = ``undesirable_weight``.

    So every term lies between 0 and its lambda, and a response far on either side of z0 has no gradient left. ``reference_point``, an
    estimate of KL(policy || reference), carries none; it must be the global batch's (``kto_reference_point``), or the gradient would depend on
    how the batch was cut. 0 is APO-zero's loss (D'Oosterlinck et al. 2024).

    Sum over responses / ``denominator`` (default B). Rewards are beta r: sums over the desirable, and over the undesirable, / ``denominator``.
    Accuracy is the share of responses on their side of z0; on z0 itself a response counts one half.
    """
    if beta <= 0.0 or desirable_weight < 0.0 or undesirable_weight < 0.0:
        weights = f"the weights ({desirable_weight}, {undesirable_weight})"
        raise ValueError(f"beta ({beta}) must be positive, and {weights} must not be negative")
    if denominator is None:
        denominator = max(len(logprobs), 1)
    log_ratio = logprobs - ref_logprobs.detach()
    point = torch.as_tensor(reference_point, dtype=log_ratio.dtype, device=log_ratio.device).detach().clamp(min=0.0)
    good = desirable.to(log_ratio.dtype)
    weights = good * desirable_weight + (1.0 - good) * undesirable_weight
    # 1 - sigma(u) = sigma(-u), which keeps its digits (and its gradient) where sigma(u) rounds to 1.
    wrong_by = (1.0 - 2.0 * good) * (log_ratio - point)  # nats on the wrong side of z0
    loss = (weights * torch.sigmoid(beta * wrong_by)).sum() / denominator
    rewards, wrong_by = beta * log_ratio.detach(), wrong_by.detach()
    return loss, {
        "kto_loss": loss.detach(),
        "kto/reward_desirable": (good * rewards).sum() / denominator,
        "kto/reward_undesirable": ((1.0 - good) * rewards).sum() / denominator,
        "kto/accuracy": ((wrong_by < 0) + 0.5 * (wrong_by == 0)).sum() / denominator,
        "kto/desirable_share": good.sum() / denominator,
    }


def kto_reference_point(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The KL estimate that is KTO's z0: mean log-ratio of summed log-probs [M], without gradient, NaN if there are none.

    The paper takes responses to *other* prompts, (x_i, y_{i+1}), so that the estimate is not itself pushed by the update. M must be those of the
    global batch. It may be negative, as an estimate; ``kto_loss`` takes 0 then.
    """
    return (logprobs - ref_logprobs).detach().mean()
