"""The packed batch: sequences laid end to end in flat tensors, never padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from openrl_reason.core.seeds import content_id
from openrl_reason.core.segments import segment_ids, segment_starts
from openrl_reason.core.trajectory import Trajectory


@dataclass(eq=False)
class TokenBatch:
    """B sequences, N tokens in all. Entry t of every per-token tensor belongs to token t."""

    token_ids: Tensor
    """int64 [N]."""
    cu_seqlens: Tensor
    """int32 [B+1]: sequence b is ``cu_seqlens[b]:cu_seqlens[b+1]``."""
    action_mask: Tensor
    """bool [N]: true where the policy produced the token."""
    step_ids: Tensor
    """int64 [N]: reasoning step of an action token, -1 elsewhere."""
    behaviour_logprobs: Tensor
    """float32 [N]: log-prob under the sampling distribution, NaN where unknown."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Further per-token tensors [N, ...]: rewards, advantages, old_logprobs, ref_logprobs, returns, values, ..."""
    sequences: dict[str, Tensor] = field(default_factory=dict)
    """Per-sequence tensors [B, ...]: rewards, group_ids, policy_versions, weights, ..."""

    def __post_init__(self):
        num_tokens, num_sequences = len(self.token_ids), len(self.cu_seqlens) - 1
        if num_sequences < 0 or int(self.cu_seqlens[0]) != 0 or int(self.cu_seqlens[-1]) != num_tokens:
            raise ValueError(f"cu_seqlens must run from 0 to the number of tokens ({num_tokens}): {self.cu_seqlens.tolist()[:10]}...")
        for name, tensor in {**self._own_tokens(), **self.tokens}.items():
            if len(tensor) != num_tokens:
                raise ValueError(f"per-token tensor {name!r} has {len(tensor)} entries, token_ids has {num_tokens}")
        for name, tensor in self.sequences.items():
            if len(tensor) != num_sequences:
                raise ValueError(f"per-sequence tensor {name!r} has {len(tensor)} entries, the batch has {num_sequences} sequences")

    def _own_tokens(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("token_ids", "action_mask", "step_ids", "behaviour_logprobs")}

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> TokenBatch:
        """Packs trajectories in order.

        Adds ``tokens["rewards"]`` (each step's reward on the step's last action token, see ``place_step_rewards``),
        ``sequences["rewards"]`` (their sum), ``sequences["group_ids"]`` (an integer made of the group's name, so batches can be
        concatenated) and ``sequences["policy_versions"]``. Raises ``ValueError`` for an empty list or an empty trajectory.
        """
        if not trajectories:
            raise ValueError("a batch needs at least one trajectory")
        empty = [trajectory.trajectory_id for trajectory in trajectories if trajectory.num_tokens == 0]
        if empty:
            raise ValueError(f"trajectories without a single token: {empty[:5]}")

        def flat(name: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(trajectory, name) for trajectory in trajectories])).to(dtype)

        lengths = np.array([0] + [trajectory.num_tokens for trajectory in trajectories])
        return cls(
            token_ids=flat("token_ids", torch.int64),
            cu_seqlens=torch.from_numpy(lengths.cumsum()).to(torch.int32),
            action_mask=flat("action_mask", torch.bool),
            step_ids=flat("step_ids", torch.int64),
            behaviour_logprobs=flat("behaviour_logprobs", torch.float32),
            tokens={"rewards": torch.from_numpy(np.concatenate([place_step_rewards(trajectory) for trajectory in trajectories]))},
            sequences={
                "rewards": torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32),
                "group_ids": torch.tensor([_group_number(trajectory.group_id) for trajectory in trajectories], dtype=torch.int64),
                "policy_versions": torch.tensor([trajectory.policy_version for trajectory in trajectories], dtype=torch.int64),
            },
        )

    @classmethod
    def dummy(cls) -> TokenBatch:
        """Two tokens and no action: a forward for a rank that has nothing left to do. Contributes exactly nothing to any loss."""
        return cls(
            token_ids=torch.zeros(2, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
            action_mask=torch.zeros(2, dtype=torch.bool),
            step_ids=torch.full((2,), -1, dtype=torch.int64),
            behaviour_logprobs=torch.zeros(2),
        )

    def empty_like_dummy(self) -> TokenBatch:
        """``dummy`` with the extra keys of this batch, all zero (a mask is false, a weight is nothing)."""
        tokens = {name: tensor.new_zeros((2, *tensor.shape[1:])) for name, tensor in self.tokens.items()}
        sequences = {name: tensor.new_zeros((1, *tensor.shape[1:])) for name, tensor in self.sequences.items()}
        return replace(TokenBatch.dummy().to(self.token_ids.device), tokens=tokens, sequences=sequences)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.sum())

    @property
    def lengths(self) -> Tensor:
        """int32 [B]."""
        return self.cu_seqlens.diff()

    @property
    def sequence_ids(self) -> Tensor:
        """int64 [N]: the sequence each token belongs to."""
        return segment_ids(self.cu_seqlens)

    @property
    def position_ids(self) -> Tensor:
        """int64 [N]: 0, 1, 2, ... within each sequence."""
        return torch.arange(self.num_tokens, device=self.token_ids.device) - segment_starts(self.cu_seqlens)

    def with_tokens(self, **tensors: Tensor) -> TokenBatch:
        """A batch with more (or replaced) per-token tensors; this one is left as it is."""
        return replace(self, tokens={**self.tokens, **tensors})

    def without_tokens(self, *names: str) -> TokenBatch:
        """A batch without these per-token tensors, where it has them: what nobody will read should not travel."""
        return replace(self, tokens={name: tensor for name, tensor in self.tokens.items() if name not in names})

    def with_sequences(self, **tensors: Tensor) -> TokenBatch:
        """A batch with more (or replaced) per-sequence tensors."""
        return replace(self, sequences={**self.sequences, **tensors})

    def to(self, device: torch.device | str) -> TokenBatch:
        return self._map(lambda tensor: tensor.to(device), lambda tensor: tensor.to(device), self.cu_seqlens.to(device))

    def _map(self, on_tokens, on_sequences, cu_seqlens: Tensor) -> TokenBatch:
        return TokenBatch(
            cu_seqlens=cu_seqlens,
            **{name: on_tokens(tensor) for name, tensor in self._own_tokens().items()},
            tokens={name: on_tokens(tensor) for name, tensor in self.tokens.items()},
            sequences={name: on_sequences(tensor) for name, tensor in self.sequences.items()},
        )

    def token_index(self, indices: Sequence[int] | Tensor) -> Tensor:
        """int64 [n]: where the tokens of the sequences ``indices`` lie in this batch, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.cu_seqlens.device)
        starts, lengths = self.cu_seqlens[:-1].to(torch.int64)[chosen], self.lengths.to(torch.int64)[chosen]
        new_starts = lengths.cumsum(0) - lengths
        return torch.arange(int(lengths.sum()), device=chosen.device) + (starts - new_starts).repeat_interleave(lengths)

    def select(self, indices: Sequence[int] | Tensor) -> TokenBatch:
        """The sequences ``indices``, in that order (a subset, a permutation, or with repeats)."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.cu_seqlens.device)
        index = self.token_index(chosen)
        cu_seqlens = torch.nn.functional.pad(self.lengths[chosen].cumsum(0), (1, 0)).to(self.cu_seqlens.dtype)
        return self._map(lambda tensor: tensor[index], lambda tensor: tensor[chosen], cu_seqlens)

    def split(self, index_lists: Iterable[Sequence[int]]) -> list[TokenBatch]:
        """One batch per list; an empty list becomes ``empty_like_dummy`` (every rank must run the same number of forwards)."""
        return [self.select(indices) if len(indices) else self.empty_like_dummy() for indices in index_lists]

    @staticmethod
    def concat(batches: Sequence[TokenBatch]) -> TokenBatch:
        """Sequences of all batches in order. Raises ``ValueError`` if the extra keys differ."""
        if not batches:
            raise ValueError("nothing to concatenate")
        first = batches[0]
        for batch in batches:
            keys, first_keys = (sorted(b.tokens) + sorted(b.sequences) for b in (batch, first))
            if keys != first_keys:
                raise ValueError(f"batches with different keys cannot be joined: {first_keys} and {keys}")
        lengths = torch.cat([batch.lengths for batch in batches])
        own = {name: torch.cat([batch._own_tokens()[name] for batch in batches]) for name in first._own_tokens()}
        return TokenBatch(
            **own,
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(first.cu_seqlens.dtype),
            tokens={name: torch.cat([batch.tokens[name] for batch in batches]) for name in first.tokens},
            sequences={name: torch.cat([batch.sequences[name] for batch in batches]) for name in first.sequences},
        )


