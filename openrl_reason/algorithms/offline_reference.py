"""The frozen reference of an offline algorithm: where its log-probs (and, for an exact KL, its hidden states) come from.

They are computed once and kept on disk (``reference_cache.py``) where that fits; the reference then needs no model of its own while the
policy trains. Otherwise it scores each batch: by the policy itself without its adapters, where it is a LoRA policy's start, else by a group.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.algorithms.common import local_path
from openrl_reason.algorithms.oreo_config import OfflineReferenceConfig
from openrl_reason.algorithms.reference_cache import ReferenceCache, cache_bytes
from openrl_reason.core.batch import TokenBatch
from openrl_reason.data.token_store import TokenStore
from openrl_reason.evaluation.identity import model_identity
from openrl_reason.workers.model_config import ModelConfig, TrainedModelConfig
from openrl_reason.workers.placement import Placement, Role

if TYPE_CHECKING:
    from openrl_reason.workers.model_group import ModelGroup

TOKENS_PER_CALL = 262_144
"""The cache is filled in parts of about this many tokens, which bounds the driver's memory and what a kill can cost."""


class OfflineReference:
    """Adds the reference's scores to batches.

    Args:
        config: the reference's settings.
        policy: the policy's, whose dtype and attention it shares.
        exact: whether hidden states are needed.
        direction: of the exact KL, "reverse" or "forward".
    """

    def __init__(self, config: OfflineReferenceConfig, policy: TrainedModelConfig, *, exact: bool, direction: str, temperature: float = 1.0) -> None:
        self.config, self.policy_config = config, policy
        self.exact, self.direction, self.temperature = exact, direction, temperature
        self.path = local_path(config.path or policy.path)
        self.is_start = self.path == local_path(policy.path)
        self.cache: ReferenceCache | None = None
        self.group: ModelGroup | None = None
        self._policy: ModelGroup | None = None

    # ---- before anything starts --------------------------------------------------------------------------------------------------------

    def roles(self) -> list[Role]:
        """A group of its own, where one may be needed: for another model, or to score each batch. A LoRA policy is its own reference."""
        own_adapters = self.is_start and self.policy_config.lora.rank
        scores_batches = self.config.cache == "none" or (self.config.cache == "auto" and self.exact)
        needed = not self.is_start or (scores_batches and not own_adapters)
        return [Role("reference", self.config.num_ranks if needed else 0)]

    def prepare(self, store: TokenStore, rows: np.ndarray, folder: Path, say: Callable[[str], None] = print) -> None:
        """Opens the cache for ``rows`` of ``store``, or decides against one. ``folder``: where it goes unless the config names a place."""
        from openrl_reason.models.loading import load_config

        self.store = store
        hidden_size = load_config(self.path, trust_remote_code=self.policy_config.trust_remote_code).hidden_size if self.exact else 0
        cache, needed = self.config.cache, cache_bytes(int(store.lengths[rows].sum()), hidden_size, self.policy_config.dtype)
        if cache == "none" or (cache == "auto" and self.exact and needed > self.config.cache_gib * 2**30):
            if cache == "auto":
                say(f"the reference scores each batch: its hidden states would take up to {needed / 2**30:.1f} GiB (--reference.cache_gib)")
            return
        identity = {name: value for name, value in model_identity(self.path, whole=True).items() if name != "path"} or {"path": self.path}
        key = {"model": identity, "data": store.identity, "temperature": self.temperature, "weights_dtype": self.policy_config.dtype}
        place = Path(self.config.cache_dir).absolute() if self.config.cache_dir else folder
        self.cache = ReferenceCache(place, key, store.lengths, hidden_size=hidden_size, dtype=self.policy_config.dtype)

    def describe(self) -> str:
        """One line for the plan."""
        kept = {"none": "scores each batch", "logprobs": "log-probs kept on disk", "all": "log-probs and hidden states kept on disk"}
        kept["auto"] = "kept on disk where it fits" if self.exact else kept["logprobs"]
        return f"{self.path}{' (the policy at its start)' if self.is_start else ''}, {kept[self.config.cache]}"

    # ---- with actors -------------------------------------------------------------------------------------------------------------------

    def build(self, policy: ModelGroup, rows: np.ndarray, placement: Placement, stack: contextlib.ExitStack, *, seed: int) -> None:
        """Fills the cache for ``rows``, or starts what scores each batch. ``policy`` stands at its start: call this before loading a checkpoint."""
        self._policy = policy
        if self.exact:
            policy.set_reference_head(self.path, self.direction)
        if self.cache is None:
            if not (self.is_start and self.policy_config.lora.rank):
                self.group = stack.enter_context(self._started(placement, seed))
            return
        missing = self.cache.missing(rows)
        if not len(missing):
            return
        started, scored = time.perf_counter(), 0
        source = contextlib.nullcontext(policy) if self.is_start else self._started(placement, seed)
        with source as group:
            for part in _parts(np.sort(missing), self.store.lengths):
                batch = TokenBatch.from_trajectories(self.store.trajectories(part))
                self.cache.write(part, batch, self._score(group, batch))
                scored += batch.num_tokens
        seconds = time.perf_counter() - started
        print(f"reference: {len(missing)} rows ({scored} tokens) scored in {seconds:.1f} s, kept in {self.cache.folder}")

    @contextlib.contextmanager
    def _started(self, placement: Placement, seed: int) -> Iterator[ModelGroup]:
        from openrl_reason.workers.model_group import ModelGroup

        group = ModelGroup.start(self.model_config(), role="reference", placement=placement, seed=seed, timeout_s=self.policy_config.timeout_s)
        try:
            yield group
        finally:
            group.close()

    def model_config(self) -> ModelConfig:
        """The group's settings: its own path and ranks, everything else like the policy."""
        policy, own = self.policy_config, self.config
        return ModelConfig(
            path=self.path, dtype=policy.dtype, num_ranks=own.num_ranks, zero_stage=own.zero_stage, attention=policy.attention,
            tokens_per_micro_batch=own.tokens_per_micro_batch, head_chunk_tokens=policy.head_chunk_tokens,
            trust_remote_code=policy.trust_remote_code, threads_per_rank=policy.threads_per_rank, timeout_s=policy.timeout_s,
        )  # fmt: skip

    def _score(self, group: ModelGroup, batch: TokenBatch) -> dict[str, Any]:
        adapters = not (group is self._policy and self.policy_config.lora.rank)
        return group.logprobs(batch, temperature=self.temperature, adapters=adapters, with_hidden=self.exact)

    def attach(self, rows: Sequence[int], batch: TokenBatch) -> TokenBatch:
        """``batch``, made of ``rows``, with ``tokens["ref_logprobs"]`` [N] and, for an exact KL, ``["ref_hidden"]`` [N, H]; 0 outside actions."""
        if self.cache is not None:
            return batch.with_tokens(**self.cache.read(rows, batch))
        scores = self._score(self.group or self._policy, batch)
        return batch.with_tokens(**{f"ref_{name}": tensor for name, tensor in scores.items()})


def _parts(rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of ``rows`` of about TOKENS_PER_CALL tokens."""
    edges = np.cumsum(lengths[rows]) // TOKENS_PER_CALL
    for part in np.split(rows, np.flatnonzero(np.diff(edges)) + 1):
        if len(part):
            yield part
