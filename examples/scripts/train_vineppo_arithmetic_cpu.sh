#!/usr/bin/env bash
# VinePPO on additions, on a machine without a GPU: real engines, real ranks, a few minutes. Every response is cut into its lines, and the state before
# each line is valued by rollouts that run while other responses still generate.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/sft_arithmetic_cpu.sh runs/arithmetic
#   bash examples/scripts/train_vineppo_arithmetic_cpu.sh [model] [output-dir] [flags...]      (default: runs/arithmetic/sft/model, runs/arithmetic/vineppo)
#
#   SEED=1               another seed (default: 0)
set -euo pipefail

model="${1:-runs/arithmetic/sft/model}"
output="${2:-runs/arithmetic/vineppo}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

openrl-reason vineppo \
    --config "$here/../configs/arithmetic_cpu.yaml" \
    --run.output_dir "$output" \
    --run.seed "${SEED:-0}" \
    --policy.path "$model" \
    --vine.num_rollouts 9 \
    "${@:3}"
