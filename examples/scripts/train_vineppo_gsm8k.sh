#!/usr/bin/env bash
# VinePPO on GSM8K, as a Ray job on the GPUs of one node or several, with the settings published for rho-math-1b and DeepSeekMath-7B
# (examples/configs/vineppo_base.yaml and vineppo_gsm8k.yaml): 64 problems with 8 responses a step, two passes of 8 updates, learning rate 1e-6, a k3 KL
# of 1e-4 in the loss, temperature 0.6, top-p 0.9. Start from a model fine-tuned on the same prompts:
# train_sft_gsm8k.sh runs/sft_gsm8k --task.prompt_style vineppo.
#
#   bash examples/scripts/train_vineppo_gsm8k.sh [output-dir]      (default: runs/vineppo_gsm8k)
#
#   MODEL=runs/sft_gsm8k/model      folder or hub name
#   DATA=path/to/gsm8k              a folder with train.jsonl and test.jsonl (default: the hub's)
#   NUM_GPUS=8 NUM_NODES=1          GPUs of each node, and nodes (docs/cluster.md)
#
# Not run on GPUs: none were at hand. train_vineppo_arithmetic_cpu.sh takes the same path on CPUs; a test parses the flags and files below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/vineppo_gsm8k}")"  # absolute, as a job runs in a copy of the working directory
model="${MODEL:-$root/runs/sft_gsm8k/model}"
if [ -d "$model" ]; then model="$(realpath "$model")"; fi
gpus="${NUM_GPUS:-8}"
all_gpus=$((gpus * ${NUM_NODES:-1}))
data=()
if [ -n "${DATA:-}" ]; then data=(--task.train_path "$(realpath "$DATA")/train.jsonl" --task.test_path "$(realpath "$DATA")/test.jsonl"); fi

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-gpus "$gpus"

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason vineppo \
    --config examples/configs/vineppo_base.yaml \
    --config examples/configs/vineppo_gsm8k.yaml \
    --run.output_dir "$output" \
    "${data[@]}" \
    --policy.path "$model" \
    --policy.dtype bfloat16 \
    --policy.num_ranks "$all_gpus" \
    --policy.zero_stage 2 \
    --policy.gradient_checkpointing true \
    --policy.tokens_per_micro_batch 16384 \
    --reference.num_ranks "$all_gpus" \
    --rollout.num_engines "$all_gpus" \
    --rollout.dtype bfloat16 \
    --rollout.max_num_seqs 512 \
    --rollout.gpu_memory_utilization 0.5 \
    --rollout.enforce_eager false \
    --grader_processes 4 \
    --placement.device gpu
