#!/usr/bin/env bash
# Photos and a table of labels -> an encoder -> how well BMI and age can be read, in one pipe and its parts.
#
# Command:   examples/quickstart.sh OUT                     on 300 drawn people, two photos each
#            examples/quickstart.sh OUT PHOTOS LABELS.csv   on your own; LABELS.csv: path, subject, bmi, age
# Time:      3 min 50 s of processor time
# Hardware:  2 cores of an AMD EPYC, no GPU
# Expected:  age r2 .27 [.17, .36], step 0 .21 [.12, .29]: not told apart by 600 photos; BMI is not read (r2 .00)
# RECIPE="--epochs 50 ..." takes the place of the options of pretraining, by default a small network for few faces.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0") out=$1
photos=${2:-$out/photos} labels=${3:-$out/labels.csv}
small="--backbone vit_tiny_patch16_224 --depth 4 --image-size 96 --mask quadrants --predictor-depth 2"  # as mefem demo
read -ra recipe <<<"${RECIPE:-$small}"

[ $# -gt 1 ] || python "$here/imaginary_clinic.py" "$out" --people "${PEOPLE:-300}"

mefem crop "$photos" --labels "$labels" -o "$out/crops" |
  mefem pretrain "${recipe[@]}" -o "$out/run" --overwrite |
  mefem embed -o "$out/features.h5" --overwrite |
  mefem probe bmi age --by sex -o "$out/scores" --overwrite

# Is that better than the same network before its first step? The paired difference says it.
mefem pretrain "$out/crops" "${recipe[@]}" --epochs 0 -o "$out/step0" --overwrite |
  mefem embed -o "$out/step0.h5" --overwrite >/dev/null
mefem probe bmi age --head linear --features mean --store "$out/features.h5" --store "$out/step0.h5"