def place_step_rewards(trajectory: Trajectory) -> np.ndarray:
    """float32 [T]: each step's reward on that step's last action token; of a step without tokens, on the last action before it (or the
    first action, if there is none before). The total is kept, unless there is no action at all."""
    placed = np.zeros(trajectory.num_tokens, np.float32)
    actions = np.flatnonzero(trajectory.action_mask)
    if actions.size:
        last = np.searchsorted(trajectory.step_ids[actions], np.arange(trajectory.num_steps), side="right") - 1
        np.add.at(placed, actions[last.clip(min=0)], trajectory.rewards)
    return placed


def _group_number(group_id: str) -> int:
    return int(content_id(group_id), 16) >> 1  # fits int64


def unsplit_tokens(pieces: Sequence[Tensor], index_lists: Sequence[Sequence[int]], batch: TokenBatch) -> Tensor:
    """Inverse of ``batch.split`` for a per-token tensor: pieces [n_i, ...] back to [N, ...] in the order of ``batch``.

    A piece whose index list is empty came from a dummy and is ignored. Tokens that no list names are 0.
    """
    return _unsplit(pieces, [batch.token_index(indices) for indices in index_lists], batch.num_tokens)


def unsplit_sequences(pieces: Sequence[Tensor], index_lists: Sequence[Sequence[int]], batch: TokenBatch) -> Tensor:
    """The same for a per-sequence tensor [B, ...]."""
    return _unsplit(pieces, [torch.as_tensor(indices, dtype=torch.int64) for indices in index_lists], batch.num_sequences)


def _unsplit(pieces: Sequence[Tensor], indices: Sequence[Tensor], size: int) -> Tensor:
    whole = pieces[0].new_zeros((size, *pieces[0].shape[1:]))
    for piece, index in zip(pieces, indices, strict=True):
        if len(index):
            whole[index.to(piece.device)] = piece
    return whole
