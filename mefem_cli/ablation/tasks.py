"""Whether crops have what a grid is scored on, asked before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mefem_cli import console, parts
from mefem_cli.ablation import steps
from mefem_cli.ablation.grid import Cell
from mefem_cli.errors import MefemError, NoInputError
from mefem_cli.evaluation import problem
from mefem_cli.parts import Given
from mefem_cli.stores.crops import Crops

ADVISED = re.compile(r"type --([\w-]+) ([^\s;,]+)")  # in an error of mefem probe


class LabelledFaces:
    """Crops as the probing protocol sees a store before it reads features: labels, and who is who."""

    def __init__(self, crops: Crops):
        self.path: Path = crops.folders[0]
        self.ids = np.array(crops.ids, dtype=object)
        self.labels: Mapping[str, np.ndarray] = crops.labels
        self.meta: Mapping[str, np.ndarray] = crops.columns

    def __len__(self) -> int:
        return len(self.ids)


def usable_tasks(
    faces: LabelledFaces, tasks: Sequence[str], cells: Sequence[Cell], seed: int, may_drop: bool
) -> tuple[str, ...]:
    """Make the targets and folds of every task once, so that hours of training do not end at a missing label.

    Returns the tasks; where `may_drop`, without those that the faces have no label for, if one is left. Raises
    NoInputError for a label that is missing and what `evaluation.problem` raises for one that does not do.
    """
    names = {option.name for option in parts.read_fields("evaluation.options", "ProbeOptions")} - {"head", "features"}
    distinct = {
        steps.key(chosen): chosen for cell in cells for chosen in [{n: v for n, v in cell.probe.items() if n in names}]
    }
    lacking: dict[str, NoInputError] = {}
    for chosen in distinct.values():
        options = Given(chosen).build("evaluation.options", "ProbeOptions")
        for task in tasks:
            try:
                asked = problem.ask(faces, task, options.kind)
            except NoInputError as error:
                lacking[task] = error
                continue
            for target in asked.targets:
                _make_problem(faces, asked, target, options, seed)
    if lacking and (not may_drop or len(lacking) == len(tasks)):
        raise next(iter(lacking.values()))
    for reason in lacking.values():
        console.warn(f"left out: {reason}")
    return tuple(task for task in tasks if task not in lacking)


def _make_problem(faces: LabelledFaces, asked: Any, target: Any, options: Any, seed: int) -> None:
    """Make a problem; where an error advises an option of mefem probe, it is typed as a grid is given it."""
    try:
        problem.make_problem(faces, asked, target, options, seed)
    except MefemError as error:
        raise type(error)(ADVISED.sub(r"type --set \1=\2", str(error))) from error
