#!/usr/bin/env bash
# Pretraining as a Slurm job: one process a GPU, a checkpoint before the time is over, and the job queues itself again.
#
# Command:   examples/slurm_pretrain.sh CROPS RUN [options of mefem pretrain]
# Time:      seconds to submit; ViT-S on a million crops for 66 epochs: see `mefem pretrain -n` on the machine itself
# Hardware:  a Slurm cluster with GPUs; without sbatch the job script is printed and nothing runs
# Expected:  a job number, or the script; then RUN/report.html, to be looked at while it trains
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
crops=$1 run=$2
shift 2
mkdir -p "$(dirname "$run")"

mefem pretrain "$crops" -o "$run" --gpus "${GPUS:-8}" "$@" --print-sbatch >"$run.sbatch"
if command -v sbatch >/dev/null; then
  sbatch "$run.sbatch"
else
  echo "no sbatch on this machine; the job script is $run.sbatch:" >&2
  cat "$run.sbatch"
fi
