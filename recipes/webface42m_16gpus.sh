#!/usr/bin/env bash
# WebFace42M (42,474,557 crops of 2,059,906 people) with InsightFace's r100 on 16 GPUs of two machines.
#
#     recipes/webface42m_16gpus.sh /shared/webface42m /shared/runs/webface HOST --val /shared/lfw.bin     # on both
#
# HOST is the name of the first machine. Under Slurm: the sbatch file in docs/training.md.
#
# Reaches: not measured here. Costs: 20 epochs are 850 million crops of 73 GFLOP, forward and backward; by arithmetic, at
# a quarter of the bfloat16 rate of 16 H100 (989 TFLOP/s each), four and a half hours. A GPU holds a sixteenth of the
# head, 0.6 GB of centres and momentum. The disk holds three checkpoints of 9 GB, in 16 parts each.
#
# The recipe is arcface_torch's (wf42m_pfc02_16gpus): CosFace 0.4, rate 0.3 for 4,096 crops a step, falling as (1 - t)^2
# after an epoch of warm-up, a fifth of the identities in each step.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: recipes/webface42m_16gpus.sh CROPS OUT HOST [more options]"
data=${1:?$usage}
out=${2:?$usage}
host=${3:?$usage}
shift 3
torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$host:29500" --max-restarts=3 \
  train.py --data "$data" --out "$out" --resume \
  --network ir100 --batch-size 4096 --epochs 20 --warmup 1 --schedule poly --lr 0.3 \
  --loss cosface --margin 0.4 --scale 64 --sample-rate 0.2 --compile "$@"
