"""What is measured: states with their truths and predictions, next steps with theirs, and the numbers that come of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.evaluation.folders import number_text, write_csv
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.value_accuracy import (
    Resamples,
    Truths,
    accuracy,
    calibration,
    count_pairs,
    noise_floor,
    position_bins,
    ranking_accuracy,
)
from openrl_reason.evaluation.value_estimators import PrefixValues, StepScores
from openrl_reason.evaluation.value_states import NextSteps, State


@dataclass
class ValueStudy:
    """S states and, for the ranking, N next steps at a number of other states."""

    states: list[State]
    truth: Truths
    """[S]."""
    ranking: list[NextSteps]
    """States with enough distinct next steps."""
    ranking_truth: Truths
    """[N]: of the states after all next steps, laid end to end."""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """Estimator -> [S]."""
    ranking_predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """Estimator -> [N]."""
    counts: dict[str, float] = field(default_factory=dict)
    """What was sampled, skipped and failed."""

    @property
    def next_states(self) -> list[State]:
        """[N]."""
        return [state for steps in self.ranking for state in steps.after]

    def add_values(self, name: str, values: PrefixValues) -> None:
        """Asks an estimator about all states."""
        self.predictions[name] = _checked(name, values([state.prefix.token_ids for state in self.states]), len(self.states))
        later = self.next_states
        self.ranking_predictions[name] = _checked(name, values([state.prefix.token_ids for state in later]), len(later))

    def add_step_scores(self, name: str, scores: StepScores) -> None:
        """Asks about all next steps."""
        lengths = [len(after.prefix.token_ids) - len(steps.state.prefix.token_ids) for steps in self.ranking for after in steps.after]
        later = [state.prefix.token_ids for state in self.next_states]
        self.ranking_predictions[name] = _checked(name, scores(later, lengths), len(later))

    @property
    def slices(self) -> list[slice]:
        """Where the next steps of each ranking state lie."""
        ends = np.cumsum([0, *(len(steps.after) for steps in self.ranking)]).tolist()
        return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _checked(name: str, values: Any, count: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape != (count,):
        raise ValueError(f"the estimator {name!r} returned an array of shape {values.shape} for {count} states; one number each is needed")
    return values


# ---- the numbers -------------------------------------------------------------------------------------------------------------------


def summarise(study: ValueStudy, *, delta: float, num_position_bins: int, num_calibration_bins: int, intervals: IntervalConfig) -> dict[str, Any]:
    """Everything but the settings: truth, counts, each estimator's accuracy (overall, by position, by step), calibration, and the ranking."""
    truth, states = study.truth, study.states
    resamples = Resamples(np.array([state.item.task_id for state in states]), intervals)
    bins = position_bins(np.array([state.position for state in states]), num_position_bins)
    steps = np.array([state.step for state in states])
    groups = [({"low": b / num_position_bins, "high": (b + 1) / num_position_bins}, bins == b) for b in range(num_position_bins)]
    by_step = [({"step": int(step)}, steps == step) for step in np.unique(steps)]

    def grouped(predictions: np.ndarray, masks: Sequence[tuple[dict[str, Any], np.ndarray]]) -> list[dict[str, Any]]:
        return [about | accuracy(truth.values, predictions, resamples, delta=delta, mask=mask) for about, mask in masks]

    return {
        "truth": _about_truth(truth) | {"num_problems": resamples.num_problems},
        "truth_by_position": [about | _about_truth(truth.take(mask)) for about, mask in groups],
        "truth_by_step": [about | _about_truth(truth.take(mask)) for about, mask in by_step],
        "estimators": {
            name: {
                "overall": accuracy(truth.values, predictions, resamples, delta=delta),
                "by_position": grouped(predictions, groups),
                "by_step": grouped(predictions, by_step),
                "calibration": calibration(truth.values, predictions, num_calibration_bins),
            }
            for name, predictions in study.predictions.items()
        },
        "ranking": _ranking(study, intervals),
        "counts": study.counts,
    }


def _about_truth(truth: Truths) -> dict[str, Any]:
    known = truth.values[np.isfinite(truth.values)]
    spread = {"mean": float(known.mean()), "std": float(known.std())} if len(known) else {"mean": math.nan, "std": math.nan}
    return {"num_states": len(known)} | spread | noise_floor(truth)


def _ranking(study: ValueStudy, intervals: IntervalConfig) -> dict[str, Any]:
    problems = np.array([steps.state.item.task_id for steps in study.ranking])
    parts = [(place, study.ranking_truth.take(place)) for place in study.slices]
    found = {}
    for name, predictions in study.ranking_predictions.items():
        counts = [count_pairs(truth, predictions[place], confidence=intervals.confidence) for place, truth in parts]
        found[name] = ranking_accuracy(counts, problems, intervals)
    return found


