"""Scores of prefixes that grow, as those of a search: keys and values computed for one prefix are kept for those that continue it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openrl_reason.errors import DataError
from openrl_reason.models.attention import PACKED, packed_forward_kwargs
from openrl_reason.models.scalar_model import ScalarModel

LEAST_SHARED = 16
"""Prefixes that several new states share are computed by themselves from so many tokens on: below, a pass more costs more than it saves."""

_BASE = np.uint64(0x9E3779B97F4A7C15)

KeysAndValues = list[tuple[Tensor, Tensor]]
"""By layer, each [1, heads, tokens, head size]."""


def prefix_hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 [T]: a hash of the first 1, 2, ... T ids."""
    powers = np.cumprod(np.full(len(ids), _BASE, np.uint64), dtype=np.uint64)
    return np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers, dtype=np.uint64)


@dataclass(eq=False)
class Prefix:
    """Token ids that are wanted, or have been computed."""

    ids: np.ndarray
    hashes: np.ndarray
    parts: tuple[KeysAndValues, ...] = ()
    """What all of its tokens left, in runs that prefixes share."""
    score: float = 0.0
    rank: int = 0
    """Where that is, for whoever asks several ranks."""

    @classmethod
    def of(cls, ids: np.ndarray) -> Prefix:
        return cls(ids, prefix_hashes(ids))


class Prefixes:
    """Prefixes by their ids, in order of last use."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[int, int], Prefix] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, one: Prefix) -> None:
        self._lengths[len(one.ids)] += 1
        self._entries[len(one.ids), int(one.hashes[-1])] = one

    def remove(self, one: Prefix) -> None:
        del self._entries[len(one.ids), int(one.hashes[-1])]
        self._lengths[len(one.ids)] -= 1
        if not self._lengths[len(one.ids)]:
            del self._lengths[len(one.ids)]

    def longest(self, of: Prefix, at_most: int) -> Prefix | None:
        """The longest entry that ``of`` begins with, of at most so many tokens. It has been used, then."""
        for length in sorted((length for length in self._lengths if length <= at_most), reverse=True):
            key = length, int(of.hashes[length - 1])
            if key in self._entries:
                found = self._entries[key]
                assert np.array_equal(found.ids, of.ids[:length]), "two prefixes have one hash"
                self._entries.move_to_end(key)
                return found
        return None


class SegmentPasts:
    """What ``packed_attention`` sees before each segment of a packed row. Keeps what the segments add."""

    def __init__(self, pasts: Sequence[tuple[KeysAndValues, ...]]) -> None:
        self._pasts = pasts
        self.added: list[KeysAndValues] = [[] for _ in pasts]

    def extend(self, layer: int, segment: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole prefix, from those [1, heads, T, head size] of its new tokens."""
        assert layer == len(self.added[segment]), "a model whose layers do not run once each and in order cannot be continued"
        self.added[segment].append((key.clone(), value.clone()))  # views would keep the whole packed row
        past = self._pasts[segment]
        if not past:
            return key, value
        return torch.cat([*(part[layer][0] for part in past), key], 2), torch.cat([*(part[layer][1] for part in past), value], 2)


