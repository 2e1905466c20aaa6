"""A table as a source of `mefem crop`: each row names a file, with boxes, a segment and labels as the table has them.

`path` names the file, from the table's folder. `box`, or `box_x, box_y, box_w, box_h`, is a face in it; rows with one
path are several faces of one picture. `segment_start, segment_end` (seconds; one of them may be missing) are a part of
a video, `point_x, point_y` (shares of width and height) choose the nearest face. All other columns are labels. A CSV of
AVSpeech needs no header.
"""

from __future__ import annotations

import codecs
import itertools
import math
import os
import posixpath
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mefem_cli import console
from mefem_cli.errors import UsageError
from mefem_cli.faces import avspeech
from mefem_cli.faces.boxes import BOX_COLUMNS, NO_BOX, BoxTable, box_columns, faces_of, numbers_of
from mefem_cli.faces.sidecars import SidecarTable, file_sidecar, sidecars_of, useful
from mefem_cli.faces.source import NOTHING, Given, GivenFace, Label, hash63, printable
from mefem_cli.stores.tables import DEFAULT_KEY, CsvTable, Table, as_texts, open_table

__all__ = ["BoxTable", "SidecarTable", "TableRow", "file_sidecar", "is_table", "rows_of", "sidecars_of", "useful"]

PATH = DEFAULT_KEY
SEGMENT, POINT = ("segment_start", "segment_end"), ("point_x", "point_y")
TEXT_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".txt"})
TABLE_SUFFIXES = frozenset({".parquet", ".pq", ".xlsx", ".xls"})  # Excel's are tables too: the reader says what to do
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LEAVES = "the path leaves the table's folder"
MISSING = "no clip of it is in the table's folder or below"
MOST_SCATTERED = 1_000_000  # rows of pictures whose rows do not follow each other; they wait in memory


@dataclass(frozen=True, slots=True)
class TableRow:
    """A file that a table names, with what it says of it. `tag` is what tells two sources in one file apart."""

    path: str  # as written, but with / between folders, and nothing superfluous; safe to look up where problem is ""
    given: Given = NOTHING
    problem: str = ""  # why it cannot be read
    tag: str = ""  # belongs to the source's name


class _Row(NamedTuple):
    """A row before the faces of a picture are brought together."""

    path: str
    problem: str
    given: Given  # without faces
    face: GivenFace | None
    tag: str

    @property
    def identity(self) -> int:
        return hash63(self.path, self.tag)


def is_table(path: str, start: bytes) -> bool:
    """Return whether a named file is to be read as a table; `start` are its first 512 bytes.

    Parquet by its content; text if it is called .csv, .tsv, .tab or .txt and holds no binary.

    >>> is_table("clinic.csv", b"path,age"), is_table("photo.csv", bytes.fromhex("ffd8ffe000104a46"))
    (True, False)
    """
    suffix = os.path.splitext(path)[1].lower()
    if start.startswith(b"PAR1") or suffix in TABLE_SUFFIXES:
        return True
    return suffix in TEXT_SUFFIXES and (start.startswith(UTF16) or b"\0" not in start)


def rows_of(path: Path) -> Iterator[TableRow]:
    """Yield the files that a table names, in its order, each once; those with scattered rows at their last one.

    Raises UsageError where the table is damaged, has no column `path`, or names a file twice without boxes.
    """
    table = open_table(path, avspeech.columns)
    if isinstance(table, CsvTable) and not table.has_header:
        yield from _avspeech_rows(table)
        return
    reader = _Reader(table)
    if reader.boxes:
        for group in _by_picture(reader):
            yield _with_faces(group)
    else:
        yield from _without_faces(reader)


