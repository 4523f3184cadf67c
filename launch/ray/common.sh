#!/usr/bin/env bash
# What the scripts beside it share: the interpreter, the token, and how Ray is set up. Sourced, not run.
#
#   RAY_AUTH_TOKEN       the secret itself; or
#   RAY_AUTH_TOKEN_PATH  a file that holds it (~/.ray/auth_token), the same on every node: a shared home does that
#   PORT                 of the head (6379)
#   NODE_ADDR            this node's address, where it has several (Ray takes the one that leads outside)
#   NUM_CPUS, NUM_GPUS   what this node offers (all)
#   TEMP_DIR             Ray's logs and sockets (/tmp/ray); a short path, because names of sockets end after 107 letters
#   OBJECT_STORE_BYTES   Ray's shared memory (200000000)
#   PYTHON, DRY_RUN      as in torchrun.sh

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python
fi
PORT=${PORT:-6379}

# Whoever reaches a head without a token may run programs on every node. Ray since 2.60 asks for one where a cluster is
# made by `ray.init`, and only warns where it is made by `ray start`; here it always asks.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
fi
# No telemetry unless somebody asks for it.
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}

has_token() {
  [ "$RAY_AUTH_MODE" != token ] || [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$RAY_AUTH_TOKEN_PATH" ]
}

want_token() { # what the others do without one: one sentence in place of Ray's retries
  if ! has_token; then
    echo "launch/ray: no token in $RAY_AUTH_TOKEN_PATH; copy the head's file there, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" >&2
    exit 2
  fi
}

run() { # the command, or what it would be; a token is never printed
  if [ -n "${DRY_RUN:-}" ]; then
    printf 'RAY_AUTH_MODE=%q RAY_USAGE_STATS_ENABLED=%q' "$RAY_AUTH_MODE" "$RAY_USAGE_STATS_ENABLED"
    [ -n "${RAY_AUTH_TOKEN:-}" ] || printf ' RAY_AUTH_TOKEN_PATH=%q' "$RAY_AUTH_TOKEN_PATH"
    printf ' %q' "$@"
    printf '\n'
    exit 0
  fi
  exec "$@"
}

start_ray() { # WORDS of `ray start`, before those that all nodes have
  # Paths and small reports travel through Ray, pixels never do; by default it takes 30 % of the memory.
  local words=(--disable-usage-stats --object-store-memory "${OBJECT_STORE_BYTES:-200000000}" --block)
  [ -n "${NODE_ADDR:-}" ] && words+=(--node-ip-address "$NODE_ADDR")
  [ -n "${NUM_CPUS:-}" ] && words+=(--num-cpus "$NUM_CPUS")
  [ -n "${NUM_GPUS:-}" ] && words+=(--num-gpus "$NUM_GPUS")
  [ -n "${TEMP_DIR:-}" ] && words+=(--temp-dir "$TEMP_DIR")
  run "$PYTHON" -m ray.scripts.scripts start "$@" "${words[@]}"
}