class PrefixScorer:
    """What a scalar model says after the last token of prefixes; only tokens that it has not seen in the same place go through the model.

    The model's weights must not change meanwhile. With another attention than ``attention.PACKED`` nothing is kept: each prefix is computed from its
    start.

    Args:
        max_bytes: of keys and values that are kept. What was asked for longest ago goes first. (Prefixes share what they have in common, but each
            is counted whole, so less than this is used.)
        max_tokens: new tokens of one forward pass; a longer prefix has one of its own.
    """

    def __init__(self, model: ScalarModel, *, max_bytes: int, max_tokens: int) -> None:
        self._keeps = model.attn_impl == PACKED and max_bytes > 0
        self.model, self.max_bytes, self.max_tokens = model, max_bytes, max_tokens
        self._decoder = getattr(model.model, model.model.base_model_prefix)
        self._device = next(model.parameters()).device
        self._known, self._bytes_kept, self._bytes_per_token = Prefixes(), 0, 0
        self.counts: Counter[str] = Counter(tokens=0, computed_tokens=0)
        """Tokens of all prefixes that were asked for, and those that went through the model."""

    @torch.no_grad()
    def scores(self, prefixes: Sequence[Sequence[int]]) -> list[float]:
        """One score for each prefix of at least one token. Raises DataError for one beyond the model's positions."""
        limit, longest = self.model.max_positions, max(map(len, prefixes), default=0)
        if limit is not None and longest > limit:
            raise DataError(f"a prefix has {longest} tokens, but the model has {limit} positions")
        self.counts["tokens"] += sum(map(len, prefixes))
        distinct: dict[bytes, Prefix] = {}
        wanted = [distinct.setdefault(ids.tobytes(), Prefix.of(ids)) for ids in (np.asarray(prefix, np.int64) for prefix in prefixes)]
        missing = Prefixes()
        for one in distinct.values():
            known = self._known.longest(one, len(one.ids))
            if known is not None and len(known.ids) == len(one.ids):
                one.score = known.score
            else:
                missing.add(one)
        for one in self._worth_sharing(missing) if self._keeps else ():
            missing.add(one)
        while len(missing):  # what begins with another one comes after it
            ready = [one for one in list(missing) if missing.longest(one, len(one.ids) - 1) is None]
            for one in ready:
                missing.remove(one)
            self._compute(ready)
        return [one.score for one in wanted]

    def _worth_sharing(self, missing: Prefixes) -> list[Prefix]:
        """Prefixes that several of ``missing`` begin with, and whose keys and values nobody has."""
        ordered = sorted(one.ids.tolist() for one in missing)
        shared = {tuple(one[: _common_length(one, other)]) for one, other in zip(ordered, ordered[1:], strict=False)}
        chosen = Prefixes()
        for one in (Prefix.of(np.asarray(ids, np.int64)) for ids in sorted(shared, key=len) if len(ids) >= LEAST_SHARED):
            before = (index.longest(one, len(one.ids)) for index in (self._known, missing, chosen))
            if len(one.ids) - max((len(other.ids) for other in before if other is not None), default=0) >= LEAST_SHARED:
                chosen.add(one)
        return list(chosen)

    def _compute(self, prefixes: Sequence[Prefix]) -> None:
        """Gives them scores, and keeps what they left. None begins with another."""
        batch: list[tuple[Prefix, tuple[KeysAndValues, ...], np.ndarray]] = []
        num_tokens = 0
        for one in sorted(prefixes, key=lambda one: len(one.ids)):
            before = self._known.longest(one, len(one.ids) - 1)
            new = one.ids[len(before.ids) :] if before else one.ids
            if batch and num_tokens + len(new) > self.max_tokens:
                self._pass(batch)
                batch, num_tokens = [], 0
            batch.append((one, before.parts if before else (), new))
            num_tokens += len(new)
        if batch:
            self._pass(batch)

    def _pass(self, batch: Sequence[tuple[Prefix, tuple[KeysAndValues, ...], np.ndarray]]) -> None:
        lengths = [len(new) for _, _, new in batch]
        pasts = SegmentPasts([parts for _, parts, _ in batch])
        edges = torch.tensor([0, *lengths]).cumsum(0).to(self._device, torch.int32)
        attention = packed_forward_kwargs(edges, self.model.attn_impl) | ({"segment_pasts": pasts} if self._keeps else {})
        positions = np.concatenate([np.arange(len(one.ids) - len(new), len(one.ids)) for one, _, new in batch])
        token_ids = torch.from_numpy(np.concatenate([new for _, _, new in batch])).to(self._device)
        output = self._decoder(
            input_ids=token_ids[None], position_ids=torch.from_numpy(positions).to(self._device)[None], attention_mask=None, use_cache=False,
            **attention,
        )  # fmt: skip
        scores = self.model.model.score(output.last_hidden_state[0, edges[1:].long() - 1]).squeeze(-1).tolist()
        self.counts["computed_tokens"] += len(token_ids)
        for (one, parts, _), score, added in zip(batch, scores, pasts.added, strict=True):
            one.score = score
            if self._keeps:
                one.parts = (*parts, added)
                self._keep(one)

    def _keep(self, one: Prefix) -> None:
        if not self._bytes_per_token:
            added = one.parts[-1]
            self._bytes_per_token = sum(tensor.nbytes for pair in added for tensor in pair) // added[0][0].shape[2]
        self._known.add(one)
        self._bytes_kept += len(one.ids) * self._bytes_per_token
        while self._bytes_kept > self.max_bytes:
            oldest = next(iter(self._known))
            self._known.remove(oldest)
            self._bytes_kept -= len(oldest.ids) * self._bytes_per_token


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading ids that are equal."""
    return next((place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other)))
