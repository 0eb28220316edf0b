"""Cutting a global batch into micro-batches: by tokens, evenly over ranks, the same number on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def plan_micro_batches(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """``plan[rank][micro]`` is the list of sequence indices of that micro-batch.

    Deterministic in ``lengths``. Every index occurs once; every rank has the same number of micro-batches (ZeRO-3 would hang otherwise; an
    empty list stands for a forward of ``TokenBatch.dummy``). A micro-batch holds at most ``max_tokens`` tokens, except that a longer
    sequence gets one of its own. Micro-batch k has about the same number of tokens on every rank, since ranks wait for one another.
    Raises ``ValueError`` if ``num_ranks`` or ``max_tokens`` is not positive.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks ({num_ranks}) and max_tokens ({max_tokens}) must be positive")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = _first_fit(order, lengths, max_tokens)
    num_micro = -(-len(bins) // num_ranks)
    # First fit leaves a small last bin. As many bins, filled evenly, cost the same number of forwards and less peak memory.
    bins = _spread(order, lengths, num_micro * num_ranks, max_tokens) or bins
    bins += [[] for _ in range(num_micro * num_ranks - len(bins))]
    bins.sort(key=lambda members: (-sum(lengths[index] for index in members), members))
    return _deal(bins, lengths, num_ranks)


def _first_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: within 11/9 of the fewest bins. A segment tree over free space finds the first fit in O(log n)."""
    size = 1
    while size < max(len(order), 1):
        size *= 2
    free = [max_tokens] * (2 * size)
    bins: list[list[int]] = []
    for index in order:
        need, node = min(lengths[index], max_tokens), 1  # a sequence over the limit fills a bin
        while node < size:
            node = 2 * node if free[2 * node] >= need else 2 * node + 1
        if node - size == len(bins):
            bins.append([])
        bins[node - size].append(index)
        free[node] -= need
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


def _spread(order: list[int], lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest first into the emptiest of ``num_bins``; None if that overfills one."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in order:
        load, number = heapq.heappop(loads)
        if bins[number] and load + lengths[index] > max_tokens:
            return None
        bins[number].append(index)
        heapq.heappush(loads, (load + lengths[index], number))
    return bins


def _deal(bins: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Bins come heaviest first: each round gives one to every rank, the heaviest to the rank with the least so far."""
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, members in zip(ranks, bins[start : start + num_ranks], strict=True):
            plan[rank].append(sorted(members))
            totals[rank] += sum(lengths[index] for index in members)
    return plan
