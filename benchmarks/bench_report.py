"""The report of a long run: time to build it, its size, and the time until headless Chromium has it on the screen.

    python benchmarks/bench_report.py [--steps 10000] [--trajectories 5000] [--tokens 300] [--keep DIR]

Makes a synthetic run (rewards rise, entropy falls, spikes, a dip of the evaluation, wrong and unfinished answers; every token with advantage, value
and two kinds of log-probs, which do not compress), writes its report and opens it from a file: address. Loaded means that header, alarms, the
charts in view and the list of trajectories with the first one opened are painted: the page then writes performance.now() into its document, so
the figure holds parsing, unpacking, drawing and everything since navigation began. Medians over fresh browser profiles; ``at_charts`` is the
same for a page opened in the middle, where six charts are in view.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from _browser import browser, chromium
from _record import write

from openrl_reason.observe.report import ReportConfig, report

WORDS = "so we add the ones first then tens carry one and get a number that is larger than before which means let us check again wait no".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--trajectories", type=int, default=5_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", default="", help="keep run and page in this folder")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(words.keep or temporary)
        run = folder / "synthetic"
        make_run(run, steps=words.steps, trajectories=words.trajectories, mean_tokens=words.tokens)
        started = time.perf_counter()
        page = report(ReportConfig(runs=(str(run),), output=str(folder / "report.html")))
        build = time.perf_counter() - started
        loads = [load(page) for _ in range(words.repeats)]
        seconds = [entry[0] for entry in loads]
        charts = [load(page, "at=policy")[0] for _ in range(words.repeats)]
        source = (run / "rollouts.jsonl").stat().st_size
        row = {
            "steps": words.steps, "metrics": len(metrics(0, words.steps, np.random.default_rng(0))), "trajectories": loads[0][1],
            "mean_tokens": words.tokens, "rollouts_mb": source / 1e6, "page_mb": page.stat().st_size / 1e6, "build_seconds": build,
            "loaded_seconds": statistics.median(seconds), "loaded_worst": max(seconds),
            "loaded_at_charts_seconds": statistics.median(charts),
        }  # fmt: skip
    browser = subprocess.run([chromium(), "--version"], capture_output=True, text=True).stdout.strip()
    write("report", {"repeats": words.repeats, "browser": browser, "limits": {"page_mb": 25, "loaded_seconds": 3}}, [row])


def load(page: Path, fragment: str = "") -> tuple[float, int]:
    """Seconds until the page stood, in a fresh browser and in real time, and the number of trajectories it says it has."""
    with browser() as window:
        seconds = window.open(page, fragment)
        if window.run("document.documentElement.dataset.errors") != "0" or window.complaints() or len(window.requests()) != 1:
            raise SystemExit(f"the page did not load well: {window.complaints()} {window.requests()}")
        return seconds, int(re.sub(r"\D", "", window.run("document.querySelector('.count').textContent")))


# ---- a run that looks like one ---------------------------------------------------------------------------------------------------


def make_run(folder: Path, *, steps: int, trajectories: int, mean_tokens: int, seed: int = 0, group: int = 5, lift: float = 1.0) -> None:
    """Writes config.yaml, metrics.jsonl and rollouts.jsonl of a run of ``steps`` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (folder / "config.yaml").write_text(
        f"run: {{output_dir: {folder.name}, steps: {steps}, seed: {seed}}}\npolicy: {{path: models/small-135m, lr: {1e-6 * lift:g}}}\n"
        "task: {name: arithmetic, levels: [1, 2]}\nalgo: {advantage: rloo, kl: {where: loss, coef: 0.001}}\n"
        "prompts_per_step: 32\nsamples_per_prompt: 8\n"
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            if step % max(1, steps // 25) == 0:
                file.write(json.dumps({"step": step, "event": "eval", **evaluation(step, steps, rng, lift)}) + "\n")
            file.write(json.dumps({"step": step, "event": "train", **metrics(step, steps, rng, lift)}) + "\n")
    groups = max(1, trajectories // group)
    with (folder / "rollouts.jsonl").open("w") as file:
        for number in range(groups):
            step = number * steps // groups
            for record in siblings(step, steps, number, rng, min(group, trajectories), mean_tokens, lift):
                file.write(json.dumps(record) + "\n")


def skill(step: int, steps: int, lift: float = 1.0) -> float:
    """Between 0 and 1, rising."""
    return 0.15 + 0.75 / (1 + math.exp(-8 * lift * (step / steps - 0.35)))


def metrics(step: int, steps: int, rng: np.random.Generator, lift: float = 1.0) -> dict[str, float | None]:
    """Sixty metrics of one step."""
    now, noise = skill(step, steps, lift), rng.normal(size=64)
    spike = 1 + 30 * (rng.random() < 4 / steps)
    length = 60 + 240 * now + 12 * noise[0]
    generate, update = 3.1 + length / 90 + 0.2 * abs(noise[1]), 2.4 + 0.1 * abs(noise[2])
    entropy = 1.2 * math.exp(-4.2 * step / steps) * (1 + 0.05 * noise[3]) + 0.004
    rows = {
        "train/reward": now + 0.04 * noise[4], "train/reward_std": math.sqrt(now * (1 - now)) + 0.01 * noise[5], "train/return": 0.02 * noise[6],
        "train/policy_loss": -0.02 * now + 0.01 * noise[7],
        "train/zero_variance_groups": min(1.0, max(0.0, abs(now - 0.4) * 1.7 + 0.05 * noise[8])),
        "train/kl": 0.001 + 0.06 * (step / steps) ** 2 * (1 + 0.1 * noise[9]) * spike, "train/entropy": entropy, "train/kl_coef": 0.001,
        "train/clip_fraction/low": abs(0.01 * noise[10]), "train/clip_fraction/high": abs(0.015 * noise[11]),
        "train/ratio/min": 1 - abs(0.3 * noise[12]), "train/ratio/max": 1 + abs(0.5 * noise[13]) * spike,
        "train/approx_kl": abs(0.002 * noise[14]), "train/grad_norm": (0.4 + 0.06 * noise[15]) * spike,
        "train/lr": 1e-6 * min(1.0, step / (0.03 * steps) if step < 0.03 * steps else 1.03 - step / steps), "train/skipped_update": 0.0,
        "response_length/mean": length, "response_length/max": min(512.0, length * 1.7), "response_length/min": length * 0.3,
        "response_length/clip_ratio": max(0.0, 0.02 + 0.01 * noise[16] + (0.3 if 0.5 < step / steps < 0.53 else 0)),
        "prompt_length/mean": 34 + noise[17], "reward/correct": now + 0.03 * noise[18], "reward/format": min(1.0, 0.5 + now / 2),
        "reward/no_answer_rate": max(0.0, 0.25 * (1 - now) + 0.02 * noise[19]), "reward/timeout_rate": 0.0 if step % 997 else 0.03,
        "reward/error_rate": 0.0, "rollout/ungraded": 0.0, "rollout/engine_restarts": float(step == steps * 2 // 3), "rollout/resubmitted": 0.0,
        "rollout/prefix_cache_hit": 0.6 + 0.02 * noise[20], "sampling/logprob_difference/mean": 4e-5 * (1 + 0.2 * abs(noise[21])) * spike,
        "sampling/logprob_difference/max": 4e-4 * (1 + abs(noise[22])) * spike, "critic/vf_explained_var": 0.8 * now - 0.1 + 0.05 * noise[23],
        "critic/value_loss": 0.2 * (1 - now) + 0.02 * abs(noise[24]), "critic/values_mean": now,
        "credit/step_advantage_std": 0.3 + 0.02 * noise[25], "credit/value_bias": 0.05 * noise[26], "offline/weight_mean": 1 + 0.1 * noise[27],
        "timing/generate": generate, "timing/generate_busy": generate * 0.95, "timing/grade": 0.02, "timing/credit": 0.4,
        "timing/reference_wait": 0.1, "timing/score": 0.28, "timing/forward_backward": update * 0.85, "timing/optimizer": update * 0.1,
        "timing/update": update, "timing/sync": 0.31 + 0.02 * noise[28], "timing/step": generate + update + 0.9,
        "perf/tokens_per_second": 256 * length / (generate + update + 0.9), "perf/trained_tokens_per_second": 256 * length / update,
    }  # fmt: skip
    rows |= {f"extra/metric_{number}": float(noise[30 + number]) for number in range(60 - len(rows))}
    return {name: round(float(value), 8) for name, value in rows.items()}


def evaluation(step: int, steps: int, rng: np.random.Generator, lift: float) -> dict[str, float]:
    """An evaluation that falls behind in the last fifth, while the reward goes on rising."""
    score = min(0.97, 0.9 * skill(step, steps, lift) - (0.12 if step > 0.85 * steps else 0) + 0.01 * rng.normal())
    found = {}
    for name, gap in (("arithmetic", 0.0), ("gsm8k", 0.3)):
        mean = max(0.01, score - gap * score)
        found |= {f"eval/{name}/pass@1": mean, f"eval/{name}/pass@1_low": mean - 0.03, f"eval/{name}/pass@1_high": mean + 0.03}
        found |= {
            f"eval/{name}/pass@8": min(1.0, mean + 0.1),
            f"eval/{name}/maj@8": min(1.0, mean + 0.04),
            f"eval/{name}/response_length": 200 * (score + 0.4),
        }
        found |= {f"eval/{name}/truncated_rate": 0.03, f"eval/{name}/no_answer_rate": 0.1 * (1 - score), "timing/evaluate": 21.0}
    return found


def siblings(step: int, steps: int, number: int, rng: np.random.Generator, count: int, mean_tokens: int, lift: float) -> list[dict]:
    """Responses to one sum: worked out step by step, some wrong, some cut off."""
    a, b = int(rng.integers(1000, 99999)), int(rng.integers(1000, 99999))
    now = skill(step, steps, lift)
    right = rng.random(count) < np.clip(now + 0.35 * rng.normal(), 0, 1)
    mean = right.mean()
    records = []
    for place in range(count):
        tokens, starts = response_tokens(rng, a, b, int(mean_tokens * rng.uniform(0.6, 1.4)), bool(right[place]))
        cut = rng.random() < 0.03
        tokens = tokens[: len(tokens) * 2 // 3] if cut else tokens
        starts = [start for start in starts if start < len(tokens)]
        score = 0.0 if cut else float(right[place])
        answer = "".join(tokens).split("#### ")[-1] if not cut else None
        n = len(tokens)
        value = np.clip(now + 0.35 * np.cumsum(rng.normal(size=n)) / np.sqrt(n) * (1 if right[place] else -1), 0, 1)
        logprob = -rng.exponential(0.25, size=n)
        data = {
            "advantage": 0.5 * (score - mean) + 0.6 * np.gradient(value, 12.0) + 0.35 * (score - value),
            "value": value,
            "logprob": logprob,
            "logprob_ratio": 4e-3 * rng.normal(size=n),
        }
        records.append({
            "step": step, "source": "train" if number % 10 else "eval/arithmetic", "trajectory_id": f"{number:06x}{place:02x}",
            "task_id": f"sum-{number:05d}", "prompt": f"What is {a} + {b}? Work it out column by column, then write #### and the sum.",
            "response": "".join(tokens), "gold": str(a + b), "parsed": answer,
            "status": "no_answer" if cut else "timeout" if rng.random() < 0.004 else "ok", "detail": "", "reward": score,
            "reward_terms": {"correct": score, "format": 0.1 * (not cut)}, "stop_reason": "length" if cut else "eos", "num_tokens": n,
            "policy_version": step, "tokens": tokens,
            "token_data": {name: [round(float(v), 6) for v in values] for name, values in data.items()}, "step_starts": starts,
            "step_rewards": [0.0] * (len(starts) - 1) + [score],
        })  # fmt: skip
    return records


def response_tokens(rng: np.random.Generator, a: int, b: int, count: int, right: bool) -> tuple[list[str], list[int]]:
    """Tokens of a worked sum with some padding talk, and where its steps begin."""
    tokens, starts, carry = [], [], 0
    columns = max(len(str(a)), len(str(b)))
    talk = max(4, (count - 6 - 14 * columns) // columns)
    for column in range(columns):
        starts.append(len(tokens))
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        tokens += [f"{column + 1}", ".", " ", str(x), " +", f" {y}", " +", f" {carry}", " =", f" {total}", ",", " carry", f" {total // 10}", "."]
        tokens += [" " + WORDS[index] for index in rng.integers(0, len(WORDS), size=talk)]
        tokens.append("\n")
        carry = total // 10
    starts.append(len(tokens))
    wrong = 0 if right else int(rng.integers(1, 9)) * 10 ** int(rng.integers(0, columns))
    return [*tokens, "####", " ", *str(a + b + wrong)], starts


if __name__ == "__main__":
    main()
