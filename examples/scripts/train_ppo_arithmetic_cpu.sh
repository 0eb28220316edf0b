#!/usr/bin/env bash
# PPO with a learned critic on additions, on a machine without a GPU: real engines, real ranks, a few minutes.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/sft_arithmetic_cpu.sh runs/arithmetic
#   bash examples/scripts/train_ppo_arithmetic_cpu.sh [model] [output-dir] [flags...]      (default: runs/arithmetic/sft/model, runs/arithmetic/ppo)
#
#   SEED=1               another seed (default: 0)
set -euo pipefail

model="${1:-runs/arithmetic/sft/model}"
output="${2:-runs/arithmetic/ppo}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

openrl-reason ppo \
    --config "$here/../configs/arithmetic_cpu.yaml" \
    --run.output_dir "$output" \
    --run.seed "${SEED:-0}" \
    --policy.path "$model" \
    --critic.dtype float32 \
    --critic.num_ranks 2 \
    --critic.lr 1e-3 \
    --critic.schedule constant \
    --critic.warmup_steps 2 \
    "${@:3}"
