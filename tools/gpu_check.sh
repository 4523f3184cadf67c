#!/usr/bin/env bash
# Everything that needs a GPU, in one call under nine minutes: tests, then benchmarks with their results as JSON.
#
#   tools/gpu_check.sh                          in a checkout after `make setup`, on a machine with a GPU
#   WHEELS=gpu_wheels tools/gpu_check.sh        on a bare one without internet (its own torch; see tools/gpu_wheels.sh)
#   GPU_CHECK_REHEARSAL=1 tools/gpu_check.sh    the same commands, small, on the CPU: does the script itself hold?
#
# Each part has a limit of its own; a part that fails is told, the others run, and the exit code is 1.
#
#   OUT       folder for the results (gpu_check)
#   WORK      scratch folder (a temporary one)
#   PYTHON    interpreter (.venv/bin/python of this checkout, else python3)
#   ENCODER   of the benchmarks (resnet34, the benchmark's own)
#   PLACES    places of four views of 2048 px that are rendered (16)
#   PARTS     which parts to run, in order
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
fi
out=${OUT:-gpu_check}
work=${WORK:-$(mktemp -d)}
mkdir -p "$out" "$work"
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
rehearsal=${GPU_CHECK_REHEARSAL:-}
encoder=${ENCODER:-resnet34}
failed=()

# part NAME LIMIT_S COMMAND...: run it under its limit, keep its output, go on whatever becomes of it.
part() {
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  case " ${PARTS:-setup doctor tests data step epoch augment predict checkpoint} " in *" $name "*) ;; *) return 0 ;; esac
  timeout --kill-after=10 "$limit" bash -c '"$@"' part "$@" >"$out/$name.log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then
    echo "gpu_check: $name done in $((SECONDS - began)) s"
  else
    echo "gpu_check: $name FAILED with $code after $((SECONDS - began)) s (124: over its limit of $limit s); $out/$name.log ends:"
    tail -n 15 "$out/$name.log"
    failed+=("$name")
  fi
}

# A bare machine: its own torch, our missing packages from wheels, the kernels compiled by its compiler.
setup() {
  if [ -n "${WHEELS:-}" ]; then
    "$python" -m venv --system-site-packages "$work/venv" &&
      "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$WHEELS"/*.whl || return
  fi
  "${venv:-$python}" setup.py --quiet build_ext --inplace --force
}

# The benchmark's tiles at its own size; labels and images are what our renderer makes, so nothing is fetched.
data() {
  "$python" -m geopose_dist synth --out "$work/tiles" --places "$places" --views 4 --size "$side" --seed 1 &&
    "$python" -m geopose_dist pack --source "$work/tiles" --out "$work/shards" --reduce 2
}

bench() {
  local name=$1
  shift
  "$python" -m geopose_dist bench "$name" --json "$out/$name.json" --threads 0 "$@"
}

if [ -n "$rehearsal" ]; then
  places=2 side=256 device=cpu
  recipe=(--config smoke --run.data.crop-px 64 --run.data.micro-batch 2 --run.data.global-batch 2 --run.device cpu)
  short=(--repeats 1 --steps 1)
  tests=(-m pytest -q -x -m gpu --collect-only)
else
  places=${PLACES:-16} side=2048 device=cuda
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch sees no GPU here; GPU_CHECK_REHEARSAL=1 runs the same commands on the CPU" >&2
    exit 2
  fi
  recipe=(--config train/base --run.model.encoder "$encoder" --run.model.weights none --run.device cuda
    --run.data.crop-px null --run.data.micro-batch "${MICRO_BATCH:-16}" --run.data.global-batch "${MICRO_BATCH:-16}")
  short=(--repeats 5 --steps 10)
  tests=(-m pytest -q -m gpu)
fi

[ -n "${WHEELS:-}" ] && venv=$work/venv/bin/python
export python out work places side venv
export -f setup data bench # timeout starts a shell of its own
part setup 90 setup
python=${venv:-$python}
part doctor 60 "$python" -m geopose_dist doctor --json "$out/doctor.json"
part tests 120 "$python" "${tests[@]}"
part data 90 data
part step 150 bench step "${recipe[@]}" "${short[@]}"
part epoch 120 bench epoch "${recipe[@]}" "${short[@]}" --shards "$work/shards"
part augment 60 bench device_augment --repeats "${short[1]}"
part predict 90 bench predict --repeats 1
part checkpoint 60 bench checkpoint --repeats "${short[1]}"

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: ${failed[*]} failed on $device after $SECONDS s; see $out/"
  exit 1
fi
echo "gpu_check: all parts done on $device in $SECONDS s; results in $out/"
