"""Prefixes shared to the token in a vLLM engine that runs in this process.

vLLM's prefix cache serves whole blocks, so each of the K branches of one prefix computes the prefix's last, part-filled block again. vLLM can
also start a request from a *part* of a block: it gives the request a copy (copy-on-write, ``kv_cache_block_copies``). It does so by itself for
models with Mamba layers only. `PrefixReuse` finds such blocks for every model with plain attention: a block in the cache that follows the very
same prefix, and whose first tokens are the request's next ones. Each request still computes its last token, which gives it its first logits.

A part-filled block is in the cache, too, if a prompt or a response ended in it. It lies there under a key of our own and is evicted, emptied with
`reset_prefix_cache`, and overtaken by the full block like any other. What is used is looked up in vLLM's cache at that moment, so the index here
may forget or be out of date, and is never wrong.

A copy is made before the step's forward pass, so its source must have been computed in an earlier step. `HeldRequests` therefore lets one
request with each prompt go ahead, and the others follow a step later.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from openrl_reason.workers.rollout_config import Request

logger = logging.getLogger(__name__)

ROOT = b""
"""The prefix of a first block."""
GROUP = 0
"""The only group of the KV cache."""


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


@dataclass(frozen=True, slots=True)
class _Written:
    """When a block was written."""

    key: bytes
    """Under which key the cache had it then."""
    step: int
    """The last step that wrote to it, or may have."""
    before: int
    """How many of its tokens were computed before that step."""


class BlockIndex:
    """Which blocks have been seen to follow a prefix, by their tokens.

    Args:
        cached_block: number of the block that the cache has under a key; None if it has none any more.
        max_blocks: blocks in the cache; the index forgets the dead when it has grown to twice as many.
    """

    def __init__(self, cached_block: Callable[[bytes], int | None], max_blocks: int) -> None:
        self._cached_block, self._max_blocks = cached_block, max_blocks
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._followers: dict[bytes, list[tuple[tuple[int, ...], bytes]]] = {}  # sorted, so that the best match has its place
        self._keys: set[bytes] = set()
        self._written: dict[int, _Written] = {}  # by block: a key may have several, of which the cache gives the oldest
        self._next_cleaning = 2 * self._max_blocks

    def add(self, parent: bytes, tokens: tuple[int, ...], key: bytes, block: int, *, step: int, before: int) -> None:
        """Notes that ``block``, cached under ``key``, holds ``tokens`` after the prefix ``parent``; ``before`` of them since before ``step``."""
        if key not in self._keys:
            if len(self._keys) >= self._next_cleaning:
                self._forget_dead()
            insort(self._followers.setdefault(parent, []), (tokens, key))
            self._keys.add(key)
        self._written[block] = _Written(key, step, before)

    def find(self, parent: bytes, target: tuple[int, ...], *, step: int) -> tuple[bytes, int]:
        """The block with the longest beginning in common with ``target`` that was computed before ``step``: key and length (0: none)."""
        followers = self._followers.get(parent)
        if not followers:
            return ROOT, 0
        best, dead = (ROOT, 0), []
        start = bisect_left(followers, (target,))
        for places in (range(start, len(followers)), range(start - 1, -1, -1)):
            for place in places:  # the farther from its place in the order, the less a block has in common with the target
                tokens, key = followers[place]
                common = common_length(tokens, target)
                if common <= best[1]:
                    break
                block = self._cached_block(key)
                if block is None:
                    dead.append(place)
                    continue
                usable = self._computed(key, block, common, step)
                if usable > best[1]:
                    best = (key, usable)
        for place in sorted(dead, reverse=True):
            self._keys.discard(followers.pop(place)[1])
        return best

    def _computed(self, key: bytes, block: int, length: int, step: int) -> int:
        written = self._written.get(block)
        if written is None or written.key != key:  # cached behind our back: nothing is known of it
            return 0
        return length if written.step < step else min(length, written.before)

    def _forget_dead(self) -> None:
        alive = {parent: [one for one in followers if self._cached_block(one[1]) is not None] for parent, followers in self._followers.items()}
        self._followers = {parent: followers for parent, followers in alive.items() if followers}
        self._keys = {key for followers in self._followers.values() for _, key in followers}
        self._next_cleaning = max(2 * self._max_blocks, 2 * len(self._keys))


class PrefixReuse:
    """Hooks into the KV cache manager of one vLLM scheduler.

    Args:
        scheduler: vLLM's scheduler; `attach` has looked at it.
    """

    def __init__(self, scheduler: Any) -> None:
        from vllm.v1.core.kv_cache_manager import KVCacheBlocks
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        self._scheduler, self._make_blocks, self._make_key = scheduler, KVCacheBlocks, make_block_hash_with_group_id
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self._blocks_of = self._manager.coordinator.single_type_managers[GROUP].req_to_blocks
        self._block_size: int = self._pool.hash_block_size
        self._index = BlockIndex(self._cached_block, self._pool.num_gpu_blocks)
        self._step = 0
        self._starting: dict[str, Any] = {}
        """Requests that were looked up and whose prompt has not been seen computed."""
        self._hook(self._manager, "get_computed_blocks", self._get_computed_blocks)
        self._hook(self._manager, "new_step_starts", self._new_step_starts)
        self._hook(self._manager, "free", self._free)
        self._hook(self._manager, "reset_prefix_cache", self._reset_prefix_cache)
        self._hook(self._pool, "cache_full_blocks", self._cache_full_blocks)

    @staticmethod
    def _hook(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))

    def is_computed(self, request_id: str) -> bool:
        """Whether the prompt of a request (by vLLM's id) has been computed, now or once."""
        request = self._scheduler.requests.get(request_id)
        return request is None or request.num_preemptions > 0 or request.num_computed_tokens >= request.num_prompt_tokens

    # --- hooks: each gets vLLM's own method first ---

    def _new_step_starts(self, original: Callable[[], None]) -> None:
        self._step += 1
        starting, self._starting = self._starting, {}
        for request_id, request in starting.items():
            if 0 < request.num_computed_tokens < request.num_prompt_tokens:  # a prompt in pieces
                self._starting[request_id] = request
            else:
                self._keep_tail(request, request.num_prompt_tokens)
        original()

    def _free(self, original: Callable[[Any], None], request: Any) -> None:
        self._starting.pop(request.request_id, None)
        if self._manager.prefix_cache_lookup_enabled(request) and _is_plain(request):
            self._keep_tail(request, request.num_tokens)  # a search goes on from here, and branches start in it
        original(request)

    def _reset_prefix_cache(self, original: Callable[[], bool]) -> bool:
        done = original()
        if done:
            self._index.clear()
        return done

    def _cache_full_blocks(
        self, original: Callable[..., None], request: Any, blocks: list[Any], num_cached_blocks: int, num_full_blocks: int, *args: Any, **kwargs: Any
    ) -> None:
        original(request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        if not _is_plain(request):
            return
        size = self._block_size
        for number in range(num_cached_blocks, num_full_blocks):
            tokens = tuple(request.all_token_ids[number * size : (number + 1) * size])
            before = min(max(request.num_computed_tokens - number * size, 0), size)  # vLLM moves num_computed_tokens on after scheduling
            key, block = self._make_key(request.block_hashes[number], GROUP), blocks[number].block_id
            self._index.add(self._parent(request, number), tokens, key, block, step=self._step, before=before)

    def _get_computed_blocks(self, original: Callable[[Any], tuple[Any, int, int]], request: Any) -> tuple[Any, int, int]:
        blocks, num_tokens, boundary = original(request)
        if not (self._manager.prefix_cache_lookup_enabled(request) and _is_plain(request)):
            return blocks, num_tokens, boundary
        self._starting[request.request_id] = request
        full, size = list(blocks.blocks[GROUP]), self._block_size
        limit = min(request.num_tokens - 1, num_tokens + size - 1)
        target = tuple(request.all_token_ids[num_tokens:limit])
        key, length = self._index.find(self._parent(request, len(full)), target, step=self._step)
        if not length:
            return blocks, num_tokens, boundary
        source = self._pool.cached_block_hash_to_block.get_one_block(key)
        if not self._fits(request, [*full, source]):
            return blocks, num_tokens, boundary
        return self._make_blocks(([*full, source],)), num_tokens + length, boundary

    # --- what the hooks share ---

    def _cached_block(self, key: bytes) -> int | None:
        block = self._pool.cached_block_hash_to_block.get_one_block(key)
        return None if block is None else block.block_id

    def _parent(self, request: Any, number: int) -> bytes:
        return request.block_hashes[number - 1] if number else ROOT

    def _fits(self, request: Any, blocks: list[Any]) -> bool:
        """Whether the request can start now although the copy's source is held beside the copy. Otherwise vLLM might wait for ever."""
        num_new = -(-request.num_tokens // self._block_size) - (len(blocks) - 1)
        num_taken = sum(block.ref_cnt == 0 for block in blocks)
        return num_new + num_taken + self._manager.watermark_blocks <= self._pool.get_num_free_blocks()

    def _keep_tail(self, request: Any, num_tokens: int) -> None:
        """Puts the part-filled block at the end of a request's first tokens into the cache, as far as they are computed, if it adds anything."""
        num_computed = min(request.num_computed_tokens, num_tokens, request.num_tokens - 1)
        number, length = divmod(num_computed, self._block_size)
        blocks = self._blocks_of.get(request.request_id, ())
        if not length or number >= len(blocks) or blocks[number].is_null or (blocks[number].block_hash_num_tokens or 0) >= num_computed:
            return
        parent, start = self._parent(request, number), number * self._block_size
        tokens = tuple(request.all_token_ids[start:num_computed])
        if self._index.find(parent, tokens, step=self._step)[1] == length:
            return
        digest = hashlib.sha256(parent + b"part of a block" + array("q", tokens).tobytes()).digest()
        key = self._make_key(digest, GROUP)
        if self._pool.cached_block_hash_to_block.get_one_block(key) is not None:
            return
        self._pool._remove_cached_block_hashes(blocks[number])  # the prompt's tail, which the longer one begins with
        blocks[number].set_block_hash(key, num_tokens=num_computed)
        self._pool.cached_block_hash_to_block.insert(key, blocks[number])
        self._index.add(parent, tokens, key, blocks[number].block_id, step=self._step, before=length)


def _is_plain(request: Any) -> bool:
    """Whether tokens alone decide a request's KV cache."""
    return not (request.lora_request or request.cache_salt or request.mm_features or request.prompt_embeds is not None)


class HeldRequests:
    """Lets one request with each prompt go ahead; those whose prompts it contains follow when it has been computed.

    Args:
        is_computed: whether the prompt of a request has been computed, by the id that vLLM has given it.
    """

    def __init__(self, is_computed: Callable[[str], bool]) -> None:
        self._is_computed = is_computed
        self._leaders: dict[tuple[int, ...], str] = {}
        self._held: dict[tuple[int, ...], list[Request]] = {}

    def admit(self, requests: Iterable[Request], add: Callable[[Request], str]) -> None:
        """Gives ``add``, which returns vLLM's id, the requests that go ahead, and keeps the others."""
        by_prompt: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            by_prompt.setdefault(tuple(request.prompt_ids), []).append(request)
        if not by_prompt:
            return
        ordered = sorted({*by_prompt, *self._leaders})  # a prompt that begins others comes right before the first of them
        leader_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        for prompt, following in zip(reversed(ordered), [(), *reversed(ordered)], strict=False):
            contained = following[: len(prompt)] == prompt
            leader_of[prompt] = leader_of[following] if contained else prompt
        for prompt, siblings in by_prompt.items():
            leader, rest = leader_of[prompt], siblings
            if leader == prompt and prompt not in self._leaders:
                self._leaders[prompt], rest = add(siblings[0]), siblings[1:]
            if rest:
                self._held.setdefault(leader, []).extend(rest)

    def release(self, add: Callable[[Request], str]) -> None:
        """Gives ``add`` the requests whose leader has been computed."""
        for prompt in [prompt for prompt, request_id in self._leaders.items() if self._is_computed(request_id)]:
            del self._leaders[prompt]
            for request in self._held.pop(prompt, ()):
                add(request)

    def clear(self) -> list[str]:
        """Forgets everything; the ids of the requests that were held."""
        held = [request.request_id for requests in self._held.values() for request in requests]
        self._leaders.clear()
        self._held.clear()
        return held


def attach(engine: Any) -> PrefixReuse | None:
    """Hooks into a ``vllm.LLMEngine`` that runs in this process.

    Returns:
        None where it cannot be done, which leaves vLLM's own prefix cache: silently for models with other than plain attention, with a
        warning if this vLLM is not built as expected.
    """
    try:
        scheduler = engine.engine_core.engine_core.scheduler
        if not _is_supported(scheduler):
            return None
        missing = _missing(scheduler)
    except (AttributeError, ImportError) as error:
        missing = str(error)
    if missing:
        logger.warning("prefixes are shared in whole blocks only: this version of vLLM is not built as expected (%s)", missing)
        return None
    return PrefixReuse(scheduler)


def _is_supported(scheduler: Any) -> bool:
    """One group of plain attention, and none of the features that read the cache in ways of their own."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    manager = scheduler.kv_cache_manager
    groups = manager.coordinator.single_type_managers
    if len(groups) != 1 or type(groups[GROUP]) is not FullAttentionManager or not isinstance(groups[GROUP].kv_cache_spec, FullAttentionSpec):
        return False
    special = manager.use_eagle or manager.enable_kv_cache_events or scheduler.connector is not None or scheduler.num_spec_tokens
    sizes = {groups[GROUP].block_size, groups[GROUP].kv_cache_spec.block_size, manager.block_pool.hash_block_size}
    return manager.enable_caching and not special and len(sizes) == 1


def _missing(scheduler: Any) -> str:
    """What `PrefixReuse` needs of vLLM and does not find; empty if all is there."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request as VllmRequest
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    manager, pool = scheduler.kv_cache_manager, scheduler.kv_cache_manager.block_pool
    group = manager.coordinator.single_type_managers[GROUP]
    request = VllmRequest("probe", [0], SamplingParams(max_tokens=1), None)
    parameters = [
        (manager.get_computed_blocks, ["request"]),
        (manager.new_step_starts, []),
        (manager.free, ["request"]),
        (manager.reset_prefix_cache, []),
        (pool.cache_full_blocks, ["request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size", "kv_cache_group_id", "block_mask"]),
        (pool.cached_block_hash_to_block.insert, ["key", "block"]),
        (pool.cached_block_hash_to_block.get_one_block, ["key"]),
        (KVCacheBlocks, ["blocks"]),
        (KVCacheBlock.set_block_hash, ["self", "block_hash", "num_tokens"]),
        (copy_kv_cache_blocks_inplace, ["kv_caches", "num_blocks", "kv_cache_block_copies"]),
    ]
    wrong = [function.__qualname__ for function, names in parameters if list(inspect.signature(function).parameters) != names]
    attributes = [
        (manager, ["watermark_blocks", "prefix_cache_lookup_enabled", "take_kv_cache_block_copies"]),
        (group, ["req_to_blocks", "_has_partial_local_hit", "_partial_hit_reqs", "_apply_cow"]),
        (pool, ["num_gpu_blocks", "get_num_free_blocks", "_remove_cached_block_hashes"]),
        (pool.blocks[0], ["ref_cnt", "is_null", "block_hash", "block_hash_num_tokens"]),
        (request, ["num_tokens", "num_prompt_tokens", "num_computed_tokens", "num_preemptions", "all_token_ids", "block_hashes"]),
        (request, ["lora_request", "cache_salt", "mm_features", "prompt_embeds"]),
        (scheduler, ["requests"]),
    ]
    wrong += [f"{type(owner).__name__}.{name}" for owner, names in attributes for name in names if not hasattr(owner, name)]
    fields = inspect.signature(SchedulerOutput).parameters
    return ", ".join(wrong + ([] if "kv_cache_block_copies" in fields else ["SchedulerOutput.kv_cache_block_copies"]))
