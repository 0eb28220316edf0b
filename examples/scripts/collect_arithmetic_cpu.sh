#!/usr/bin/env bash
# A balanced collection of rewarded responses to additions, on a machine without a GPU: of each of 400 problems at most four right and four wrong ones,
# with text rows and pairs beside the trajectories. Started again, it goes on where it was stopped.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/sft_arithmetic_cpu.sh runs/arithmetic
#   bash examples/scripts/collect_arithmetic_cpu.sh [model] [output-dir] [flags...]      (default: runs/arithmetic/sft/model, runs/arithmetic/collect)
#
#   SEED=1               another seed (default: 0)
set -euo pipefail

model="${1:-runs/arithmetic/sft/model}"
output="${2:-runs/arithmetic/collect}"

openrl-reason collect \
    --model "$model" \
    --output "$output" \
    --seed "${SEED:-0}" \
    --mode balanced \
    --rows true \
    --pairs_per_question 6 \
    --num_items 400 \
    --sampling.temperature 1.0 \
    --sampling.max_new_tokens 40 \
    --task.name arithmetic \
    --task.styles '[columns]' \
    --task.levels '[1]' \
    --task.direct_share 0.6 \
    --task.num_train 6500 \
    --task.num_test 200 \
    --rollout.num_engines 2 \
    --rollout.dtype float32 \
    --rollout.max_model_len 96 \
    --rollout.kv_cache_gib 0.1 \
    "${@:3}"
