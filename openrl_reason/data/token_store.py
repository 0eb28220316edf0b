"""Sequences on disk as flat arrays of token ids: what offline training reads, a row at a time, without a list in the driver's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason.core.trajectory import Trajectory


class TokenStore:
    """Rows of a finished store, in the order of the files they came from. Only arrays with a few numbers a row are in memory."""

    folder: Path
    """Where it is."""
    kind: str
    """responses, pairs (rows 2i chosen, 2i + 1 rejected), labels (reward 1 or 0 before the affine map), sft, or steps."""
    identity: str
    """Hash of the rows' content in their order."""
    statistics: dict[str, Any]
    """What became of the rows, and of what lengths and rewards they are (JSON)."""
    lengths: np.ndarray
    """int [rows]: tokens of each sequence."""
    rewards: np.ndarray
    """float [rows]: reward of each sequence (of steps: their sum), the affine map applied. 0 where there is none."""
    has_reward: np.ndarray
    """bool [rows]: false where no reward is known (sft, and cut-off responses with truncated_reward mask): leave it out of losses on rewards."""
    labels: np.ndarray
    """bool [rows]: pairs: whether it is the chosen one; labels: the label; else whether the reward in the file was positive."""
    questions: np.ndarray
    """uint64 [rows]: equal for rows with the same question."""

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """The store in ``folder``. Raises DataError if there is none, or if it is damaged."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def trajectory(self, row: int) -> Trajectory:
        """One row. Its ``info`` has ``source`` (file and line) and, where false, ``has_reward``."""
        raise NotImplementedError

    def trajectories(self, rows: Sequence[int]) -> list[Trajectory]:
        """Several rows, in the given order."""
        raise NotImplementedError
