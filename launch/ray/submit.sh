#!/usr/bin/env bash
# Run a job on the cluster: `geopose predict` or `geopose pack` with the words after it.
#
#   HEAD=node0 launch/ray/submit.sh predict --source DATA --checkpoint runs/a --out PREDICTIONS
#   HEAD=node0 launch/ray/submit.sh pack --source DATA --out SHARDS --split split.json --reduce 2
#
# On any node of the cluster (Ray's drivers talk to a Ray of their own machine); sources and outputs lie where all
# nodes see them. Run it again to go on. Variables: common.sh.
set -euo pipefail
# shellcheck disable=SC1091 # shellcheck reads it by itself
. "$(dirname "$0")/common.sh"

[ -n "${DRY_RUN:-}" ] || want_token
case ${1:-} in
  predict | pack) ;;
  *)
    echo "launch/ray/submit.sh: ${1:-nothing} does not run on Ray; wanted predict or pack, and its words" >&2
    exit 2
    ;;
esac
run "$PYTHON" -m geopose_dist "$@" --ray-address "${HEAD:-127.0.0.1}:$PORT"
