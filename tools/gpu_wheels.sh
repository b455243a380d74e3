#!/usr/bin/env bash
# Wheels for a machine that has a GPU and torch but no network: DeepSpeed, what it needs, and pytest; no torch, no CUDA.
#
#   here:   bash tools/gpu_wheels.sh wheels              # some 20 MiB; PYTHON=... for another than .venv's
#   there:  pip install --no-index --find-links wheels deepspeed safetensors pytest pybind11 setuptools
#           python setup.py -q build_ext --inplace       # needs a C++ compiler; without one Python does its work
#           python tools/gpu_check.py
#
# The Python of both machines must be of one version: some of the wheels are compiled.
set -euo pipefail

FOLDER="${1:-wheels}"
PYTHON="${PYTHON:-.venv/bin/python}"
DEEPSPEED=0.19.8

mkdir -p "$FOLDER"
# DeepSpeed's is built here, from its sources: that asks for torch, but compiles nothing of CUDA.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation \
  --wheel-dir "$FOLDER" "deepspeed==$DEEPSPEED"
"$PYTHON" -m pip wheel --quiet --wheel-dir "$FOLDER" \
  einops hjson msgpack safetensors ninja "numpy<3" packaging psutil py-cpuinfo pydantic tqdm pytest pybind11==3.1.0 setuptools
du -sh "$FOLDER"
