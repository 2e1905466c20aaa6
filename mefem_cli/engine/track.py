"""`--track tensorboard`: the numbers of metrics.jsonl as curves, in `tensorboard/` under the run folder."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.errors import UsageError

FOLDER = "tensorboard"
COUNTS = ("step", "epoch", "samples")  # the axis, not curves


def refuse_missing(track: str) -> None:
    """Raise UsageError where what `--track` wants is not installed."""
    if track == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError('--track tensorboard: it is not installed; type: pip install "mefem-cli[track]"')


class TensorBoard(Observer):
    """Writes every number of a row as `step/<name>` or `epoch/<name>`; lists are left to the report."""

    def __init__(self, run_path: Path):
        self.folder = run_path / FOLDER
        self._writer: Any = None  # opened by the first row, so that a resumed run knows its step

    def see(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write one row; an epoch row also flushes."""
        if not trainer.world.is_first:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=row["step"])  # an earlier run's later steps
        for name, value in row.items():
            if name not in COUNTS and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        if row["kind"] == "epoch":
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
