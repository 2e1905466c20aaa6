"""Face boxes that a table gives: read with care, and found for a picture by its label or its path.

A box is a column `box`, `[x1, y1, x2, y2]` as JSON text or as a list (as FaceCaption-15M has it), or the four columns
`box_x, box_y, box_w, box_h`; all in px of the EXIF-oriented picture.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mefem_cli import console
from mefem_cli.errors import UsageError
from mefem_cli.faces.source import GivenFace, Label, hash63, printable
from mefem_cli.stores.joining import MOST_FOLDERS
from mefem_cli.stores.tables import HashIndex, Rows, Table, as_texts, number_text, open_table, spooled, to_numbers

CORNERS, SIDES = "box", ("box_x", "box_y", "box_w", "box_h")
BOX_COLUMNS = (CORNERS, *SIDES)  # none of them is a label where one holds boxes
LARGEST = 1e7  # px; what is further out is no place in a picture
LONGEST_BOX = 200  # characters of JSON; deep nesting is not worth a parser
NO_BOX = "the table has no box for it"


def box_columns(table: Table) -> list[str]:
    """Return the columns that hold boxes, if any. Raises UsageError where some of the four sides are missing."""
    if CORNERS in table.names:
        return [CORNERS]
    found = [name for name in SIDES if name in table.names]
    missing = [name for name in SIDES if name not in table.names]
    if found and missing:
        raise UsageError(f"{table.path} has a column {found[0]} but no {missing[0]}; wanted {', '.join(SIDES)}")
    return found


def faces_of(batch: pa.RecordBatch, columns: list[str]) -> Iterator[GivenFace | None]:
    """Yield the face of each row, without labels; None where the row has no box."""
    if columns == [CORNERS]:
        yield from map(_from_corners, _plain(batch.column(CORNERS)).to_pylist())
    else:
        yield from map(_from_sides, *(numbers_of(batch.column(name)) for name in columns))


def _plain(column: pa.Array) -> pa.Array:
    """Return JSON texts as strings, whatever a file calls them; lists as they are."""
    return column if pa.types.is_nested(column.type) else as_texts(column)


def numbers_of(column: pa.Array) -> list[Any]:
    """Return numbers where they are some, None where there is nothing, and texts where they are none."""
    texts = as_texts(column)
    numbers = to_numbers(texts)
    if numbers is not None:
        return numbers.to_pylist()
    alone = [to_numbers(texts[index : index + 1]) for index in range(len(texts))]
    return [text if one is None else one[0].as_py() for text, one in zip(texts.to_pylist(), alone, strict=True)]


def _from_corners(given: Any) -> GivenFace | None:
    if isinstance(given, str):
        given = given.strip()
    if given is None or given == "":
        return None
    value = _parsed(given) if isinstance(given, str) else given
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_place, value)):
        return GivenFace(problem=f"no list of four numbers: {_shown(given)}")
    left, top, right, bottom = map(float, value)
    if right <= left or bottom <= top:
        return GivenFace(problem=f"x2 and y2 are not beyond x1 and y1: {_shown(given)}")
    return GivenFace((left, top, right - left, bottom - top))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if len(text) <= LONGEST_BOX else None
    except ValueError:
        return None


def _from_sides(*sides: Any) -> GivenFace | None:
    if all(side is None for side in sides):
        return None
    if not all(map(_is_place, sides)):
        return GivenFace(problem=f"not four numbers: {_shown(list(sides))}")
    x, y, width, height = map(float, sides)
    if width <= 0 or height <= 0:
        return GivenFace(problem=f"its width and height are not above 0: {_shown(list(sides))}")
    return GivenFace((x, y, width, height))


def _is_place(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN is not


def _shown(given: Any) -> str:
    text = given if isinstance(given, str) else json.dumps(given, default=str)
    return printable(text[:60]) + ("..." if len(text) > 60 else "")


def tidy(key: str) -> str:
    r"""Return a key as the end of a path.

    >>> tidy(r".\t2i\b.jpg")
    't2i/b.jpg'
    """
    return key.replace("\\", "/").removeprefix("./").lstrip("/")


def stem_of(name: str) -> str:
    """Return a file's name without its last suffix.

    >>> stem_of("b.png"), stem_of(".hidden")
    ('b', '.hidden')
    """
    before, _, suffix = name.rpartition(".")
    return before if before and suffix else name


class BoxTable:
    """The table of `--boxes`: which faces a picture has. In memory are some 40 bytes a row; the rest is on disk.

    A source that has a label named like the key column (a downloader's `url`) has the rows with that value. Else a row
    belongs to the picture whose path ends with its key at a folder's border; if the key names no folder, to the one
    with its stem.

    >>> BoxTable.read(Path("boxes.parquet"), "url").lookup("/x/0.jpg", {"url": "http://..."})  # doctest: +SKIP
    (GivenFace(box=(120.0, 80.0, 200.0, 260.0), problem='', labels={'caption': 'a woman'}),)
    """

    def __init__(self, path: Path, key: str | None):
        table = open_table(path)
        self.path, self.key, self._column = path, key, table.key_column(key)
        boxes = box_columns(table)
        if not boxes:
            raise UsageError(f'{path} has neither a column "{CORNERS}" nor {", ".join(SIDES)}')
        self._names = [name for name in table.can_label if name not in (self._column, *BOX_COLUMNS)]
        self._hashes, self._stem_hashes, self._stem_rows = array("q"), array("q"), array("q")
        self._most_folders = 0
        self._rows = Rows(spooled(self._batches(table, boxes)))
        self._by_key = HashIndex(np.frombuffer(self._hashes, np.int64))
        self._by_stem = HashIndex(np.frombuffer(self._stem_hashes, np.int64), np.frombuffer(self._stem_rows, np.int64))
        del self._hashes, self._stem_hashes, self._stem_rows
        self._is_used = np.zeros(len(self._rows), bool)
        self._claims = np.zeros(len(self._rows), np.int64)  # hash of the picture that a row was given to by its path
        self._is_by_stem = np.zeros(len(self._rows), bool)
        self._asked = self._found = 0

    @classmethod
    def read(cls, path: Path, key: str | None) -> BoxTable:
        """Read a table of boxes. Raises UsageError where it is damaged or has no boxes or no key column."""
        return cls(path, key)

    def _batches(self, table: Table, boxes: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows as they are spooled: key, x, y, width, height, problem, labels."""
        raw = [self._column, *(name for name in boxes if name != self._column)]
        for batch in table.batches(self._names, raw):
            keys = [tidy(text) for text in as_texts(batch.column(0)).to_pylist()]
            faces = [face or GivenFace(problem=NO_BOX) for face in faces_of(batch, boxes)]
            self._note_keys(keys)
            sides = [pa.array([face.box and face.box[side] for face in faces], pa.float64()) for side in range(4)]
            problems = pa.array([face.problem for face in faces], pa.string())
            columns = [pa.array(keys, pa.string()), *sides, problems, *batch.columns[len(raw) :]]
            yield pa.RecordBatch.from_arrays(columns, names=[str(index) for index in range(len(columns))])

    def _note_keys(self, keys: list[str]) -> None:
        for key in keys:
            if key and "/" not in key:
                self._stem_hashes.append(hash63(stem_of(key)))
                self._stem_rows.append(len(self._hashes))
            self._hashes.append(hash63(key) if key else -1)
            self._most_folders = min(MOST_FOLDERS, max(self._most_folders, key.count("/")))

    def lookup(self, source_path: str, labels: dict[str, Label]) -> tuple[GivenFace, ...]:
        """Return the faces of a source, in the table's order; none if the table does not know it.

        Raises UsageError where a key fits two pictures, as one of them would get the other's boxes.
        """
        self._asked += 1
        value = labels.get(self.key) if self.key is not None else None
        if value is None:
            rows = self._rows_of_path(source_path)
        else:
            rows = self._by_key.find(hash63(tidy(value if isinstance(value, str) else number_text(value))))
        if not len(rows):
            return ()
        self._found += 1
        self._is_used[rows] = True
        return tuple(self._face(self._rows[row]) for row in rows.tolist())

    def _face(self, row: list[Any]) -> GivenFace:
        _, x, y, width, height, problem, *values = row
        labels = {name: None if value == "" else value for name, value in zip(self._names, values, strict=True)}
        return GivenFace(None if problem else (x, y, width, height), problem, labels or None)

    def _rows_of_path(self, path: str) -> np.ndarray:
        pieces = path.strip("/").split("/")
        for num_folders in range(min(self._most_folders, len(pieces) - 1), -1, -1):
            rows = self._by_key.find(hash63("/".join(pieces[-num_folders - 1 :])))
            if len(rows):
                self._claim(rows, path, is_by_stem=False)
                return rows
        rows = self._by_stem.find(hash63(stem_of(pieces[-1])))
        is_known = len(rows) and self._claims[rows[0]] and not self._is_by_stem[rows[0]]
        if is_known or len({self._rows[row][0] for row in rows.tolist()}) > 1:
            return rows[:0]  # they belong to the picture with that very name, or are of a.jpg and a.png
        self._claim(rows, path, is_by_stem=True)
        return rows

    def _claim(self, rows: np.ndarray, path: str, is_by_stem: bool) -> None:
        if not len(rows):
            return
        mark = hash63(path) | 1  # never 0
        if self._claims[rows[0]] not in (0, mark):
            key = self._rows[int(rows[0])][0]
            both = f'the boxes of "{printable(str(key))}" fit {printable(path)} and a picture before it'
            raise UsageError(f"{self.path}: {both}; write the folders of pictures into column {self._column}")
        self._claims[rows] = mark
        self._is_by_stem[rows] = is_by_stem

    def tell(self) -> None:
        """Say on stderr how many sources have boxes, and which rows fit none. Raises UsageError where none fits."""
        told = [f"{self._found} of {self._asked} sources have boxes"]
        unused = np.flatnonzero(~self._is_used)
        if len(unused):
            first = printable(str(self._rows[int(unused[0])][0]))
            told.append(f'{len(unused)} rows of the table fit no picture, the first is "{first}"')
        if self._asked and not self._found:
            key = "--key" if self.key is None else f"--key {self.key}"
            raise UsageError(f"boxes from {self.path}: {'; '.join(told)}; is {key} the column that both sides know?")
        console.note(f"boxes from {self.path}: {'; '.join(told)}")
