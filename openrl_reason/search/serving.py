"""What searches run on: a rollout pool that samples, a model with a scalar head that values."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from openrl_reason.search.drive import TokenIds
from openrl_reason.workers.branching import Branch, BranchCall, Prefix
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.evaluation.value_estimators import PrefixValues

STATES_PER_CALL = 32
"""A call of the value model has at most so many states: the searches of the first ones go on while the others are valued. All of a run start
together, and their first steps end together; the engines would have nothing to do until the last of them has its value."""


class PolledPool(Protocol):
    """What is needed of ``RolloutPool``."""

    config: RolloutConfig

    def submit(self, requests: Sequence[Request]) -> None: ...

    def generate(self, requests: Sequence[Request] = ()) -> Any: ...

    def poll(self) -> list[Completion]: ...


class PoolSampler:
    """A ``Sampler`` on a rollout pool, which nothing else uses meanwhile.

    Args:
        sampling: temperature, top-p, stop strings; each prefix has its own budget.
        seed: identity of all samples, to which each prefix adds its own.
    """

    def __init__(self, pool: PolledPool, sampling: SamplingConfig, seed: Sequence[int | str]) -> None:
        self.pool, self._call = pool, BranchCall(pool, sampling=sampling, seed=seed)
        self._missing: dict[str, int] = {}

    def submit(self, prefix: Prefix, num_samples: int) -> str:
        """See ``drive.Sampler``."""
        key = self._call.ask(prefix, num_samples)
        self._missing[key] = num_samples
        return key

    def poll(self) -> list[Branch]:
        """See ``drive.Sampler``."""
        found = self._call.take_exhausted()
        if not found and self._call.num_open:
            found = [branch for branch in map(self._call.take, self.pool.poll()) if branch is not None]
        for branch in found:
            self._missing[branch.key] -= 1
            if not self._missing[branch.key]:
                del self._missing[branch.key]
                self._call.forget(branch.key)
        return found

    @property
    def num_open(self) -> int:
        """See ``drive.Sampler``."""
        return sum(self._missing.values())


class BatchedValuer:
    """A ``Valuer`` that asks ``values`` for all states that are waiting, in one call at a time, from a thread of its own.

    Engines and searches go on meanwhile. What a state is worth does not depend on who waits beside it, but for the rounding of packed batches.
    A context manager; ``close`` ends the thread.
    """

    def __init__(self, values: PrefixValues, states_per_call: int = STATES_PER_CALL) -> None:
        self._values, self._states_per_call = values, states_per_call
        self._waiting: SimpleQueue[tuple[TokenIds, Future[float]] | None] = SimpleQueue()
        self.counts: Counter[str] = Counter(calls=0, states=0, tokens=0)
        """Calls of the model, states valued, and their tokens."""
        self.seconds_busy = 0.0
        self._thread = threading.Thread(target=self._serve, name="search-values", daemon=True)
        self._thread.start()

    def submit(self, token_ids: TokenIds) -> Future[float]:
        """See ``drive.Valuer``."""
        future: Future[float] = Future()
        self._waiting.put((token_ids, future))
        return future

    def _serve(self) -> None:
        ended = False
        while not ended:
            first = self._waiting.get()
            batch, ended = ([first], False) if first is not None else ([], True)
            while not ended and len(batch) < self._states_per_call:
                try:
                    one = self._waiting.get_nowait()
                except Empty:
                    break
                batch, ended = ([*batch, one], False) if one is not None else (batch, True)
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[TokenIds, Future[float]]]) -> None:
        started = time.perf_counter()
        try:
            values = [float(value) for value in self._values([token_ids for token_ids, _ in batch])]
        except BaseException as error:  # whoever waits must hear of it
            for _, future in batch:
                future.set_exception(error)
            return
        self.seconds_busy += time.perf_counter() - started
        self.counts.update(calls=1, states=len(batch), tokens=sum(len(token_ids) for token_ids, _ in batch))
        for (_, future), value in zip(batch, values, strict=True):
            future.set_result(value)

    def close(self) -> None:
        """Ends the thread when what is waiting is answered. May be called twice."""
        self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> BatchedValuer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalCritic:
    """A critic in this process, without Ray: ``scalar_values(LocalCritic(path))`` values prefixes, for an agent or a notebook.

    Args:
        path: folder of a model with a scalar head, as PPO leaves it in ``critic/``.
        settings: further fields of ``ModelConfig`` (``dtype``, ``attention``, ``tokens_per_micro_batch``, ...).

    Raises:
        ConfigError: the model has no scalar head, so all its values would be 0.
        DataError: the folder cannot be read, or its head has several labels.
    """

    def __init__(self, path: str, **settings: Any) -> None:
        from openrl_reason.workers.model_config import ScalarModelConfig
        from openrl_reason.workers.model_worker import ModelWorker

        config = ScalarModelConfig(path=path, **settings)
        refuse_without_head(path, "path", trust_remote_code=config.trust_remote_code)
        self._worker = ModelWorker(config, role="critic")

    def scores(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value of the state after each token, as ``ModelGroup.scores``."""
        from openrl_reason.core.batch import unsplit_tokens
        from openrl_reason.core.partition import plan_micro_batches

        (plan,) = plan_micro_batches(batch.lengths.tolist(), 1, self._worker.config.tokens_per_micro_batch)
        bare = replace(batch, tokens={}, sequences={})
        pieces = self._worker.values(bare.split(plan), shifted=False)
        return unsplit_tokens([piece["values"] for piece in pieces], plan, bare)


def refuse_without_head(path: str, flag: str, *, trust_remote_code: bool = False) -> None:
    """Raises ConfigError for a folder without a scalar head."""
    from openrl_reason.config import require
    from openrl_reason.models.loading import load_config
    from openrl_reason.models.scalar_model import has_scalar_head

    found = has_scalar_head(load_config(path, trust_remote_code=trust_remote_code))
    remedy = "that is a language model without a scalar head, whose values would all be 0: name a critic, as PPO leaves it in critic/"
    require(found, flag, path, remedy)
