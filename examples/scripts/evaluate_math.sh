#!/usr/bin/env bash
# Accuracy of a model on GSM8K's test problems and on MATH-500: one greedy response, and 8 samples at temperature 0.6 for pass@k and maj@k, with
# intervals. A Ray job on the GPUs of one node or several.
#
#   bash examples/scripts/evaluate_math.sh model [output-dir]      (default: runs/evaluate_math)
#
#   GSM8K=path/to/test.jsonl        local files (default: openai/gsm8k and HuggingFaceH4/MATH-500 of the hub)
#   MATH500=path/to/math500.jsonl
#   NUM_GPUS=8 NUM_NODES=1          GPUs of each node, and nodes (docs/cluster.md)
#
# Not run on GPUs: none were at hand. ray_job_cpu.sh takes the same path on CPUs and is run by a test; another test parses the flags below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
model="${1:?usage: bash examples/scripts/evaluate_math.sh model [output-dir]}"
if [ -d "$model" ]; then model="$(realpath "$model")"; fi
output="$(realpath -m "${2:-$root/runs/evaluate_math}")"  # absolute, as a job runs in a copy of the working directory
gpus="${NUM_GPUS:-8}"
gsm8k="$([ -z "${GSM8K:-}" ] || realpath "$GSM8K")"
math500="$([ -z "${MATH500:-}" ] || realpath "$MATH500")"
sets='[
  {"name": "gsm8k", "greedy": true, "task": {"name": "gsm8k", "prompt_style": "oreo_qwen", "test_path": "'"$gsm8k"'"}},
  {"name": "math500", "greedy": true, "task": {"name": "math", "prompt_style": "oreo_qwen", "test_path": "'"${math500:-HuggingFaceH4/MATH-500}"'"}}
]'

# shellcheck source=examples/scripts/start_ray.sh
. "$root/examples/scripts/start_ray.sh"
start_ray --num-gpus "$gpus"

set -x
ray job submit \
    --address="$RAY_API_SERVER_ADDRESS" \
    --runtime-env-json='{"working_dir": "'"$root"'", "excludes": ["/.git/", "/.venv*/", "/runs/", "/wandb/"]}' \
    -- python -m openrl_reason evaluate \
    --model "$model" \
    --output "$output/result.json" \
    --sets "$sets" \
    --num_samples 8 \
    --ks '[1, 4, 8]' \
    --sampling.temperature 0.6 \
    --sampling.max_new_tokens 2048 \
    --rollout.num_engines "$((gpus * ${NUM_NODES:-1}))" \
    --rollout.dtype bfloat16 \
    --rollout.max_model_len 4096 \
    --rollout.gpu_memory_utilization 0.9 \
    --rollout.enforce_eager false \
    --grader_processes 8 \
    --placement.device gpu
