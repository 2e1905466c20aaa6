"""Finished grids in a moment, for tests of what is read from them: real scores of made-up predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mefem_cli.ablation.grid import Cell
from mefem_cli.ablation.runner import Strand
from mefem_cli.evaluation import bootstrap, report
from mefem_cli.evaluation.job import Results
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.evaluation.score import Score

Predict = Callable[[Cell, int, str, str], np.ndarray]  # cell, seed, head, features -> output (N,) or [N, C]


def write_scores(
    folder: Path,
    task: str,
    outputs: dict[tuple[str, str], np.ndarray],
    ids: Sequence[str],
    target: np.ndarray,
    group: np.ndarray,
    classes: tuple[str, ...] = (),
    published: dict[str, float] | None = None,
) -> None:
    """Write what `mefem probe -o` does, from outputs out of fold by head and features."""
    scores = []
    for (head, features), output in outputs.items():
        one = Predictions(np.array(ids, dtype=object), target, output, np.arange(len(ids)) % 2, group, classes)
        found = bootstrap.intervals(one, 200, 0)
        guess = replace(one, output=np.full(output.shape, 1 / len(classes) if classes else target.mean()))
        scores.append(Score(task, head, features, "s", "m", one, guess, found, published=published or {}))
    report.save(folder, Results(scores=scores), {})


def finish(
    strands: Sequence[Strand], predict: Predict, ids: Sequence[str], target: np.ndarray, group: np.ndarray
) -> None:
    """Write the scores of all cells of strands."""
    for strand in strands:
        for cell in strand.cells:
            for task in strand.tasks:
                features = cell.probe.get("features", "cls")
                outputs = {
                    (head, features): predict(cell, strand.seed, head, features)
                    for head in cell.probe["head"].split(",")
                }
                if not strand.is_scored(cell, task):
                    write_scores(strand.scores(cell, task), task, outputs, ids, target, group)
