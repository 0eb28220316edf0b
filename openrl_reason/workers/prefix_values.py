"""Values of states that grow, from a model group whose ranks keep what they computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from openrl_reason.models.prefix_scores import Prefix, Prefixes

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup

MOST_REMEMBERED = 4_000_000
"""Tokens of the states of which it is remembered what rank valued them."""


class PrefixValues:
    """Token ids of states -> what a scalar model says after the last token of each (a ``value_estimators.PrefixValues``).

    Each rank keeps keys and values of the states that it valued, so a state goes to the rank that valued the longest one it continues; a new
    one goes to the rank that has the fewest tokens to read.

    Args:
        group: ranks of a scalar model that is only run.
        max_bytes: of keys and values that each rank keeps; 0: none.
    """

    def __init__(self, group: ModelGroup, max_bytes: int) -> None:
        self.group, self.max_bytes = group, max_bytes
        self._valued, self._tokens = Prefixes(), 0

    def __call__(self, states: Sequence[tuple[int, ...]]) -> np.ndarray:
        if not states:
            return np.zeros(0)
        ranks = self._ranks(states) if self.group.num_ranks > 1 else np.zeros(len(states), int)
        places = [np.flatnonzero(ranks == rank) for rank in range(self.group.num_ranks)]
        found = self.group.prefix_scores([[states[place] for place in own] for own in places], self.max_bytes)
        values = np.empty(len(states))
        for own, scores in zip(places, found, strict=True):
            values[own] = scores
        return values

    def _ranks(self, states: Sequence[tuple[int, ...]]) -> np.ndarray:
        loads, ranks = [0] * self.group.num_ranks, []
        for ids in states:
            one = Prefix.of(np.asarray(ids, np.int64))
            known = self._valued.longest(one, len(ids))
            one.rank = known.rank if known is not None else min(range(len(loads)), key=lambda rank: loads[rank])
            loads[one.rank] += len(ids) - (len(known.ids) if known is not None else 0)
            ranks.append(one.rank)
            if known is None or len(known.ids) < len(ids):
                self._valued.add(one)
                self._tokens += len(ids)
            while self._tokens > MOST_REMEMBERED:
                oldest = next(iter(self._valued))
                self._valued.remove(oldest)
                self._tokens -= len(oldest.ids)
        return np.array(ranks)
