"""Learning curves as one PNG, from ``metrics.jsonl`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openrl_reason.observe.run_log import read_records


def plot_curves(metrics_path: Path, png_path: Path, *, train: Sequence[str], title: str) -> None:
    """Draws every ``eval/*/pass@1`` (and ``eval/*/loss``) in one panel, then each metric of ``train`` that was logged in a panel of its own."""
    from matplotlib.figure import Figure  # pyplot would take as long again to import

    records = read_records(metrics_path)
    steps = [record for record in records if record["event"] == "train"]
    evaluations = [record for record in records if record["event"] == "eval"]
    eval_names = sorted({name for record in evaluations for name in record if name.endswith(("/pass@1", "/loss"))})
    names = [name for name in train if any(record.get(name) is not None for record in steps)]
    panels = ([eval_names] if eval_names else []) + [[name] for name in names]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        is_eval = panel is eval_names
        for name in panel:
            points = [(record["step"], record[name]) for record in (evaluations if is_eval else steps) if record.get(name) is not None]
            axis.plot(*zip(*points, strict=True), marker="o" if is_eval or len(points) < 3 else None, linewidth=1.5, label=name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if is_eval:
            axis.legend(fontsize=7)
            axis.set_title("held-out evaluation", fontsize=9)
        else:
            axis.set_title(panel[0], fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(png_path, dpi=130)
