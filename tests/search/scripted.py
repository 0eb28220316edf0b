"""Engines that answer from a script, in a scrambled order, a few at a time; and value models that are functions of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

import numpy as np

from openrl_reason.core.trajectory import StopReason
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.search.candidates import Problem, StepReader
from openrl_reason.search.drive import run_searches
from openrl_reason.search.serving import PoolSampler
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig, check_requests

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
END = "~"
"""In a script: the end-of-sequence token."""

Script = Callable[[str, int, int], str]
"""(text so far, number of the sample, seed) -> all that the model would write, ``END`` at its end where it ends."""


_TEXTS = {token: TOKENIZER.decode([token]) for token in range(len(TOKENIZER))} | {EOS: END}
_IDS = {character: TOKENIZER(character, add_special_tokens=False)["input_ids"][0] for character in map(chr, range(128))} | {END: EOS}


def ids_of(text: str) -> list[int]:
    """A token for each (ASCII) character."""
    return [_IDS[character] for character in text]


def text_of(ids: Iterable[int]) -> str:
    """With ``END`` for the end token."""
    return "".join(_TEXTS[token] for token in ids)


class ScriptedPool:
    """A rollout pool. It looks for stop strings in what it writes, not in the prompt, and keeps them, as engines do."""

    def __init__(self, script: Script, *, order: int | None = None, max_model_len: int = 256) -> None:
        self.script, self.config = script, RolloutConfig(max_model_len=max_model_len)
        self.requests: list[Request] = []
        self._waiting: list[Request] = []
        self._seen: set[str] = set()
        self._order = None if order is None else np.random.default_rng(order)
        self.generated_tokens = 0

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        check_requests(requests, self.config, [self._seen])
        self._seen |= {request.request_id for request in requests}
        self.requests += requests
        self._waiting += requests

    def generate(self, requests: Iterable[Request] = ()):
        self.submit(requests)
        while self._waiting:
            yield from self.poll()

    def poll(self) -> list[Completion]:
        count = 1
        if self._order is not None:
            self._order.shuffle(self._waiting)
            count = int(self._order.integers(0, 4))
        now, self._waiting = self._waiting[:count], self._waiting[count:]
        return [self.complete(request) for request in now]

    def complete(self, request: Request) -> Completion:
        sampling, sample = request.sampling, int(request.request_id.rsplit("/", 1)[1])
        text = self.script(text_of(request.prompt_ids), sample, request.seed)
        found = [(text.find(stop), stop) for stop in sampling.stop if stop in text]
        place, stop = min(found, key=lambda one: one[0] + len(one[1]), default=(0, None))
        ids = ids_of(text[: place + len(stop)] if stop else text)
        if len(ids) > sampling.max_new_tokens:
            ids, stop, reason = ids[: sampling.max_new_tokens], None, StopReason.LENGTH
        elif stop:
            reason = StopReason.STOP_STRING
        else:
            reason = StopReason.EOS if ids and ids[-1] == EOS else StopReason.LENGTH
        self.generated_tokens += len(ids)
        return Completion(request.request_id, ids, [-0.1] * len(ids), reason, stop, policy_version=0, num_cached_tokens=0)

    def stats(self) -> dict[str, float]:
        return {"generated_tokens": self.generated_tokens}


class Oracle:
    """A value model: a function of the text of a state. Remembers what it was asked; ``order`` delays and scrambles its answers."""

    def __init__(self, value: Callable[[str], float]) -> None:
        self.value, self.asked = value, []

    def submit(self, token_ids: tuple[int, ...]) -> Future[float]:
        self.asked.append(text_of(token_ids))
        future: Future[float] = Future()
        future.set_result(self.value(self.asked[-1]))
        return future


def by_number(*options: str) -> Script:
    """Sample i writes option i, whatever stands before."""
    return lambda text, sample, seed: options[sample % len(options)]


def problem(prompt: str = "Q:", *, budget: int = 100, max_model_len: int = 256, identity: str | None = None) -> Problem:
    return Problem.fitting(identity or prompt, ids_of(prompt), budget, max_model_len)


def reader(kind="newline", **settings) -> StepReader:
    return StepReader(TOKENIZER, kind, **settings)


def run(searches, script, value=lambda text: 0.0, *, stop=("\n",), seed=(0, "search"), concurrent=0, **pool):
    """Outcomes, the pool and the oracle of some searches."""
    engines, oracle = ScriptedPool(script, **pool) if not isinstance(script, ScriptedPool) else script, Oracle(value)
    sampler = PoolSampler(engines, SamplingConfig(stop=tuple(stop)), seed)
    outcomes = run_searches(searches, sampler, oracle if value is not None else None, concurrent=concurrent)
    assert sampler.num_open == 0 and sampler._missing == {} and sampler._call._asked == {}, "nothing is left behind"
    return outcomes, engines, oracle


def answers(outcome) -> list[str]:
    return [text_of(one.response) for one in outcome.finished]
