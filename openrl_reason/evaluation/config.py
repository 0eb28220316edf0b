"""Settings of evaluations: sets of items, each with sampling of its own. Used by ``evaluate`` and by every trainer's evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openrl_reason.config import require
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.tasks.base import SPLITS, TaskConfig

GREEDY_REMEDY = "greedy samples of an item are all alike: use 1 sample, or a temperature above 0 (and {greedy} for a greedy pass beside it)"


@dataclass(frozen=True)
class EvalSetConfig:
    """Items to evaluate on, and how responses to them are sampled. What is left out (null) is taken from the command's own settings."""

    name: str = ""
    """Name in the metrics (eval/<name>/...). Empty: the task's name. Each set needs a name of its own."""
    task: TaskConfig | None = None
    """Task of this set, complete: nothing of the command's task is mixed into it. Null: the command's task."""
    split: str | None = None
    """train or test."""
    num_items: int | None = None
    """The first so many items (0: all)."""
    ids: tuple[str, ...] = ()
    """Only these items: task ids, or ids in the data (info["id"])."""
    ids_file: str = ""
    """A file with one id a line, added to ids."""
    num_samples: int | None = None
    """Samples per item."""
    temperature: float | None = None
    """Softmax temperature; 0 is greedy."""
    top_p: float | None = None
    """Nucleus."""
    top_k: int | None = None
    """Sample among the k most likely tokens; -1 keeps all."""
    max_new_tokens: int | None = None
    """Longest response, in tokens."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response."""
    ks: tuple[int, ...] = ()
    """pass@k and maj@k for these k (pass@1 is always there). Empty: the command's ks."""
    greedy: bool = False
    """Also one greedy response to each item, reported as eval/<name>/greedy/..."""
    also_grade: tuple[str, ...] = ()
    """Grade the same responses by these graders too, reported as eval/<name>/<grader>/... (gsm8k_lenient beside gsm8k, for instance)."""

    def __post_init__(self) -> None:
        label = f"set {self.name!r}" if self.name else "a set without a name"
        checks = (
            (self.name == self.name.strip("/ ") and "//" not in self.name, "name", self.name, "no slash or space at an end"),
            (self.split is None or self.split in SPLITS, "split", self.split, "use train or test"),
            (self.num_items is None or self.num_items >= 0, "num_items", self.num_items, "use 0 for all items"),
            (not self.ids_file or Path(self.ids_file).is_file(), "ids_file", self.ids_file, "there is no such file"),
            (self.num_samples is None or self.num_samples >= 1, "num_samples", self.num_samples, "at least 1"),
            (self.temperature is None or self.temperature >= 0, "temperature", self.temperature, "use 0 (greedy) or more"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1"),
            (self.top_k is None or self.top_k >= 1 or self.top_k == -1, "top_k", self.top_k, "use -1 (every token) or 1 and more"),
            (self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (all(k >= 1 for k in self.ks), "ks", self.ks, "every k must be at least 1"),
        )
        for holds, name, value, remedy in checks:
            if not holds:
                raise ConfigError(f"{label}: {name} is {value!r}: {remedy}")

    def wanted_ids(self) -> list[str]:
        """``ids`` and the lines of ``ids_file``."""
        try:
            lines = Path(self.ids_file).read_text(encoding="utf-8").splitlines() if self.ids_file else []
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"ids_file {self.ids_file}: {getattr(error, 'strerror', None) or 'not UTF-8'}; expected one id a line") from None
        return [*self.ids, *(line.strip() for line in lines if line.strip())]


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training, from the same engines, always on the same items."""

    num_items: int = 128
    """Held-out items: the first so many of the test split (0: no evaluation, unless sets says otherwise)."""
    num_samples: int = 1
    """Samples per item."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus of the evaluation."""
    ks: tuple[int, ...] = ()
    """pass@k and maj@k for these k. Empty: k = num_samples."""
    sets: tuple[EvalSetConfig, ...] = ()
    """Sets of items instead of the task's own test split: a list of objects with name, task, split, num_items, ids, num_samples, ..."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence intervals."""

    def __post_init__(self) -> None:
        require(self.num_items >= 0, "eval.num_items", self.num_items, "use 0 for no evaluation, or a number of items")
        require(self.num_samples >= 1, "eval.num_samples", self.num_samples, "at least 1")
        require(self.temperature >= 0, "eval.temperature", self.temperature, "use 0 (greedy) or more")
        require(0 < self.top_p <= 1, "eval.top_p", self.top_p, "must be above 0 and at most 1")
        if not self.sets:
            check_not_repeated(self.num_samples, self.temperature, "eval.num_samples")
        check_ks(self.ks, [self.num_samples, *(one.num_samples or 1 for one in self.sets)], "eval.ks")
        check_intervals(self.intervals, "eval.intervals")


def check_not_repeated(num_samples: int, temperature: float, flag: str) -> None:
    """Refuses several greedy samples of one item."""
    require(num_samples == 1 or temperature > 0, flag, num_samples, f"at temperature 0 {GREEDY_REMEDY.format(greedy='a second set')}")


def check_ks(ks: Sequence[int], num_samples: Sequence[int], flag: str) -> None:
    """Refuses a k that no set has the samples for."""
    most = max(num_samples)
    require(all(k >= 1 for k in ks), flag, list(ks), "every k must be at least 1")
    require(all(k <= most for k in ks), flag, list(ks), f"no set has more than {most} samples per item: use k from 1 to {most}, or more samples")


def check_intervals(config: IntervalConfig, flag: str) -> None:
    """Refuses a confidence outside (0, 1) and too few resamples."""
    require(0 < config.confidence < 1, f"{flag}.confidence", config.confidence, "must lie between 0 and 1, for instance 0.95")
    require(config.num_resamples >= 100, f"{flag}.num_resamples", config.num_resamples, "at least 100")


def check_output_file(path: Path) -> None:
    """Refuses a place where the result could not be written, before it is computed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    require(writable and not path.is_dir(), "output", str(path), "give a file name in a folder that can be written")
