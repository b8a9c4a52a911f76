#!/usr/bin/env bash
# A set with wrong labels: train, audit it with the network that this gave, train without what was found, three times.
#
#     recipes/noisy_set.sh data/crops runs/mine [--val pairs.bin]
#
# Reaches: 88.83 % +- 1.16 on LFW (folds 1-3) with 15,423 crops of 1,308 people of which 30 % stand under another's label;
# 82.44 % without the audits, 91.17 % with the true labels (2,400 steps each, less than this; docs/results.md).
# Costs: three trainings, of which the first two have half of the epochs, and three audits. One GPU or a CPU.
#
# A network that was trained on wrong labels has learned some of them, and does not find these again. Trained without
# those that it did find, it finds more. So the first audits are generous (--error-rate 0.3): a wrong label costs the next
# training more than a right crop that is missing. The last one, OUT/audit, is strict: the one to look at.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?"usage: recipes/noisy_set.sh CROPS OUT [more options]"}
out=${2:?"usage: recipes/noisy_set.sh CROPS OUT [more options]"}
shift 2
short=(--epochs 10 --margin-warmup 5)
look() { python audit.py --data "$data" --checkpoint "$1/embedding.pt" --out "$1/audit" "${@:2}"; }
recipes/small_set.sh "$data" "$out/first" "${short[@]}" "$@"
look "$out/first" --error-rate 0.3
recipes/small_set.sh "$data" "$out/second" "${short[@]}" --exclude "$out/first/audit/audit.tsv" "$@"
look "$out/second" --error-rate 0.3
recipes/small_set.sh "$data" "$out" --exclude "$out/second/audit/audit.tsv" "$@"
look "$out"
