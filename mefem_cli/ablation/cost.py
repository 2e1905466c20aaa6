"""What cells cost: seconds of each step, as the runner timed them, and images seen, from metrics.jsonl."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from mefem_cli.ablation.grid import Cell
from mefem_cli.ablation.runner import Strand
from mefem_cli.ablation.timing import read as read_times

METRICS, LOG = "metrics.jsonl", "run.log"
STAMP = "%Y-%m-%d %H:%M:%S"  # of the lines of run.log
MEASURED = ("pretrain_seconds", "images", "images_per_second", "embed_seconds", "probe_seconds")
SESSION = " device "  # in the first line of each session of a run, after its time


@dataclass(frozen=True)
class Cost:
    """What the cells of one name took, means over the seeds; None: not known."""

    name: str
    pretrain_seconds: float | None
    images: float | None  # seen in training
    images_per_second: float | None
    embed_seconds: float | None
    probe_seconds: float | None  # of all tasks and heads
    pretraining_of: str = field(default="", kw_only=True)  # the earlier cell whose pretraining this is
    embedding_of: str = field(default="", kw_only=True)  # the earlier cell whose features these are


def costs(cells: Sequence[Cell], strands: Sequence[Strand]) -> list[Cost]:
    """Return what cells took, those of one name (heads and features of one encoder) together."""
    owners: dict[Path, str] = {}  # of encoders and stores: the first cell that has it
    return [_cost(name, strands, owners) for name in dict.fromkeys(cell.name for cell in cells)]


def _cost(name: str, strands: Sequence[Strand], owners: dict[Path, str]) -> Cost:
    found: dict[str, list[float]] = {}
    trained: list[str] = []
    embedded: list[str] = []
    for strand in strands:
        mine = [cell for cell in strand.cells if cell.name == name]
        for what, value in _of_strand(strand, mine) if mine else ():
            found.setdefault(what, []).append(value)
        for cell in mine:
            trained.append(owners.setdefault(strand.folder, name))
            embedded.append(owners.setdefault(strand.store(cell), name))
    means = {what: statistics.fmean(values) for what, values in found.items()}
    return Cost(
        name,
        *map(means.get, MEASURED),
        pretraining_of="" if name in trained else trained[0],
        embedding_of="" if name in embedded else embedded[0],
    )


def total(found: Sequence[Cost]) -> Cost:
    """Return what all cells took together with one seed, what they share counted once."""
    trained = [one for one in found if not one.pretraining_of]
    embedded = [one for one in found if not one.embedding_of]
    return Cost(
        "all, a seed",
        pretrain_seconds=_sum(one.pretrain_seconds for one in trained),
        images=_sum(one.images for one in trained),
        images_per_second=None,
        embed_seconds=_sum(one.embed_seconds for one in embedded),
        probe_seconds=_sum(one.probe_seconds for one in found),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum of what is known; None where that is nothing."""
    return sum(filter(None, values)) or None


def _of_strand(strand: Strand, cells: Sequence[Cell]) -> Iterator[tuple[str, float]]:
    times = read_times(strand.folder)
    pretrain = times.get("pretrain") or _logged_seconds(strand.run / LOG)
    if pretrain:
        yield "pretrain_seconds", pretrain
    rows = _rows(strand.run / METRICS)
    if rows:
        yield "images", max(row["samples"] for row in rows)
        speeds: list[Any] = [row.get("images_per_second") for row in rows if row["kind"] == "epoch"]
        speeds = [one for one in speeds if isinstance(one, float)]  # the row before training has none
        if speeds:
            yield "images_per_second", statistics.median(speeds)
    stores = {strand.store(cell) for cell in cells}
    embedded = [read_times(store.parent).get(store.stem) for store in stores]  # features of a given encoder: elsewhere
    if embedded and None not in embedded:
        yield "embed_seconds", sum(filter(None, embedded))
    folders = {strand.scores(cell, task).name for cell in cells for task in strand.tasks}
    if folders <= times.keys():
        yield "probe_seconds", sum(times[one] for one in folders)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics; none where the file is missing or damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if isinstance(row["samples"], int) and row["kind"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _logged_seconds(path: Path) -> float | None:
    """Return the seconds between the first and last line of each session of a run, without start-up; None: no log.

    For runs that were not timed.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    total, begun, last = 0.0, None, None
    for line in lines:
        try:
            moment = datetime.strptime(line[: len("2026-01-01 00:00:00")], STAMP)
        except ValueError:
            continue
        if begun is None or SESSION in line:
            total += (last - begun).total_seconds() if begun and last else 0.0
            begun = moment
        last = moment
    return total + (last - begun).total_seconds() if begun and last else None


def to_csv(found: Sequence[Cost]) -> str:
    """Return costs.csv: seconds, images and images per second of each cell; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *(one.name for one in fields(Cost)[1:])])
    for one in found:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in astuple(one))
    return text.getvalue()
