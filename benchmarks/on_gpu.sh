#!/usr/bin/env bash
# Everything that asks for a GPU, in ten minutes: is it right there, how fast is it, what does it learn?
#
#   bash benchmarks/on_gpu.sh                       # or: make gpu; results in benchmarks/results/*.json
#   bash benchmarks/on_gpu.sh --device cpu --tiny   # every part in small, to see that the script works
#
# Needs torch, torchvision, numpy and opencv and no network; parts that need more say so and are skipped. Parts come in the
# order of their worth, each with a time limit; one that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/on_gpu.py "$@"