class _Reader:
    """The rows of a table that has a header."""

    def __init__(self, table: Table):
        if PATH not in table.names:
            hint = f"; for boxes of pictures elsewhere type --boxes {table.path}" if box_columns(table) else ""
            known = ", ".join(table.names)[:200]
            raise UsageError(f'{table.path} has no column "{PATH}" that names files, but {known}{hint}')
        self.table, self.boxes = table, box_columns(table)
        self.segment, self.point = [name for name in SEGMENT if name in table.names], _pair(table, POINT)
        self._raw = list(dict.fromkeys([PATH, *self.boxes, *self.segment, *self.point]))
        own = {*self._raw, *(BOX_COLUMNS if self.boxes else ())}
        self._labels = [name for name in table.can_label if name not in own]
        left_out = [name for name in table.names if name not in own and name not in self._labels]
        if left_out:
            console.note(f"{table.path}: no labels, as they hold binary data: {', '.join(left_out)}")

    def rows(self, with_labels: bool = True) -> Iterator[_Row]:
        """Yield the rows, numbered from 1 where they have no path."""
        names = self._labels if with_labels else []
        number = 0
        for batch in self.table.batches(names, self._raw):
            paths = as_texts(batch.column(0)).to_pylist()
            faces = list(faces_of(batch, self.boxes)) if self.boxes else [None] * len(paths)
            segments, points = _pairs(batch, SEGMENT), _pairs(batch, POINT)
            columns = [batch.column(name).to_pylist() for name in names]
            for index, path in enumerate(paths):
                number += 1
                labels = {name: _label(column[index]) for name, column in zip(names, columns, strict=True)}
                yield _row(_tidied(path, number), segments[index], points[index], faces[index], labels)


def _pair(table: Table, pair: tuple[str, str]) -> list[str]:
    found = [name for name in pair if name in table.names]
    if len(found) == 1:
        raise UsageError(f"{table.path} has a column {found[0]}, which wants both of {', '.join(pair)}")
    return found


def _pairs(batch: pa.RecordBatch, pair: tuple[str, str]) -> list[Any]:
    """Return two columns row by row; one that the table does not have is None."""
    known = batch.schema.names
    columns = [numbers_of(batch.column(name)) if name in known else [None] * len(batch) for name in pair]
    return list(zip(*columns, strict=True))


def _label(value: str | float | None) -> Label:
    return None if value == "" else value


def _tidied(text: str, number: int) -> tuple[str, str]:
    """Return a path as it can be looked up, and what is wrong with it."""
    if not text:
        return f"row {number}", "the row names no file"
    path = text.replace("\\", "/") if "/" not in text else text
    if "\0" in path or ".." in path.split("/") or re.match(r"[A-Za-z]:", path):
        return path.replace("\0", "\\0"), LEAVES
    path = posixpath.normpath(path)
    return "/" + path.lstrip("/") if path.startswith("/") else path, ""


def _row(
    place: tuple[str, str], segment: tuple[Any, Any], point: tuple[Any, Any], face: GivenFace | None, labels: Any
) -> _Row:
    path, problem = place
    tag = ""
    if segment != (None, None):
        start, end = segment
        segment = (0.0 if start is None else start, math.inf if end is None else end)
        problem = problem or _segment_problem(*segment)
        tag = f"_{_short(segment[0])}-{_short(segment[1])}"
    if point != (None, None):
        problem = problem or _point_problem(*point)
        tag += f"@{_short(point[0])},{_short(point[1])}"
    known: dict[str, Any] = {"labels": labels or None}
    if not problem:
        known |= {name: pair for name, pair in (("segment", segment), ("point", point)) if pair != (None, None)}
    return _Row(path, problem, Given(**known), face, tag)


def _segment_problem(start: Any, end: Any) -> str:
    if not all(isinstance(one, float) and not math.isnan(one) for one in (start, end)):
        return f"start and end of the segment are no two numbers: {_shown(start, end)}"
    return "" if 0 <= start < end else f"the segment ends before it starts: {_shown(start, end)}"


def _point_problem(x: Any, y: Any) -> str:
    is_inside = all(isinstance(one, float) and 0 <= one <= 1 for one in (x, y))
    return "" if is_inside else f"the point is no two numbers from 0 to 1: {_shown(x, y)}"


