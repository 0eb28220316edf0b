"""GAE at (64, 8192): the blocked scan against a Python loop over time.

    python benchmarks/bench_gae.py [--repeats 9]

The reference is the loop as it is usually written: backwards over time, all sequences of a padded batch at once. Two variants, because
the library's function takes observations (holes in the action mask) in its stride: the loop without a mask, and the loop that carries one.
CPU-seconds, one thread, medians of interleaved repeats; the ratio is what counts. ``max_error`` is against the loop in float64; where
advantages reach 200 (gamma = lam = 1) the last bit of a float32 alone is 1.5e-5.
"""

from __future__ import annotations

import argparse

import torch
from _record import interleaved_cpu_seconds, write

from openrl_reason.core.credit import gae


def loop_gae(rewards_BT, values_BT, gamma, lam):
    running, columns = 0.0, []
    num_steps = rewards_BT.shape[1]
    for t in reversed(range(num_steps)):
        next_values = values_BT[:, t + 1] if t + 1 < num_steps else 0.0
        delta = rewards_BT[:, t] + gamma * next_values - values_BT[:, t]
        running = delta + gamma * lam * running
        columns.append(running)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values_BT


def masked_loop_gae(rewards_BT, values_BT, mask_BT, gamma, lam):
    running = next_values = torch.zeros_like(values_BT[:, 0])
    columns = []
    for t in reversed(range(rewards_BT.shape[1])):
        mask, value = mask_BT[:, t], values_BT[:, t]
        delta = rewards_BT[:, t] + gamma * next_values - value
        running = torch.where(mask, delta + gamma * lam * running, running)
        next_values = torch.where(mask, value, next_values)
        columns.append(torch.where(mask, running, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask_BT, advantages + values_BT, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = []
    for batch, steps in [(64, 1024), (64, 8192), (8, 32768)]:
        for gamma, lam in [(1.0, 1.0), (0.99, 0.95)]:
            rows += measure(batch, steps, gamma, lam, repeats)
    write("gae", {"repeats": repeats, "dtype": "float32", "unit": "CPU milliseconds"}, rows)


def measure(batch: int, steps: int, gamma: float, lam: float, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    rewards, values = torch.randn(batch, steps), torch.randn(batch, steps)
    cu_seqlens = torch.arange(0, batch * steps + 1, steps, dtype=torch.int32)
    masks = {"all tokens are actions": torch.ones(batch, steps, dtype=torch.bool), "30% observations": torch.rand(batch, steps) >= 0.3}
    rows = []
    for name, mask in masks.items():
        flat = [tensor.flatten() for tensor in (rewards, values, mask)]

        def loop(dtype=torch.float32, mask=mask):
            wide = rewards.to(dtype), values.to(dtype)
            return loop_gae(*wide, gamma, lam) if bool(mask.all()) else masked_loop_gae(*wide, mask, gamma, lam)

        def ours(flat=flat):
            return gae(*flat, cu_seqlens, gamma=gamma, lam=lam)

        ours()
        seconds = interleaved_cpu_seconds({"loop": loop, "ours": ours}, repeats)
        error = (ours()[0].view(batch, steps) - loop(torch.float64)[0]).abs().max()
        rows.append({
            "shape": f"({batch}, {steps})", "gamma": gamma, "lam": lam, "mask": name, "loop_ms": seconds["loop"] * 1e3,
            "ours_ms": seconds["ours"] * 1e3, "times_faster": seconds["loop"] / seconds["ours"], "max_error": float(error),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
