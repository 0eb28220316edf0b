"""Preference pairs from a token store: the rows of its pairs, or its rewarded responses and labels, paired question by question."""

from __future__ import annotations

from collections import Counter

import numpy as np

from openrl_reason.core.seeds import content_id
from openrl_reason.data.pairs import Pair, PairBuilder, PairData
from openrl_reason.data.token_store import TokenStore
from openrl_reason.errors import DataError


def pair_store(store: TokenStore, builder: PairBuilder) -> PairData:
    """The pairs of a store. Of responses and labels ``builder`` makes them, with the rows of one question in memory at a time; its counts are those
    of ``build_pairs``. Of kind "pairs" they are as given. Raises DataError for rows that are neither."""
    if store.kind == "pairs":
        pairs = [_given(store, number) for number in range(len(store) // 2)]
        return PairData(pairs, Counter(rows=len(pairs), pairs=len(pairs)))
    if store.kind not in ("responses", "labels"):
        raise DataError(f"the data are of the kind {store.kind!r}: pairs are made of rewarded responses, labels or pairs (--data.format)")
    for rows in rows_by_question(store):
        builder.add(store.trajectories(rows))
        builder.close()
    return builder.finish()


def rows_by_question(store: TokenStore) -> list[np.ndarray]:
    """The rows of each question, ascending; questions in the order of their first rows."""
    by_question = np.argsort(store.questions, kind="stable")
    begins = np.flatnonzero(np.diff(store.questions[by_question])) + 1
    groups = np.split(by_question, begins) if len(by_question) else []
    return sorted(groups, key=lambda rows: int(rows[0]))


def _given(store: TokenStore, number: int) -> Pair:
    chosen, rejected = store.trajectories([2 * number, 2 * number + 1])
    chosen.info, rejected.info = {}, {}  # texts that nothing that learns from pairs reads
    return Pair(content_id("pair", chosen.trajectory_id, rejected.trajectory_id, str(number)), chosen.task_id, chosen, rejected)
