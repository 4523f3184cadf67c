#!/usr/bin/env bash
# Settings that several processes on several machines need, each with its reason, in this one place.
#
# torchrun.sh reads it, and so do slurm.sbatch and the files of k8s/, which call torchrun.sh. (Ray gives every actor
# its own threads: ray/common.sh.)
# Every setting is a default: what the environment says already wins. `launch/env.sh` alone prints them, and
# DRY_RUN=1 before any script of this folder prints them with the command.
#
#   DEBUG=1           everything that helps to find a hang or a wrong interface (many lines; a few % slower)
#   IFNAME            this node's network interface, where the choice below is wrong
#   LOCAL_ADDR        this node's address, where its host name does not resolve to it
#   NPROC             processes of this node that share its cores (1)

SETTINGS=() # names, for those who print them
default() { # NAME VALUE
  export "$1=${!1:-$2}"
  SETTINGS+=("$1")
}

# --- Meeting -------------------------------------------------------------------------------------------------------
# Agents that share one store keep addresses of dead ranks after a restart: 7 of 15 trials ended badly (two of them in
# silent hangs), none of 13 with a store of its own for every round (docs/decisions.md, 3).
default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
# Nodes start minutes apart: queues, image pulls, cold file systems. torchrun's agents give up on node 0 after 60 s.
default MEET_TIMEOUT 900

# --- Ending --------------------------------------------------------------------------------------------------------
# torchrun kills its ranks 30 s after a signal; the step and the save that preemption promises take longer. Batch
# systems must give more notice than this (`--signal` of Slurm, terminationGracePeriodSeconds of Kubernetes).
default SHUTDOWN_TIMEOUT 300
# What batch systems send ahead of the end; of USR1 and USR2 torchrun would die at once, without a save.
default HANDLED_SIGNALS SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

# --- Network -------------------------------------------------------------------------------------------------------
# gloo takes the interface that the host name resolves to, and on many systems that is 127.0.0.1: then nodes never
# meet. The one that leads to node 0 is right. NCCL looks for its own, InfiniBand first, and is left alone unless
# IFNAME says otherwise: the way to node 0 is often the slow management network.
interface_to() { # HOST: "ADDRESS INTERFACE" of this node on the way there; nothing if that is this machine's loopback
  local target source name
  command -v ip >/dev/null || return 0
  target=$(getent ahostsv4 "$1" 2>/dev/null | awk 'NR == 1 { print $1 }')
  [ -n "$target" ] || return 0
  source=$(ip -o route get "$target" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p')
  [ -n "$source" ] || return 0
  name=$(ip -o -4 addr show to "$source" 2>/dev/null | awk 'NR == 1 { sub(/@.*/, "", $2); print $2 }')
  [ "${name:-lo}" = lo ] || echo "$source $name"
}
if [ "${NNODES:-1}" != 1 ] && [ -n "${MASTER_ADDR:-}" ]; then
  read -r found_addr found_name < <(interface_to "$MASTER_ADDR") || true
  # torchrun tells the others this node's host name, which they may not be able to resolve.
  LOCAL_ADDR=${LOCAL_ADDR:-${found_addr:-}}
fi
[ -n "${IFNAME:-${found_name:-}}" ] && default GLOO_SOCKET_IFNAME "${IFNAME:-$found_name}"
[ -n "${IFNAME:-}" ] && default NCCL_SOCKET_IFNAME "$IFNAME"

# --- Cores, memory, files ------------------------------------------------------------------------------------------
# Without a setting torchrun gives every rank one thread, and without torchrun every rank would take all cores.
usable=$(nproc)
default OMP_NUM_THREADS $((usable / ${NPROC:-1} > 0 ? usable / ${NPROC:-1} : 1))
# A rank on the other socket than its GPU reads its batches across the sockets: 1 to 10 % by torch's own word. Only
# where it can work: several sockets, numactl (in containers the kernel may forbid it), and all cores ours, because
# ranks whose socket lies outside of what a batch system gave them fail. `none` turns it off.
if [ -z "${NUMA_BINDING:-}" ]; then
  NUMA_BINDING=none
  if [ -e /sys/devices/system/node/node1 ] && [ -e /dev/nvidia0 ] && [ "$usable" = "$(nproc --all)" ] &&
    numactl --physcpubind=0 true 2>/dev/null; then
    NUMA_BINDING=node
  fi
fi
default NUMA_BINDING none
# Shards, sockets of ranks and batches of loader workers are open files; 1024 is soon too few, and unlimited makes
# programs that close all of them slow.
limit=$(ulimit -Hn)
[ "$limit" = unlimited ] || [ "$limit" -gt 65536 ] && limit=65536
ulimit -Sn "$limit" 2>/dev/null || true

# --- Last words ----------------------------------------------------------------------------------------------------
# A bus error (full /dev/shm) or a crash in a library ends a rank without a word, unless Python may write its stack;
# and what a rank said last must not wait in a buffer.
default PYTHONFAULTHANDLER 1
default PYTHONUNBUFFERED 1
# NCCL's reasons for failing; by default it fails without one.
default NCCL_DEBUG "$([ -n "${DEBUG:-}" ] && echo INFO || echo WARN)"
if [ -n "${DEBUG:-}" ]; then
  default NCCL_DEBUG_SUBSYS INIT,NET,ENV,GRAPH  # which interfaces and links it chose; ALL is unreadable
  default TORCH_DISTRIBUTED_DEBUG DETAIL        # compares shapes and order of collectives over ranks
  default TORCH_CPP_LOG_LEVEL INFO              # the store's and the process group's own log
  default TORCH_SHOW_CPP_STACKTRACES 1
fi

print_settings() { # as words before a command
  local name
  for name in "${SETTINGS[@]}"; do
    printf '%s=%q ' "$name" "${!name}"
  done
}
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  for name in "${SETTINGS[@]}"; do
    printf '%s=%q\n' "$name" "${!name}"
  done
fi
