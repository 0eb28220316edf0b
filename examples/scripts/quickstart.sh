#!/usr/bin/env bash
# The main job, from a bare machine: sets up the virtual environment, makes a small model, fine-tunes it a little on arithmetic problems, trains it
# by reinforcement learning through Ray, vLLM and DeepSpeed, and measures its accuracy on held-out problems before and after.
#
#   bash examples/scripts/quickstart.sh [output-dir]      (default: runs/quickstart)
#
#   OPENRL_VENV=/path    another place than .venv for the virtual environment
#   SEED=1               another seed (default: 0)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${OPENRL_VENV:-$root/.venv}"
output="${1:-$root/runs/quickstart}"
seed="${SEED:-0}"
bash "$root/examples/scripts/install.sh" "$venv"

# shellcheck disable=SC1091
. "$venv/bin/activate"
export HF_HUB_OFFLINE=1  # nothing here comes from a hub: the model and the problems are made on the spot
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -e "$output/rl" ]; then
    echo "$output holds a run already: name another output directory, or remove it" >&2
    exit 2
fi
mkdir -p "$output"
cd "$output"

SEED="$seed" bash "$root/examples/scripts/sft_arithmetic_cpu.sh" .

openrl-reason reinforce \
    --run.output_dir rl \
    --run.seed "$seed" \
    --run.steps 60 \
    --run.eval_every 15 \
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
    --sampling.max_new_tokens 40 \
    --algo.advantage rloo \
    --prompts_per_step 32 \
    --samples_per_prompt 8 \
    --policy.path sft/model \
    --policy.dtype float32 \
    --policy.num_ranks 2 \
    --policy.lr 1e-4 \
    --policy.schedule constant \
    --policy.betas '[0.9, 0.99]' \
    --sampling.temperature 1.0 \
    --eval.num_items 200 \
    --eval.num_samples 2 \
    --eval.temperature 1.0

python - <<'SUMMARY'
import json

scores = [(record["step"], record["eval/arithmetic/pass@1"]) for record in map(json.loads, open("rl/metrics.jsonl")) if record["event"] == "eval"]
(_, before), (steps, after) = scores[0], scores[-1]
print(f"held-out accuracy (200 problems, 2 samples each): {before:.1%} after fine-tuning, {after:.1%} after {steps} steps of RL ({after - before:+.1%})")
SUMMARY
