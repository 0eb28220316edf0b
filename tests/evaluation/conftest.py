"""Engines that answer at once, a task of five sums, and a tokenizer of characters: the parts of an evaluation without vLLM."""

import pytest

from openrl_reason.core.trajectory import StopReason
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.grading import GraderPool
from openrl_reason.workers.rollout_config import Completion


class Characters:
    """A tokenizer: a token per character."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(token) for token in ids if token or not skip_special_tokens)


class Sums(Task):
    """1+1=? ... 5+5=?; the last one is long."""

    name = "sums"
    grade_kind = "gsm8k"
    default_prompt_template = "{question}"

    def load_split(self, split):
        first = 0 if split == "test" else 100
        items = []
        for n in range(1, 6):
            question = f"{first + n}+{first + n}=?" + " " * (80 if n == 5 else 0)
            items.append(self.make_item(question, gold=str(2 * (first + n)), info={"id": f"sum-{n}", "level": n % 2}))
        return items


class AnsweringPool:
    """Answers ``a+b=?``: sample 0 is right with the mark, the others add the sample's number, and sample 3 gives none. Remembers requests."""

    def __init__(self, fail_after=None):
        self.served, self.fail_after = [], fail_after

    def stats(self):
        return {"prompt_tokens": 0, "cached_prompt_tokens": 0, "generated_tokens": 0, "restarts": 0, "resubmitted": 0, "seconds_busy/engine-0": 0.0}

    def generate(self, requests):
        for request in requests:
            if self.fail_after is not None and len(self.served) == self.fail_after:
                raise KeyboardInterrupt
            self.served.append(request)
            text = "".join(map(chr, request.prompt_ids))
            sample = int(request.request_id.rsplit("/", 1)[1])
            left, right = text.split("=")[0].split("+")
            answer = "no idea" if sample == 3 else f"so #### {int(left) + int(right) + sample}"
            ids = [ord(character) for character in answer]
            yield Completion(request.request_id, ids, [-0.5] * len(ids), StopReason.LENGTH if sample == 3 else StopReason.EOS, None, 0, 0)


@pytest.fixture(scope="session")
def grader():
    pool = GraderPool(1)
    yield pool
    pool.close()


@pytest.fixture
def sums():
    return Sums(TaskConfig())
