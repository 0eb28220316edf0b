"""Alarms: what in a run's metrics asks for a look, where, by which threshold, and what to try.

All thresholds are in ``RULES`` (plus the few relative ones in ``RELATIVE``). An alarm is a hint, not a verdict: each shows the value and the
threshold it was compared with.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from openrl_reason.observe.report_data import interval, metric_names, number, series

SEVERITIES = ("critical", "warning", "notice")
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Alarm:
    """Something to look at."""

    key: str
    """The rule's name."""
    severity: str
    """critical: the run is probably spoilt; warning: it learns less than it could; notice: good to know."""
    title: str
    metric: str
    """The metric to look at."""
    first_step: float
    last_step: float
    """The steps between which the rule held (it need not have held at each)."""
    num_steps: int
    """Records in which it held."""
    value: float | None
    """The worst value; None where the metric had none."""
    threshold: str
    """What it was compared with, in words."""
    advice: str
    """What to try."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """``metric`` (a pattern) above or below ``threshold``, as the mean of ``window`` records in a row."""

    key: str
    severity: str
    title: str
    metric: str
    threshold: float
    advice: str
    window: int = 1
    below: bool = False
    skip: int = 0
    """The first so many records are not judged."""

    @property
    def words(self) -> str:
        """The condition, to read."""
        over = f", mean of {self.window} steps" if self.window > 1 else ""
        return f"{'below' if self.below else 'above'} {self.threshold:g}{over}"


RULES = (
    Rule("zero_variance", "warning", "Most groups teach nothing", "train/zero_variance_groups", 0.8,
         "All siblings of these prompts got the same reward, so their advantage is zero. Choose prompts that the model solves sometimes, more"
         " samples per prompt, or a higher temperature.", window=5),
    Rule("truncation", "warning", "Many responses hit the length limit", "response_length/clip_ratio", 0.2,
         "Unfinished answers count as wrong and push the model towards whatever is short. Raise --sampling.max_new_tokens, or shape the reward of"
         " overlong responses.", window=5),
    Rule("eval_truncation", "warning", "Many evaluated responses hit the length limit", "eval/*/truncated_rate", 0.2,
         "The score measures the budget as much as the model. Raise the token budget of the evaluation."),
    Rule("logprob_gap", "critical", "Engine and trainer disagree on log-probs", "sampling/logprob_difference/mean", 0.1,
         "The engine does not sample from the model that is trained. Compare both in float32 (--policy.dtype, --rollout.dtype): a gap that stays is"
         " a fault of the weight sync or the chat template, one that goes is rounding; --max_logprob_difference stops such runs."),
    Rule("grader_timeout", "warning", "Grading timed out", "reward/timeout_rate", 0.01,
         "Look at the responses with status timeout below. Raise --grader_deadline_s only if they are honest answers."),
    Rule("grader_error", "warning", "The grader failed", "reward/error_rate", 0.001,
         "Responses with status error say why in their detail. Ungraded responses are left out of the update."),
    Rule("grader_crash", "warning", "A grading process died", "reward/crashed_rate", 0.0,
         "Filter the responses by status crashed: such an answer brings the grader down."),
    Rule("grader_memory", "warning", "Grading ran out of its memory limit", "reward/memory_rate", 0.001,
         "Filter the responses by status memory: such answers are usually hostile or degenerate numbers."),
    Rule("no_answer", "notice", "Many responses have no answer that can be read", "reward/no_answer_rate", 0.3,
         "The model does not know the answer's form. Fine-tune on solutions first, show the form in the prompt, or reward the format.", window=10),
    Rule("ungraded", "notice", "Responses without a reward were left out", "rollout/ungraded", 0.0,
         "Their statuses say why; the step was made with fewer samples."),
    Rule("kl", "critical", "The policy has run far from the reference", "train/kl", 0.5,
         "Nats per token. Lower --policy.lr, raise --algo.kl.coef, or refresh the reference if the distance is wanted.", window=3),
    Rule("update_size", "warning", "Single updates change the policy a lot", "train/approx_kl", 0.1,
         "Lower --policy.lr, or make fewer epochs and minibatches per collection.", window=3),
    Rule("clipping", "warning", "The clip removes many gradients", "train/clip_fraction/*", 0.3,
         "Much of each collection is wasted. Fewer epochs or minibatches, or a lower --policy.lr.", window=3),
    Rule("skipped_update", "critical", "Updates were skipped: a non-finite gradient, or no reward at all", "train/skipped_update", 0.0,
         "The weights are intact, the step is lost. Where rollout/ungraded counts all responses, mend the reward. Otherwise lower --policy.lr or "
         "--policy.max_grad_norm; with bfloat16, try float32."),
    Rule("engine_restarts", "warning", "Rollout engines were restarted", "rollout/engine_restarts", 0.0,
         "Requests were sent again, nothing was lost but time. The engine's log says why; memory is the usual cause (--rollout.kv_cache_gib)."),
    Rule("critic", "warning", "The critic explains nothing", "critic/vf_explained_var", 0.0,
         "A negative explained variance is worse than a constant. Warm the critic up, raise its learning rate, or use a critic-free advantage.",
         window=20, below=True, skip=20),
)  # fmt: skip

RELATIVE = {
    "entropy_collapse": "below 10 % of the first 10 steps' mean, or below 0.02 nats, mean of 5 steps",
    "reward_hacking": "an evaluation 0.03 and its interval below the best before it, while the reward rose by 0.02 or more",
    "not_a_number": "a loss, gradient norm or reward without a value",
    "gradient_spike": "above 20 times the median of the 50 steps before",
}
ENTROPY_SHARE, ENTROPY_FLOOR, ENTROPY_WINDOW = 0.1, 0.02, 5
HACKING_DROP, HACKING_RISE = 0.03, 0.02
SPIKE_FACTOR, SPIKE_WINDOW = 20.0, 50


def alarms(records: Records) -> list[Alarm]:
    """All alarms of a run's records (of steps and of evaluations), the gravest first."""
    train = [record for record in records if record.get("event") != "eval"]
    evals = [record for record in records if record.get("event") == "eval"]
    found = [alarm for rule in RULES for alarm in _by_rule(rule, evals if rule.metric.startswith("eval/") else train)]
    found += [*_entropy_collapse(train), *_not_a_number(train), *_gradient_spikes(train), *_reward_hacking(train, evals)]
    return sorted(found, key=lambda alarm: (SEVERITIES.index(alarm.severity), alarm.first_step))


