#!/usr/bin/env bash
# The whole story in one file: synthetic cities -> leak-free split -> shards -> training -> prediction -> score -> page.
# Every stage skips what is whole, so an interrupted run goes on where it stopped. `make demo` calls this.
#
#   OUT=demo  PLACES=64 VIEWS=2 SIZE=640 SEED=0   what is rendered: places over four cities, views of each, pixels
#   CONFIG=demo  STEPS=   the training recipe, and its length in steps where the recipe's own is not wanted
#   RANKS=  WORKERS=2     training processes (all GPUs, or 2 without one) and prediction workers
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-demo}
CONFIG=${CONFIG:-demo}
python=${PYTHON:-.venv/bin/python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}

geopose() {
  "$python" -m geopose_dist "$@"
}
stage() {
  printf '\n== %3d s  %s\n' "$SECONDS" "$*"
}

# 1. Cities that never were, in the challenge's own layout. Every place is seen from several directions.
stage "render ${PLACES:=64} places in ${VIEWS:=2} views each"
geopose synth --out "$OUT/data" --places "$PLACES" --views "$VIEWS" --size "${SIZE:-640}" --seed "${SEED:-0}"

# 2. Validation places are places that training never sees: a random split of tiles would leak.
stage "split by place"
geopose split --source "$OUT/data" --by place --out "$OUT/split.json"

# 3. Plain WebDataset tars, reduced 2x as in the published benchmark: image by area, heights on the same pixel centres.
stage "pack shards"
geopose pack --source "$OUT/data" --out "$OUT/shards" --split "$OUT/split.json" --reduce 2

# 4. Distributed data parallel, one process per GPU or two on the CPU.
stage "train on $RANKS processes"
NPROC=$RANKS CONFIG=$CONFIG launch/torchrun.sh --data.shards "$OUT/shards" --out "$OUT/run" ${STEPS:+--length "$STEPS steps"}

# 5. Ray actors, averaging over the symmetries of a square, turn the unlabelled test tiles, places that were in neither split, into challenge files.
stage "predict the test tiles"
geopose predict --config predict/best --source "$OUT/data" --checkpoint "$OUT/run" --out "$OUT/predictions" --workers "${WORKERS:-2}"

# 6. The official score against the truth that synth kept aside, then the archive that one would hand in.
stage "score and pack the submission"
geopose evaluate --predictions "$OUT/predictions" --truth "$OUT/data/test_truth" --json "$OUT/score.json"
geopose submit --predictions "$OUT/predictions" --format "$OUT/data/submission_format" --out "$OUT/submission.tar.gz"

# 7. One page with everything to look at, and a tile in three dimensions.
stage "write the page"
geopose report --run "$OUT/run" --source "$OUT/data" --predictions "$OUT/predictions" --truth "$OUT/data/test_truth" \
  --score "$OUT/score.json" --out "$OUT/index.html"
for tile in "$OUT"/predictions/*_AGL.tif; do break; done
geopose view --source "$OUT/data" --predictions "$OUT/predictions" --truth "$OUT/data/test_truth" \
  --key "$(basename "$tile" _AGL.tif)" --out "$OUT/view.html"

"$python" -c '
import json, sys
score = json.load(open(sys.argv[1]))
cities = ", ".join("{} {:.3f}".format(name, facts["r2"]) for name, facts in sorted(score["cities"].items()))
print("final score {:.4f} ({}), on places that training never saw".format(score["r2"], cities))
' "$OUT/score.json"
echo "the pages: $OUT/index.html, $OUT/view.html (after $SECONDS s)"
