"""Plots of an analysis of values, as PNG: predictions against truths, errors by position, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.evaluation.value_study import ValueStudy, positions_of

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b5569a", "#8a6d00", "#3a9bd9", "#5b5f66", "#7a3e00")
"""Okabe and Ito's palette, darkened for a white ground; the page's charts use the same."""
_MANY = 1500
"""So many points cover each other: hexagons from here on."""


def write_plots(study: ValueStudy, summary: Mapping[str, Any], folder: Path) -> None:
    """``scatter.png``, ``error_by_position.png`` and ``calibration.png``, where an estimator has values."""
    import matplotlib

    matplotlib.use("Agg")
    if not study.predictions:
        return
    _scatter(study, summary, folder / "scatter.png")
    _errors(study, summary, folder / "error_by_position.png")
    _calibration(study, summary, folder / "calibration.png")


def _panels(count: int, width: float = 3.6, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat)[:count]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _scatter(study: ValueStudy, summary: Mapping[str, Any], path: Path) -> None:
    figure, axes = _panels(len(study.predictions))
    for axis, colour, (name, predictions) in zip(axes, _cycle(), study.predictions.items(), strict=False):
        used = np.isfinite(predictions) & np.isfinite(study.truth.values)
        x, y = study.truth.values[used], predictions[used]
        low, high = min(0.0, x.min(initial=0), y.min(initial=0)), max(1.0, x.max(initial=1), y.max(initial=1))
        axis.plot([low, high], [low, high], color="#8a8f99", linewidth=1, zorder=1)
        if len(x) > _MANY:
            axis.hexbin(x, y, gridsize=30, bins="log", mincnt=1, cmap="Blues", extent=(low, high, low, high))
        else:
            axis.scatter(x, y, s=12, alpha=0.45, color=colour, linewidths=0, zorder=2)
        overall = summary["estimators"][name]["overall"]
        axis.set_title(f"{name}: MAE {overall['mae']['value']:.3f}, r {overall['correlation']['value']:.2f}", fontsize=9)
        axis.set_xlabel("true value", fontsize=8)
        axis.set_ylabel("prediction", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_aspect("equal")
        axis.grid(alpha=0.25)
    _save(figure, path)


def _errors(study: ValueStudy, summary: Mapping[str, Any], path: Path) -> None:
    figure, axes = _panels(2, width=4.8)
    for axis, key, label in zip(axes, ("by_position", "by_step"), ("relative position of the state", "steps before the state"), strict=True):
        centres = positions_of(summary, key)
        for colour, (name, found) in zip(_cycle(), summary["estimators"].items(), strict=False):
            maes = [row["mae"] for row in found[key]]
            values = np.array([mae["value"] for mae in maes])
            axis.plot(centres, values, marker="o", markersize=4, color=colour, label=name)
            bounds = np.array([(mae["low"], mae["high"]) for mae in maes])
            axis.fill_between(centres, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.12, linewidth=0)
        axis.plot(centres, [row["noise_mae"] for row in summary[f"truth_{key}"]], color="#8a8f99", linestyle="--", label="truth's own noise")
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylabel("mean absolute error", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_xlim(0, 1)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _calibration(study: ValueStudy, summary: Mapping[str, Any], path: Path) -> None:
    figure, (axis,) = _panels(1, width=4.8, height=4.4)
    axis.plot([0, 1], [0, 1], color="#8a8f99", linewidth=1)
    for colour, (name, found) in zip(_cycle(), summary["estimators"].items(), strict=False):
        rows = [row for row in found["calibration"]["bins"] if row["num_states"]]
        x, y = [row["prediction"] for row in rows], [row["truth"] for row in rows]
        label = f"{name} (error {found['calibration']['error']:.3f})"
        axis.plot(x, y, color=colour, linewidth=1.3, label=label)
        axis.scatter(x, y, s=[12 + 12 * row["num_states"] ** 0.5 for row in rows], color=colour, alpha=0.6, linewidths=0)
    axis.set_xlabel("mean prediction (larger: more states)", fontsize=8)
    axis.set_ylabel("mean true value", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    _save(figure, path)


def _cycle() -> list[str]:
    return list(COLOURS) * 8
