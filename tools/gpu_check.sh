#!/usr/bin/env bash
# What CI cannot see: run this on a machine with GPUs after `make setup`. Leaves gpu_check/ with what was measured.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-gpu_check}
mkdir -p "$out"

"$python" -m geopose_dist doctor --json "$out/doctor.json"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "tools/gpu_check.sh: torch sees no GPU here; nothing was checked" >&2
  exit 1
fi

# Tests marked gpu; code 5 means that there are none.
"$python" -m pytest -m gpu || [ $? = 5 ]

# The whole story on the GPUs, small.
OUT=$out/story PLACES=${PLACES:-12} VIEWS=${VIEWS:-2} SIZE=${SIZE:-512} CONFIG=${CONFIG:-smoke} launch/pipeline.sh
