"""Penalties: scores that look at the response's length or form alone, computed on the spot. They cost microseconds and cannot fail."""

from __future__ import annotations

import math
import re
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from openrl_reason.config import require
from openrl_reason.errors import ConfigError, did_you_mean
from openrl_reason.rewards.base import RewardResult, RewardSample

if TYPE_CHECKING:
    from openrl_reason.rewards.config import RewardTermConfig

EXTRA_FIELDS = ("responses", "steps", "task_ids", "num_tokens", "stop_reasons")
"""What a reward server may be sent beside query, prompts and labels."""


def length_penalty(sample: RewardSample, *, max_length: int, target: int = 0, shape: str = "linear") -> float:
    """0 up to ``target`` tokens, -1 from ``max_length`` tokens on, and between them a line or half a cosine wave."""
    excess = min(max((sample.num_tokens - target) / (max_length - target), 0.0), 1.0)
    return -excess if shape == "linear" else (math.cos(math.pi * excess) - 1.0) / 2.0


def overlong_penalty(sample: RewardSample, *, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), with |y| tokens, L = ``max_length`` and C = ``cache``:

    0 if |y| <= L - C;  ((L - C) - |y|) / C if L - C < |y| <= L;  -1 if |y| > L.
    """
    return -min(max((sample.num_tokens - (max_length - cache)) / cache, 0.0), 1.0)


def repetition_penalty(sample: RewardSample, *, ngram: int = 4) -> float:
    """Minus the share of n-grams of words that occurred before in the response: 0 if all differ, near -1 for a loop."""
    words = sample.response.split()
    total = len(words) - ngram + 1
    if total <= 0:
        return 0.0
    return len({tuple(words[start : start + ngram]) for start in range(total)}) / total - 1.0


def match_format(response: str, pattern: str, dotall: bool = True) -> float:
    """1 if the whole response matches the regular expression, else 0. Called in a process: a pattern may backtrack for ever."""
    return float(re.compile(pattern, re.DOTALL if dotall else 0).fullmatch(response) is not None)


PENALTIES = {"length": length_penalty, "overlong": overlong_penalty, "repetition": repetition_penalty}
_OPTIONS: dict[str, dict[str, type]] = {
    "length": {"max_length": int, "target": int, "shape": str},
    "overlong": {"max_length": int, "cache": int},
    "repetition": {"ngram": int},
    "format": {"pattern": str, "dotall": bool},
    "server": {"send": list},
    "task": {},
}


def check_options(term: RewardTermConfig, where: str) -> None:
    """Refuses options that the source does not know, lacks, or cannot use. A function's are checked against its signature when it is loaded."""
    source, options = "server" if term.urls else term.source, term.options
    if source not in _OPTIONS:
        return
    known = _OPTIONS[source]
    for name, value in options.items():
        if name not in known:
            listing = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"--{where}: {source} has no option {name!r}{did_you_mean(name, known)}; {listing}")
        good = isinstance(value, known[name]) and (known[name] is bool or not isinstance(value, bool))
        require(good, where, value, f"option {name} of {source} takes a {known[name].__name__}")
    for name in {"length": ("max_length",), "overlong": ("max_length", "cache"), "format": ("pattern",)}.get(source, ()):
        require(name in options, where, options, f"{source} needs the option {name}")
    _check_values(source, options, where)


def _check_values(source: str, options: dict[str, Any], where: str) -> None:
    if source == "length":
        target, shape = options.get("target", 0), options.get("shape", "linear")
        require(0 <= target < options["max_length"], where, options, "length: 0 <= target < max_length, in tokens")
        require(shape in ("linear", "cosine"), where, shape, "length: shape is linear or cosine")
    elif source == "overlong":
        require(0 < options["cache"] <= options["max_length"], where, options, "overlong: 0 < cache <= max_length, in tokens")
    elif source == "repetition":
        require(options.get("ngram", 4) >= 1, where, options, "repetition: ngram is at least 1")
    elif source == "format":
        try:
            re.compile(options["pattern"])
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"--{where}: the pattern {options['pattern']!r} is no regular expression: {error}") from None
    elif source == "server":
        unknown = [name for name in options.get("send", []) if name not in EXTRA_FIELDS]
        require(not unknown, where, unknown, f"send takes some of {', '.join(EXTRA_FIELDS)}")


class Penalty:
    """A penalty as a source of rewards."""

    def __init__(self, source: str, options: dict[str, Any]) -> None:
        self._function, self._options = PENALTIES[source], options

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """The score, at once."""
        future: Future[RewardResult] = Future()
        future.set_result(RewardResult(self._function(sample, **self._options)))
        return future

    def flush(self) -> None:
        """Nothing waits."""

    def metrics(self) -> dict[str, Any]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing to end."""
