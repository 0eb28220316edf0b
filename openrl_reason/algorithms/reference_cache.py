"""What a frozen reference says of each row of a token store, on disk: log-probs of the action tokens and, for exact KLs, hidden states.

Flat files like the store's own, with a mark for each row that is there, so that a run that is killed goes on from the rows it has, and a
batch is read without the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openrl_reason.atomic import naming_disk_errors, sole_writer, write_json
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.seeds import content_id
from openrl_reason.errors import ConfigError, DataError

FREE_SHARE = 0.9
"""Of the free disk that a cache may take."""


class ReferenceCache:
    """Rows of a token store, each scored once.

    Args:
        folder: holds the caches of all models and data; this one's is a subfolder named after ``key``.
        key: everything the scores depend on (model, data, temperature, dtype), JSON-able. Another key is another subfolder, so that a cache
            of another model or of other data is never read.
        lengths: tokens of each row of the store.
        hidden_size: of the reference, to keep its hidden states as well; 0: log-probs alone.
        dtype: "float32" or "bfloat16", of the hidden states.

    Raises:
        ConfigError: the disk is too small.
        DataError: the subfolder holds something else, or damaged files.
    """

    def __init__(self, folder: Path, key: dict[str, Any], lengths: np.ndarray, *, hidden_size: int = 0, dtype: str = "float32") -> None:
        self.key = {**key, "rows": len(lengths), "hidden_size": hidden_size, "dtype": dtype}
        self.folder = folder / content_id(json.dumps(self.key, sort_keys=True))
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.hidden_size, self._dtype = hidden_size, dtype
        # bfloat16 is kept as its bits: numpy has no such type.
        kinds = {"logprobs": (np.float32, ()), "done": (np.uint8, None)}
        if hidden_size:
            kinds["hidden"] = (np.uint16 if dtype == "bfloat16" else np.float32, (hidden_size,))
        with sole_writer(self.folder), naming_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            is_new = self._is_new()
            self._arrays = {name: self._array(name, *kind, is_new) for name, kind in kinds.items()}
            if is_new:
                write_json(self.folder / "manifest.json", self.key)  # when its files are there

    def _is_new(self) -> bool:
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            try:
                found = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != json.loads(json.dumps(self.key)):
                raise DataError(f"{manifest} is not that of this model and these data: delete {self.folder} to have it computed again")
            return False
        needed, free = cache_bytes(int(self.offsets[-1]), self.hidden_size, self._dtype), shutil.disk_usage(self.folder).free
        if needed > FREE_SHARE * free:
            raise ConfigError(
                f"the cache of the reference would take up to {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free at {self.folder}:"
                " name another --reference.cache_dir, or use --reference.cache none (the reference then runs beside the policy)"
            )
        for leftover in self.folder.glob("*.bin"):
            leftover.unlink()
        return True

    def _array(self, name: str, dtype: Any, tail: tuple[int, ...] | None, is_new: bool) -> np.memmap:
        shape = (len(self.offsets) - 1,) if tail is None else (int(self.offsets[-1]), *tail)
        path, size = self.folder / f"{name}.bin", int(np.prod(shape)) * np.dtype(dtype).itemsize
        if is_new:
            with path.open("wb") as file:
                os.truncate(file.fileno(), size)  # a hole in the file: tokens of prompts never take any disk
        elif not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.exists() else "is not there,"
            raise DataError(f"{path} {found} where {size} are due: delete {self.folder} to have it computed again")
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

    def missing(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of ``rows`` that are not there yet."""
        rows = np.asarray(rows, dtype=np.int64)
        return rows[self._arrays["done"][rows] == 0]

    def write(self, rows: Sequence[int], batch: TokenBatch, scores: dict[str, Tensor]) -> None:
        """Keeps the ``scores`` of a batch made of ``rows``: "logprobs" [N] and, where hidden states are kept, "hidden" [N, H]."""
        starts, mask = batch.cu_seqlens.tolist(), batch.action_mask.numpy()
        for place, row in enumerate(rows):
            own = slice(starts[place], starts[place + 1])
            inside = mask[own]
            target = int(self.offsets[row]) + np.flatnonzero(inside)
            if not len(target):
                continue
            self._reserve(int(target[0]), int(target[-1]) + 1)
            self._arrays["logprobs"][target] = scores["logprobs"][own].numpy()[inside]
            if self.hidden_size:
                self._arrays["hidden"][target] = _bits(scores["hidden"][own])[inside]
        for name, array in self._arrays.items():
            if name != "done":
                array.flush()
        self._arrays["done"][np.asarray(rows, dtype=np.int64)] = 1  # after its data: a row that is marked is there
        self._arrays["done"].flush()

    def _reserve(self, start: int, end: int) -> None:
        """Takes the disk for tokens ``start`` to ``end`` - 1: a full disk is an error here, and at the write to mapped memory ends the process."""
        for name, array in self._arrays.items():
            if name != "done":
                size = array.dtype.itemsize * int(np.prod(array.shape[1:]))
                with naming_disk_errors(self.folder), (self.folder / f"{name}.bin").open("r+b") as file:
                    os.posix_fallocate(file.fileno(), start * size, (end - start) * size)

    def read(self, rows: Sequence[int], batch: TokenBatch) -> dict[str, Tensor]:
        """``ref_logprobs`` [N] of a batch made of ``rows`` and, where they are kept, ``ref_hidden`` [N, H]; 0 outside actions."""
        index = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        found = {"ref_logprobs": torch.from_numpy(np.asarray(self._arrays["logprobs"][index]))}
        if self.hidden_size:
            hidden = torch.from_numpy(np.asarray(self._arrays["hidden"][index]))
            found["ref_hidden"] = hidden.view(torch.bfloat16) if self._dtype == "bfloat16" else hidden
        return found


def cache_bytes(num_tokens: int, hidden_size: int, dtype: str) -> int:
    """Most disk that ``num_tokens`` tokens take."""
    return num_tokens * (4 + hidden_size * (2 if dtype == "bfloat16" else 4))


def _bits(tensor: Tensor) -> np.ndarray:
    return (tensor.contiguous().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
