"""What the rollouts of an analysis gave, kept beside its output folder until that is complete: a model that fails afterwards costs no rollouts.

JSON, written at once or not at all. It tells what it depends on, and is used for an analysis that depends on the same alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.atomic import write_json
from openrl_reason.core.seeds import content_id
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.folders import without_nan
from openrl_reason.evaluation.identity import code_of, model_identity, reward_identity
from openrl_reason.evaluation.sets import EvalSet
from openrl_reason.evaluation.value_accuracy import Truths
from openrl_reason.evaluation.value_config import AnalyzeValuesConfig
from openrl_reason.evaluation.value_states import NextSteps, State
from openrl_reason.evaluation.value_study import ValueStudy
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.branching import Prefix

FORMAT = "openrl_reason.values.partial.v1"
_SETTINGS = (
    "seed", "num_states", "position_bins", "truth_rollouts", "mc", "ranking_states", "ranking_actions", "ranking_truth_rollouts",
    "grader_deadline_s",
)  # fmt: skip


class Partial:
    """The file of one analysis: ``results/values`` has ``results/values.partial.json``. Without an output there is none."""

    def __init__(
        self, config: AnalyzeValuesConfig, model: str, chosen: EvalSet, tokenizer: Any, reward_function: Callable[..., Any] | None = None
    ) -> None:
        output = Path(config.output) if config.output else None
        self.path = output and output.with_name(f"{output.name}.partial.json")
        self._items, self._resume = chosen.items, config.resume
        self._identity = rollouts_identity(config, model, chosen, tokenizer, reward_function) if self.path else {}

    def read(self) -> ValueStudy | None:
        """What an analysis that was cut short has left, which is said; None if there is nothing, or it is not wanted. Raises as ``read_partial``."""
        study = read_partial(self.path, self._identity, self._items) if self.path and self._resume else None
        if study is not None:
            print(f"the rollouts of an analysis that was cut short are in {self.path}: they are used, and nothing is sampled again")
        return study

    def write(self, study: ValueStudy) -> None:
        """Keeps the study."""
        if self.path:
            write_partial(self.path, self._identity, study)

    def delete(self) -> None:
        """The output is complete: the file is not needed any more."""
        if self.path:
            self.path.unlink(missing_ok=True)


def rollouts_identity(
    config: AnalyzeValuesConfig, model: str, chosen: EvalSet, tokenizer: Any, reward_function: Callable[..., Any] | None = None
) -> dict[str, str]:
    """Hashes of all that responses, states, truths and Monte-Carlo estimates depend on, by name. The models that score states are not in it."""
    task = chosen.task
    parts: dict[str, Any] = {name: getattr(config, name) for name in _SETTINGS}
    parts |= {
        "model": model_identity(model), "rollout.dtype": config.rollout.dtype, "sampling": chosen.sampling,
        "samples_per_prompt": chosen.num_samples, "items": [(item.task_id, task.encode_prompt(item, tokenizer)) for item in chosen.items],
        "grader": sorted({task.grade_kind_of(item) for item in chosen.items}), "step_kind": code_of(task.step_kind),
        "reward": reward_identity(config.reward, reward_function),
    }  # fmt: skip
    return {name: content_id(repr(part)) for name, part in parts.items()}


# ---- the file --------------------------------------------------------------------------------------------------------------------


def write_partial(path: Path, identity: Mapping[str, str], study: ValueStudy) -> None:
    """Keeps the study. A disk that refuses is told of and no reason to lose it now."""
    record = {
        "format": FORMAT, "identity": dict(identity), "states": [_state_record(state) for state in study.states],
        "truth": _columns(vars(study.truth)), "predictions": _columns(study.predictions),
        "ranking": [_steps_record(steps) for steps in study.ranking], "ranking_truth": _columns(vars(study.ranking_truth)),
        "ranking_predictions": _columns(study.ranking_predictions), "counts": dict(study.counts),
    }  # fmt: skip
    try:
        write_json(path, without_nan(record))
    except OSError as error:
        print(f"note: the rollouts are not kept in {path}: {error}")


def read_partial(path: Path, identity: Mapping[str, str], items: Sequence[TaskItem]) -> ValueStudy | None:
    """What ``write_partial`` kept; None if there is no file.

    Raises:
        ConfigError: the file belongs to another analysis, or is none.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record["identity"] if record["format"] == FORMAT else {}
        changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if changed:
            raise ConfigError(
                f"{path} holds the rollouts of an analysis with other settings ({', '.join(changed)}): go on with those it was started with,"
                " give another --output, or pass --resume false to sample anew"
            )
        return _study(record, {item.task_id: item for item in items})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error}): delete it, or pass --resume false to sample anew") from None


def _study(record: Mapping[str, Any], items: Mapping[str, TaskItem]) -> ValueStudy:
    def states(records: Sequence[Mapping[str, Any]]) -> list[State]:
        return [_state(one, items) for one in records]

    ranking = [NextSteps(_state(one["state"], items), states(one["after"]), one["texts"], one["num_last"]) for one in record["ranking"]]
    return ValueStudy(
        states(record["states"]), _truths(record["truth"]), ranking, _truths(record["ranking_truth"]), _arrays(record["predictions"]),
        _arrays(record["ranking_predictions"]), {name: math.nan if value is None else value for name, value in record["counts"].items()},
    )  # fmt: skip


def _state_record(state: State) -> dict[str, Any]:
    own = {name: getattr(state, name) for name in ("prompt", "num_prompt_tokens", "trajectory_id", "step", "num_steps")}
    return own | {"task_id": state.item.task_id, "prefix": vars(state.prefix)}


def _state(record: Mapping[str, Any], items: Mapping[str, TaskItem]) -> State:
    prefix = Prefix(**record["prefix"] | {"token_ids": tuple(record["prefix"]["token_ids"])})
    own = {name: value for name, value in record.items() if name not in ("task_id", "prefix")}
    return State(item=items[record["task_id"]], prefix=prefix, **own)


def _steps_record(steps: NextSteps) -> dict[str, Any]:
    after = [_state_record(state) for state in steps.after]
    return {"state": _state_record(steps.state), "after": after, "texts": steps.texts, "num_last": steps.num_last}


def _columns(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in arrays.items()}


def _arrays(columns: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float64) for name, values in columns.items()}  # None becomes NaN


def _truths(columns: Mapping[str, Sequence[float | None]]) -> Truths:
    arrays = _arrays(columns)
    return Truths(**arrays | {"counts": arrays["counts"].astype(np.int64)})
