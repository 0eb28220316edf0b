#!/usr/bin/env bash
# Reinforcement learning on GSM8K with RLOO or GRPO, as a Ray job on the GPUs of one node or several. Sizes of VinePPO's published runs: 64 problems
# with 8 responses a step, two passes of 8 updates, learning rate 1e-6, a k3 KL of 1e-4 in the loss, 650 steps; temperature 0.6, without their top-p.
#
#   bash examples/scripts/train_reinforce_gsm8k.sh [output-dir]      (default: runs/reinforce_gsm8k)
#
#   MODEL=runs/sft_gsm8k/model      folder or hub name (default: what train_sft_gsm8k.sh leaves)
#   ADVANTAGE=rloo                  rloo, grpo, dr_grpo, reinforce++_baseline, ...
#   DATA=path/to/gsm8k              a folder with train.jsonl and test.jsonl (default: openai/gsm8k of the hub)
#   NUM_GPUS=8 NUM_NODES=1          GPUs of each node, and nodes (docs/cluster.md)
#
# Each GPU holds a rank of the policy, one of the reference and an engine, which take turns (--placement.colocate).
# Not run on GPUs: none were at hand. ray_job_cpu.sh takes the same path on CPUs and is run by a test; another test parses the flags below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/reinforce_gsm8k}")"  # absolute, as a job runs in a copy of the working directory
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
    -- python -m openrl_reason reinforce \
    --run.output_dir "$output" \
    --run.steps 650 \
    --run.eval_every 25 \
    --run.save_every 25 \
    --task.name gsm8k \
    --task.prompt_style oreo_qwen \
    "${data[@]}" \
    --prompts_per_step 64 \
    --samples_per_prompt 8 \
    --sampling.temperature 0.6 \
    --sampling.max_new_tokens 1024 \
    --algo.advantage "${ADVANTAGE:-rloo}" \
    --algo.epochs 2 \
    --algo.minibatches 8 \
    --algo.kl.where loss \
    --algo.kl.kind k3 \
    --algo.kl.coef 1e-4 \
    --policy.path "$model" \
    --policy.dtype bfloat16 \
    --policy.num_ranks "$all_gpus" \
    --policy.zero_stage 2 \
    --policy.gradient_checkpointing true \
    --policy.tokens_per_micro_batch 16384 \
    --policy.lr 1e-6 \
    --policy.schedule linear \
    --policy.betas '[0.9, 0.999]' \
    --reference.num_ranks "$all_gpus" \
    --rollout.num_engines "$all_gpus" \
    --rollout.dtype bfloat16 \
    --rollout.max_model_len 2048 \
    --rollout.gpu_memory_utilization 0.5 \
    --rollout.enforce_eager false \
    --eval.num_items 500 \
    --grader_processes 4 \
    --placement.device gpu