def checks() -> list[dict[str, str]]:
    """Every rule in words, for "what was checked"."""
    absolute = [{"key": rule.key, "title": rule.title, "metric": rule.metric, "threshold": rule.words} for rule in RULES]
    return absolute + [
        {"key": key, "title": _RELATIVE_TITLES[key][1], "metric": _RELATIVE_TITLES[key][2], "threshold": words} for key, words in RELATIVE.items()
    ]


_RELATIVE_TITLES = {
    "entropy_collapse": ("critical", "Entropy collapsed", "train/entropy",
        "The policy has stopped exploring. Raise --sampling.temperature or --algo.entropy_coef, lower --policy.lr, or widen --algo.clip_high; if"
        " the reward is at its ceiling, the run is simply done."),
    "reward_hacking": ("warning", "Reward rises while evaluation falls", "eval/*/pass@1",
        "The reward pays for something that the evaluation does not. Read high-reward responses of these steps, tighten the grader, or keep the"
        " best checkpoint."),
    "not_a_number": ("critical", "A loss or gradient was no number", "train/loss",
        "Lower --policy.lr; with bfloat16, try float32. Rewards without a value come from graders: see the statuses."),
    "gradient_spike": ("notice", "Gradient spikes", "train/grad_norm",
        "Clipping absorbs single spikes; if many come, lower --policy.lr or make larger batches."),
}  # fmt: skip


def _relative(key: str, steps: np.ndarray, held: np.ndarray, value: float, metric: str = "") -> list[Alarm]:
    severity, title, default, advice = _RELATIVE_TITLES[key]
    return _alarm(key, severity, title, metric or default, steps, held, value, RELATIVE[key], advice)


