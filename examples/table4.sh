#!/usr/bin/env bash
# The paper's ablation without its confounds: 9 pretrainings of one length, 3 seeds, 17 rows, on your own crops.
#
# Command:   examples/table4.sh CROPS OUT [options of mefem ablate]
# Time:      some hours of processor time for 1,317 faces on 2 cores of an AMD EPYC; see `-n`
# Expected:  differences that cannot be told apart from chance with so few faces; look at the intervals
# Stop it at any time: the same line goes on where it was. With GPUs leave `small` out, for the paper's ViT-S at 224 px.
set -euo pipefail
crops=$1 out=$2
shift 2
small=(--epochs 10 --set backbone=vit_tiny_patch16_224 --set depth=4 --set embed_dim=96 --set num_heads=3
  --set predictor_depth=2 --set image_size=112 --set patch_size=8)

mefem ablate table4-fair --crops "$crops" -o "$out" "${small[@]}" "$@" -n
mefem ablate table4-fair --crops "$crops" -o "$out" "${small[@]}" "$@"
