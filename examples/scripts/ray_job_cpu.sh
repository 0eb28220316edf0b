#!/usr/bin/env bash
# `ray job submit` on a machine without a GPU: fine-tuning and two steps of RLOO of a model made on the spot, as jobs of a cluster. A check of the
# path that train_sft_gsm8k.sh and train_reinforce_gsm8k.sh take; a minute, most of it to start processes.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/ray_job_cpu.sh [output-dir]      (default: runs/ray_job_cpu)
#
# It starts a cluster on this machine if there is none (examples/scripts/start_ray.sh), and leaves it running: `ray stop` ends every Ray of yours on this
# machine.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/ray_job_cpu}")"  # absolute: a job runs in a copy of the working directory, which is deleted in the end
[ -d "$output/start" ] || python -m openrl_reason make-model \
    --output "$output/start" \
    --tiny.hidden_size 64 \
    --tiny.num_layers 2 \
    --tiny.num_heads 2 \
    --tiny.num_kv_heads 1 \
    --tiny.intermediate_size 128

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-cpus 2

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason sft \
    --run.output_dir "$output/sft" \
    --run.steps 4 \
    --batch_size 32 \
    --eval_items 16 \
    --task.name arithmetic \
    --task.levels '[1]' \
    --task.num_train 128 \
    --policy.path "$output/start" \
    --policy.dtype float32 \
    --policy.num_ranks 2 \
    --policy.lr 3e-3

ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason reinforce \
    --run.output_dir "$output/rl" \
    --run.steps 2 \
    --prompts_per_step 8 \
    --samples_per_prompt 4 \
    --task.name arithmetic \
    --task.levels '[1]' \
    --task.num_train 64 \
    --policy.path "$output/sft/model" \
    --policy.dtype float32 \
    --rollout.dtype float32 \
    --rollout.max_model_len 128 \
    --rollout.kv_cache_gib 0.05 \
    --sampling.max_new_tokens 32 \
    --eval.num_items 8
