"""A linear sketch of vectors too many or too long to keep: inner products survive, and sketches of parts add up to that of the whole.

The vector is cut into blocks of ``size`` entries. Every entry gets a random sign, every block is rotated by a random shift, and the blocks are
added up. That is a count sketch (Charikar, Chen and Farach-Colton 2002; Weinberger et al. 2009) without its scattered writes: two entries
of one block never meet, and two of different blocks meet with probability 1 / size. Over the random signs and shifts,

    E <Sa, Sb> = <a, b>,     Var <Sa, Sb> <= (|a|^2 |b|^2 + <a, b>^2) / size,

and a vector of at most ``size`` entries is one block, of which the sketch is a signed permutation: all inner products are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from openrl_reason.core.seeds import derive_seed

_PIECE = 1 << 20
"""Entries whose signs exist at a time."""


class CountSketch:
    """The sketch of a vector that comes as named parts, in any order.

    Args:
        lengths: entries of each part, by name; the vector is the parts end to end, in this order.
        size: entries of a sketch; fewer if the vector has fewer.
        seed: of signs and shifts. Sketches are comparable if ``lengths``, ``size``, ``seed`` and the kind of device agree.
    """

    def __init__(self, lengths: Mapping[str, int], *, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a sketch has at least 1 entry, not {size}")
        self._starts: dict[str, int] = {}
        total = 0
        for name, length in lengths.items():
            self._starts[name] = total
            total += length
        self.size, self.seed = max(1, min(size, total)), seed
        self._lengths = dict(lengths)

    def zeros(self, device: torch.device | str = "cpu") -> Tensor:
        """The sketch of the zero vector, float32 [size]."""
        return torch.zeros(self.size, device=device)

    def add(self, name: str, part: Tensor, into: Tensor) -> None:
        """Adds the sketch of one part (any shape, its entries in memory order) to ``into``."""
        flat = part.detach().reshape(-1)
        if len(flat) != self._lengths[name]:
            raise ValueError(f"{name} has {len(flat)} entries, {self._lengths[name]} were announced")
        generator = torch.Generator(device=flat.device).manual_seed(derive_seed(self.seed, "signs", name))
        for first, last, place in self._pieces(name):
            positive = torch.randint(2, (last - first,), generator=generator, device=flat.device, dtype=torch.uint8).bool()
            piece = flat[first:last].to(into.dtype)
            piece = torch.where(positive, piece, -piece)
            ahead = min(len(piece), self.size - place)
            into[place : place + ahead] += piece[:ahead]
            into[: len(piece) - ahead] += piece[ahead:]

    def _pieces(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(first, last, place): entries of a part that lie in one block, and where in the sketch the first of them goes; the rest follow it round."""
        start, length = self._starts[name], self._lengths[name]
        first = 0
        while first < length:
            block, within = divmod(start + first, self.size)
            last = min(length, first + self.size - within, first + _PIECE)
            shift = derive_seed(self.seed, "shift", block) % self.size
            yield first, last, (within + shift) % self.size
            first = last
