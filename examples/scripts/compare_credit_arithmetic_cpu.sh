#!/usr/bin/env bash
# PPO with a learned critic against VinePPO on additions, from the same fine-tuned start, with the same number of episodes: held-out accuracy along
# the runs, seconds of a step, and how far the critic's values and nine rollouts are from many rollouts. About half an hour on two cores.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/compare_credit_arithmetic_cpu.sh [output-dir]      (default: runs/compare_credit)
#
#   SEEDS="0 1 2"        seeds of the runs; all start from the same model
set -euo pipefail

output="${1:-runs/compare_credit}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
seeds="${SEEDS:-0 1 2}"
mkdir -p "$output"
if [ ! -e "$output/sft/model" ]; then bash "$here/sft_arithmetic_cpu.sh" "$output"; fi

for seed in $seeds; do
    for method in ppo vineppo; do
        if [ ! -e "$output/$method-$seed/model" ]; then
            echo "$method, seed $seed; its log is $output/$method-$seed.log"
            SEED=$seed bash "$here/train_${method}_arithmetic_cpu.sh" "$output/sft/model" "$output/$method-$seed" >"$output/$method-$seed.log"
        fi
    done
done

python - "$output" $seeds <<'SUMMARY'
import json
import statistics
import sys
from pathlib import Path

output, seeds = Path(sys.argv[1]), sys.argv[2:]
for method in ("ppo", "vineppo"):
    finals, seconds = [], []
    for seed in seeds:
        records = [json.loads(line) for line in (output / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines()]
        curve = [(record["step"], record["eval/arithmetic/pass@1"]) for record in records if record["event"] == "eval"]
        steps = [record["timing/step"] for record in records if record["event"] == "train"]
        finals.append(curve[-1][1])
        seconds.append(statistics.median(steps[5:]))
        print(f"{method:8} seed {seed}:  " + "  ".join(f"{accuracy:.1%} after {step}" for step, accuracy in curve) + f"   {seconds[-1]:.2f} s a step")
    print(f"{method:8} mean of {len(seeds)} seeds: {statistics.mean(finals):.1%}; median step {statistics.median(seconds):.2f} s\n")
SUMMARY

first="${seeds%% *}"
openrl-reason report "$output/ppo-$first" "$output/vineppo-$first" --output "$output/both.html"
