#!/usr/bin/env bash
# Supervised fine-tuning on the solutions of GSM8K's training problems, as a Ray job on the GPUs of one node or several. Batch, epochs and learning rate
# are those that OREO published for Qwen2.5-Math-1.5B (128, 3, 2e-5).
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/train_sft_gsm8k.sh [output-dir] [flags...]      (default: runs/sft_gsm8k)
#
#   MODEL=Qwen/Qwen2.5-Math-1.5B    hub name or folder
#   DATA=path/to/gsm8k              a folder with train.jsonl and test.jsonl (default: openai/gsm8k of the hub)
#   NUM_GPUS=8 NUM_NODES=1          GPUs of each node, and nodes (docs/cluster.md)
#
# Not run on GPUs: none were at hand. ray_job_cpu.sh takes the same path on CPUs and is run by a test; another test parses the flags below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/sft_gsm8k}")"  # absolute, as a job runs in a copy of the working directory
model="${MODEL:-Qwen/Qwen2.5-Math-1.5B}"
gpus="${NUM_GPUS:-8}"
data=()
if [ -n "${DATA:-}" ]; then data=(--task.train_path "$(realpath "$DATA")/train.jsonl" --task.test_path "$(realpath "$DATA")/test.jsonl"); fi

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-gpus "$gpus"

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason sft \
    --run.output_dir "$output" \
    --run.steps 175 \
    --run.eval_every 25 \
    --run.save_every 50 \
    --batch_size 128 \
    --max_length 1024 \
    --task.name gsm8k \
    --task.prompt_style oreo_qwen \
    "${data[@]}" \
    --policy.path "$model" \
    --policy.dtype bfloat16 \
    --policy.num_ranks "$((gpus * ${NUM_NODES:-1}))" \
    --policy.zero_stage 2 \
    --policy.gradient_checkpointing true \
    --policy.tokens_per_micro_batch 16384 \
    --policy.lr 2e-5 \
    --policy.schedule cosine \
    --placement.device gpu \
    "${@:2}"
