#!/usr/bin/env bash
# Train on one node or on several: the same command on each of them.
#
#   launch/torchrun.sh                                     one node: all GPUs or else 2 CPU ranks, the smoke recipe
#   CONFIG=train/base launch/torchrun.sh --data.shards S --out runs/a
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 CONFIG=train/base launch/torchrun.sh --data.shards S --out runs/a   (on host0)
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 CONFIG=train/base launch/torchrun.sh --data.shards S --out runs/a   (on host1)
#
# Words after the script's name go to `geopose train` as they are. Run the same command again to go on.
# Exit codes: 0 done; 2 a mistake to mend; 75 preempted after saving, or a rank was lost: run again; else 1 (look at
# the first message above).
#
#   CONFIG            recipe: a file or a shipped name (smoke)
#   SHARDS, OUT       folder of shards and run folder, where --data.shards and --out are not among the words
#   NPROC             processes on this node (all GPUs, or 2 without one)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     the nodes (1, 0, localhost, 29400); node 0 runs at MASTER_ADDR.
#                     NNODES=2:8 is elastic: 2 to 8 nodes, which may come and go (README.md, "What survives what")
#   RDZV_ID           name of this job, the same on every node (geopose)
#   MEET_TIMEOUT      seconds to wait for the other nodes (900)
#   MAX_RESTARTS      how often torchrun itself starts lost ranks again (0: leave it to the batch system; elastic: 100)
#   RDZV_CONF         more settings of the rendezvous, such as last_call_timeout=10,keep_alive_interval=2
#   SHUTDOWN_TIMEOUT  seconds for the last step and the save (300)
#   PREFLIGHT=1       train nothing: look at ranks and machines with the training's own words (geopose doctor)
#   DRY_RUN=1         print the command and stop
#   PYTHON            interpreter (.venv/bin/python of this checkout, else python3)
#
# Interfaces, threads, debugging and everything else that only clusters need: env.sh.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python
fi
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29400}

# The run folder and the shards may be named by a variable or among the words; the words win.
words=("$@")
shards_given=${SHARDS:-}
out_given=
for i in "${!words[@]}"; do
  case ${words[i]} in
    --out) OUT=${words[i + 1]:-}; out_given=yes ;;
    --out=*) OUT=${words[i]#--out=}; out_given=yes ;;
    --data.shards | --data.shards=*) shards_given=yes; unset SHARDS ;;
  esac
done
OUT=${OUT:-runs/smoke}
# A run that is kept in a store (s3://BUCKET/RUN) has its ranks' logs in a folder of each node.
FOLDER=$OUT
case $OUT in *://*) FOLDER=runs/${OUT##*/} ;; esac

if [ -z "${NPROC:-}" ]; then
  # torch counts what CUDA_VISIBLE_DEVICES leaves; nvidia-smi would count all.
  NPROC=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi

# shellcheck disable=SC1091 # shellcheck reads env.sh by itself
. "$here/launch/env.sh"

# torchrun, with one line in place of its traceback where a rank fails.
command=("$PYTHON" -m geopose_dist.torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC")
if [ "$NNODES" = 1 ]; then
  command+=(--standalone) # a free port of this host: two runs may share a machine
else
  # is_host says outright who holds the store; by default the name in the endpoint is compared with the host's own,
  # which fails behind aliases and in network namespaces, and then every node waits for ever.
  command+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-geopose}")
  command+=(--rdzv-conf "is_host=$((NODE_RANK == 0 ? 1 : 0)),join_timeout=$MEET_TIMEOUT${RDZV_CONF:+,$RDZV_CONF}")
fi
[ -n "${LOCAL_ADDR:-}" ] && command+=(--local-addr "$LOCAL_ADDR")
# Ranks that were lost are started again up to so often, and never those that ended with an error. A fixed number of
# nodes waits for a lost one in vain, so there restarts are the batch system's work.
case $NNODES in *:*) MAX_RESTARTS=${MAX_RESTARTS:-100} ;; esac
command+=(--max-restarts "${MAX_RESTARTS:-0}")
command+=(--signals-to-handle "$HANDLED_SIGNALS" --shutdown-timeout "$SHUTDOWN_TIMEOUT")
[ "$NUMA_BINDING" != none ] && command+=(--numa-binding "$NUMA_BINDING")
# What each rank says: on the console behind its name, and in a file of its own below the run folder.
# shellcheck disable=SC2016 # torchrun puts the rank in, not the shell
[ "$NPROC:$NNODES" != 1:1 ] && command+=(--tee 3 --log-dir "$FOLDER/logs" --log-line-prefix-template '[rank ${rank}] ')
what=(train)
[ -n "${PREFLIGHT:-}" ] && what=(doctor --distributed)
command+=(-m geopose_dist "${what[@]}" --config "${CONFIG:-smoke}")

