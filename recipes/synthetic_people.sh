#!/usr/bin/env bash
# People who do not exist, from nothing to a network: nobody has to be asked.
#
#     recipes/synthetic_people.sh data/synthetic runs/synthetic [--val lfw.bin]
#
# Reaches: 83.39 % +- 1.13 on LFW (folds 1-3, 1,800 pairs; AUC 0.911). They are no substitute for photos.
# Costs: 40,000 photos in 27 minutes and 680,000 crops of training in 72, on two CPU cores with bfloat16 (--amp --compile
# --workers 0, two processes).
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?"usage: recipes/synthetic_people.sh CROPS OUT [more options]"}
out=${2:?"usage: recipes/synthetic_people.sh CROPS OUT [more options]"}
shift 2
python synthesize.py --identities 4000 --images 10 --crops --out "$data"
python train.py --data "$data" --out "$out" --resume \
  --network mfn --embedding-size 256 --augment strong --batch-size 64 --epochs 17 \
  --small-epochs 11 --schedule cosine --lr 0.03 --warmup 1 --margin 0.3 --margin-warmup 6 --scale 32 "$@"
