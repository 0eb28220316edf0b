"""Accuracy round by round: a table, ``summary.json`` and ``accuracy.png``, from the manifest and the result files of an iterated run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openrl_reason.atomic import write_json
from openrl_reason.evaluation.compare import compare_results, read_result
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.metrics import as_json
from openrl_reason.evaluation.table import cell, print_table


def summarise(folder: Path, manifest: Mapping[str, Any], intervals: IntervalConfig, *, show: bool = False) -> list[dict[str, Any]]:
    """Writes the summary of the evaluations that are finished, and returns it; with ``show`` it is printed, too."""
    entries = [("start", manifest["start"])] + [(str(one["round"]), one["stages"]) for one in manifest["rounds"]]
    evaluated = [(name, stages) for name, stages in entries if "evaluate" in stages]
    results = [read_result(str(folder / stages["evaluate"]["result"])) for _, stages in evaluated]
    summary = []
    for (name, stages), result in zip(evaluated, results, strict=True):
        entry: dict[str, Any] = {"round": name, "model": stages.get("train", {}).get("model", result["model"]["path"]), "sets": _sets(result)}
        if evaluated[0][0] == "start" and name != "start":
            both = (_sets(results[0]), entry["sets"])
            known = [one for one in entry["sets"] if all(sets[one]["pass@1"]["value"] is not None for sets in both)]
            for one in compare_results(result, results[0], config=intervals, names=known) if known else ():
                entry["sets"][one.name]["gain"] = as_json(one.difference) | {"p_value": one.p_value, "test": one.test}
        if "collect" in stages:
            entry["collected"] = stages["collect"]["statistics"]
        summary.append(entry)
    write_json(folder / "summary.json", summary)
    plot_accuracy(summary, folder / "accuracy.png")
    if show:
        print_table(rows(summary), f"pass@1, per cent [{100 * intervals.confidence:g} % interval]; gain over the model to begin with, paired")
        print(f"summary: {folder / 'summary.json'}   plot: {folder / 'accuracy.png'}   models: {folder / 'round-*/train/model'}")
    return summary


def _sets(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """pass@1 of each set by its own grader, which comes first."""
    return {one["name"]: {"pass@1": next(iter(one["estimates"].values()))["pass@1"]} for one in result["sets"]}


def rows(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table: a row for each model and set, and of the samples that its round trained on."""
    found = []
    for entry in summary:
        for number, (name, own) in enumerate(entry["sets"].items()):
            row = {"set": name, "round": entry["round"], "pass@1": cell(own["pass@1"])}
            if "gain" in own:
                row |= {"gain": cell(own["gain"]), "p": f"{own['gain']['p_value']:.3g}"}
            collected = entry.get("collected")
            if collected and not number:
                rate = collected["right_rate"]
                row |= {"samples": str(collected["samples"]), "right": "-" if rate is None else f"{100 * rate:.1f} %",
                        "kept": str(collected["kept"]["kept"])}  # fmt: skip
            found.append(row)
    return found


def plot_accuracy(summary: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A line for each set, with intervals; nothing where no accuracy has a value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for entry in summary for name in entry["sets"]))
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        known = [(place, entry["sets"][name]["pass@1"]) for place, entry in enumerate(summary) if name in entry["sets"]]
        known = [(place, mean) for place, mean in known if mean["value"] is not None]
        if not known:
            continue
        places, means = zip(*known, strict=True)
        values = [100 * mean["value"] for mean in means]
        bounds = [[100 * (mean["value"] if mean[end] is None else mean[end]) for mean in means] for end in ("low", "high")]
        errors = [[abs(bound - value) for bound, value in zip(ends, values, strict=True)] for ends in bounds]
        axis.errorbar(places, values, yerr=errors, marker="o", capsize=3, linewidth=1.5, label=name)
    axis.set_xticks(range(len(summary)), [entry["round"] for entry in summary])
    axis.set_xlabel("round")
    axis.set_ylabel("pass@1, per cent")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
