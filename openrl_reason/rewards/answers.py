"""What reward functions and servers return, read strictly. Standard library only: function processes import it.

A reward that is not finite, is missing, or does not fit the response becomes the status ``error`` with the reason, never a silent 0.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.graders import STATUSES

_SCORE_KEYS, _STEP_KEYS = ("reward", "score"), ("step_rewards", "steps", "step_scores")
_RECORD_KEYS = (*_SCORE_KEYS, *_STEP_KEYS, "parsed", "status", "detail", "logs", "extra_logs")
_MAX_DETAIL = 1000


def failure(status: str, detail: str) -> RewardResult:
    """A result without a score."""
    return RewardResult(float("nan"), status, detail=detail[:_MAX_DETAIL])


def is_skipped(result: RewardResult) -> bool:
    """Whether a reward said that it does not apply to this response (a ``None`` in the list of a columns function)."""
    return result.status == "ok" and math.isnan(result.score)


def plain(value: Any) -> Any:
    """Tensors and arrays as (nested) lists or numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def number(value: Any) -> float | None:
    """A finite float, or None."""
    value = plain(value)
    if not isinstance(value, numbers.Real):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def read_batch(returned: Any, num_steps: Sequence[int], *, none_skips: bool = False) -> list[RewardResult]:
    """The results of ``len(num_steps)`` responses out of what one call returned: a list, tensor or array, or a dict with "rewards".

    An error of the whole is the status of all; of an entry, of that one alone."""
    count = len(num_steps)
    rewards, extras = returned, {}
    if isinstance(returned, Mapping):
        key = next((key for key in ("rewards", "reward", "scores", "score") if key in returned), None)
        if key is None:
            return [failure("error", f"it returned a dict with {_names(returned)}; it needs 'rewards'")] * count
        rewards, extras = returned[key], dict(returned.get("extra_logs") or {}) if isinstance(returned.get("extra_logs") or {}, Mapping) else {}
        if "scores" in returned and key != "scores":
            extras.setdefault("scores", returned["scores"])
    rewards = plain(rewards)
    if count == 1 and not isinstance(rewards, (list, tuple)):
        rewards = [rewards]
    if not isinstance(rewards, (list, tuple)):
        return [failure("error", f"it returned {_brief(rewards)}; expected one reward for each of {count} responses")] * count
    if len(rewards) != count:
        return [failure("error", f"it returned {len(rewards)} rewards for {count} responses")] * count
    logs = _logs_of_each(extras, count)
    return [
        _with_logs(read_one(_uncolumn(plain(value), steps), steps, none_skips=none_skips), more)
        for value, steps, more in zip(rewards, num_steps, logs, strict=True)
    ]


def read_one(returned: Any, num_steps: int, *, none_skips: bool = False) -> RewardResult:
    """The result of one response: a number, a list (a number per step), a record (dict) or a RewardResult."""
    if isinstance(returned, RewardResult):
        return _checked(returned, num_steps)
    returned = plain(returned)
    if isinstance(returned, Mapping):
        return _read_record(returned, num_steps)
    if isinstance(returned, (list, tuple)):
        return _read_steps(returned, num_steps)
    if returned is None:
        return RewardResult(float("nan"), detail="does not apply") if none_skips else failure("error", "it returned None; is a return missing?")
    score = number(returned)
    if score is None:
        return failure("error", f"it returned {_brief(returned)}; expected a finite number, a list of them (one a step) or a record")
    return RewardResult(score)


def to_wire(result: RewardResult) -> list:
    """A result as JSON."""
    return [result.score, result.status, result.parsed, result.detail, result.step_scores, result.logs]


def from_wire(fields: list) -> RewardResult:
    """The reverse of :func:`to_wire`."""
    score, status, parsed, detail, steps, logs = fields
    return RewardResult(score, status, parsed, detail, None if steps is None else tuple(steps), logs=logs)


def _read_steps(values: Sequence[Any], num_steps: int) -> RewardResult:
    if len(values) != num_steps:
        return failure("error", f"it returned {len(values)} step rewards for a response of {num_steps} steps")
    scores = [number(value) for value in values]
    if None in scores:
        place = scores.index(None)
        return failure("error", f"the reward of step {place} of {num_steps} is {_brief(values[place])}; expected a finite number")
    return RewardResult(math.fsum(scores), step_scores=tuple(scores))


def _read_record(record: Mapping[str, Any], num_steps: int) -> RewardResult:
    unknown = [str(key) for key in record if key not in _RECORD_KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _RECORD_KEYS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(_RECORD_KEYS)}; further numbers go into 'logs'"
        return failure("error", f"it returned a record with {unknown[0]!r}{hint}")
    status, parsed, detail = record.get("status", "ok"), record.get("parsed"), str(record.get("detail", ""))
    if status not in STATUSES:
        return failure("error", f"it returned the status {_brief(status)}; known: {', '.join(STATUSES)}")
    score = next((record[key] for key in _SCORE_KEYS if record.get(key) is not None), None)
    steps = plain(next((record[key] for key in _STEP_KEYS if record.get(key) is not None), None))
    if status not in ("ok", "no_answer"):
        result = failure(status, detail or "its own verdict")
    elif steps is None:
        result = RewardResult(float("nan")) if score is None and status == "no_answer" else read_one(score, num_steps)
    elif not isinstance(steps, (list, tuple)):
        result = failure("error", f"it returned step rewards of type {type(steps).__name__}; expected a list of numbers")
    else:
        result = _read_steps(steps, num_steps)
        total = result.score if score is None else number(score)
        if result.status == "ok" and (total is None or not math.isclose(total, result.score, rel_tol=1e-4, abs_tol=1e-6)):
            return failure("error", f"its reward {_brief(score)} is not the sum of its step rewards, {result.score:g}; leave one of them out")
    if result.status == "ok":
        parsed = None if parsed is None else str(parsed)
        result = RewardResult(result.score, status, parsed, detail[:_MAX_DETAIL], result.step_scores)
    return _with_logs(result, _logs_of_each(record.get("logs") or record.get("extra_logs") or {}, 1)[0])


def _checked(result: RewardResult, num_steps: int) -> RewardResult:
    """A RewardResult made by a user's function."""
    record = {"status": result.status, "parsed": result.parsed, "detail": result.detail, "logs": result.logs, "score": result.score}
    return _read_record(record | ({} if result.step_scores is None else {"steps": list(result.step_scores)}), num_steps)


def _uncolumn(value: Any, num_steps: int) -> Any:
    """A row of a column vector is a number; unless the response has one step, where both readings agree."""
    return value[0] if isinstance(value, list) and len(value) == 1 and num_steps != 1 else value


def _logs_of_each(extras: Any, count: int) -> list[dict[str, float]]:
    """Further numbers of each response: a vector is taken apart, a number belongs to all. What is no finite number is left out."""
    logs: list[dict[str, float]] = [{} for _ in range(count)]
    for name, values in extras.items() if isinstance(extras, Mapping) else ():
        values = plain(values)
        each = values if isinstance(values, (list, tuple)) and len(values) == count else [values] * count
        for log, value in zip(logs, each, strict=True):
            value = number(_uncolumn(plain(value), 0))
            if value is not None:
                log[str(name)] = value
    return logs


def _with_logs(result: RewardResult, logs: dict[str, float]) -> RewardResult:
    result.logs.update(logs)
    return result


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key))[:40] for key in list(record)[:8]) or "nothing"
