#!/usr/bin/env bash
# Everything that needs a GPU, in one call under nine minutes: tests, then benchmarks with their results as JSON.
#
#   tools/gpu_check.sh                          in a checkout after `make setup`, on a machine with a GPU
#   WHEELS=gpu_wheels tools/gpu_check.sh        on a bare one without internet (its own torch >= 2.11; WHEELS counts from
#                                               the root of the checkout; see tools/gpu_wheels.sh)
#   GPU_CHECK_REHEARSAL=1 tools/gpu_check.sh    the same commands, small, on the CPU: does the script itself hold?
#
# Each part has a limit of its own and ends with a result or a reason; the others run whatever becomes of it, and what
# it measured before its limit is kept. All of them together end within LIMIT_S. Exit code: 0 all parts are done, 1 some
# are not, 2 there is no GPU.
#
#   OUT          folder for the results (gpu_check): log.txt and at most seven files of JSON
#   WORK         scratch folder (a temporary one)
#   PYTHON       interpreter (.venv/bin/python of this checkout, else python3)
#   ENCODER      of the benchmarks (resnet34, the benchmark's own)
#   MICRO_BATCH  tiles of 1024 px in a step (16); epoch_large has twice as many
#   PLACES       places of four views of 2048 px that are rendered (16)
#   PARTS        which parts to run
#   LIMIT_S      seconds for everything (530; a rehearsal, which tells nothing of times, has ten times as many)
#   GEOPOSE_COMMIT   commit of a copy without .git, with a + behind it for changes
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
out=$(cd "$out" && pwd)
work=$(cd "$work" && pwd)
log=$out/log.txt
: >"$log"
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
rehearsal=${GPU_CHECK_REHEARSAL:-}
patience=1
[ -z "$rehearsal" ] || patience=10
limit_s=${LIMIT_S:-$((530 * patience))}
encoder=${ENCODER:-resnet34}
micro_batch=${MICRO_BATCH:-16}
undone=()

say() {
  echo "gpu_check: $*" | tee -a "$log"
}

# lacking NAME...: those modules that this Python cannot import.
lacking() {
  "$python" -c '
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])' "$@"
}

# part NAME LIMIT_S NEEDED-MODULES COMMAND...: run it under its limit, keep its output, go on whatever becomes of it.
part() {
  local name=$1 limit=$(($2 * patience)) needs=$3 began=$SECONDS code=0 missing left=$((limit_s - SECONDS - 5))
  shift 3
  case " ${PARTS:-setup doctor data step epoch submission tests augment checkpoint lossless epoch_large} " in
    *" $name "*) ;;
    *) return 0 ;;
  esac
  if [ "$left" -lt 10 ]; then
    say "$name LEFT OUT: the $limit_s s of LIMIT_S are spent"
    undone+=("$name")
    return 0
  fi
  # shellcheck disable=SC2086 # names of modules, one word each
  missing=$(lacking $needs 2>>"$log") || missing="a working Python ($python)"
  if [ -n "$missing" ]; then
    say "$name LEFT OUT: it needs $missing, which this machine lacks; carry it as a wheel (WHEELS, tools/gpu_wheels.sh)"
    undone+=("$name")
    return 0
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --kill-after=10 "$limit" bash -c '"$@"' part "$@" >"$work/part.log" 2>&1 </dev/null || code=$?
  { echo "== $name" && cat "$work/part.log"; } >>"$log"
  if [ "$code" = 0 ]; then
    say "$name done in $((SECONDS - began)) s"
  else
    echo "gpu_check: $name ends with:"
    tail -n 12 "$work/part.log"
    say "$name FAILED with $code after $((SECONDS - began)) s (124 or 137: over its limit of $limit s)"
    undone+=("$name")
  fi
}

