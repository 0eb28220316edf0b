"""Tokens generated per second in a beam search over steps, against plain sampling on the same engine.

Both sample the same prompts from one pool in turns, plain sampling the number of responses whose tokens come nearest to the search's. The search
is run twice: with values that cost nothing, which shows what stepwise requests cost by themselves, and with a critic of the policy's size on an actor
of its own, which on a CPU takes its share of the cores. The model is random: steps are runs of tokens, cut by the limit of a step.

    python benchmarks/bench_search.py [--repeats 3] [--small]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from _record import write

BEAMS, STEP_TOKENS, MAX_NEW_TOKENS = 3, 24, 120


def make_models(folder: Path, hidden_size: int) -> tuple[str, str]:
    """A policy, and a critic made of it with a head that says something."""
    from transformers import AutoTokenizer

    from openrl_reason.models.scalar_model import load_scalar_model
    from openrl_reason.models.tiny import make_model

    make_model(
        folder / "policy", hidden_size=hidden_size, num_layers=2, num_heads=hidden_size // 64, num_kv_heads=1, intermediate_size=4 * hidden_size
    )
    load_scalar_model(str(folder / "policy"), "float32", head_init="small").save_pretrained(folder / "critic")
    AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / "critic")
    return str(folder / "policy"), str(folder / "critic")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few prompts, to see that it runs; nothing is written")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openrl_reason.models.loading import load_tokenizer
    from openrl_reason.search import BatchedValuer, BeamSettings, PoolSampler, Problem, StepReader, beam_search, run_searches, sample_responses
    from openrl_reason.workers.model_config import ScalarModelConfig
    from openrl_reason.workers.model_group import ModelGroup
    from openrl_reason.workers.placement import Placement, PlacementConfig, Role
    from openrl_reason.workers.prefix_values import PrefixValues
    from openrl_reason.workers.rollout import RolloutPool
    from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

    num_prompts, hidden_size = (4, 64) if args.small else (64, 256)
    repeats = 1 if args.small else args.repeats
    policy, critic = make_models(Path(tempfile.mkdtemp()), hidden_size)
    tokenizer = load_tokenizer(policy)
    prompts = [tokenizer(f"{place} + {place} = ")["input_ids"] for place in range(num_prompts)]
    config = RolloutConfig(dtype="float32", max_model_len=256, kv_cache_gib=0.1 if args.small else 0.5)
    problems = [Problem.fitting(str(place), ids, MAX_NEW_TOKENS, config.max_model_len) for place, ids in enumerate(prompts)]
    steps, whole = StepReader(tokenizer, "newline", step_tokens=STEP_TOKENS), StepReader(tokenizer, "response")
    rows, rates = [], {"plain": [], "no critic": [], "critic": []}
    with Placement(PlacementConfig(device="cpu"), [Role("engine", 1), Role("critic", 1)]) as placement:
        group = ModelGroup.start(ScalarModelConfig(path=critic, dtype="float32"), role="critic", placement=placement, wait=False)
        with (
            RolloutPool(config, policy, placement=placement) as pool,
            BatchedValuer(lambda states: np.array([hash(state) % 1009 for state in states])) as free,
            BatchedValuer(PrefixValues(group, 1 << 30)) as served,
        ):

            def run(way: str, repeat: int, num_samples: int) -> int:
                valuer, reader = {"plain": (None, whole), "no critic": (free, steps), "critic": (served, steps)}[way]
                searches = [
                    sample_responses(one, range(num_samples), whole, None) if way == "plain" else beam_search(one, BeamSettings(BEAMS), steps)
                    for one in problems
                ]
                sampler = PoolSampler(pool, SamplingConfig(stop=reader.stop), (repeat, way))
                before, calls, started = pool.stats(), dict(valuer.counts) if valuer else {}, time.perf_counter()
                busy = valuer.seconds_busy if valuer else 0.0
                run_searches(searches, sampler, valuer)
                seconds, after = time.perf_counter() - started, pool.stats()
                tokens = int(after["generated_tokens"] - before["generated_tokens"])
                if repeat:
                    rates[way].append(tokens / seconds)
                    rows.append({
                        "way": way, "seconds": seconds, "tokens": tokens, "tokens/s": tokens / seconds,
                        "samples": num_samples if way == "plain" else "",
                        "engine busy": (after["seconds_busy_max"] - before["seconds_busy_max"]) / seconds,
                        "value calls": valuer.counts["calls"] - calls["calls"] if valuer else 0,
                        "states": valuer.counts["states"] - calls["states"] if valuer else 0,
                        "critic busy": (valuer.seconds_busy - busy) / seconds if valuer else 0.0,
                    })  # fmt: skip
                return tokens

            one_sample = run("plain", 0, 1)  # the first round warms up, and tells how many samples make as many tokens
            num_samples = max(1, round(run("no critic", 0, 0) / one_sample))
            run("critic", 0, 0)
            for repeat in range(1, repeats + 1):
                for way in rates:
                    run(way, repeat, num_samples)
        group.close()
    for way in ("no critic", "critic"):
        ratio = statistics.median(a / b for a, b in zip(rates[way], rates["plain"], strict=True))
        rows.append({"way": f"{way} / plain (median of pairs)", "tokens/s": ratio})
    settings = {"prompts": num_prompts, "beams": BEAMS, "step_tokens": STEP_TOKENS, "max_new_tokens": MAX_NEW_TOKENS, "hidden_size": hidden_size}
    if args.small:
        print(*rows, sep="\n")
    else:
        write("search", settings, rows)


if __name__ == "__main__":
    main()
