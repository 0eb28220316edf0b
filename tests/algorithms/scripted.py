"""Engines and rewards whose answers are written down beforehand, so that counts can be foretold. Both answer in an order that a seed scrambles."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import Future

from openrl_reason.core.trajectory import StopReason
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.rollout_config import Completion, RolloutConfig

TOKENIZER = make_tokenizer()


class ScriptedTask(Task):
    """Questions 0, 1, 2, ...: ``script[q][n]`` says what sample n of question q is: R(ight), W(rong), F(ailed grading) or T (right, cut off)."""

    name = "scripted"

    def __init__(self, script: dict[str, str]) -> None:
        super().__init__(TaskConfig())
        self.script = script

    def load_split(self, split):
        return [self.make_item(question, gold="") for question in self.script]


class ScriptedPool:
    """Completions of a script. What a sample is depends on its question and number; ``requests`` are all that were asked for."""

    def __init__(self, script, *, order=0, fail_after=None, at_once=7):
        self.script, self.random, self.fail_after, self.at_once = script, random.Random(order), fail_after, at_once
        self.config, self.requests, self.waiting, self.served, self.aborted = RolloutConfig(), [], [], 0, 0
        self.most_waiting = 0

    @property
    def num_unfinished(self):
        return len(self.waiting)

    def submit(self, requests):
        requests = list(requests)
        ids = {request.request_id for request in self.requests}
        assert not any(request.request_id in ids for request in requests), "a sample was asked for twice"
        self.requests += requests
        self.waiting += requests
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def poll(self):
        self.random.shuffle(self.waiting)
        count = self.random.randint(0, min(self.at_once, len(self.waiting)))
        ready, self.waiting = self.waiting[:count], self.waiting[count:]
        self.served += count
        if self.fail_after is not None and self.served > self.fail_after:
            raise KeyboardInterrupt
        return [self.complete(request) for request in ready]

    def complete(self, request):
        question = TOKENIZER.decode(request.prompt_ids, skip_special_tokens=True).strip()
        kind = self.script[question][int(request.request_id.rsplit("/", 1)[1])]
        text = f"{kind}{request.seed % 1000:03d}"
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        stop = StopReason.LENGTH if kind == "T" else StopReason.EOS
        return Completion(request.request_id, ids, [-0.5] * len(ids), stop, None, 0, 0)

    def abort_all(self):
        self.aborted += len(self.waiting)
        self.waiting = []

    def stats(self):
        return {"generated_tokens": 4 * self.served}


class ScriptedRewards:
    """The letter's reward: at once, by a thread, in batches that wait for ``flush``, or any of these."""

    def __init__(self, how="mixed", order=0):
        self.how, self.random, self.queue, self.counts = how, random.Random(order), [], Counter()

    def submit(self, sample):
        future = Future()
        how = self.random.choice(("now", "late", "flush")) if self.how == "mixed" else self.how
        self.counts[how] += 1
        result = self.score(sample.response[0])
        if how == "now":
            future.set_result(result)
        elif how == "late":
            threading.Timer(self.random.random() / 200, future.set_result, (result,)).start()
        else:
            self.queue.append((future, result))
        return future

    @staticmethod
    def score(kind):
        if kind == "F":
            return RewardResult(float("nan"), "timeout", None, "too late")
        return RewardResult(float(kind in "RT"), "ok", kind)

    def flush(self):
        while self.queue:
            future, result = self.queue.pop()
            future.set_result(result)

    def metrics(self):
        return {}

    def close(self): ...
