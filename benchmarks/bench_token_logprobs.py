"""Token log-probs with backward at 1024 x 896 x 151 936 (the head of a 0.5 B Qwen2): memory and CPU time against references.

    python benchmarks/bench_token_logprobs.py [--repeats 3] [--dtypes float32 bfloat16]

References of the same run: "naive" is log_softmax over all logits, then gather; "token chunks" is the same per 128 tokens under activation
checkpointing, the usual way to save the memory. Each is run with a frozen head (LoRA, for instance) and a trained one. Every run is a fresh
process that reports its CPU-seconds and the growth of its peak resident memory above the inputs (VmHWM, reset before the run); methods take
turns, medians are shown. A trained head cannot do without the gradient of its weight (V x H numbers), so that is stated separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from _record import write
from torch.utils.checkpoint import checkpoint

from openrl_reason.core.logprobs import token_logprobs

METHODS = ("naive", "token chunks", "ours", "ours with entropy")


def naive(hidden, weight, token_ids):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, token_ids[:, None]).squeeze(1)


def token_chunks(hidden, weight, token_ids):
    parts = zip(hidden.split(128), token_ids.split(128), strict=True)
    return torch.cat([checkpoint(naive, part, weight, ids, use_reentrant=False) for part, ids in parts])


def run_method(method: str, hidden, weight, token_ids) -> None:
    if method == "naive":
        logprobs = naive(hidden, weight, token_ids)
    elif method == "token chunks":
        logprobs = token_chunks(hidden, weight, token_ids)
    elif method == "ours":
        logprobs = token_logprobs(hidden, weight, token_ids)
    else:
        logprobs, entropy = token_logprobs(hidden, weight, token_ids, with_entropy=True)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()


def status_mb(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024 / 1e6


def child(method: str, head: str, dtype: str, shape: list[int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, hidden_size, vocabulary = shape
    hidden = torch.randn(tokens, hidden_size).to(getattr(torch, dtype)).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, hidden_size)).to(hidden.dtype).requires_grad_(head == "trained")
    token_ids = torch.randint(0, vocabulary, (tokens,))
    run_method(method, hidden[:8].detach().requires_grad_(), weight[:512].detach(), token_ids[:8] % 512)  # libraries load, allocators wake
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM to the present resident size
    before, start = status_mb("VmRSS"), time.process_time()
    run_method(method, hidden, weight, token_ids)
    print(json.dumps({"cpu_s": time.process_time() - start, "peak_mb": status_mb("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs=3, type=int, default=[1024, 896, 151_936], metavar=("TOKENS", "HIDDEN", "VOCABULARY"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.shape)
        return
    rows = []
    for dtype in args.dtypes:
        for head in ("frozen", "trained"):
            rows += measure(head, dtype, args.shape, args.repeats)
    write("token_logprobs", {"shape": args.shape, "repeats": args.repeats, "threads": 1}, rows)


def measure(head: str, dtype: str, shape: list[int], repeats: int) -> list[dict]:
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method in METHODS:
            command = [sys.executable, __file__, "--child", method, head, dtype, "--shape", *map(str, shape)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[method].append(json.loads(done.stdout))
    gradient_mb = shape[1] * shape[2] * (4 if dtype == "float32" else 2) / 1e6 if head == "trained" else 0.0
    rows = []
    for method in METHODS:
        cpu, peak = (statistics.median(run[key] for run in runs[method]) for key in ("cpu_s", "peak_mb"))
        base = statistics.median(run["cpu_s"] for run in runs["naive"])
        rows.append({
            "dtype": dtype, "head": head, "method": method, "cpu_s": cpu, "cpu_over_naive": cpu / base, "peak_mb": peak,
            "weight_gradient_mb": gradient_mb, "peak_without_it_mb": peak - gradient_mb,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