# ---- files and tables --------------------------------------------------------------------------------------------------------------


def write_states(study: ValueStudy, path: Path) -> None:
    """``states.csv``: a row for each state and estimator."""
    head = ("state_id", "task_id", "trajectory_id", "step", "num_steps", "position", "prefix_tokens", "budget", "truth", "truth_stderr",
            "truth_rollouts", "estimator", "prediction")  # fmt: skip
    rows = []
    for place, state in enumerate(study.states):
        about = [state.prefix.key, state.item.task_id, state.trajectory_id, state.step, state.num_steps, number_text(state.position),
                 len(state.prefix.token_ids), state.prefix.budget]  # fmt: skip
        truth = [number_text(study.truth.values[place]), number_text(study.truth.stderrs[place]), int(study.truth.counts[place])]
        rows += [[*about, *truth, name, number_text(values[place])] for name, values in study.predictions.items()]
    write_csv(path, head, rows)


def write_ranking(study: ValueStudy, path: Path) -> None:
    """``ranking.csv``: a row for each next step and estimator."""
    head = ("state_id", "task_id", "step", "action", "action_tokens", "truth", "truth_stderr", "truth_rollouts", "estimator", "prediction", "text")
    rows, truth = [], study.ranking_truth
    for steps, places in zip(study.ranking, study.slices, strict=True):
        for number, place in enumerate(range(places.start, places.stop)):
            length = len(steps.after[number].prefix.token_ids) - len(steps.state.prefix.token_ids)
            about = [steps.state.prefix.key, steps.state.item.task_id, steps.state.step, number, length, number_text(truth.values[place]),
                     number_text(truth.stderrs[place]), int(truth.counts[place])]  # fmt: skip
            rows += [[*about, name, number_text(values[place]), steps.texts[number]] for name, values in study.ranking_predictions.items()]
    write_csv(path, head, rows)


def cell(mean: Mapping[str, Any]) -> str:
    """A number with its interval: ``0.110 [0.095, 0.127]``."""
    if mean["value"] is None or not math.isfinite(mean["value"]):
        return "-"
    bounds = "" if mean["method"] == "none" else f" [{mean['low']:.3f}, {mean['high']:.3f}]"
    return f"{mean['value']:.3f}{bounds}"


def accuracy_rows(summary: Mapping[str, Any], delta: float) -> list[dict[str, str]]:
    """The table of all estimators; the last row is the noise floor."""
    labels = {"mae": "MAE", "rmse": "RMSE", "bias": "bias", "correlation": "correlation", "within": f"within {delta:g}"}
    rows = []
    for name, found in summary["estimators"].items():
        row = {"set": name, "states": str(found["overall"]["num_states"])}
        row |= {label: cell(found["overall"][metric]) for metric, label in labels.items()}
        rows.append(row | {"calibration error": _plain(found["calibration"]["error"])})
    truth = summary["truth"]
    floor = {"set": "(truth's own noise)", "states": str(truth["num_states"])}
    return [*rows, floor | {"MAE": _plain(truth["noise_mae"]), "RMSE": _plain(truth["noise_rmse"])}]


def position_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Mean absolute error by relative position of the state."""
    rows = []
    for place, truth in enumerate(summary["truth_by_position"]):
        row = {"group": f"{truth['low']:.2f} .. {truth['high']:.2f}", "states": str(truth["num_states"]), "mean value": _plain(truth["mean"])}
        row |= {name: cell(found["by_position"][place]["mae"]) for name, found in summary["estimators"].items()}
        rows.append(row | {"(truth's own noise)": _plain(truth["noise_mae"])})
    return rows


def positions_of(summary: Mapping[str, Any], key: str) -> list[float]:
    """Where the groups of ``by_position`` (their centres) or ``by_step`` stand on an axis."""
    rows = summary[f"truth_{key}"]
    return [row["step"] for row in rows] if key == "by_step" else [(row["low"] + row["high"]) / 2 for row in rows]


def ranking_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of the ranking."""
    return [
        {
            "set": name, "states": str(found["num_states"]), "pairs": str(found["num_pairs"]), "accuracy": cell(found["accuracy"]),
            "significant pairs": f"{found['num_significant']} ({_plain(100 * found['significant_share'], 0)} %)",
            "accuracy on them": cell(found["accuracy_significant"]), "ties": f"{_plain(100 * found['tied_share'], 0)} %",
        }
        for name, found in summary["ranking"].items()
    ]  # fmt: skip


def _plain(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
