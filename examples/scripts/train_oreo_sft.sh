#!/usr/bin/env bash
# OREO's start: Qwen2.5-Math-1.5B fine-tuned on the training solutions of GSM8K and MATH (examples/python/oreo_sft_rows.py), as a Ray job on the GPUs of
# one node or several, with the published settings: three epochs of 128 sequences of at most 8192 tokens, learning rate 2e-5.
#
#   bash examples/scripts/train_oreo_sft.sh [output-dir] [flags...]      (default: runs/oreo_sft)
#
#   MODEL=Qwen/Qwen2.5-Math-1.5B    hub name or folder
#   GSM8K=path/to/train.jsonl       local files (default: the hub's)
#   MATH=path/to/train.jsonl
#   NUM_GPUS=8 NUM_NODES=1          GPUs of each node, and nodes (docs/cluster.md)
#
# Not run on GPUs: none were at hand. oreo_arithmetic_cpu.sh takes the same path on CPUs; a test parses the flags below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/oreo_sft}")"  # absolute, as a job runs in a copy of the working directory
gpus="${NUM_GPUS:-8}"
rows="$output.jsonl"
mkdir -p "$(dirname "$output")"
python "$root/examples/python/oreo_sft_rows.py" "$rows" --gsm8k "${GSM8K:-}" --math "${MATH:-}"

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-gpus "$gpus"

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason sft \
    --run.output_dir "$output" \
    --run.steps 351 \
    --run.save_every 100 \
    --batch_size 128 \
    --max_length 8192 \
    --data.path "$rows" \
    --policy.path "${MODEL:-Qwen/Qwen2.5-Math-1.5B}" \
    --policy.dtype bfloat16 \
    --policy.num_ranks "$((gpus * ${NUM_NODES:-1}))" \
    --policy.zero_stage 2 \
    --policy.gradient_checkpointing true \
    --policy.tokens_per_micro_batch 16384 \
    --policy.lr 2e-5 \
    --policy.schedule cosine \
    --placement.device gpu \
    "${@:2}"
