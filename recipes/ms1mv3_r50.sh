#!/usr/bin/env bash
# MS1MV3 (5,179,510 crops of 93,431 people), or another public set in InsightFace's RecordIO, with InsightFace's r50.
#
#     recipes/ms1mv3_r50.sh data/ms1m-retinaface-t1 runs/ms1mv3_r50 8 --val lfw.bin cfp_fp.bin agedb_30.bin
#
# Reaches: not measured here. Costs: 20 epochs are 104 million crops of 38 GFLOP, forward and backward; by arithmetic, at
# a quarter of an H100's bfloat16 rate (989 TFLOP/s), four and a half hours on one. If 1,024 crops do not fit into one
# GPU: --accumulate 2.
#
# The recipe is arcface_torch's: ArcFace 0.5, rate 0.1 for 1,024 crops a step, falling as (1 - t)^2.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?"usage: recipes/ms1mv3_r50.sh CROPS OUT [GPUS] [more options]"}
out=${2:?"usage: recipes/ms1mv3_r50.sh CROPS OUT [GPUS] [more options]"}
shift 2
gpus=1
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$1
  shift
fi
torchrun --standalone --nproc_per_node="$gpus" train.py --data "$data" --out "$out" --resume \
  --network ir50 --batch-size 1024 --epochs 20 --schedule poly --lr 0.1 --margin 0.5 --scale 64 --compile "$@"
