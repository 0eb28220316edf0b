#!/usr/bin/env bash
# A Ray cluster on this machine that only this machine can reach, and only with the token. The training scripts call it; by hand:
#
#   bash examples/scripts/start_ray.sh [more options of `ray start`]
#
#   RAY_PORT=6379               where Ray listens (outside 10002-19999, which `ray start` keeps for workers)
#   RAY_DASHBOARD_PORT=8265     where jobs are submitted
#   RAY_TMPDIR=/tmp/ray-<uid>   sessions, with their logs. Mode 700, since Ray makes its own folders writable for everybody
#   RAY_AUTH_TOKEN              the token. Not set: the file RAY_AUTH_TOKEN_PATH, or else ~/.ray/auth_token, which is made when it is missing
#
# What actors need from the environment (WANDB_API_KEY, HF_HOME, ...) has to be there when the cluster starts: jobs do not bring it, since what they
# bring is shown in the dashboard. Several nodes: docs/cluster.md.
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:${RAY_DASHBOARD_PORT:-8265}}"

# The token passes through a file that its owner alone can read, never through a command line, where `ps` and `set -x` would show it.
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
    fi
fi

export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray-$(id -u)}"
mkdir -m 700 -p "$RAY_TMPDIR"
if [ ! -O "$RAY_TMPDIR" ] || [ "$(stat -c %a "$RAY_TMPDIR")" != 700 ]; then
    echo "start_ray.sh: $RAY_TMPDIR is not yours alone: chmod 700 it, or set RAY_TMPDIR to another (short) path" >&2
    exit 2
fi

# Whether something listens where jobs are submitted.
ray_answers() {
    local place="${RAY_API_SERVER_ADDRESS#*://}"
    (exec 3<>"/dev/tcp/${place%:*}/${place##*:}") 2>/dev/null
}

# Starts a head node, unless there is one. Ray listens on every interface of a machine unless the variable below, whose name comes from other systems
# where it is the default, says that there will be one node only; --node-ip-address alone does not do it.
start_ray() {
    if ray_answers; then
        echo "a cluster answers at $RAY_API_SERVER_ADDRESS: using it"
        return
    fi
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start \
        --head \
        --node-ip-address 127.0.0.1 \
        --port "${RAY_PORT:-6379}" \
        --dashboard-host 127.0.0.1 \
        --dashboard-port "${RAY_DASHBOARD_PORT:-8265}" \
        --disable-usage-stats \
        "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then start_ray "$@"; fi
