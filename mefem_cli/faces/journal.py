"""What a crops folder knows about its sources, so that a run can be killed at any time and go on later.

`.parts/` holds one Parquet file per finished chunk, written atomically and numbered; of a source in several of them the
last one counts. A finished run joins them into one. The manifest is derived from it: the same rows in the order of the
sources, without the journal's own columns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mefem_cli.errors import OutputError
from mefem_cli.faces.crop import Row
from mefem_cli.stores import product
from mefem_cli.stores.crops import REJECTED, SCHEMA

FOLDER = ".parts"
LOCK = "lock"
# What makes the id, and what tells whether the file has changed since (bytes, ns); paths as `path_to_text` writes them.
JOURNAL_SCHEMA = pa.schema([*SCHEMA, ("name", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])


@dataclass(frozen=True, slots=True)
class Known:
    """What was known of a source when it was last read."""

    path: str
    size: int
    mtime: int
    is_rejected: bool


class Journal:
    """The journal of one crops folder."""

    def __init__(self, out: Path):
        self.folder = out / FOLDER
        self._next: int | None = None  # number of the next part, once one was written

    def parts(self) -> list[Path]:
        """Return the parts in the order in which they were written."""
        return sorted(self.folder.glob("*.parquet"), key=lambda path: int(path.stem))

    def read(self) -> pa.Table:
        """Return the rows that count, in the order in which they were written."""
        tables = [pq.read_table(path, schema=JOURNAL_SCHEMA) for path in self.parts()]
        if not tables:
            return JOURNAL_SCHEMA.empty_table()
        rows = pa.concat_tables(tables)
        part_of_row = [index for index, table in enumerate(tables) for _ in range(len(table))]
        names = rows["name"].to_pylist()
        latest = dict(zip(names, part_of_row, strict=True))
        counts = [latest[name] == part for name, part in zip(names, part_of_row, strict=True)]
        return rows.filter(pa.array(counts, pa.bool_()))

    def all_crop_paths(self) -> set[str]:
        """Return the crops of all parts, also of rows that no longer count."""
        parts = self.parts()
        return {path for part in parts for path in pq.read_table(part, columns=["path"])["path"].to_pylist() if path}

    def clear(self) -> None:
        """Empty the crops folder, but for the lock."""
        for path in [*self.folder.parent.iterdir(), *self.folder.iterdir()]:
            if path.is_dir() and not path.is_symlink() and path != self.folder:
                shutil.rmtree(path)
            elif path != self.folder and path.name != LOCK:
                path.unlink()

    def append(self, rows: list[Row]) -> None:
        """Write one finished chunk."""
        self._write(pa.Table.from_pylist(rows, schema=JOURNAL_SCHEMA))

    def join(self, rows: pa.Table) -> None:
        """Replace all parts by one with `rows`, and sweep out what killed runs left behind."""
        old = self.parts()
        if len(old) != 1:
            self._write(rows)
            for path in old:
                path.unlink()
        for leftover in [*self.folder.glob("*.tmp"), *self.folder.glob(".*.tmp"), *self.folder.parent.glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)

    def _write(self, rows: pa.Table) -> None:
        if self._next is None:
            self._next = max((int(path.stem) for path in self.parts()), default=-1) + 1
        with product.writing(self.folder / f"{self._next:05d}.parquet") as temporary:
            pq.write_table(rows, temporary, compression="zstd")
        self._next += 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the lock ends with the process, however it ends."""
        out = self.folder.parent
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("w")
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror}; name another --out") from error
        with file:
            if not _lock(file):
                raise OutputError(f"another mefem crop is at work in {out}; wait or name another --out")
            yield


def _lock(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no lock, the parts are atomic all the same
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def known_sources(rows: pa.Table) -> dict[str, Known]:
    """Return what is known of each source, by name."""
    known: dict[str, Known] = {}
    columns = (rows[name].to_pylist() for name in ("name", "source", "size", "mtime", "status"))
    for name, source, size, mtime, status in zip(*columns, strict=True):
        is_rejected = status == REJECTED or (name in known and known[name].is_rejected)
        known[name] = Known(source, size, mtime, is_rejected)
    return known
