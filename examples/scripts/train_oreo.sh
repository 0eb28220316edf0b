#!/usr/bin/env bash
# OREO on rewarded responses, as a Ray job on the GPUs of one node or several, with the settings published for Qwen2.5-Math-1.5B
# (examples/configs/oreo_base.yaml): one epoch, 128 responses a step, learning rate 5e-6 for policy and critic.
# First the start (train_oreo_sft.sh) and its responses, ten to each training question of GSM8K and MATH (`openrl-reason collect`), or rows
# {"prompt", "response", "reward"} of your own.
#
#   bash examples/scripts/train_oreo.sh [output-dir] [flags...]      (default: runs/oreo; for steps --algo.level step --data.step_kind oreo --algo.kl.coef 0.1)
#
#   MODEL=runs/oreo_sft/model                         folder or hub name: the policy's start, and the reference
#   DATA="runs/collect/gsm8k/trajectories ..."        files or folders, separated by spaces
#   NUM_GPUS=8 NUM_NODES=1                            GPUs of each node, and nodes (docs/cluster.md)
#
# Not run on GPUs: none were at hand. oreo_arithmetic_cpu.sh takes the same path on CPUs; a test parses the flags and files below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
output="$(realpath -m "${1:-$root/runs/oreo}")"  # absolute, as a job runs in a copy of the working directory
model="${MODEL:-$root/runs/oreo_sft/model}"
if [ -d "$model" ]; then model="$(realpath "$model")"; fi
files=()
for file in ${DATA:-$root/runs/collect/gsm8k/trajectories $root/runs/collect/math/trajectories}; do files+=("\"$(realpath -m "$file")\""); done
gpus="${NUM_GPUS:-8}"
all_gpus=$((gpus * ${NUM_NODES:-1}))

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-gpus "$gpus"

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason oreo \
    --config examples/configs/oreo_base.yaml \
    --run.output_dir "$output" \
    --run.eval_every 50 \
    --run.save_every 50 \
    --data.path "[$(IFS=,; echo "${files[*]}")]" \
    --policy.path "$model" \
    --policy.dtype bfloat16 \
    --policy.num_ranks "$all_gpus" \
    --policy.zero_stage 2 \
    --policy.gradient_checkpointing true \
    --policy.tokens_per_micro_batch 16384 \
    --critic.dtype bfloat16 \
    --critic.num_ranks "$all_gpus" \
    --critic.zero_stage 2 \
    --critic.gradient_checkpointing true \
    --critic.tokens_per_micro_batch 16384 \
    --reference.num_ranks "$all_gpus" \
    --placement.device gpu \
    "${@:2}"
