"""From the journal of a crops folder to what people and programs read: manifest, rejects.csv, contact.html."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.faces import contact
from mefem_cli.faces.listing import SourceList
from mefem_cli.faces.source import DAMAGED_SHARD, Label, Source, printable
from mefem_cli.stores import product
from mefem_cli.stores.crops import (
    CONTACT,
    LABEL,
    MANIFEST,
    PROVENANCE,
    REJECTED,
    REJECTS,
    SCHEMA,
    read_manifest,
    text_to_path,
    write_manifest,
)

VANISHED = "source vanished"


def in_source_order(rows: pa.Table, sources: SourceList) -> pa.Table:
    """Sort the journal's rows as the sources are listed, then those of other runs."""
    return rows.take(pa.array(np.argsort(_positions(rows, sources), kind="stable")))


def _positions(rows: pa.Table, sources: SourceList) -> np.ndarray:
    """Return where each row's source stands in the list, its length for one that is not there."""
    hashes = rows["hash"].to_numpy()
    if not len(sources):
        return np.zeros(len(hashes), np.int64)
    order = np.argsort(sources.names, kind="stable")
    index = np.minimum(np.searchsorted(sources.names, hashes, sorter=order), len(order) - 1)
    return np.where(sources.names[order[index]] == hashes, order[index], len(order))


def without_mended_shards(rows: pa.Table, sources: SourceList) -> pa.Table:
    """Leave out what was said of damaged shards that are listed as such no longer and have changed since."""
    is_listed = _positions(rows, sources) < len(sources)
    was_damaged = pc.starts_with(rows["detail"], DAMAGED_SHARD).to_numpy()
    is_mended = np.zeros(len(rows), bool)
    for index in np.flatnonzero(was_damaged & ~is_listed).tolist():
        file, detail, state = (rows[name][index].as_py() for name in ("file", "detail", "state"))
        is_mended[index] = _has_changed(text_to_path(file), detail, state)
    return rows.filter(pa.array(~is_mended))


def _has_changed(path: str, problem: str, state: int) -> bool:
    """Return whether a file is there and is another one than that with a problem and a state."""
    try:
        status = os.stat(path)
    except OSError:  # vanished, which the manifest marks
        return False
    return Source("", path, status.st_size, status.st_mtime_ns, problem).state != state


def readable(rows: pa.Table, sources: SourceList | None) -> pa.Table:
    """Return the manifest's rows: columns of SCHEMA, then labels; marks vanished sources and exact duplicates."""
    shown = rows.select(SCHEMA.names)
    if sources is not None:
        shown = _set(shown, "detail", _details(rows, _positions(rows, sources) == len(sources)))
    shown = _set(shown, "duplicate_of", _duplicates(rows))
    for name, column in _label_columns(rows["labels"].to_pylist()).items():
        shown = shown.append_column(LABEL + name, column)
    return shown


def _set(rows: pa.Table, name: str, values: list[str]) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, pa.string()))


def _details(rows: pa.Table, is_unlisted: np.ndarray) -> list[str]:
    files = rows["file"].to_pylist()
    unlisted = {file for file, one in zip(files, is_unlisted.tolist(), strict=True) if one}
    gone = {file for file in unlisted if not os.path.lexists(text_to_path(file))}
    details = rows["detail"].to_pylist()
    if not gone:
        return details
    return [
        "; ".join(filter(None, (detail, VANISHED))) if one and file in gone else detail
        for detail, file, one in zip(details, files, is_unlisted.tolist(), strict=True)
    ]


def num_vanished(rows: pa.Table) -> int:
    """Return how many sources are marked as vanished."""
    marked = rows.filter(pc.ends_with(rows["detail"], VANISHED))
    return len(pc.unique(marked["source"]))


def _duplicates(rows: pa.Table) -> list[str]:
    """Return for each row the id of the first row of a source with the same bytes, "" for that first one."""
    first: dict[tuple[str, int, int | None], str] = {}
    found = []
    columns = (rows[name].to_pylist() for name in ("id", "sha256", "frame", "face"))
    for one, digest, frame, face in zip(*columns, strict=True):
        before = first.setdefault((digest, frame, face), one) if digest else one
        found.append("" if before == one else before)
    return found


def _label_columns(texts: list[str]) -> dict[str, pa.Array]:
    """Return the labels that came with the sources: float64 where all values of a name are numbers, else text."""
    if not any(texts):
        return {}
    rows: list[dict[str, Label]] = [json.loads(text)["labels"] if text else {} for text in texts]
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, str) and value for value in values):
            columns[name] = pa.array(["" if value is None else _as_text(value) for value in values], pa.string())
        else:
            columns[name] = pa.array([None if isinstance(value, str) else value for value in values], pa.float64())
    return columns


def _as_text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.17g}"


def refuse_equal_ids(rows: pa.Table) -> None:
    """Raise UsageError where two rows have one id."""
    ids = rows["id"]
    if pc.count_distinct(ids).as_py() < len(rows):
        twice = Counter(ids.to_pylist()).most_common(1)[0][0]
        both = rows.filter(pc.equal(ids, twice))["source"].to_pylist()
        raise UsageError(f"{printable(both[0])} and {printable(both[1])} have one id, {twice}; rename one of them")


def write(out: Path, rows: pa.Table, shown: pa.Table, max_pixels: int, provenance: dict[str, object]) -> None:
    """Write rejects.csv, contact.html, provenance.json and, last, the manifest; nothing if it says all that already.

    `shown` is the manifest, `rows` are the same rows of the journal.
    """
    if _is_written(out, shown):
        return
    product.write_text(out / REJECTS, _rejects_csv(shown))
    product.write_text(out / CONTACT, contact.page(out, rows, shown, max_pixels))
    product.write_json(out / PROVENANCE, provenance)
    write_manifest(out, shown)


def _is_written(out: Path, rows: pa.Table) -> bool:
    if not all((out / name).exists() for name in (MANIFEST, REJECTS, CONTACT, PROVENANCE)):
        return False
    try:
        return read_manifest(out).equals(rows, check_metadata=False)
    except NoInputError:  # damaged: write it again
        return False


def _rejects_csv(rows: pa.Table) -> str:
    rejected = rows.filter(pc.equal(rows["status"], REJECTED)).select(["id", "source", "reason", "detail"])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rejected.column_names)
    writer.writerows(zip(*rejected.to_pydict().values(), strict=True))
    return text.getvalue()
