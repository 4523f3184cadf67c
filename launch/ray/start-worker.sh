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
[ -n "${DRY_RUN:-}" ] || want_token
start_ray --address "$HEAD:$PORT"
