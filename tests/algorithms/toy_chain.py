"""A language model that is a table: the next token depends on the last one alone, so that the value of every state is known exactly.

It stands where the engines stand (``ToyPool``), with a rewarder beside it that can be late, batched or broken.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache

import numpy as np

from openrl_reason.algorithms.collect import Collector
from openrl_reason.algorithms.common import ItemSampler
from openrl_reason.algorithms.vine import VineConfig
from openrl_reason.algorithms.vineppo import VinePPOAlgoConfig, VinePPOConfig, VinePPOTrainer
from openrl_reason.core.trajectory import StopReason
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig, check_requests

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
ALPHABET = "\nabcdefghij"


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Chain:
    """``table[s, a]``: probability of token a after token s. Token 0 is the end, token i > 0 is ``alphabet[i - 1]``."""

    def __init__(self, alphabet: str = ALPHABET, *, seed: int = 0, end: float = 0.12, newline: float = 0.22, end_after_newline: bool = True) -> None:
        self.alphabet, self.tokens = alphabet, [EOS, *ids_of(alphabet)]
        rest = np.random.default_rng(seed).dirichlet(np.ones(len(alphabet) - 1), size=len(self.tokens))
        self.table = np.hstack([np.full((len(self.tokens), 1), end), np.full((len(self.tokens), 1), newline), rest * (1 - end - newline)])
        if not end_after_newline:
            self.table[1, 0] = 0.0
            self.table[1] /= self.table[1].sum()
        self._cumulative = np.cumsum(self.table, axis=1)
        self._index = {token: index for index, token in enumerate(self.tokens)}

    def state(self, token: int) -> int:
        """Row of the table after a token; tokens that the chain never writes have a row, too."""
        return self._index.get(token, token % len(self.tokens))

    def sample(self, last: int, budget: int, seed: int) -> tuple[list[int], list[float], StopReason]:
        cumulative, state = self._cumulative, self.state(last)
        ids, logprobs = [], []
        for draw in np.random.default_rng(seed).random(budget):
            action = min(int(np.searchsorted(cumulative[state], draw, side="right")), len(self.tokens) - 1)
            ids.append(self.tokens[action])
            logprobs.append(float(np.log(self.table[state, action])))
            if action == 0:
                return ids, logprobs, StopReason.EOS
            state = action
        return ids, logprobs, StopReason.LENGTH

    def value(self, prompt: str, response: str, budget: int, letter: str = "a") -> float:
        """Probability that a finished response has an odd number of ``letter``, after ``response`` and with ``budget`` tokens left."""
        last = self.state(ids_of(prompt + response)[-1])
        return self._values(letter)(last, response.count(letter) % 2, budget)

    def _values(self, letter: str) -> Callable[[int, int, int], float]:
        marked = 1 + self.alphabet.index(letter)

        @cache
        def value(state: int, odd: int, budget: int) -> float:
            if not budget:
                return 0.0
            later = sum(self.table[state, a] * value(a, odd ^ (a == marked), budget - 1) for a in range(1, len(self.tokens)))
            return float(self.table[state, 0] * odd + later)

        return value


def parity(sample: RewardSample, letter: str = "a") -> RewardResult:
    """1 for a finished response with an odd number of a's, else 0."""
    return RewardResult(float(sample.response.count(letter) % 2 and sample.stop_reason != "length"))


