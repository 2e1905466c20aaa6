"""Paired differences between two lines of a table, from their predictions out of fold.

For each seed it is what `mefem probe --store A --store B` says: a bootstrap that draws the same people for both. Over
seeds it is combined as the mean is (`results.mean_interval`). What was computed is kept in `cells/differences.json`, so
that tables are rewritten quickly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mefem_cli import console
from mefem_cli.ablation import results, steps
from mefem_cli.ablation.grid import COLUMNS_OF_THEIR_OWN, Cell, shown_value
from mefem_cli.ablation.results import Line
from mefem_cli.ablation.runner import Strand
from mefem_cli.ablation.steps import Assignment
from mefem_cli.errors import MefemError, NoInputError, UsageError
from mefem_cli.evaluation import evaluate
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.metrics import LOWER_IS_BETTER, Predictions
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.score import Score
from mefem_cli.parts import Given
from mefem_cli.stores import product
from mefem_cli.stores.joining import Faces

PREDICTIONS, KEPT = "predictions.parquet", "differences.json"
SIDES = ("value", "low", "high")
MOST_NAMED = 4  # cells in an error

Found = dict[str, dict[str, float | None]]  # metric -> value, low, high of a difference

# What to compare with -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A cell to compare with; without head and features, each line is compared with its own."""

    name: str
    own: Assignment  # head and features, where they were named

    def fits(self, line: Line, compared: Line) -> bool:
        """Whether `line` is what `compared` is to be compared with."""
        wanted = {"head": compared.head, "features": compared.features, **self.own}
        return line.cell.name == self.name and _columns_of(line) == wanted

    def names(self, line: Line) -> bool:
        """Whether `line` is one that others may be compared with."""
        return line.cell.name == self.name and self.own.items() <= _columns_of(line).items()

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={shown_value(value)}" for name, value in self.own.items())])


def _columns_of(line: Line) -> Assignment:
    return {"head": line.head, "features": line.features}


def find_references(wanted: Sequence[Assignment], cells: Sequence[Cell]) -> list[Reference]:
    """Return the cells to compare with, the first cell where none is named; see `known_references`."""
    found = [Reference(names[0], _columns(one)) for one in wanted if (names := _names(one, cells))]
    return found or [Reference(cells[0].name, {})]


def known_references(wanted: Sequence[Assignment], cells: Sequence[Cell], is_exact: bool) -> list[Assignment]:
    """Return those that name a cell. Raises UsageError where one names several, or none, or two are of one group.

    Unless `is_exact`, one that names none is left out with a warning: flags have changed the grid that it was made for.
    """
    found: list[Assignment] = []
    groups: dict[str, str] = {}
    for one in wanted:
        names = _names(one, cells)
        typed = " ".join(f"{name}={shown_value(value)}" for name, value in one.items())
        if len(names) > 1:
            several = _listed(names)
            raise UsageError(f'--reference "{typed}" fits {len(names)} cells ({several}); add what tells one of them')
        if not names and is_exact:
            there = _listed([f"{cell.name} ({cell.reads})" if _columns(one) else cell.name for cell in cells])
            raise UsageError(f'--reference "{typed}" fits no cell of this grid; there is {there}')
        if not names:
            console.warn(f"the reference of the grid, {typed}, fits no cell now; name one with --reference")
            continue
        group = next(cell.group for cell in cells if cell.name == names[0])
        if group in groups:
            of_group = f'the group "{group}"' if group else "a grid without groups"
            raise UsageError(
                f'--reference "{groups[group]}" and "{typed}": {of_group} has one reference; give one of them'
            )
        groups[group] = typed
        found.append(one)
    return found


