"""Join a table to pictures: a row's key is the end of a picture's path, or else its stem, or a value of a column.

All is done on whole columns, in Arrow's memory or in a temporary file, so that a million rows join a million sources
in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.errors import UsageError
from mefem_cli.stores.crops import LABEL
from mefem_cli.stores.tables import Table, as_texts, open_table, spooled, to_numbers

MOST_FOLDERS = 64  # in a key
PIECE = 1 << 20  # sources looked at in one go
TAKEN = 1 << 16  # rows taken in one go; a column of texts holds no more than 2 GiB

Part = Callable[[pa.Array], pa.Array]  # of paths


@dataclass(frozen=True)
class Labels:
    """A table of labels: its keys as large_string, and its other columns (float64 or string), which lie on disk."""

    path: Path
    key: str
    keys: pa.Array
    columns: pa.Table


@dataclass(frozen=True)
class Match:
    """Which row of the table each source has, -1 for none, and the rows that fit no picture or several."""

    row_of_source: np.ndarray
    unmatched: np.ndarray
    ambiguous: np.ndarray


def read_labels(path: Path, key: str | None) -> Labels:
    """Read a table of labels. Raises UsageError where the key column is missing or a key appears twice."""
    table = open_table(path)
    column = table.key_column(key)
    content = spooled(_keyed_batches(table, column))
    keys = large(content.column(0))
    _refuse_repeats(path, column, keys)
    return Labels(path, column, keys, content.remove_column(0))


def _keyed_batches(table: Table, key: str) -> Iterator[pa.RecordBatch]:
    names = [name for name in table.can_label if name != key]
    for batch in table.batches(names, [key]):
        columns = [as_texts(batch.column(0)), *batch.columns[1:]]
        yield pa.RecordBatch.from_arrays(columns, names=[key, *names])


def large(texts: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return texts as one array, whatever they come in and however long they are together."""
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    arrays = [one if isinstance(one, pa.Array) else pa.array(one, pa.string()) for one in chunks]
    return pa.concat_arrays([one.cast(pa.large_string()) for one in arrays] or [pa.array([], pa.large_string())])


def _refuse_repeats(path: Path, column: str, keys: pa.Array) -> None:
    counts = pc.value_counts(keys)
    values = counts.field("values")
    is_repeated = pc.and_(pc.greater(counts.field("counts"), 1), pc.not_equal(values, ""))
    repeated = values.filter(is_repeated)
    if len(repeated):
        which = f'{len(repeated)} keys, the first is "{_printable(repeated[0].as_py()[:200])}"'
        raise UsageError(f'{path}: keys in column "{column}" must be distinct, but twice or more there are {which}')


def match(keys: Sequence[str] | pa.Array, sources: Sequence[str] | pa.Array) -> Match:
    """Find the picture of each key: the one whose path ends with it (at a folder's border), else the one with its stem.

    A key that fits several pictures fits none. Sources are distinct. Raises UsageError if two keys are the end of one
    picture's path.

    >>> match(["t2i/a.jpg", "b"], ["/photos/t2i/a.jpg", "/photos/t2i/b.jpg"]).row_of_source
    array([0, 1])
    """
    keys, sources = large(keys), large(sources)
    row_of_source = np.full(len(sources), -1, dtype=np.int64)
    tidied = _tidied(keys)
    num_fitting, source = _fitting(tidied, sources)
    rows = np.flatnonzero(num_fitting == 1)
    _refuse_shared(keys, sources, rows, source[rows])
    row_of_source[source[rows]] = rows
    ambiguous = np.flatnonzero(num_fitting > 1)

    left = np.flatnonzero((num_fitting == 0) & pc.not_equal(tidied, "").to_numpy(zero_copy_only=False))
    stems = _stems(tidied.take(pa.array(left)))
    num_fitting, source = _hits(stems, sources, _stems)
    code = pc.index_in(stems, value_set=pc.unique(stems)).to_numpy()
    is_alone = np.bincount(code)[code] == 1 if len(code) else np.zeros(0, bool)
    is_free = (num_fitting == 1) & (row_of_source[source] < 0) if len(sources) else np.zeros(len(left), bool)
    row_of_source[source[is_free & is_alone]] = left[is_free & is_alone]
    ambiguous = np.sort(np.append(ambiguous, left[(num_fitting > 1) | is_free & ~is_alone]))
    matched = np.append(row_of_source[row_of_source >= 0], ambiguous)
    return Match(row_of_source, _others(matched, len(keys)), ambiguous)


