"""Outcomes as results.csv (every seed) and results.md (means over seeds with intervals)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli.ablation.grid import Cell, shown_value
from mefem_cli.ablation.runner import Outcome
from mefem_cli.stores import product

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT_DIGITS = 6
OK, FAILED = "ok", "failed"
CAPTION_ONE_SEED = "Brackets: 95 % bootstrap intervals over people, with the trained models fixed."
CAPTION_SEEDS = (
    "Values are means over the seeds; a seed sets initialisation, data order, masks and folds. Brackets: 95 % "
    "intervals of the mean, from the bootstrap over people (more seeds do not shrink it: all see the same people) and "
    "the t-interval over seeds, added in quadrature. results.csv has each seed with its own bootstrap interval."
)


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
    num_seeds: int  # that have scores
    metrics: dict[str, tuple[float, float, float]]  # mean, low, high; empty: it failed


def lines_of(outcomes: Sequence[Outcome], task: str) -> list[Line]:
    """Return the lines of a task's table in the order of the cells; a cell without any score is one empty line."""
    found: dict[tuple[str, str, str], tuple[Cell, list[dict[str, Any]]]] = {}
    for outcome in outcomes:
        if outcome.task not in ("", task):
            continue
        if outcome.failure:
            where = (outcome.cell.name, outcome.cell.probe["head"], outcome.cell.probe.get("features") or "")
            found.setdefault(where, (outcome.cell, []))
        for score in outcome.scores:
            where = (outcome.cell.name, score["head"], score["features"])
            seeds = found.setdefault(where, (outcome.cell, []))[1]
            seeds += [score] if score not in seeds else []
    scored = {name for (name, _, _), (_, scores) in found.items() if scores}
    return [
        Line(cell, head, features, len(scores), _means(scores))
        for (name, head, features), (cell, scores) in found.items()
        if scores or name not in scored or features
    ]


def _means(scores: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    names = scores[0]["metrics"] if scores else {}
    return {name: mean_interval([score["metrics"][name] for score in scores]) for name in names}


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


# Tables --------------------------------------------------------------------------------------------------------


def _shown_metrics(lines: list[Line]) -> list[str]:
    from mefem_cli.evaluation.report import SHOWN

    known = {name for line in lines for name in line.metrics}
    return [name for names in SHOWN.values() for name in names if name in known]


def _cell_text(interval: tuple[float, float, float] | None) -> str:
    if interval is None or not math.isfinite(interval[0]):
        return "-"
    value, low, high = (f"{one + 0.0:.3f}" if abs(one) < 10 else f"{one:.4g}" for one in interval)
    return f"{value} [{low}, {high}]"


def to_table(outcomes: Sequence[Outcome], task: str) -> Table:
    """Return a short table for a terminal: one metric."""
    from rich import box
    from rich.table import Table

    from mefem_cli.evaluation.report import TITLES

    lines = lines_of(outcomes, task)
    metrics = _shown_metrics(lines)[:1]
    table = Table(title=task, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("cell", overflow="fold")
    table.add_column("head")
    table.add_column("features")
    for name in metrics:
        table.add_column(f"{TITLES[name]} [95 %]", justify="right", no_wrap=True)
    for line in lines:
        cells = [_cell_text(line.metrics.get(name)) if line.metrics else FAILED for name in metrics]
        table.add_row(line.cell.name, line.head.replace(",", ", "), line.features, *cells)
    return table


def to_markdown(name: str, outcomes: Sequence[Outcome], tasks: Sequence[str], seeds: int, notes: Sequence[str]) -> str:
    """Return results.md: for each task a table with a line for each cell, head and kind of features."""
    parts = [f"# Ablation {name}", CAPTION_ONE_SEED if seeds == 1 else CAPTION_SEEDS]
    for task in tasks:
        parts += [f"## {task}", _markdown_table(lines_of(outcomes, task), seeds)]
    failures = {f"- {row.cell}, seed {row.seed}: {row.status}": None for row in rows_of(outcomes) if row.status != OK}
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    parts += ["## How it was made", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(lines: list[Line], seeds: int) -> str:
    from mefem_cli.evaluation.report import TITLES

    metrics = _shown_metrics(lines)
    names = list(dict.fromkeys(option for line in lines for option in line.cell.shown))
    header = [*names, *["seeds"] * (seeds > 1), "head", "features", *(f"{TITLES[metric]} [95 %]" for metric in metrics)]
    body = []
    for line in lines:
        shown = [shown_value(line.cell.shown[name]) if name in line.cell.shown else "" for name in names]
        count = [f"{line.num_seeds} of {seeds}" if line.num_seeds < seeds else str(seeds)] * (seeds > 1)
        cells = [_cell_text(line.metrics.get(metric)) if line.metrics else FAILED for metric in metrics]
        body.append([*shown, *count, line.head.replace(",", ", "), line.features, *cells])
    return _aligned([header, ["-" * 3] * len(header), *body])


def _aligned(table: list[list[str]]) -> str:
    """Return a Markdown table whose source reads as a table too."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rule = ["-" * width for width in widths]
    rows = [table[0], rule, *table[2:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Write results.csv atomically."""
    product.write_text(folder / "results.csv", to_csv(rows))
