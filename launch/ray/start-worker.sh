#!/usr/bin/env bash
# One more node of the cluster whose head runs on HEAD; stays in the foreground and ends with Ctrl-C, or with the head.
#
#   launch/ray/start-worker.sh HEAD
#
# Nodes may come and go while a job runs: what a lost one had in hand is done again. Variables: common.sh.
set -euo pipefail
# shellcheck disable=SC1091 # shellcheck reads it by itself
. "$(dirname "$0")/common.sh"

HEAD=${1:-${HEAD:?is not set: launch/ray/start-worker.sh HEAD}}
if [ -z "${DRY_RUN:-}" ]; then
  want_token
  # `ray start` gives up soon; a head that is still in a queue or pulls its image is waited for.
  told=
  until timeout 5 bash -c ": >/dev/tcp/$HEAD/$PORT" 2>/dev/null; do
    if [ "$SECONDS" -ge "${MEET_TIMEOUT:-900}" ]; then
      echo "launch/ray/start-worker.sh: nobody answers at $HEAD:$PORT, ${MEET_TIMEOUT:-900} s long; is the head started?" >&2
      exit 1
    fi
    [ -n "$told" ] || echo "launch/ray/start-worker.sh: nobody answers at $HEAD:$PORT yet; waiting" >&2
    told=yes
    sleep 1
  done
fi
start_ray --address "$HEAD:$PORT"