# A bare machine: its own torch, our missing packages from wheels, the kernels compiled by its compiler. Packages go into
# a folder on PYTHONPATH, since torch may itself live in a virtual environment, which another one would not see.
setup() {
  if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
      --target "$work/site" "$WHEELS"/*.whl || return
  fi
  time "$python" setup.py --quiet build_ext --inplace --force || return
  "$python" -c 'import torch, geopose_dist.kernels; print("torch", torch.__version__, "and the kernels are here")'
}

# The benchmark's tiles at its own size; labels and images are what our renderer makes, so nothing is fetched.
data() {
  "$python" -m geopose_dist synth --out "$work/tiles" --places "$places" --views 4 --size "$side" --test-places 0 \
    --seed 1 && "$python" -m geopose_dist pack --source "$work/tiles" --out "$work/shards" --reduce 2
}

doctor() {
  nvidia-smi 2>/dev/null
  "$python" -m geopose_dist doctor || echo "doctor names faults, above; the other parts will tell which of them matter"
}

# The folder of the tests themselves, which import each other; another machine's warnings are no failures.
gpu_tests() {
  local files
  files=$(grep -l "mark.gpu" tests/test_*.py) || return
  # shellcheck disable=SC2086 # file names without spaces
  "$python" -m pytest -q -m gpu -o filterwarnings=default -o addopts=--strict-markers -p no:cacheprovider \
    --basetemp "$work/pytest" "$@" $files
}

bench() {
  local result=$1
  shift
  "$python" -m geopose_dist bench "$@" --json "$out/$result.json" --threads 0
}

if [ -n "$rehearsal" ]; then
  places=1 side=256 device=cpu
  recipe=(--config smoke --run.data.crop-px 64 --run.device cpu)
  batch=(--run.data.micro-batch 2 --run.data.global-batch 2)
  large=(--run.data.micro-batch 4 --run.data.global-batch 4)
  short=(--repeats 1 --steps 1)
  job=(--submission.tiles 6 --submission.side 256 --submission.distinct 2 --submission.sample 1
    --submission.encoder resnet18 --submission.device cpu)
  fewer=()
  tests=(--collect-only)
  quick=(--quick true)
else
  places=${PLACES:-16} side=2048 device=cuda
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
    echo "gpu_check: torch sees no GPU here ($python); GPU_CHECK_REHEARSAL=1 runs the same commands on the CPU" >&2
    exit 2
  fi
  recipe=(--config train/base --config hardware/gpu80 --run.model.encoder "$encoder" --run.model.weights none
    --run.data.crop-px null --run.data.workers "$(($(nproc) > 3 ? $(nproc) - 2 : 1))")
  batch=(--run.data.micro-batch "$micro_batch" --run.data.global-batch "$micro_batch")
  large=(--run.data.micro-batch $((2 * micro_batch)) --run.data.global-batch $((2 * micro_batch)))
  short=(--repeats 5 --steps 6)
  job=(--submission.encoder "$encoder")
  fewer=(--submission.tiles 128)
  tests=()
  quick=()
fi

[ -z "${WHEELS:-}" ] || WHEELS=$(cd "$WHEELS" && pwd)
export PYTHONPATH=$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor # what one part compiles the next one finds
if [ -z "${GEOPOSE_COMMIT:-}" ] && [ ! -e .git ]; then
  say "this is no checkout: results will name no commit unless GEOPOSE_COMMIT does"
fi
export python out work places side WHEELS
export -f setup doctor data gpu_tests bench # timeout starts a shell of its own

command="yaml rich jsonargparse docstring_parser numpy cv2"
pixels="$command imagecodecs tifffile PIL"
network="$pixels torch torchvision timm segmentation_models_pytorch safetensors"
part setup 90 "torch numpy Cython setuptools" setup
[ -z "$(lacking ray)" ] || say "Ray is not installed here: the same actors run in plain processes"
part doctor 20 "$command" doctor
part data 70 "$pixels" data
part step 110 "$network" bench step step "${recipe[@]}" "${batch[@]}" "${short[@]}"
part epoch 80 "$network" bench epoch epoch epoch_benchmark "${recipe[@]}" "${batch[@]}" "${short[@]}" --shards "$work/shards"
part submission 110 "$network" bench submission submission "${job[@]}"
part tests 90 "$network pytest hypothesis" gpu_tests "${tests[@]}"
part augment 40 "$network" bench device_augment device_augment --repeats "${short[1]}" "${quick[@]}"
part checkpoint 40 "$network" bench checkpoint checkpoint --repeats "${short[1]}" "${quick[@]}"
part lossless 60 "$network" bench submission_lossless submission "${job[@]}" "${fewer[@]}" --submission.megabytes 0
part epoch_large 80 "$network" bench epoch_large epoch "${recipe[@]}" "${large[@]}" "${short[@]}" --shards "$work/shards"

if [ ${#undone[@]} -gt 0 ]; then
  say "not done on $device after $SECONDS s: ${undone[*]}; see $out/"
  exit 1
fi
say "all parts done on $device in $SECONDS s; results in $out/"
