#!/usr/bin/env bash
# Some hundred to some thousand people of your own, one GPU, and a public network to begin with: InsightFace's r50.
#
#     recipes/finetune.sh data/crops runs/mine backbone.pth [--val pairs.bin]
#     recipes/finetune.sh data/crops runs/mine adaface_ir101_webface4m.ckpt --network adaface_ir_101
#
# Reaches: not measured here with this network; benchmarks/trial_finetune.py measures the same options with mfn.
# Costs: by arithmetic, 500 people with 20 crops each are 100,000 crops of 38 GFLOP, forward and backward, in 10 epochs:
# 10 minutes at 6 TFLOP/s. On a CPU begin with InsightFace's MobileFaceNet (--network mbf). If a batch does not fit into
# the GPU: --accumulate 2.
#
# The centres begin at the mean embeddings of the identities, so the margin needs no warm-up; a tenth of the usual rate
# for the network, which knows a lot already. Margin 0.4 and scale 32 are for few identities.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?"usage: recipes/finetune.sh CROPS OUT FILE [more options]"}
out=${2:?"usage: recipes/finetune.sh CROPS OUT FILE [more options]"}
init=${3:?"usage: recipes/finetune.sh CROPS OUT FILE [more options]"}
shift 3
python train.py --data "$data" --out "$out" --init "$init" --resume \
  --network ir50 --augment strong --batch-size 64 --epochs 10 \
  --schedule cosine --lr 0.01 --head-lr 0.1 --warmup 0.5 --margin 0.4 --scale 32 "$@"
