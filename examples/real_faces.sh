#!/usr/bin/env bash
# The four commands on 2,285 synthetic face photos (SFHQ-T2I and SFHQ), as docs/results.md reports them.
#
# Command:   examples/real_faces.sh FACES OUT [pretrain options]; FACES holds t2i/, stylegan/ and labels.csv
# Time:      about half an hour of processor time, two thirds of it training
# Hardware:  2 cores of an AMD EPYC with avx512_bf16, no GPU
# Expected:  sex AUROC .765 [.737, .792] by ridge on cls, step 0 .682; age r2 .093 [.051, .134], step 0 .064
# Any later run goes on where it stopped.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
faces=$1 out=$2
shift 2
recipe=(--backbone vit_tiny_patch16_224 --depth 6 --image-size 112 --patch-size 16 --width 2 --predictor-depth 3 "$@")

mefem crop "$faces/t2i" --labels "$faces/labels.csv" -o "$out/crops_t2i"
mefem crop "$faces/stylegan" --labels "$faces/labels.csv" --detector none -o "$out/crops_stylegan"
if [ ! -e "$out/pretrained/model.json" ]; then
  mefem pretrain "$out/crops_t2i" "$out/crops_stylegan" "${recipe[@]}" -o "$out/pretrained"
fi
mefem pretrain "$out/crops_t2i" "$out/crops_stylegan" "${recipe[@]}" --epochs 0 -o "$out/step0" --overwrite
for model in pretrained step0; do
  mefem embed "$out/crops_t2i" "$out/crops_stylegan" --model "$out/$model" --patches -o "$out/$model.h5"
done
python "$(dirname "$0")/pixel_store.py" "$out/pixels.h5" "$out/crops_t2i" "$out/crops_stylegan"

python "$(dirname "$0")/learning_curve.py" "$out/pretrained"
stores=(--store "$out/pretrained.h5" --store "$out/step0.h5")
mefem probe age_est sex_est --head linear --features mean "${stores[@]}" --store "$out/pixels.h5"
mefem probe age_est sex_est --head linear --features cls "${stores[@]}"
mefem probe age_est sex_est --head attentive --weight-decays 0.01,1 "${stores[@]}"  # half the default grid
