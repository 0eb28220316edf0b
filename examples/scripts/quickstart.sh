#!/usr/bin/env bash
# The main job, from a bare machine: sets up the virtual environment, makes a small model, fine-tunes it a little on arithmetic problems, trains it
# by reinforcement learning through Ray, vLLM and DeepSpeed, and measures its accuracy on held-out problems before and after.
#
#   bash examples/scripts/quickstart.sh [output-dir]      (default: runs/quickstart)
#
#   OPENRL_VENV=/path    another place than .venv for the virtual environment
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${OPENRL_VENV:-$root/.venv}"
output="${1:-$root/runs/quickstart}"
bash "$root/examples/scripts/install.sh" "$venv"

# shellcheck disable=SC1091
. "$venv/bin/activate"
export HF_HUB_OFFLINE=1  # nothing here comes from a hub: the model and the problems are made on the spot
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$output"
cd "$output"

openrl-reason make-model ...
openrl-reason sft ...
openrl-reason evaluate ...
openrl-reason reinforce ...
openrl-reason evaluate ...
