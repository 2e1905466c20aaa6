"""Print what a run measured on its held-out faces, ten epochs of it, as Markdown. Usage: learning_curve.py RUN."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mefem_cli.stores.runs import Run

COLUMNS = ("loss_over_position", "rankme_centred", "rankme_centred_cls", "feature_std", "feature_std_cls")

rows = [row for row in Run.open(Path(sys.argv[1])).metrics() if row["kind"] == "epoch"]
chosen = [rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, 11).round().astype(int))]
print("| epoch | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
for row in chosen:
    print(f"| {row['epoch']} | " + " | ".join(f"{row[name]:.2f}" if name in row else "" for name in COLUMNS) + " |")
