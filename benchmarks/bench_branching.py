"""What Monte-Carlo branches cost: K continuations from every step boundary of trajectories that the same engine has just generated.

    python benchmarks/bench_branching.py [--repeats 7] [--trajectories 16] [--siblings 9]

Prints a table and writes ``benchmarks/results/branching.json``. A random model of about 2 M parameters, float32, one thread, an engine in this
process. The same list of requests goes

* "plain": to vLLM itself, with its own prefix cache, all requests at once (``partial_prefix_reuse`` never);
* "reuse": to the engine as it is, which shares prefixes to the token.

Both engines generate the trajectories anew before each round, into an empty cache, and take turns; only the branches are timed. The table has
the medians of the times and of the rounds' ratios: the two of a round see the same machine. The bars: reuse <= 1.1 x plain, in seconds and in
CPU-seconds, and <= 1.15 prompt tokens computed per distinct prefix token (the nodes of the trie of the prefixes). The samples of both are
compared.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from _record import write

from openrl_reason.models.tiny import VOCAB_SIZE, make_model
from openrl_reason.workers.engine import RolloutEngine
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, SamplingConfig

CONFIG = RolloutConfig(dtype="float32", max_model_len=256, max_num_seqs=256, kv_cache_gib=0.25)
RESPONSE_TOKENS = 120
Generate = Callable[[list[Request]], dict[str, Completion]]


def make_prompts(count: int, rng: random.Random) -> list[Request]:
    """Requests for trajectories: prompts of 60 to 100 random tokens."""
    sampling = SamplingConfig(max_new_tokens=RESPONSE_TOKENS)
    prompts = [[rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randint(60, 100))] for _ in range(count)]
    return [Request(f"trajectory {number}", prompt, seed=number, sampling=sampling) for number, prompt in enumerate(prompts)]


def make_branches(prompts: list[Request], responses: dict[str, Completion], siblings: int, rng: random.Random) -> list[Request]:
    """Continuations of every beginning of whole steps (of 15 to 30 tokens), each with what the trajectory had left as its budget."""
    requests = []
    for prompt in prompts:
        tokens = prompt.prompt_ids + responses[prompt.request_id].token_ids
        end = len(prompt.prompt_ids)
        while end < len(tokens):
            sampling = SamplingConfig(max_new_tokens=len(prompt.prompt_ids) + RESPONSE_TOKENS - end)
            for sibling in range(siblings):
                name = f"{prompt.request_id}, {end}/{sibling}"
                requests.append(Request(name, tokens[:end], seed=rng.randrange(2**31), sampling=sampling))
            end += rng.randint(15, 30)
    return requests


def through_vllm(engine: RolloutEngine) -> Generate:
    """All requests to vLLM's own engine, then its steps until none is left."""

    def generate(requests: list[Request]) -> dict[str, Completion]:
        engine._unfinished.update((request.request_id, request) for request in requests)
        for request in requests:
            engine._add(request)
        completions = []
        while engine._engine.has_unfinished_requests():
            completions += [engine._completion(output) for output in engine._engine.step()]
        return {completion.request_id: completion for completion in completions}

    return generate


def through_engine(engine: RolloutEngine) -> Generate:
    """All requests to `RolloutEngine.pump`."""
    return lambda requests: {completion.request_id: completion for completion in engine.pump(requests, max_seconds=float("inf"))}


def distinct_tokens(requests: list[Request]) -> int:
    """Nodes of the trie of the prompts."""
    nodes, last = 0, ()
    for prompt in sorted({tuple(request.prompt_ids) for request in requests}):
        shared = next((at for at, (one, other) in enumerate(zip(prompt, last, strict=False)) if one != other), min(len(prompt), len(last)))
        nodes, last = nodes + len(prompt) - shared, prompt
    return nodes


def computed_tokens(requests: list[Request], completions: dict[str, Completion]) -> int:
    """Prompt tokens that were not served from the cache."""
    return sum(len(request.prompt_ids) - completions[request.request_id].num_cached_tokens for request in requests)


def same_samples(one: dict[str, Completion], other: dict[str, Completion]) -> bool:
    """Whether all token ids are equal."""
    return one.keys() == other.keys() and all(one[name].token_ids == other[name].token_ids for name in one)


def measure_engine(arguments: argparse.Namespace, folder: str) -> tuple[list[dict], dict]:
    """Rows of the table, and what was generated."""
    rng = random.Random(arguments.seed)
    engines = {"plain": RolloutEngine(replace(CONFIG, partial_prefix_reuse="never"), folder), "reuse": RolloutEngine(CONFIG, folder)}
    generate = {"plain": through_vllm(engines["plain"]), "reuse": through_engine(engines["reuse"])}
    prompts, requests = make_prompts(arguments.trajectories, rng), []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    results: dict[str, dict[str, Completion]] = {}
    for number in range(arguments.repeats + 1):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            engines[name].reset_prefix_cache()
            responses = generate[name](prompts)
            requests = requests or make_branches(prompts, responses, arguments.siblings, rng)
            started = time.perf_counter(), time.process_time()
            results[name] = generate[name](requests)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    rows = []
    for name in engines:
        wall, cpu = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        ratios = [(one[0] / plain[0], one[1] / plain[1]) for one, plain in zip(seconds[name], seconds["plain"], strict=True)]
        wall_ratio, cpu_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
        computed = computed_tokens(requests, results[name])
        rows.append({"engine": name, "seconds": wall, "cpu_seconds": cpu, "prompt_tokens_computed": computed})
        rows[-1]["computed_per_distinct"] = computed / distinct_tokens(requests)
        rows[-1] |= {"seconds_to_plain": wall_ratio, "cpu_seconds_to_plain": cpu_ratio}
    rows[-1]["within_bars"] = max(wall_ratio, cpu_ratio) <= 1.1 and rows[-1]["computed_per_distinct"] <= 1.15  # the last row is "reuse"
    about = {
        "requests": len(requests),
        "prefixes": len(requests) // arguments.siblings,
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "distinct_prefix_tokens": distinct_tokens(requests),
        "generated_tokens": sum(len(completion.token_ids) for completion in results["reuse"].values()),
        "same_samples": same_samples(results["plain"], results["reuse"]),
        "all_seconds": {name: [round(wall, 3) for wall, _ in values] for name, values in seconds.items()},
        "all_cpu_seconds": {name: [round(cpu, 3) for _, cpu in values] for name, values in seconds.items()},
    }
    return rows, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--siblings", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder) / "model", initializer_range=0.1))
        rows, about = measure_engine(arguments, model)
    write("branching", {**vars(arguments), "engine": asdict(CONFIG), **about}, rows)


if __name__ == "__main__":
    main()
