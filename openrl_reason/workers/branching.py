"""The branch call: continue token prefixes K times, while the engines that take the requests may be busy with something else.

Monte-Carlo values, process labels and search are all this one thing. A prefix is token ids, never text. Whoever asks for a prefix that somebody
has asked for already gets the same samples: each distinct prefix is submitted once. A sample's seed is made of the identity of the call,
the prefix and the sample's number, so that it depends neither on the order of the requests nor on who shares them.

What a branch may still generate is what its trajectory had left: with a fresh budget, late states would look better than they are
(published VinePPO grants one; see docs/vineppo.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig


class TakesRequests(Protocol):
    """What is needed of ``RolloutPool``."""

    config: RolloutConfig

    def submit(self, requests: Iterable[Request]) -> None: ...

    def generate(self, requests: Iterable[Request] = ()) -> Iterator[Completion]: ...


@dataclass(frozen=True)
class Prefix:
    """A state to continue from."""

    token_ids: tuple[int, ...]
    """Everything up to the state, prompt included; at least one token."""
    budget: int
    """Tokens that may follow. 0: the length limit is reached, and every branch is empty."""
    identity: str = ""
    """Prefixes of different identities (problems) are never shared."""
    group: str | None = None
    """Engine affinity (``Request.group``): the group of the trajectory it was cut from, whose engine has its KV cache."""

    @property
    def key(self) -> str:
        """Hash of what makes two prefixes the same."""
        return content_id(self.identity, str(self.budget), np.asarray(self.token_ids, np.int64).tobytes().hex())


@dataclass(frozen=True)
class Branch:
    """One continuation of a prefix."""

    key: str
    """``Prefix.key``."""
    sample: int
    """Number of the sample, from 0."""
    completion: Completion
    """What was sampled; of an exhausted prefix no tokens and the stop reason ``length``."""


class BranchCall:
    """Asks a pool for continuations of prefixes. One object per weights version: a new version is a new call.

    Args:
        pool: a ``RolloutPool`` (or anything with its ``submit`` and ``generate``).
        sampling: temperature, top-p, stop strings; each prefix has a budget of its own in place of ``max_new_tokens``.
        seed: identity of the call, for instance ``(run_seed, "branch", step)``.
        share: submit identical prefixes once. False is for tests and comparisons: the samples are the same ones.
    """

    def __init__(self, pool: TakesRequests, *, sampling: SamplingConfig, seed: Sequence[int | str], share: bool = True) -> None:
        self.pool, self.sampling, self.share = pool, sampling, share
        self._seed = tuple(seed)
        self._name = "/".join(map(str, self._seed))
        self._open: dict[str, tuple[str, int]] = {}
        self._asked: dict[str, tuple[Prefix, int]] = {}
        self._exhausted: list[Branch] = []
        self.counts: Counter[str] = Counter(asked=0, shared=0, requests=0, exhausted=0, prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=0)
        """Calls of ``ask``, of those for a prefix that had been asked for; requests; prefixes without a budget; tokens of the requests' prompts,
        of those from the prefix cache, and of continuations."""

    @property
    def num_open(self) -> int:
        """Requests submitted whose completions have not been taken."""
        return len(self._open)

    def ask(self, prefix: Prefix, num_samples: int) -> str:
        """Makes sure that samples 0 .. ``num_samples`` - 1 of the prefix are under way, and returns its key.

        Raises:
            ConfigError: ``num_samples`` is below 1, the prefix is empty, or its budget negative. (A prefix that fills the engines' context is
                exhausted, like one without a budget.)
        """
        if num_samples < 1:
            raise ConfigError(f"a prefix is to be continued {num_samples} times: use at least 1")
        if not prefix.token_ids or prefix.budget < 0:
            size = f"{len(prefix.token_ids)} tokens and a budget of {prefix.budget}"
            raise ConfigError(f"a prefix has {size}: it needs a token, and no negative budget")
        key = prefix.key
        known = key in self._asked
        self.counts["asked"] += 1
        self.counts["shared"] += known
        if known and not self.share:
            key = f"{key}+{self.counts['asked']}"
        self._asked.setdefault(key, (prefix, 0))
        self.more(key, num_samples)
        return key

    def more(self, key: str, num_samples: int) -> None:
        """Tops a prefix that was asked for up to ``num_samples`` samples (an adaptive estimate); those that are under way are not repeated."""
        prefix, first = self._asked[key]
        if first >= num_samples:
            return
        self._asked[key] = prefix, num_samples
        budget = min(prefix.budget, self.pool.config.max_model_len - len(prefix.token_ids))
        if budget <= 0:
            self.counts["exhausted"] += first == 0
            self._exhausted += [Branch(key, sample, _empty(key, sample)) for sample in range(first, num_samples)]
            return
        ids = list(prefix.token_ids)  # one list for all: the requests of a call travel together, and it travels once
        requests = [self._request(prefix, ids, key, sample, budget) for sample in range(first, num_samples)]
        self.pool.submit(requests)
        self._open |= {request.request_id: (key, sample) for request, sample in zip(requests, range(first, num_samples), strict=True)}
        self.counts["requests"] += len(requests)
        self.counts["prompt_tokens"] += len(requests) * len(prefix.token_ids)

    def forget(self, key: str) -> None:
        """Drops what is remembered of a prefix whose samples are all there and that nobody asks for again (a search leaves many behind)."""
        self._asked.pop(key, None)

    def _request(self, prefix: Prefix, ids: list[int], key: str, sample: int, budget: int) -> Request:
        seed = derive_seed(*self._seed, key.partition("+")[0], sample)
        sampling = replace(self.sampling, max_new_tokens=budget)
        return Request(f"{self._name}/{key}/{sample}", ids, seed=seed, sampling=sampling, group=prefix.group, movable=True)

    def take(self, completion: Completion) -> Branch | None:
        """The branch that a completion of the pool is; None if it belongs to somebody else."""
        found = self._open.pop(completion.request_id, None)
        if found is None:
            return None
        self.counts["cached_prompt_tokens"] += completion.num_cached_tokens
        self.counts["generated_tokens"] += len(completion.token_ids)
        return Branch(*found, completion)

    def take_exhausted(self) -> list[Branch]:
        """The empty branches of prefixes without a budget, which never go to an engine; each once."""
        branches, self._exhausted = self._exhausted, []
        return branches


def _empty(key: str, sample: int) -> Completion:
    request_id = f"{key}/{sample}"
    return Completion(request_id, [], [], stop_reason=StopReason.LENGTH, stop_string=None, policy_version=-1, num_cached_tokens=0)


def branch(
    pool: TakesRequests, prefixes: Iterable[Prefix], num_samples: int, *, sampling: SamplingConfig, seed: Sequence[int | str]
) -> Iterator[Branch]:
    """``num_samples`` continuations of every distinct prefix, as they finish: the whole call in one loop, for a pool with nothing else to do."""
    call = BranchCall(pool, sampling=sampling, seed=seed)
    for prefix in prefixes:
        call.ask(prefix, num_samples)
    yield from call.take_exhausted()
    for completion in pool.generate():
        found = call.take(completion)
        if found is not None:
            yield found