def _others(rows: np.ndarray, num_rows: int) -> np.ndarray:
    is_other = np.ones(num_rows, bool)
    is_other[rows] = False
    return np.flatnonzero(is_other)


def _fitting(tidied: pa.Array, sources: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key how many sources end with it, and one of them (0 if there is none)."""
    num_fitting, source = np.zeros(len(tidied), np.int64), np.zeros(len(tidied), np.int64)
    num_folders = pc.count_substring(tidied, "/").to_numpy()
    for folders in np.flatnonzero(np.bincount(num_folders[num_folders <= MOST_FOLDERS])).tolist():
        rows = np.flatnonzero(num_folders == folders)
        wanted = tidied.take(pa.array(rows))
        num_fitting[rows], source[rows] = _hits(wanted, sources, functools.partial(_ends, num_folders=folders))
    num_fitting[pc.equal(tidied, "").to_numpy(zero_copy_only=False)] = 0
    return num_fitting, source


def _hits(wanted: pa.Array, sources: pa.Array, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return for each wanted text how many sources have it as that part, and the last of them (0 if there is none)."""
    distinct = pc.unique(wanted)
    num_hits, last = np.zeros(len(distinct), np.int64), np.zeros(len(distinct), np.int64)
    for begin in range(0, len(sources), PIECE):
        found = pc.index_in(part(sources[begin : begin + PIECE]), value_set=distinct, skip_nulls=True)
        index = pc.fill_null(found, -1).to_numpy()
        is_hit = index >= 0
        num_hits += np.bincount(index[is_hit], minlength=len(distinct))
        last[index[is_hit]] = begin + np.flatnonzero(is_hit)
    code = pc.index_in(wanted, value_set=distinct).to_numpy()
    return num_hits[code], last[code]


def _refuse_shared(keys: pa.Array, sources: pa.Array, rows: np.ndarray, source: np.ndarray) -> None:
    """Raise UsageError where two rows have one picture."""
    order = np.argsort(source, kind="stable")
    twice = np.flatnonzero(source[order][1:] == source[order][:-1])
    if len(twice):
        first, second = (keys[int(rows[order[twice[0] + step]])].as_py()[:200] for step in (0, 1))
        both = f'"{_printable(first)}" and "{_printable(second)}"'
        picture = _printable(sources[int(source[order[twice[0]]])].as_py())
        raise UsageError(f"two rows of labels, {both}, are both the picture {picture}")


def _tidied(keys: pa.Array) -> pa.Array:
    """Return keys as the ends of paths, as `boxes.tidy` does for one."""
    return pc.replace_substring_regex(pc.replace_substring(keys, "\\", "/"), r"^(?:\./)?/*", "")


def _ends(paths: pa.Array, num_folders: int) -> pa.Array:
    """Return the last folders and the name of each path, null for one that has fewer folders."""
    pattern = rf"(?s)(?:^|/)(?P<end>[^/]*(?:/[^/]*){{{num_folders}}})$"
    return pc.struct_field(pc.extract_regex(paths, pattern), "end")


def _stems(paths: pa.Array) -> pa.Array:
    """Return each path's name without its last suffix, as `boxes.stem_of` does for one."""
    return pc.replace_substring_regex(_ends(paths, 0), r"(?s)^(.+)\.[^.]+$", r"\1")


def match_values(keys: pa.Array, values: pa.ChunkedArray) -> Match:
    """Find the row whose key is a label's value; `row_of_source` is by the manifest's rows here."""
    if pa.types.is_floating(values.type) and (numbers := to_numbers(keys)) is not None:
        keys = large(as_texts(numbers))
    texts = large(pa.chunked_array([as_texts(chunk) for chunk in values.chunks], pa.string()))
    found = pc.index_in(pc.if_else(pc.equal(texts, ""), None, texts), value_set=keys, skip_nulls=True)
    row_of_row = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return Match(row_of_row, _others(row_of_row[row_of_row >= 0], len(keys)), np.empty(0, np.int64))


def label_columns(labels: Labels, label_of_row: np.ndarray) -> dict[str, pa.ChunkedArray]:
    """Return the manifest's label columns: float64 with null or string with "" where a row of it has no labels."""
    taken: dict[str, list[pa.Array]] = {name: [] for name in labels.columns.column_names}
    for begin in range(0, len(label_of_row), TAKEN):
        wanted = label_of_row[begin : begin + TAKEN]
        piece = labels.columns.take(pa.array(wanted, mask=wanted < 0))
        for name, pieces in taken.items():
            column = piece[name]
            pieces += (column if pa.types.is_floating(column.type) else pc.fill_null(column, "")).chunks
    kinds = {one.name: one.type for one in labels.columns.schema}
    return {LABEL + name: pa.chunked_array(pieces, kinds[name]) for name, pieces in taken.items()}


def _printable(text: str) -> str:
    """Return a text for a message: one line, no control characters."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


# Faces ----------------------------------------------------------------------------------------------------------


class Faces(Protocol):
    """Faces with what is known of each, (N,): a feature store, or crops."""

    @property
    def path(self) -> Path: ...  # for messages
    @property
    def ids(self) -> Any: ...
    @property
    def labels(self) -> Any: ...  # name -> values
    @property
    def meta(self) -> Any: ...  # column of the manifest -> values
    def __len__(self) -> int: ...


def rows_of_faces(labels: Labels, faces: Faces) -> np.ndarray:
    """Return for each face its row in a table of labels, -1 for none: (N,) int64.

    The table's key is the end or the stem of a picture's path (`/meta/source`), as `mefem crop --labels` takes it; if
    it is called `id`, a crop's id; if the faces have a label of its name, that label's value. A picture with several
    faces gets no labels by its path, as whose they are, nobody knows. Raises UsageError where there are no paths.
    """
    if labels.key == "id":
        found = pc.index_in(large(list(faces.ids)), value_set=labels.keys)
        return pc.fill_null(found, -1).to_numpy().astype(np.int64)
    if labels.key in faces.labels:
        values = faces.labels[labels.key]
        column = pa.array(values, pa.float64() if values.dtype.kind == "f" else pa.string())
        return match_values(labels.keys, pa.chunked_array([column])).row_of_source
    if "source" not in faces.meta:
        raise UsageError(f"{faces.path} has no /meta/source to join {labels.path} by; type --key id")
    sources, source_of_face = np.unique(faces.meta["source"].astype(str), return_inverse=True)
    row_of_source = match(labels.keys, list(sources)).row_of_source
    return np.where(_shares_its_picture(faces, source_of_face), -1, row_of_source[source_of_face])


def _shares_its_picture(faces: Faces, source_of_face: np.ndarray) -> np.ndarray:
    """Return which are one of several faces in a frame, of which nobody said where they are: (N,) bool."""
    frame = np.nan_to_num(np.asarray(faces.meta.get("frame", np.zeros(len(faces))), float)).astype(np.int64)
    shots = np.stack([source_of_face, frame])
    _, shot_of_face, num_faces = np.unique(shots, axis=1, return_inverse=True, return_counts=True)
    detector = faces.meta.get("detector", np.full(len(faces), "", object))
    return (num_faces[shot_of_face.ravel()] > 1) & (detector != "given")