def _listed(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return "; ".join(distinct[:MOST_NAMED]) + "; ..." * (len(distinct) > MOST_NAMED)


def _columns(wanted: Assignment) -> Assignment:
    return {name: value for name, value in wanted.items() if name in COLUMNS_OF_THEIR_OWN}


def _names(wanted: Assignment, cells: Sequence[Cell]) -> list[str]:
    """Return the names of the cells that fit: those told apart by just these options, else those that have them."""
    options = {name: value for name, value in wanted.items() if name not in COLUMNS_OF_THEIR_OWN}
    cells = [cell for cell in cells if _reads(cell, _columns(wanted))]
    exact = [cell.name for cell in cells if cell.shown == options]
    return list(dict.fromkeys(exact or [cell.name for cell in cells if _has(cell, options)]))


def _reads(cell: Cell, columns: Assignment) -> bool:
    """Whether a cell has a line with this head or these features, or both."""
    if cell.model and not cell.probe.get("features"):  # which features it has is known when it is read
        columns = {name: value for name, value in columns.items() if name != "features"}
    pairs = steps.reads(cell.probe, bool(cell.model) or steps.trains_cls(cell.pretrain))
    return any(columns.items() <= {"head": head, "features": features}.items() for head, features in pairs)


def _has(cell: Cell, options: Assignment) -> bool:
    """Whether a cell has these values, defaults included; nothing was pretrained for a given encoder."""
    for name, value in options.items():
        (step, *_), option = steps.of(name), name.rpartition(".")[2]
        settled = {} if cell.model and step == "pretrain" else steps.settled(step, getattr(cell, step), cell.model)
        found = cell.model if name == steps.MODEL else settled.get(option, _has)  # itself: equal to no value
        if found != value:
            return False
    return True


def reference_of(line: Line, lines: Sequence[Line], references: Sequence[Reference]) -> Line | None:
    """Return the line to compare with: that of the line's own group, else that of the first reference."""
    fitting = [(reference, one) for reference in references for one in lines if reference.fits(one, line)]
    own_group = [one for _, one in fitting if one.cell.group == line.cell.group]
    first = [one for reference, one in fitting if reference is references[0]]
    return next(iter(own_group + first), None)


# Differences --------------------------------------------------------------------------------------------------------


class Differences:
    """Compares lines of the tables, each pair once."""

    def __init__(self, cells_folder: Path, strands: Sequence[Strand], faces: Faces):
        """`faces` has the ids, labels and columns of the crops: who is who does not stand with the predictions."""
        self._faces, self._strands = faces, strands
        self._file = cells_folder / KEPT
        self._kept = _read_kept(self._file)
        self._used: dict[str, Found] = {}
        self._scores: dict[tuple[Path, str, str, str], Score | None] = {}
        self._people: dict[str, dict[str, int]] = {}

    def save(self) -> None:
        """Keep what was computed or used for the next time."""
        if self._used != _read_kept(self._file):
            product.write_json(self._file, self._used)

    def between(self, first: Line, second: Line, task: str) -> dict[str, Interval]:
        """Return first minus second for each metric, the mean over the seeds that both have, with its interval.

        Empty where predictions are missing or are not of the same faces.
        """
        by_seed = [
            self._of_seed(Side(mine, first, task), Side(other, second, task))
            for mine in self._strands
            for other in self._strands
            if mine.seed == other.seed and first.cell in mine.cells and second.cell in other.cells
        ]
        known = [one for one in by_seed if one]
        names = known[0] if known else {}
        means = {name: results.mean_interval([one[name] for one in known if name in one]) for name in names}
        return {name: Interval(*mean) for name, mean in means.items() if math.isfinite(mean[0])}

    def _of_seed(self, first: Side, second: Side) -> Found:
        """Return metric -> value, low, high of one seed, kept or computed; empty where it cannot be told."""
        bootstraps = first.options.bootstraps
        key = steps.key([first.identity, second.identity], first.task, bootstraps)
        if key not in self._kept:
            score, other = self._score(first), self._score(second)
            if score is None or other is None:
                return {}
            try:
                found = evaluate.compare(score, other, bootstraps, first.strand.seed).metrics
            except NoInputError as error:
                console.warn(str(error))
                return {}
            self._kept[key] = {
                name: {side: _known(value) for side, value in vars(one).items()} for name, one in found.items()
            }
        self._used[key] = self._kept[key]
        return self._kept[key]

    def _score(self, side: Side) -> Score | None:
        """Return a line's predictions of one seed as a score; None where they are missing or damaged."""
        where = (side.folder, side.task, side.line.head, side.line.features)
        if where not in self._scores:
            path = side.folder / PREDICTIONS
            try:
                self._scores |= _read_scores(side.folder, self._people_of(side)) if path.exists() else {}
            except (OSError, LookupError, ValueError, TypeError, MefemError) as error:  # pyarrow's are ValueErrors
                console.warn(f"{path}: cannot be read ({type(error).__name__}); its differences are left out")
        return self._scores.setdefault(where, None)

    def _people_of(self, side: Side) -> dict[str, int]:
        """Return who is who among the faces of a task, id -> number, as the probing protocol has it."""
        key = steps.key(side.task, asdict(replace(side.options, head="default", features=None, bootstraps=2000)))
        if key not in self._people:
            problem = evaluate.prepare(self._faces, side.task, side.options, side.strand.seed)
            self._people[key] = dict(zip(map(str, problem.ids), problem.group.tolist(), strict=True))
        return self._people[key]


@dataclass(frozen=True)
class Side:
    """A line's predictions of one seed."""

    strand: Strand
    line: Line
    task: str

    @property
    def folder(self) -> Path:
        """Where they are; a task with several targets has one folder for all."""
        asked = next(one for one in self.strand.tasks if f"{self.task}.".startswith(f"{one}."))
        return self.strand.scores(self.line.cell, asked)

    @property
    def options(self) -> ProbeOptions:
        """The protocol that made them."""
        return cast(ProbeOptions, Given(self.line.cell.probe).build("evaluation.options", "ProbeOptions"))

    @property
    def identity(self) -> list[Any]:
        """What differs where the predictions do."""
        try:
            written = (self.folder / PREDICTIONS).stat().st_mtime_ns
        except OSError:
            written = None
        return [self.folder.parent.name, self.folder.name, self.line.head, self.line.features, written]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_kept(path: Path) -> dict[str, Found]:
    """Return the differences of an earlier time; none where the file is missing, damaged or of another make."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: {side: one[side] for side in SIDES} for name, one in kept[key].items()} for key in kept}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _read_scores(folder: Path, people: Mapping[str, int]) -> dict[tuple[Path, str, str, str], Score]:
    """Return all scores of a folder's predictions by folder, task, head and features; faces in the order of their ids.

    `people` says who is who: id -> number. Raises OSError or ValueError for a damaged file, KeyError for unknown faces.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / PREDICTIONS)
    text = {name: np.array(table[name].to_pylist(), dtype=object) for name in ("task", "head", "features", "id")}
    repeat = table["repeat"].to_numpy()
    found = {}
    for task, head, features in dict.fromkeys(zip(text["task"], text["head"], text["features"], strict=True)):
        is_mine = (text["task"] == task) & (text["head"] == head) & (text["features"] == features)
        seeds = [_predictions(table, np.flatnonzero(is_mine & (repeat == one)), people) for one in np.unique(repeat)]
        first, *others = [one for one in seeds if len(one)]
        score = Score(task, head, features, str(folder), folder.name, first, first, {}, repeats=tuple(others))
        found[folder, task, head, features] = score
    return found


