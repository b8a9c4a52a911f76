#!/usr/bin/env bash
# The whole sequence on people who do not exist, by the commands of the README. `make demo` runs it inside .venv.
#
# 8 minutes on two idle cores. Killed at any point, it goes on where it was when it is started again;
# `rm -rf data/demo runs/demo` starts afresh. DEMO_DATA and DEMO_RUN put the files elsewhere.
set -euo pipefail
cd "$(dirname "$0")"

data=${DEMO_DATA:-data/demo}
run=${DEMO_RUN:-runs/demo}
started=$SECONDS
stage() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - started)); }

stage "Photos: 64 people to train on, 24 to verify, 12 probes, 100 distractors; nobody is in two sets"
python synthesize.py --identities 64 --images 12 --first 0 --out "$data/train"
python synthesize.py --identities 24 --images 5 --first 1000 --layout lfw --folds 3 --pairs 60 --out "$data/lfw"
python synthesize.py --identities 12 --images 5 --first 2000 --layout facescrub --out "$data/FaceScrub"
python synthesize.py --identities 100 --images 1 --first 3000 --layout megaface --out "$data/MegaFace"

stage "Stage 2: find and align faces"
python pre_process.py --photos "$data/train" --out "$data/crops"

stage "Stage 3: train"
if [ ! -e "$run/train/results.json" ]; then
  python train.py --data "$data/crops" --network mfn --embedding-size 128 --out "$run/train" --resume \
    --batch-size 64 --epochs 16 --lr 0.1 --schedule cosine --warmup 1 --margin 0.3 --margin-warmup 8 --scale 24 \
    --augment strong --log-every 5 --val "$data/lfw" --val-every 16
fi

stage "Stage 4: verification pairs"
python lfw_eval.py --checkpoint "$run/train/embedding.pt" --lfw "$data/lfw" --out "$run/lfw" | tee "$run/lfw.txt"

stage "Stage 5: align probes and distractors"
python align_facescrub.py --src "$data/FaceScrub" --dst "$data/FaceScrub_aligned" \
  --annotations "$data/FaceScrub/annotations.txt"
python align_megaface.py --src "$data/MegaFace" --dst "$data/MegaFace_aligned"

stage "Stage 6: MegaFace Challenge 1"
python megaface_eval.py --checkpoint "$run/train/embedding.pt" --facescrub "$data/FaceScrub_aligned" \
  --megaface "$data/MegaFace_aligned" --noise raw --out "$run/megaface" | tee "$run/megaface.txt"

stage "Done"
tensorboard=$(type -P tensorboard || echo tensorboard) # its path, since .venv is in nobody's PATH but this script's
printf 'Training (last lines of %s)\n' "$run/train/log.txt"
tail -n 3 "$run/train/log.txt"
printf '\nVerification\n' && cat "$run/lfw.txt"
printf '\nMegaFace Challenge 1\n' && cat "$run/megaface.txt"
cat <<END

Photos             $data/*/                  (truth beside them: truth.tsv)
Curves, errors     $run/lfw/*.png  $run/megaface/*.png
Training curves    $(printf '%q ' "$tensorboard" --logdir "$(realpath "$run")/train")

These figures say that the pipeline runs, not how good it gets: 64 invented people and a few minutes of training.
END
