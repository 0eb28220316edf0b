#!/usr/bin/env bash
# Rounds of collecting samples, training on them and evaluating, on additions, on a machine without a GPU. Started again, it goes on where it was stopped.
#
#   bash examples/scripts/install.sh && . .venv/bin/activate
#   bash examples/scripts/sft_arithmetic_cpu.sh runs/arithmetic
#   bash examples/scripts/iterate_arithmetic_cpu.sh [model] [output-dir] [flags...]      (default: runs/arithmetic/sft/model, runs/arithmetic/iterate)
#
#   ALGORITHM=oreo       another algorithm (default: rejection); settings of both are in examples/configs/iterate_arithmetic_cpu.yaml
#   CRITIC=fresh         OREO's critic of each round starts anew (default: warm, from that of the round before)
#   SEED=1               another seed (default: 0)
set -euo pipefail

model="${1:-runs/arithmetic/sft/model}"
output="${2:-runs/arithmetic/iterate}"
if [ "${ALGORITHM:-}" = oreo ]; then CRITIC="${CRITIC:-warm}"; fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

openrl-reason iterate \
    --config "$here/../configs/iterate_arithmetic_cpu.yaml" \
    --algorithm "${ALGORITHM:-rejection}" \
    --critic "${CRITIC:-fresh}" \
    --model "$model" \
    --output "$output" \
    --seed "${SEED:-0}" \
    "${@:3}"
