#!/usr/bin/env bash
# The test command: sets up the virtual environment (a second when it is there), then runs ruff and pytest in it.
#
#   bash tests/run.sh                                  all tests but those marked slow: first those that measure time, then the others, two files at once
#   bash tests/run.sh -m slow                          the slow ones
#   bash tests/run.sh tests/test_packaging.py -x       any arguments go to pytest as they are
#
#   OPENRL_VENV=/path    another place than .venv for the virtual environment
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${OPENRL_VENV:-$root/.venv}"
bash "$root/examples/scripts/install.sh" "$venv"

# shellcheck disable=SC1091
. "$venv/bin/activate"
cd "$root"

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 WANDB_MODE=offline
if [ "$(cat "$venv/.openrl-device")" = cpu ]; then export DS_ACCELERATOR=cpu; fi

status=0
ruff check . || status=$?
if [ $# -eq 0 ]; then
    python -m pytest --timeout=600 -m "alone and not slow" || status=$?
    set -- -m "not alone and not slow" -n 2 --dist loadfile --no-loadscope-reorder
fi
# One test may take ten minutes, even a slow one; then it fails with the stacks of all threads. pytest comes last: its closing line ends the output.
python -m pytest --timeout=600 "$@" || status=$?
exit "$status"