def _predictions(table: Any, rows: np.ndarray, people: Mapping[str, int]) -> Predictions:
    """Return some rows of predictions.parquet, as `report.save` writes them."""
    part = table.take(rows)
    ids = np.array(part["id"].to_pylist(), dtype=object)
    group = np.unique([people[one] for one in ids], return_inverse=True)[1] if len(ids) else np.zeros(0, int)
    target, fold = part["target"].to_numpy(), part["fold"].to_numpy()
    if part["probabilities"].null_count:
        return Predictions(ids, target, part["prediction"].to_numpy(), fold, group)
    output = np.array(part["probabilities"].to_pylist(), dtype=np.float64)
    classes = [f"class {number}" for number in range(output.shape[1])]
    for side in ("target", "prediction"):
        for number, name in zip(part[side].to_pylist(), part[f"{side}_class"].to_pylist(), strict=True):
            classes[int(number)] = name
    return Predictions(ids, target.astype(int), output, fold, group, tuple(classes))


def verdict(metric: str, difference: Interval) -> str:
    """Return `better`, `worse` or `unclear` for first minus second, as `mefem probe` says it."""
    if not difference.excludes_zero:
        return "unclear"
    return "better" if (difference.value > 0) != (metric in LOWER_IS_BETTER) else "worse"