def _alarm(
    key: str, severity: str, title: str, metric: str, steps: np.ndarray, held: np.ndarray, value: float, threshold: str, advice: str
) -> list[Alarm]:
    where = steps[held]
    if not len(where):
        return []
    shown = float(f"{value:.4g}") if math.isfinite(value) else None
    return [Alarm(key, severity, title, metric, float(where[0]), float(where[-1]), len(where), shown, threshold, advice)]


def _by_rule(rule: Rule, records: Records) -> list[Alarm]:
    found = []
    for name in fnmatch.filter(metric_names(records), rule.metric):
        steps, y = _known(records, name)
        steps, y = steps[rule.skip :], y[rule.skip :]
        means = rolling(y, rule.window, np.mean)
        held = means < rule.threshold if rule.below else means > rule.threshold
        if held.any():
            worst = means[held].min() if rule.below else means[held].max()
            found += _alarm(rule.key, rule.severity, rule.title, name, steps, held, float(worst), rule.words, rule.advice)
    return found


def _known(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps, y = series(records, name)
    finite = np.isfinite(y)
    return steps[finite], y[finite]


def rolling(y: np.ndarray, window: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """``reduce`` of each value and the ``window - 1`` before it; NaN until there are that many (a comparison with NaN is false)."""
    if window == 1:
        return y
    out = np.full(len(y), np.nan)
    if len(y) >= window:
        out[window - 1 :] = reduce(np.lib.stride_tricks.sliding_window_view(y, window), axis=1)
    return out


def _entropy_collapse(train: Records) -> list[Alarm]:
    steps, y = _known(train, "train/entropy")
    if len(y) < 2 * ENTROPY_WINDOW:
        return []
    start = y[: min(10, len(y) // 2)].mean()
    means = rolling(y, ENTROPY_WINDOW, np.mean)
    held = (means < ENTROPY_SHARE * start) | (means < ENTROPY_FLOOR)
    return _relative("entropy_collapse", steps, held, float(means[held].min())) if held.any() else []


def _not_a_number(train: Records) -> list[Alarm]:
    """Nulls of metrics that every step has, also where there never was a value: such a run broke at its first step."""
    found = []
    for name in ("train/loss", "train/policy_loss", "train/grad_norm", "train/reward"):
        steps, y = series(train, name)
        found += _relative("not_a_number", steps, ~np.isfinite(y), math.nan, name)
    return found


def _gradient_spikes(train: Records) -> list[Alarm]:
    steps, y = _known(train, "train/grad_norm")
    if len(y) <= SPIKE_WINDOW:
        return []
    before = rolling(y, SPIKE_WINDOW, np.median)[SPIKE_WINDOW - 1 : -1]
    ratio = y[SPIKE_WINDOW:] / np.maximum(before, 1e-12)
    held = ratio > SPIKE_FACTOR
    return _relative("gradient_spike", steps[SPIKE_WINDOW:], held, float(y[SPIKE_WINDOW:][held].max())) if held.any() else []


def _reward_hacking(train: Records, evals: Records) -> list[Alarm]:
    """Evaluations clearly below the best one before them, if the reward rose meanwhile."""
    found = []
    reward_steps, reward = _known(train, "train/reward")
    for name in fnmatch.filter(metric_names(evals), "eval/*/pass@1"):
        rows = [record for record in evals if math.isfinite(number(record.get(name)))]
        steps, y = series(rows, name)
        bounds = interval(rows, name)
        margin = np.full(len(y), HACKING_DROP) if bounds is None else np.fmax(HACKING_DROP, (bounds[1] - bounds[0]) / 2)
        held = np.zeros(len(y), dtype=bool)
        for index in range(1, len(y)):
            best = int(y[:index].argmax())
            rise = _mean_before(reward_steps, reward, steps[index]) - _mean_before(reward_steps, reward, steps[best])
            held[index] = y[best] - y[index] > margin[index] and rise >= HACKING_RISE
        if held.any():
            found += _relative("reward_hacking", steps, held, float(y[held].min()), name)
    return found


def _mean_before(steps: np.ndarray, y: np.ndarray, step: float, window: int = 10) -> float:
    """Mean of the last ``window`` values before ``step`` (of the first ones, before the first step)."""
    end = max(int(np.searchsorted(steps, step)), min(window, len(y)))
    part = y[max(0, end - window) : end]
    return float(part.mean()) if len(part) else math.nan