def _shown(*values: Any) -> str:
    return ", ".join(printable(_short(value)) for value in values)


def _short(value: Any) -> str:
    """Return seconds or a share with at most six digits behind the point, as names of sources have them."""
    if value == math.inf:
        return "end"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return str(value)[:20].replace("/", "_")


def _without_faces(reader: _Reader) -> Iterator[TableRow]:
    seen = array("q")
    for row in reader.rows():
        seen.append(row.identity)
        yield TableRow(row.path, row.given, row.problem, row.tag)
    hashes = np.frombuffer(seen, np.int64)
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(repeated):
        first, second = order[repeated[0] : repeated[0] + 2].tolist()
        name = next(itertools.islice(reader.rows(with_labels=False), first, None)).path
        both = f'rows {first + 1} and {second + 1} both name "{printable(name[:200])}"'
        raise UsageError(f"{reader.table.path}: {both}; a file has one row, unless the table has boxes")


def _by_picture(reader: _Reader) -> Iterator[list[_Row]]:
    """Yield the rows of one picture together; where they do not follow each other, they wait for the last one."""
    missing = _scattered(reader)
    waiting: dict[int, list[_Row]] = defaultdict(list)
    for identity, group in itertools.groupby(reader.rows(), key=lambda row: row.identity):
        if identity not in missing:
            yield list(group)
            continue
        for row in group:
            waiting[identity].append(row)
            missing[identity] -= 1
        if not missing[identity]:
            yield waiting.pop(identity)


def _scattered(reader: _Reader) -> Counter[int]:
    """Return how many rows those pictures have whose rows do not follow each other."""
    hashes = np.frombuffer(array("q", (row.identity for row in reader.rows(with_labels=False))), np.int64)
    if not len(hashes):
        return Counter()
    begins_run = np.append(True, hashes[1:] != hashes[:-1])
    runs, num_runs = np.unique(hashes[begins_run], return_counts=True)
    scattered = runs[num_runs > 1]
    mine = hashes[np.isin(hashes, scattered)]
    if len(mine) > MOST_SCATTERED:
        much = f"{len(mine)} rows of pictures with several faces do not follow each other"
        raise UsageError(f"{reader.table.path}: {much}; sort the table by {PATH}")
    return Counter(mine.tolist())


def _with_faces(group: list[_Row]) -> TableRow:
    """Return a picture with its faces. One row without a box leaves the face to the detector; of several it is none."""
    first = group[0]
    if len(group) == 1:
        given = replace(first.given, faces=(first.face,) if first.face is not None else ())
        return TableRow(first.path, given, first.problem, first.tag)
    faces = tuple(replace(row.face or GivenFace(problem=NO_BOX), labels=row.given.labels) for row in group)
    return TableRow(first.path, replace(first.given, labels=None, faces=faces), first.problem, first.tag)


def _avspeech_rows(table: CsvTable) -> Iterator[TableRow]:
    clips = avspeech.Clips(str(table.path.absolute().parent))
    number = 0
    for batch in table.batches([], avspeech.COLUMNS):
        columns = [numbers_of(batch.column(name)) for name in avspeech.COLUMNS[1:]]
        for youtube_id, start, end, x, y in zip(batch.column(0).to_pylist(), *columns, strict=True):
            number += 1
            row = _row(_tidied(youtube_id, number), (start, end), (x, y), None, {avspeech.COLUMNS[0]: youtube_id})
            yield _clip(row, clips)


def _clip(row: _Row, clips: avspeech.Clips) -> TableRow:
    """Return the row's clip: in one that is cut already, the whole of it is the segment."""
    if row.problem or row.given.segment is None:
        return TableRow(row.path, row.given, row.problem or "the row names no segment", row.tag)
    found = clips.find(row.path, *row.given.segment)
    if found is None:
        return TableRow(row.path, row.given, MISSING, row.tag)
    path, is_cut = found
    return TableRow(path, replace(row.given, segment=None) if is_cut else row.given, "", row.tag)
