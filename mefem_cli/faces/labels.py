"""Join a table of labels to pictures: a row's key is the end of a picture's path, or else its stem."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from mefem_cli import console
from mefem_cli.errors import UsageError, did_you_mean
from mefem_cli.faces.inputs import printable
from mefem_cli.stores.crops import LABEL
from mefem_cli.stores.tables import Table, read_table

DEFAULT_KEY = "path"


@dataclass(frozen=True)
class Match:
    """Which row of the table each source has, -1 for none, and the keys that found no picture or several."""

    row_of_source: np.ndarray
    unmatched: list[str]
    ambiguous: list[str]


def read_labels(path: Path, key: str | None) -> tuple[Table, str]:
    """Read a table of labels; return it and its key column.

    Raises UsageError where the key column is missing or a key appears twice.
    """
    table = read_table(path)
    if key is not None and key not in table.texts:
        raise UsageError(f"--key {key}: {path} has no such column{did_you_mean(key, table.texts)}")
    if key is None and DEFAULT_KEY not in table.texts:
        known = ", ".join(table.texts)
        raise UsageError(f'{path} has no column "{DEFAULT_KEY}"; type --key with the one that names pictures: {known}')
    key = key or DEFAULT_KEY
    repeated = [one for one, count in Counter(table.texts[key]).items() if count > 1 and one]
    if repeated:
        which = f'{len(repeated)} keys, the first is "{repeated[0]}"'
        raise UsageError(f'{path}: keys in column "{key}" must be distinct, but twice or more there are {which}')
    return table, key


def join(rows: pa.Table, path: Path, key: str | None) -> pa.Table:
    """Return the rows of a manifest with the table's columns as labels, and say on stderr what did not fit.

    A picture with several faces gets none: whose labels they are, nobody knows.
    """
    table, key = read_labels(path, key)
    sources = rows["source"].to_pylist()
    num_faces = Counter(sources)
    distinct = list(num_faces)
    matched = match(table.texts[key], distinct)
    row_of = {
        source: row
        for source, row in zip(distinct, matched.row_of_source.tolist(), strict=True)
        if num_faces[source] == 1
    }
    row_of_face = np.array([row_of.get(source, -1) for source in sources], dtype=np.int64)
    _tell(path, matched, row_of_face, sum(count > 1 for count in num_faces.values()))
    for name, column in label_columns(table, key, row_of_face).items():
        rows = rows.append_column(name, column)
    return rows


def _tell(path: Path, matched: Match, row_of_face: np.ndarray, num_crowded: int) -> None:
    num_labelled = int((row_of_face >= 0).sum())
    told = [f"{num_labelled} of {len(row_of_face)} rows of the manifest have labels"]
    if num_crowded:
        told.append(f"{num_crowded} pictures with several faces get none")
    for what, keys in (("no picture", matched.unmatched), ("several pictures", matched.ambiguous)):
        if keys:
            told.append(f'{len(keys)} rows of the table fit {what}, the first is "{printable(keys[0])}"')
    say = console.note if num_labelled else console.warn
    say(f"labels from {path}: {'; '.join(told)}")


def match(keys: list[str], sources: list[str]) -> Match:
    """Find the picture of each key: the one whose path ends with it (at a folder's border), else the one with its stem.

    A key that fits several pictures fits none. Raises UsageError if two keys are the end of one picture's path.

    >>> match(["t2i/a.jpg", "b"], ["/photos/t2i/a.jpg", "/photos/t2i/b.jpg"]).row_of_source
    array([0, 1])
    """
    by_name, by_stem = defaultdict(list), defaultdict(list)
    for index, source in enumerate(sources):
        name = source.rpartition("/")[2]
        by_name[name].append(index)
        by_stem[PurePosixPath(name).stem].append(index)
    row_of_source = np.full(len(sources), -1, dtype=np.int64)
    unmatched, ambiguous, by_stem_only = [], [], []
    for row, key in enumerate(keys):
        ending = "/" + _tidy(key)
        fitting = [index for index in by_name[ending.rpartition("/")[2]] if f"/{sources[index]}".endswith(ending)]
        if not fitting:
            by_stem_only.append(row)
        elif len(fitting) > 1:
            ambiguous.append(key)
        elif row_of_source[fitting[0]] >= 0:
            other = keys[row_of_source[fitting[0]]]
            raise UsageError(f'two rows of labels, "{other}" and "{key}", are both the picture {sources[fitting[0]]}')
        else:
            row_of_source[fitting[0]] = row
    claims: dict[int, list[int]] = defaultdict(list)
    for row in by_stem_only:
        fitting = by_stem[PurePosixPath(_tidy(keys[row])).stem] if keys[row] else []
        if len(fitting) > 1:
            ambiguous.append(keys[row])
        elif not fitting or row_of_source[fitting[0]] >= 0:
            unmatched.append(keys[row])
        else:
            claims[fitting[0]].append(row)
    for index, rows in claims.items():
        if len(rows) > 1:
            ambiguous += [keys[row] for row in rows]
        else:
            row_of_source[index] = rows[0]
    return Match(row_of_source, unmatched, ambiguous)


def _tidy(key: str) -> str:
    return key.replace("\\", "/").removeprefix("./").lstrip("/")


def label_columns(table: Table, key: str, row_of_face: np.ndarray) -> dict[str, pa.Array]:
    """Return the manifest's label columns, the table's but its key; `row_of_face` is -1 for a face without labels."""
    columns = {}
    has_row = row_of_face >= 0
    for name in table.texts:
        if name == key:
            continue
        values = table.values(name)
        if name in table.numeric:
            taken = np.full(len(row_of_face), np.nan)
            taken[has_row] = values[row_of_face[has_row]]
            columns[LABEL + name] = pa.array(taken, pa.float64(), from_pandas=True)  # NaN becomes null
        else:
            texts = [values[row] if row >= 0 else "" for row in row_of_face.tolist()]
            columns[LABEL + name] = pa.array(texts, pa.string())
    return columns
