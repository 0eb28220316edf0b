#!/usr/bin/env bash
# The start of the CPU examples: a model of two million parameters made on the spot, fine-tuned for a minute or two on additions such as 47+85=?. In
# four of ten solutions to learn from the sum is worked out, digit by digit; in the others it is just stated, which a model of this size seldom gets
# right. Fine-tuning imitates both. Reinforcement learning has to find out which of the two pays.
#
#   bash examples/scripts/sft_arithmetic_cpu.sh [output-dir]      (default: runs/arithmetic; leaves start/ and sft/model/ there)
#
#   SEED=1               another seed (default: 0)
set -euo pipefail

output="${1:-runs/arithmetic}"
seed="${SEED:-0}"
mkdir -p "$output"

openrl-reason make-model \
    --output "$output/start" \
    --seed "$seed" \
    --tiny.hidden_size 256 \
    --tiny.num_layers 2 \
    --tiny.num_heads 4 \
    --tiny.num_kv_heads 2 \
    --tiny.intermediate_size 1024

echo "fine-tuning for a minute or two; its log is $output/sft.log"
openrl-reason sft \
    --run.output_dir "$output/sft" \
    --run.seed "$seed" \
    --run.steps 900 \
    --task.name arithmetic \
    --task.styles '[columns]' \
    --task.levels '[1]' \
    --task.direct_share 0.6 \
    --task.num_train 6500 \
    --task.num_test 200 \
    --batch_size 32 \
    --policy.path "$output/start" \
    --policy.dtype float32 \
    --policy.num_ranks 2 \
    --policy.zero_stage 0 \
    --policy.lr 2e-3 \
    --policy.schedule linear >"$output/sft.log"
tail -n 2 "$output/sft.log"
