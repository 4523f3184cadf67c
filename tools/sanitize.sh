#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer and UBSan: `make sanitize`. Works in a copy, so the usual build stays.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/repo"
# What git knows, edited or not, and new files that it does not ignore; a checkout without git is copied whole.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  git ls-files -z --cached --others --exclude-standard -- geopose_dist shards configs tests \
    setup.py pyproject.toml README.md LICENSE |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    xargs -0 cp --parents -t "$copy/repo"
else
  cp -r geopose_dist shards configs tests setup.py pyproject.toml README.md LICENSE "$copy/repo"
  rm -f "$copy"/repo/geopose_dist/kernels/*.so "$copy"/repo/geopose_dist/kernels/*.c
fi
[ ! -e "$root/../shared" ] || ln -s "$(cd "$root/../shared" && pwd)" "$copy/shared"
cd "$copy/repo"
GEOPOSE_SANITIZE=address,undefined "$python" setup.py --quiet build_ext --inplace

# Python itself leaks by design; everything else ends the run at once. Its own allocator would hide overruns.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONMALLOC=malloc OMP_NUM_THREADS=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD
"$python" - <<'PY'
import pathlib
import geopose_dist.kernels._gather as built
assert pathlib.Path(built.__file__).is_relative_to(pathlib.Path.cwd()), f"not the sanitized build: {built.__file__}"
PY
tests=(tests/test_kernels.py tests/test_kernel_doors.py tests/test_raise_heights.py tests/test_augment.py
  tests/test_planes.py tests/test_synth_scene.py tests/test_rectify.py tests/test_shadows.py)
here=()
for file in "${tests[@]}"; do [ ! -e "$file" ] || here+=("$file"); done
"$python" -m pytest "${here[@]}" -m "not slow and not soak" -p no:cacheprovider -q "$@"
