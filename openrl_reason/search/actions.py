"""Best-of-K in an environment of many turns: the model proposes K turns, the value of the state after each says which to take.

This is the test-time search of OREO for agents (arXiv 2412.16145, section 4.4), as a function: it needs neither Ray nor a server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrl_reason.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from openrl_reason.evaluation.value_estimators import PrefixValues


@dataclass(frozen=True)
class Choice:
    """What was chosen, and among what."""

    index: int
    """Place of the candidate of highest value; of equal ones the first."""
    values: tuple[float, ...]
    """Value of each candidate."""


def best_of_k(conversation: Sequence[int], candidates: Sequence[Sequence[int]], values: PrefixValues) -> Choice:
    """The candidate turn whose value at its last token is highest.

    Args:
        conversation: token ids of everything so far, observations included.
        candidates: token ids of each proposed turn as they were sampled, without the token that ends a turn: a critic of OREO has learned the
            state in which that token is to be chosen (``--data.train_turn_end``, the default), and none behind it.
        values: token ids of states -> their values; ``scalar_values`` of a ``LocalCritic`` or a ``ModelGroup``. Equal candidates are valued once.

    Raises:
        ConfigError: there are no candidates, or one of them is empty.
        WorkerError: a value is not finite.
    """
    if not candidates:
        raise ConfigError("best_of_k got no candidates: sample at least one turn")
    empty = [place for place, turn in enumerate(candidates) if not len(turn)]
    if empty:
        raise ConfigError(f"best_of_k: candidate {empty[0]} of {len(candidates)} has no tokens: leave empty turns out")
    states = [(*conversation, *turn) for turn in candidates]
    distinct = list(dict.fromkeys(states))
    known = dict(zip(distinct, map(float, values(distinct)), strict=True))
    found = tuple(known[state] for state in states)
    if not all(map(math.isfinite, found)):
        raise WorkerError(f"the value model says {found} of {len(found)} candidates: values that are not finite rank nothing")
    return Choice(max(range(len(found)), key=lambda place: (found[place], -place)), found)
