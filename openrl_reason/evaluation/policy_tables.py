"""What ``analyze-policy`` shows: tables on the screen, and rows in files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrl_reason.evaluation.folders import number_text, write_csv
from openrl_reason.evaluation.policy_kl import KINDS
from openrl_reason.evaluation.table import print_table

if TYPE_CHECKING:
    from openrl_reason.evaluation.analyze_policy import ModelStudy

SHOWN = 5
"""Layers and modules in the table of the largest changes."""


def print_summary(summary: Mapping[str, Any]) -> None:
    """One table for each analysis."""
    models = summary["models"]
    if any("weights" in model for model in models):
        print_table(weight_rows(models), "distance of the weights from the reference")
        print_table(largest_rows(models), "where they have changed most: distance / norm of the reference there")
    if any("kl" in model for model in models):
        print_table(kl_rows(models), "KL divergence in nats, +- standard error (problems are the unit of chance)")
    if any("gradient" in model for model in models):
        title = "policy gradients of independent batches, +- standard error (jackknife over batches)"
        print_table(gradient_rows(models), f"{title}; noise scale in prompts, cosine of two batches")
        for model in models:
            print(_left_out(model))


def weight_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each model."""
    return [
        {
            "set": model["path"], "parameters": str(total["num_parameters"]), "distance": _text(total["distance"]),
            "relative": _text(total["relative"]), "cosine": f"{total['cosine']:.8f}", "largest change": _text(total["largest_change"]),
        }
        for model in models
        for total in [model["weights"]["total"]]
    ]  # fmt: skip


def largest_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each model the ``SHOWN`` layers and modules with the largest relative change."""
    rows = []
    for model in models:
        layers, modules = (_largest(model["weights"][key]) for key in ("by_layer", "by_module"))
        for place in range(max(len(layers), len(modules))):
            row = {"set": model["path"] if not place else ""}
            for name, found in (("layer", layers), ("module", modules)):
                one = found[place] if place < len(found) else None
                row |= {name: one["name"] if one else "", f"{name} relative": _text(one["relative"]) if one else ""}
            rows.append(row)
    return rows


def _largest(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    known = [one for one in groups if math.isfinite(one["relative"])]
    return sorted(known, key=lambda one: -one["relative"])[:SHOWN]


def kl_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each model, direction and unit."""
    rows = []
    for model in models:
        for who, found in model["kl"].items():
            direction = "KL(policy||ref)" if who == "policy" else "KL(ref||policy)"
            for unit in ("per_token", "per_response"):
                row = {"set": model["path"], "group": f"{direction} {unit.replace('per_', '/ ')}"}
                row |= {kind: _with_stderr(found[kind][unit]) for kind in KINDS}
                rows.append(row | {"mean reward": _text(found["mean_reward"]), "engine - model": _text(found["logprob_difference"])})
    return rows


def gradient_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each model and credit."""
    labels = {
        "variance": "variance", "relative_variance": "/ first credit's", "signal": "|mean|^2",
        "noise_to_signal": "noise / signal", "noise_scale_prompts": "noise scale", "cosine": "cosine",
    }  # fmt: skip
    return [
        {"set": model["path"], "group": credit} | {label: _with_stderr(numbers[name]) if name in numbers else "" for name, label in labels.items()}
        for model in models
        for credit, numbers in model["gradient"]["credits"].items()
    ]


def _left_out(model: Mapping[str, Any]) -> str:
    counts = model["gradient"]["counts"]
    text = f"{model['path']}: {counts['responses']} responses, {counts['without_reward']} without a reward left out"
    if counts["rollouts"]:
        text += f"; {counts['rollouts']} rollouts, {counts['states_without_value']:g} states without a value"
    error = counts["sketch_error"]
    return text + ("; gradients kept whole" if error < 1e-6 else f"; gradients kept as sketches, squared norms off by up to {100 * error:.2g} %")


def _with_stderr(one: Mapping[str, Any]) -> str:
    return f"{_text(one['value'])} +- {_text(one['stderr'])}" if math.isfinite(one["value"]) else "-"


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


# ---- files -------------------------------------------------------------------------------------------------------------------------


def write_weights(studies: Sequence[ModelStudy], path: Path) -> None:
    """A row for each model and weight."""
    head = ("model", "weight", "layer", "module", "parameters", "distance", "relative", "cosine", "reference_norm", "largest_change")
    rows = [
        [study.path, one.name, one.layer, one.module, one.num_parameters, number_text(one.distance), number_text(one.relative),
         f"{one.cosine:.12g}" if math.isfinite(one.cosine) else "", number_text(math.sqrt(one.reference)), number_text(one.largest)]
        for study in studies
        for one in study.tensors
    ]  # fmt: skip
    write_csv(path, head, rows)


def write_kl(studies: Sequence[ModelStudy], path: Path) -> None:
    """A row for each model and response: the sums of the estimators over its tokens."""
    rows = [
        [study.path, who, study.kl[who].task_ids[place], int(sums["num_tokens"][place]), *(number_text(sums[kind][place]) for kind in KINDS)]
        for study in studies
        for who, sums in study.kl_sums.items()
        for place in range(len(sums["num_tokens"]))
    ]
    write_csv(path, ("model", "sampled_by", "task_id", "tokens", *KINDS), rows)


def write_gradients(studies: Sequence[ModelStudy], path: Path) -> None:
    """A row for each model, credit and pair of batches: the inner product of their gradients, of which all other numbers are made."""
    rows = [
        [study.path, credit, i, j, f"{products[i, j]:.12g}"]
        for study in studies
        for credit, products in study.products.items()
        for i in range(len(products))
        for j in range(i, len(products))
    ]
    write_csv(path, ("model", "credit", "batch", "other_batch", "inner_product"), rows)
