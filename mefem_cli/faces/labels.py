"""--labels: join a table to the rows of a manifest, by the rules of `stores/joining.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli import console
from mefem_cli.faces.source import printable
from mefem_cli.stores.crops import LABEL
from mefem_cli.stores.joining import Labels, Match, label_columns, large, match, match_values, read_labels

GIVEN, BAD_BOX = "given", "bad-box"  # detector and reason of faces whose boxes were given


def join(rows: pa.Table, path: Path, key: str | None) -> pa.Table:
    """Return the rows of a manifest with the table's columns as labels, and say on stderr what did not fit.

    The labels of a video go to all of its frames. A picture with several faces gets none, as whose labels they are,
    nobody knows, unless the faces' boxes were given. Where the manifest has a label called `key` already, from tables
    or sidecars, each row gets the labels of its value of it.
    """
    labels = read_labels(path, key)
    sources = large(rows["source"])
    distinct = pc.unique(sources)
    source_of_row = pc.index_in(sources, value_set=distinct).to_numpy().astype(np.int64)
    is_crowded = _crowded(rows, source_of_row, len(distinct))
    if key is not None and LABEL + key in rows.column_names:
        matched = match_values(labels.keys, rows[LABEL + key])
        label_of_row = matched.row_of_source
    else:
        matched = match(labels.keys, distinct)
        label_of_row = matched.row_of_source[source_of_row]
    label_of_row = np.where(is_crowded[source_of_row], -1, label_of_row)
    _tell(labels, matched, label_of_row, int(is_crowded.sum()))
    return _with_columns(rows, labels, label_of_row)


def _crowded(rows: pa.Table, source_of_row: np.ndarray, num_sources: int) -> np.ndarray:
    """Return which sources have a frame with several faces that were found, not given."""
    frames = pc.fill_null(rows["frame"], 0).to_numpy()
    shots = source_of_row * (frames.max(initial=0) + 1) + frames
    _, shot_of_row, num_faces = np.unique(shots, return_inverse=True, return_counts=True)
    is_given = pc.or_(pc.equal(rows["detector"], GIVEN), pc.equal(rows["reason"], BAD_BOX)).to_numpy()
    crowded, given = np.zeros(num_sources, bool), np.zeros(num_sources, bool)
    crowded[source_of_row[num_faces[shot_of_row] > 1]] = True
    given[source_of_row[is_given]] = True
    return crowded & ~given


def _tell(labels: Labels, matched: Match, label_of_row: np.ndarray, num_crowded: int) -> None:
    num_labelled = int((label_of_row >= 0).sum())
    told = [f"{num_labelled} of {len(label_of_row)} rows of the manifest have labels"]
    if num_crowded:
        told.append(f"{num_crowded} pictures with several faces get none")
    for what, rows in (("no picture", matched.unmatched), ("several pictures", matched.ambiguous)):
        if len(rows):
            first = printable(labels.keys[int(rows[0])].as_py()[:200])
            told.append(f'{len(rows)} rows of the table fit {what}, the first is "{first}"')
    say = console.note if num_labelled else console.warn
    say(f"labels from {labels.path}: {'; '.join(told)}")


def _with_columns(rows: pa.Table, labels: Labels, label_of_row: np.ndarray) -> pa.Table:
    """Return the rows with the table's columns; `label_of_row` is -1 for a face without labels."""
    replaced = [name for name in labels.columns.column_names if LABEL + name in rows.column_names]
    if replaced:
        names = ", ".join(map(printable, replaced))
        console.note(f"labels from {labels.path} replace those that came with the sources: {names}")
    for name, column in label_columns(labels, label_of_row).items():
        index = rows.schema.get_field_index(name)
        rows = rows.append_column(name, column) if index < 0 else rows.set_column(index, name, column)
    return rows
