#!/usr/bin/env bash
# Clips of faces and a table of markers -> features of each person -> how well the markers can be read, as for MCD-rPPG.
#
# Command:   examples/video_biomarkers.sh OUT                             on 150 drawn people; the markers are made up
#            examples/video_biomarkers.sh OUT CLIPS MARKERS.csv FOLDS.csv on yours, such as MCD-rPPG:
#            MARKERS.csv: path, patient_id, upper_ap, lower_ap, ...; FOLDS.csv: patient_id, fold
# Needs:     pip install ".[video]"
# Time:      some 4 min of processor time
# Hardware:  2 cores of an AMD EPYC, no GPU
# Expected:  systolic r2 .05 [-.05, .13], MAE 8.8 beside a constant's 8.9: made-up markers cannot be read from 150 faces
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0") out=$1
clips=${2:-$out/clips} markers=${3:-$out/markers.csv} folds=${4:-$out/folds.csv}
small="--backbone vit_tiny_patch16_224 --depth 4 --image-size 96 --mask quadrants --predictor-depth 2"  # as mefem demo
read -ra recipe <<<"${RECIPE:-$small}"

[ $# -gt 1 ] || python "$here/imaginary_clinic.py" "$out" --people "${PEOPLE:-150}" --clips

# Two frames a second; each is a face of its own with its clip's labels, and all of a patient stay in one fold.
mefem crop "$clips" --labels "$markers" --frame every:0.5s -o "$out/crops"
[ -n "${MODEL:-}" ] || mefem pretrain "$out/crops" "${recipe[@]}" -o "$out/run" --overwrite
mefem embed "$out/crops" --model "${MODEL:-$out/run}" -o "$out/features.h5" --overwrite

# One prediction a patient: the mean over frames. Beside it the errors published for the data set's own video model.
mefem probe mcd_rppg --store "$out/features.h5" --folds "$folds" --group patient_id --aggregate patient_id \
  -o "$out/scores" --overwrite
