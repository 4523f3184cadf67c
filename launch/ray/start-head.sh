#!/usr/bin/env bash
# The head of a Ray cluster for `geopose predict` and `geopose pack`; stays in the foreground and ends with Ctrl-C.
#
#   launch/ray/start-head.sh [WORDS of `ray start`]
#
# Makes a token in RAY_AUTH_TOKEN_PATH if there is none; the other nodes need the same. Variables: common.sh.
set -euo pipefail
# shellcheck disable=SC1091 # shellcheck reads it by itself
. "$(dirname "$0")/common.sh"

if ! has_token && [ -z "${DRY_RUN:-}" ]; then
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  # Readable for its owner only, and whole or not there: two heads may start at once.
  token=$(umask 077 && mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX")
  "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
  ln "$token" "$RAY_AUTH_TOKEN_PATH" 2>/dev/null || true
  rm -f "$token"
  echo "launch/ray/start-head.sh: made a token in $RAY_AUTH_TOKEN_PATH" >&2
fi
# The dashboard is a web server that nothing here needs; RayJobs of Kubernetes bring their own head.
start_ray --head --port "$PORT" --include-dashboard=false "$@"