class ToyPool:
    """Engines that sample from a chain. Completions come back in an order that the seed scrambles; what a request gets depends on its seed alone."""

    def __init__(self, chain: Chain, *, max_model_len: int = 256, order: int = 0, first_in: bool = False) -> None:
        self.chain, self.config = chain, RolloutConfig(max_model_len=max_model_len)
        self.first_in = first_in  # answer in the order of submission
        self.requests: list[Request] = []
        self.returned: list[Completion] = []
        self._waiting: list[Request] = []
        self._seen: set[str] = set()
        self._order = np.random.default_rng(order)
        self._counts: Counter[str] = Counter(
            requests=0, completed=0, restarts=0, resubmitted=0, prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=0
        )

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        check_requests(requests, self.config, ())
        ids = {request.request_id for request in requests}
        assert not ids & self._seen, "a sample was asked for twice"
        self._seen |= ids
        self._waiting += requests
        self.requests += requests
        self._counts["requests"] += len(requests)

    def generate(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        self.submit(requests)
        return self._stream()

    def _stream(self) -> Iterator[Completion]:
        while self._waiting:
            place = 0 if self.first_in else int(self._order.integers(len(self._waiting)))
            completion = self.complete(self._waiting.pop(place))
            self.returned.append(completion)
            yield completion

    def complete(self, request: Request) -> Completion:
        ids, logprobs, stop_reason = self.chain.sample(request.prompt_ids[-1], request.sampling.max_new_tokens, request.seed)
        text = TOKENIZER.decode(ids, skip_special_tokens=True)  # a character for each token; engines look at what they write, not at the prompt
        ends = [place + len(stop) for stop in request.sampling.stop if (place := text.find(stop)) >= 0]
        if ends:
            ids, logprobs, stop_reason = ids[: min(ends)], logprobs[: min(ends)], StopReason.STOP_STRING
        self._counts.update(completed=1, prompt_tokens=len(request.prompt_ids), generated_tokens=len(ids))
        return Completion(request.request_id, ids, logprobs, stop_reason, None, policy_version=0, num_cached_tokens=0)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def stats(self) -> dict[str, float]:
        return dict(self._counts) | {"seconds_busy/engine-0": 0.0, "seconds_busy_max": 0.0}

    def branches(self) -> list[Request]:
        """Requests that are no trajectories'."""
        return [request for request in self.requests if "/branch/" in request.request_id]


class ToyRewarder:
    """``score`` of each sample. answer: "now", "flush" (all at once, when asked to), or "late" (from another thread, a moment after)."""

    def __init__(self, score: Callable[[RewardSample], RewardResult] = parity, *, answer: str = "now", parent: ToyRewarder | None = None) -> None:
        self.score, self.answer, self.samples = score, answer, []
        self._queue = [] if parent is None else parent._queue

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        self.samples.append(sample)
        future: Future[RewardResult] = Future()
        if self.answer == "now":
            future.set_result(self.score(sample))
        elif self.answer == "flush":
            self._queue.append((future, sample))
        else:
            threading.Timer(0.002, lambda: future.set_result(self.score(sample))).start()
        return future

    def flush(self) -> None:
        while self._queue:
            future, sample = self._queue.pop()  # last in, first out
            future.set_result(self.score(sample))

    def with_own_numbers(self) -> ToyRewarder:
        self.beside = ToyRewarder(self.score, answer=self.answer, parent=self)
        return self.beside

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class ToyTask(Task):
    """Prompts of one letter each (and the line feed of the template)."""

    name = "toy"

    def __init__(self, prompts: str = "bcde") -> None:
        super().__init__(TaskConfig())
        self.prompts = prompts

    def load_split(self, split: str):
        return [self.make_item(prompt, gold="") for prompt in self.prompts]


def toy_vineppo(
    *,
    pool: ToyPool | None = None,
    rewarder: ToyRewarder | None = None,
    prompts: str = "bc",
    samples: int = 3,
    max_new_tokens: int = 12,
    step_kind: object = None,
    gamma: float = 1.0,
    whiten: str = "none",
    max_failed_rate: float = 0.5,
    tokenizer: object = TOKENIZER,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    **vine: object,
) -> VinePPOTrainer:
    """A VinePPO trainer whose engines are a chain: ``collect`` and ``credit`` are the real ones."""
    config = VinePPOConfig(
        prompts_per_step=len(prompts), samples_per_prompt=samples, sampling=SamplingConfig(max_new_tokens=max_new_tokens, stop=stop),
        algo=VinePPOAlgoConfig(gamma=gamma, whiten=whiten), vine=VineConfig(**{"num_rollouts": 4, **vine}),
        reward=RewardConfig(max_failed_rate=max_failed_rate),
    )  # fmt: skip
    trainer = VinePPOTrainer(config, task=ToyTask(prompts))
    trainer.task, trainer.sampling, trainer.tokenizer = trainer._task, config.sampling, tokenizer
    if step_kind is not None:
        trainer.task.step_kind = step_kind
    trainer.pool, trainer.rewarder, trainer.reference = pool or ToyPool(Chain()), rewarder or ToyRewarder(), None
    trainer.collector = Collector(trainer.task, tokenizer, trainer.pool, trainer.rewarder)
    trainer.sampler = ItemSampler(trainer.task.items("train"), seed)
    trainer.done = seed
    return trainer


def written(texts: Sequence[str | list[int]], *, siblings: int, chain: Chain | None = None, **settings: object) -> ToyPool:
    """A pool whose trajectories are given, prompt by prompt, as ids or as text ("$" at the end: the end token); branches come from the chain."""
    pool = ToyPool(chain or Chain(), **settings)
    sample = pool.complete

    def complete(request: Request) -> Completion:
        completion = sample(request)
        if "/train/" in request.request_id:
            place, number = map(int, request.request_id.split("/")[-2:])
            text = texts[place * siblings + number]
            ids = text if isinstance(text, list) else ids_of(text.removesuffix("$")) + [EOS] * text.endswith("$")
            completion.token_ids, completion.logprobs = list(ids), [-1.0] * len(ids)
            completion.stop_reason = StopReason.EOS if EOS in ids[-1:] else StopReason.LENGTH
        return completion

    pool.complete = complete
    return pool
