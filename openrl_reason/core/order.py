"""The order in which items are met: epochs that are permutations, and a position that is nothing but the step's number."""

from __future__ import annotations

import numpy as np

from openrl_reason.core.seeds import derive_seed


class EpochOrder:
    """Which of ``num_items`` a step sees: a pure function of (seed, step), so that a resumed run needs no position."""

    def __init__(self, num_items: int, seed: int) -> None:
        self._num_items, self._seed = num_items, seed
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, step: int, count: int) -> list[int]:
        """Places of the ``count`` items of ``step``. Each epoch is its own permutation, and they follow one another without a gap."""
        positions = range(step * count, (step + 1) * count)
        epochs = {position // self._num_items for position in positions}
        for epoch in epochs - self._orders.keys():
            self._orders[epoch] = np.random.default_rng(derive_seed(self._seed, "epoch", epoch)).permutation(self._num_items)
        self._orders = {epoch: order for epoch, order in self._orders.items() if epoch in epochs}
        return [int(self._orders[position // self._num_items][position % self._num_items]) for position in positions]
