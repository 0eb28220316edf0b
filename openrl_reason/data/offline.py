"""Offline data as a token store, and which of its rows an optimiser step sees (docs/offline_data.md)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from openrl_reason.core.order import EpochOrder
from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline_build import build_store
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.token_store import TokenStore
from openrl_reason.errors import DataError


class OfflineLoader:
    """Which rows an optimiser step sees: a pure function of (seed, step), so that a resumed run needs no position.

    Args:
        store: the rows. Of kind "pairs" both rows of a pair always come together.
        batch_size: rows of a step (pairs: of kind "pairs").
        seed: of the permutation, another one in each epoch.
        rows: use these alone (of pairs: both rows of each).
        epochs: the last batch ends with this epoch, and may be smaller. None: batches go on.

    Raises DataError if there are no rows, ValueError if ``rows`` divide a pair.
    """

    identity: str
    """Changes when the rows or their order do."""

    def __init__(
        self, store: TokenStore, batch_size: int, *, seed: int, rows: Sequence[int] | np.ndarray | None = None, epochs: int | None = None
    ) -> None:
        self.store, self.batch_size, self.epochs = store, batch_size, epochs
        self._rows_per_unit = 2 if store.kind == "pairs" else 1
        self._units = None if rows is None else _units(np.asarray(rows, np.int64), self._rows_per_unit)
        self.num_units = len(store) // self._rows_per_unit if self._units is None else len(self._units)
        """Rows, or pairs, of an epoch."""
        if not self.num_units:
            raise DataError(f"there are no rows to learn from in {store.folder}")
        self._order = EpochOrder(self.num_units, seed)
        chosen = "all" if self._units is None else content_id(self._units.tobytes().hex())
        self.identity = f"{self.num_units} of {store.kind} ({content_id(store.identity, chosen)})"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offline-loader")
        self._next: tuple[int, Future[list[Trajectory]]] | None = None

    def num_steps(self, epochs: int) -> int:
        """Optimiser steps in so many passes over the rows; the last one may be smaller."""
        return -(-epochs * self.num_units // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Row numbers of a step. Of pairs: chosen, rejected, chosen, rejected, ... Empty beyond the last epoch, if there is one."""
        units = self._order.indices(step, self.batch_size)
        if self.epochs is not None:
            units = units[: max(self.epochs * self.num_units - step * self.batch_size, 0)]
        if self._units is not None:
            units = [int(self._units[unit]) for unit in units]
        return [unit * self._rows_per_unit + side for unit in units for side in range(self._rows_per_unit)]

    def trajectories(self, step: int) -> list[Trajectory]:
        """The rows of a step; meanwhile a thread reads those of the next."""
        expected, self._next = self._next, None
        read = expected[1].result() if expected and expected[0] == step else self.store.trajectories(self.rows(step))
        following = self.rows(step + 1)  # here, not in the thread: the order keeps the present epoch's permutation
        self._next = (step + 1, self._thread.submit(self.store.trajectories, following))
        return read

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)


def _units(rows: np.ndarray, rows_per_unit: int) -> np.ndarray:
    """Numbers of the units that the rows make up, ascending."""
    units, sizes = np.unique(rows // rows_per_unit, return_counts=True)
    if (sizes != rows_per_unit).any() or len(np.unique(rows)) != len(rows):
        raise ValueError(f"rows {rows[:10].tolist()}... name a row twice, or one row of a pair without the other")
    return units


def split_held_out(store: TokenStore, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), each ascending: ``fraction`` of the *questions* is held out, with all their rows, at least one question
    being left for training. The choice is that of the seed and the questions' order alone."""
    questions, first, question_of = np.unique(store.questions, return_index=True, return_inverse=True)
    count = min(round(fraction * len(questions)), len(questions) - 1)
    if count <= 0:
        return np.arange(len(store)), np.arange(0)
    in_order = np.argsort(first)  # as they first come, whatever their hashes
    chosen = np.random.default_rng(derive_seed(seed, "held-out questions")).permutation(len(questions))[:count]
    held_out = np.isin(question_of, in_order[chosen])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


__all__ = ["OfflineDataConfig", "OfflineLoader", "TokenStore", "build_store", "split_held_out"]
