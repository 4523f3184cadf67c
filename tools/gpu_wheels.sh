#!/usr/bin/env bash
# Download the wheels that a bare GPU machine lacks, for tools/gpu_check.sh to install there without a network.
#
#   tools/gpu_wheels.sh [FOLDER]        (gpu_wheels)
#
# Its torch, torchvision, CUDA, numpy, OpenCV, timm and compilers are its own; Ray is left at home (it is larger than
# all of these together, and prediction runs the same actors in plain processes without it), and so are pretrained
# weights, which change no time.
#
#   PYTHON_VERSION   of that machine (3.12)
#   PLATFORM         of that machine (manylinux_2_28_x86_64)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-gpu_wheels}
python=.venv/bin/python
version=${PYTHON_VERSION:-3.12}
platform=${PLATFORM:-manylinux_2_28_x86_64}
mkdir -p "$folder"

# Without their dependencies: those are on the machine, or named here.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt \
  --python-version "$version" --implementation cp --platform "$platform" --platform manylinux2014_x86_64 \
  --dest "$folder" \
  segmentation-models-pytorch webdataset imagecodecs jsonargparse docstring-parser typeshed-client \
  braceexpand obstore pytest-timeout hypothesis sortedcontainers

bytes=$(cat "$folder"/*.whl | wc -c)
echo "gpu_wheels: $((bytes / 1024 / 1024)) MiB in $folder"
if [ "$bytes" -gt $((56 * 1024 * 1024)) ]; then
  echo "gpu_wheels: that is more than fits beside the checkout into 64 MiB; carry it in two parts" >&2
  exit 1
fi