if [ -z "$shards_given" ] && [ "$NNODES" = 1 ]; then
  # Nothing to learn from was named: render a few small tiles once, so that the script works as it is.
  SHARDS=runs/smoke-shards
  if [ -z "${DRY_RUN:-}" ] && [ ! -e "$SHARDS/manifest.json" ]; then
    "$PYTHON" -m geopose_dist synth --out runs/smoke-data --places 4 --views 2 --size 256
    "$PYTHON" -m geopose_dist pack --source runs/smoke-data --out "$SHARDS" --reduce 1
  fi
fi
[ -n "${SHARDS:-}" ] && command+=(--data.shards "$SHARDS")
[ -z "$out_given" ] && command+=(--out "$OUT")
command+=("$@")

if [ -n "${DRY_RUN:-}" ]; then
  print_settings
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi

# torchrun gives up on node 0 after a minute, and says little. So this node waits for it here, and says for what.
meet() {
  local why until=$((SECONDS + MEET_TIMEOUT)) told=$SECONDS
  trap 'echo "launch/torchrun.sh: stopped while waiting for node 0; nothing had begun" >&2; exit 75' TERM INT HUP USR1 USR2
  while ! why=$(timeout 5 bash -c ": >/dev/tcp/$MASTER_ADDR/$MASTER_PORT" 2>&1); do
    why=${why%%$'\n'*} why=${why#bash: } why=${why#connect: } why=${why#line 1: } # the second line repeats the address
    why="node $NODE_RANK reaches nobody at $MASTER_ADDR:$MASTER_PORT (${why:-no answer within 5 s})"
    if [ "$SECONDS" -ge "$until" ]; then
      echo "launch/torchrun.sh: $why, $MEET_TIMEOUT s long; is node 0 started, MASTER_ADDR its address, and the port open?" >&2
      exit 1
    elif [ "$SECONDS" -ge "$told" ]; then
      echo "launch/torchrun.sh: $why; waiting for it" >&2
      told=$((SECONDS + 60))
    fi
    sleep 1
  done
}
[ "$NNODES" = 1 ] || [ "$NODE_RANK" = 0 ] || meet

# torchrun runs in the background because bash acts on a signal only between commands, and `wait` is one that a
# signal ends. Every signal becomes SIGTERM: save, then leave. torchrun ignores none of them (see above).
mkdir -p "$FOLDER"
began=$(mktemp "$FOLDER/.launched.XXXXXX")
trap 'rm -f "$began"' EXIT
"${command[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT HUP USR1 USR2
code=0
while :; do
  code=0
  wait "$child" || code=$?
  kill -0 "$child" 2>/dev/null || break
done

# geopose_dist.torchrun leaves with 75 where the same command will go on. Only a torchrun that was killed cannot say it:
# then its ranks save and leave, and the run folder tells how. A state from before this start does not count, or a run
# that fails at once would be queued again for ever.
state=$FOLDER/state.json
stands() { [ "$state" -nt "$began" ] && grep -q "\"status\": *\"$1\"" "$state"; }
if [ "$code" -ge 128 ]; then
  echo "launch/torchrun.sh: torchrun on $(hostname) was ended by signal $((code - 128)); its ranks save and leave (see $FOLDER/logs)" >&2
  until=$((SECONDS + SHUTDOWN_TIMEOUT))
  until stands preempted || stands lost || [ "$SECONDS" -ge "$until" ]; do sleep 1; done
fi
if [ "$code" != 0 ]; then
  if stands preempted; then
    echo "launch/torchrun.sh: preempted after saving in $OUT; run the same command again to go on" >&2
    exit 75
  elif stands lost || [ "$code" = 75 ]; then
    echo "launch/torchrun.sh: a rank was lost; run the same command again to go on from the last checkpoint in $OUT" >&2
    exit 75
  fi
fi
exit "$code"
