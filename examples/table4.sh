#!/usr/bin/env bash
# The paper's ablation without its confounds, on your own crops: 9 encoders of one length and an untrained one, 5 seeds.
#
# Command:   examples/table4.sh CROPS OUT --task TASK [options of mefem ablate]
# Time:      about 3 h of processor time for 1,317 faces; `-n` says it for yours
# Hardware:  2 cores of an AMD EPYC, no GPU
# Expected:  age r2 .03 to .08, sex accuracy .63 to .68, no row told apart from another (docs/results.md)
# With GPUs the paper's own ViT-S at 224 px, 66 epochs and 3 seeds:  GRID=table4-fair examples/table4.sh CROPS OUT
# Stop it at any time: the same line goes on where it was.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0") crops=$1 out=$2
shift 2

mefem ablate "${GRID:-$here/table4_coarse.yaml}" --crops "$crops" -o "$out" "$@" -n
mefem ablate "${GRID:-$here/table4_coarse.yaml}" --crops "$crops" -o "$out" "$@"
