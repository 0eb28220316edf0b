"""Shared by the rollout tests: a tiny model that says varied things, and an engine in a process of its own."""

import multiprocessing
import os
import random
import traceback
from pathlib import Path

import torch

from openrl_reason.workers.rollout_config import Request, RolloutConfig, SamplingConfig

CONFIG = RolloutConfig(dtype="float32", max_model_len=192, max_num_seqs=32, kv_cache_gib=0.0625, weight_transport="shared_memory")


def make_tiny(folder: Path, *, tied: bool = True) -> Path:
    """A random model whose biases are random too: Hugging Face starts them at 0, which would hide a bias that is not loaded."""
    from transformers import AutoModelForCausalLM

    from openrl_reason.models.tiny import make_model

    make_model(folder, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128, max_position=256,
               tie_word_embeddings=tied, initializer_range=0.2)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    perturb(model, seed=1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    """Changes every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_requests(count: int, *, seed: int = 0, max_new_tokens: int = 24, siblings: int = 1, **sampling) -> list[Request]:
    """Prompts of 1 to 90 tokens, each with some siblings of its own seed."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 261) for _ in range(rng.choice((1, 7, 33, 64, 90)))] for _ in range(count)]
    settings = SamplingConfig(max_new_tokens=max_new_tokens, **sampling)
    return [
        Request(f"{index}/{sibling}", prompt, seed=1000 * index + sibling, sampling=settings, group=str(index))
        for index, prompt in enumerate(prompts)
        for sibling in range(siblings)
    ]


class EngineProcess:
    """A `RolloutEngine` in a child process without Ray: vLLM changes process-wide state that other tests would see."""

    def __init__(self, config: RolloutConfig, model_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, str(model_path)), daemon=True)
        self._process.start()

    def __getattr__(self, name):
        return lambda *args, **kwargs: self._ask(name, args, kwargs)

    def _ask(self, name, args=(), kwargs=None):
        self._pipe.send((name, args, kwargs or {}))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def generate(self, requests):
        """Completions by request id."""
        completions = self.pump(requests, 0.01)
        while self.get("num_unfinished"):
            completions += self.pump([], 10.0)
        assert len(completions) == len(requests)
        return {completion.request_id: completion for completion in completions}

    def stop(self):
        """Ends the process."""
        self._process.kill()
        self._process.join()


def _serve(pipe, config, model_path):
    from openrl_reason.workers.engine import RolloutEngine

    os.environ["CXX"] = "/no/compiler/is/needed"
    engine = RolloutEngine(config, model_path)
    while True:
        name, args, kwargs = pipe.recv()
        try:
            pipe.send(getattr(engine, *args) if name == "get" else getattr(engine, name)(*args, **kwargs))
        except Exception as error:  # goes back to the test
            traceback.print_exc()
            pipe.send(error)


@torch.no_grad()
def hf_logprobs(model, request, completion) -> torch.Tensor:
    """Log-probs of a completion's tokens under the request's sampling settings, by one Hugging Face forward over the whole text."""
    ids = torch.tensor([request.prompt_ids + completion.token_ids])
    logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
    sampling = request.sampling
    if sampling.temperature:
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, probs.cumsum(-1) - probs >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@torch.no_grad()
def hf_greedy(model, request) -> list[int]:
    """Hugging Face's greedy continuation."""
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.sampling.max_new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()
