"""Offline data as a token store, and which of its rows an optimiser step sees (docs/offline_data.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.token_store import TokenStore


def build_store(
    config: OfflineDataConfig,
    tokenizer_path: str,
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> TokenStore:
    """The token store of ``config``, in ``config.store`` or else ``folder``: opened if it is there and was made of the same files with the same
    tokenizer and settings, else (re)built, which ``say`` tells together with the reason.

    Uses the Ray that is connected, or starts one for the time of the build. Raises DataError for bad rows (file and line), for files of
    different layouts and where no row is left; ConfigError for settings that cannot work with this tokenizer."""
    raise NotImplementedError


class OfflineLoader:
    """Which rows an optimiser step sees: a pure function of (seed, step), so that a resumed run needs no position.

    Args:
        store: the rows. Of kind "pairs" both rows of a pair always come together.
        batch_size: rows of a step (pairs: of kind "pairs").
        seed: of the permutation, another one in each epoch.
        rows: use these alone (of pairs: both rows of each).
        epochs: the last batch ends with this epoch, and may be smaller. None: batches go on.
    """

    identity: str
    """Changes when the rows or their order do."""

    def __init__(self, store: TokenStore, batch_size: int, *, seed: int, rows: Sequence[int] | None = None, epochs: int | None = None) -> None:
        raise NotImplementedError

    def num_steps(self, epochs: int) -> int:
        """Optimiser steps in so many passes over the rows; the last one may be smaller."""
        raise NotImplementedError

    def rows(self, step: int) -> list[int]:
        """Row numbers of a step. Of pairs: chosen, rejected, chosen, rejected, ..."""
        raise NotImplementedError

    def trajectories(self, step: int) -> list[Trajectory]:
        """The rows of a step; meanwhile a thread reads those of the next."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the thread."""


def split_held_out(store: TokenStore, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), each ascending: ``fraction`` of the *questions* is held out, with all their rows, at least one question
    being left for training. The choice is that of the seed alone."""
    raise NotImplementedError


__all__ = ["OfflineDataConfig", "OfflineLoader", "TokenStore", "build_store", "split_held_out"]
