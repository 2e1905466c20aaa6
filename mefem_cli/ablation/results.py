"""Outcomes as results.csv, a row for each seed, and as lines of a table: means over the seeds with intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mefem_cli.ablation.grid import Cell
from mefem_cli.ablation.runner import Outcome
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.stores import product

SIGNIFICANT_DIGITS = 6
OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Row:
    """One line of results.csv; a failure has one line without numbers."""

    cell: str
    seed: int
    task: str
    head: str
    features: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    status: str


def rows_of(outcomes: Iterable[Outcome]) -> list[Row]:
    """Return the lines of results.csv; a score that two cells share (equal but for other heads) is there once."""
    found: dict[tuple[Any, ...], Row] = {}
    for outcome in outcomes:
        for row in _outcome_rows(outcome):
            found.setdefault((row.cell, row.seed, row.task, row.head, row.features, row.metric, row.status), row)
    return list(found.values())


def _outcome_rows(outcome: Outcome) -> Iterable[Row]:
    cell = outcome.cell
    if outcome.failure:
        head, features = cell.probe["head"], cell.probe.get("features") or ""
        status = f"{FAILED}: {outcome.failure}"
        yield Row(cell.name, outcome.seed, outcome.task, head, features, "", None, None, None, status)
    for score in outcome.scores:
        where = (cell.name, outcome.seed, score["task"], score["head"], score["features"])
        for metric, found in score["metrics"].items():
            yield Row(*where, metric, found["value"], found["low"], found["high"], OK)


def to_csv(rows: Iterable[Row]) -> str:
    """Return results.csv: numbers with six significant digits, an undefined one empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Row))
    for row in rows:
        writer.writerow(f"{one:.{SIGNIFICANT_DIGITS}g}" if isinstance(one, float) else one for one in astuple(row))
    return text.getvalue()


# Means over seeds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table: a cell, head and kind of features over all seeds."""

    cell: Cell
    head: str
    features: str
    seeds: dict[int, dict[str, Any]]  # seed -> its row of scores.json; empty: it failed

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Each metric's mean over the seeds with its interval."""
        scores = list(self.seeds.values())
        names = scores[0]["metrics"] if scores else {}
        means = {name: Interval(*mean_interval([score["metrics"][name] for score in scores])) for name in names}
        return {name: mean.within(name) for name, mean in means.items()}

    def published(self, task: str) -> dict[str, float]:
        """What others report of other data, metric -> value: of the grid's row, else what the task knows."""
        known = next(iter(self.seeds.values()), {}).get("published", {})
        return {**known, **self.cell.published.get(task, {})}


def tasks_of(outcomes: Iterable[Outcome], asked: Iterable[str]) -> list[str]:
    """Return what was scored, in the order asked for: a task with several targets is one for each of them."""
    found: dict[str, dict[str, None]] = {task: {} for task in asked}
    for outcome in outcomes:
        for score in outcome.scores:
            found[outcome.task].setdefault(score["task"])
    return [name for task, names in found.items() for name in names or [task]]


def lines_of(outcomes: Iterable[Outcome], task: str) -> list[Line]:
    """Return the lines of a task's table in the order of the cells; a cell without any score is one empty line."""
    found: dict[tuple[str, str, str], Line] = {}
    for outcome in outcomes:
        if not f"{task}.".startswith(f"{outcome.task}." if outcome.task else ""):
            continue
        if outcome.failure:
            head, features = outcome.cell.probe["head"], outcome.cell.probe.get("features") or ""
            found.setdefault((outcome.cell.name, head, features), Line(outcome.cell, head, features, {}))
        for score in outcome.scores:
            if score["task"] == task:
                where = (outcome.cell.name, score["head"], score["features"])
                line = found.setdefault(where, Line(outcome.cell, score["head"], score["features"], {}))
                line.seeds.setdefault(outcome.seed, score)
    scored = {line.cell.name for line in found.values() if line.seeds}
    return [one for one in found.values() if one.seeds or one.cell.name not in scored or one.features]


def mean_interval(intervals: list[dict[str, float | None]]) -> tuple[float, float, float]:
    """Return the mean over seeds with its 95 % interval, from each seed's `value, low, high`; NaN where undefined.

    One seed keeps its bootstrap interval. Of several, two half-widths are added in quadrature: the bootstrap's over
    people (the root mean square over seeds: all see the same people, so it does not shrink) and the t-interval's over
    seeds, t(S - 1) * sqrt(B / S), with B the variance between S seeds. Cochran's approximation: exact where one of the
    two dominates, a little wide between (a test simulates it).
    """
    from scipy.special import stdtrit

    known = [one for one in intervals if None not in (one["value"], one["low"], one["high"])]
    triples = [(float(one["value"] or 0), float(one["low"] or 0), float(one["high"] or 0)) for one in known]
    if not triples:
        return math.nan, math.nan, math.nan
    if len(triples) == 1:
        return triples[0]
    count = len(triples)
    mean = sum(value for value, _, _ in triples) / count
    between = sum((value - mean) ** 2 for value, _, _ in triples) / (count - 1)
    of_people = sum(((high - low) / 2) ** 2 for _, low, high in triples) / count
    of_seeds = float(stdtrit(count - 1, 0.975)) ** 2 * between / count
    half = math.sqrt(of_people + of_seeds)
    return mean, mean - half, mean + half


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Write results.csv atomically."""
    product.write_text(folder / "results.csv", to_csv(rows))
