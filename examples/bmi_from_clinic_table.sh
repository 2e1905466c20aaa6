#!/usr/bin/env bash
# A clinic's own export (semicolons, decimal commas, heights and weights) -> BMI from photos -> a head for new photos.
#
# Command:   examples/bmi_from_clinic_table.sh OUT                    on 1,000 drawn people
#            examples/bmi_from_clinic_table.sh OUT PHOTOS CLINIC.csv  on yours: photo;patient;sex;age;height_cm;...
# Time:      5 min 40 s of processor time
# Hardware:  2 cores of an AMD EPYC, no GPU
# Expected:  BMI r2 .20 [.17, .23] of 1,000 people, .18 more than age and sex alone; with 300 people nothing (-.01)
# No data for training an encoder of your own? MODEL=farl:PATH, MODEL=onnx:PATH or an earlier run take its place.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0") out=$1
photos=${2:-$out/photos} table=${3:-$out/clinic.csv}
small="--backbone vit_tiny_patch16_224 --depth 4 --image-size 96 --mask quadrants --predictor-depth 2"  # as mefem demo
read -ra recipe <<<"${RECIPE:-$small --batch-size 32 --lr 5e-4 --ema 1:0.997 --epochs 24}"

[ $# -gt 1 ] || python "$here/imaginary_clinic.py" "$out" --people "${PEOPLE:-1000}"

mefem crop "$photos" --labels "$table" --key photo -o "$out/crops"
[ -n "${MODEL:-}" ] || mefem pretrain "$out/crops" "${recipe[@]}" -o "$out/run" --overwrite
mefem embed "$out/crops" --model "${MODEL:-$out/run}" -o "$out/features.h5" --overwrite

# BMI from height and weight; implausible values are rejected and counted. Photos of one patient are averaged.
# Beside it stands what age and sex alone say, as BMI is partly age. Results by sex; report.html has the pictures.
head=(--head linear --features mean --group patient)
mefem probe bmi --store "$out/features.h5" "${head[@]}" --aggregate patient --by sex -o "$out/scores" --overwrite
mefem probe bmi --store "$out/features.h5" "${head[@]}" --save "$out/bmi.head" --overwrite >"$out/kept.txt"

# New photos: predictions with intervals, and a warning where a face is unlike those learned from. Research only.
mefem predict "$photos" --head "$out/bmi.head" --limit 10 -o "$out/predictions.csv" --overwrite
head -n 4 "$out/predictions.csv"
