"""Errors a user can act on. The command line prints their message alone; anything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OpenRLError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(OpenRLError, ValueError):
    """A setting cannot work. The message names the flag, the value, and what would work."""


class DataError(OpenRLError, ValueError):
    """Input data is missing, malformed or empty. The message names the file and, where there is one, the line."""


class MissingDependencyError(OpenRLError, ImportError):
    """An optional package is absent. The message holds the line that installs it."""


class WorkerError(OpenRLError, RuntimeError):
    """An actor died, hung or raised. The message names the actor, the cause and the path of its log."""


class CheckpointError(OpenRLError, RuntimeError):
    """A checkpoint could not be written or does not fit the run. Nothing that was there before has been touched."""


class GateError(OpenRLError, RuntimeError):
    """A run-time guard that the user asked for (``--max_logprob_difference``, for instance) stopped the run."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest candidate, or an empty string."""
    candidates = list(candidates)
    near = [name for name in candidates if word and name.startswith(word)] or difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
