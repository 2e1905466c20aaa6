"""What the provenance.json of an ablation says beside that of any product: its strands and where their files are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mefem_cli.errors import NoInputError

PROVENANCE, CELLS = "provenance.json", "cells"


@dataclass(frozen=True)
class CellRecord:
    """A cell of a strand."""

    cell: str  # its name
    reads: str  # its heads and features
    store: str  # a file in the strand's folder
    scores: list[str]  # folders there, one for each task


@dataclass(frozen=True)
class StrandRecord:
    """An encoder with one seed."""

    folder: str  # in that of the ablation
    seed: int
    epochs: int  # 0: it is given, not trained
    cells: list[CellRecord]


@dataclass(frozen=True)
class Record:
    """What is read of an ablation."""

    command: str  # that wrote it
    inputs: dict[str, str]  # crops folder -> sha256 of its manifest
    strands: list[StrandRecord]


def read(folder: Path) -> Record:
    """Read the record of an ablation. Raises NoInputError where there is none that can be read."""
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        strands = [_read_strand(one) for one in content["strands"]]
        return Record(" ".join(content["command"]), dict(content["inputs"]), strands)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NoInputError(f"{folder}: its {PROVENANCE} is missing, damaged, or not that of an ablation") from error


def _read_strand(strand: Mapping[str, Any]) -> StrandRecord:
    cells = [CellRecord(one["cell"], one.get("reads", ""), one["store"], one["scores"]) for one in strand["cells"]]
    return StrandRecord(strand["folder"], strand["seed"], strand["epochs"], cells)


def scores_of(strands: Iterable[StrandRecord]) -> set[tuple[str, str]]:
    """Return the folders of scores that the tables of an ablation are made of."""
    return {(strand.folder, scores) for strand in strands for cell in strand.cells for scores in cell.scores}
