"""What a crops folder knows about its sources, so that a run can be killed at any time and go on later.

`.parts/` holds one Arrow stream per run, to which a batch of rows is appended for each finished chunk of sources: what
a kill leaves unfinished at the end of a stream is not read. Of a source in several streams the last one counts; a
finished run joins them into one. With --shards the crops of a run lie in one file beside its stream until they are
packed. The manifest is derived from the journal: the same rows in the order of the sources, without its own columns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.errors import OutputError
from mefem_cli.faces.rows import CONTENT, JOURNAL_SCHEMA, Row
from mefem_cli.stores import product
from mefem_cli.stores.crops import REJECTED

FOLDER = ".parts"
LOCK = "lock"
ROWS, CROPS = ".arrows", ".crops"
BATCHES_AT_ONCE = 128  # joined while reading: a batch has some 30 rows, and 20 KB beside them


class Journal:
    """The journal of one crops folder."""

    def __init__(self, out: Path):
        self.folder = out / FOLDER
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._sink: pa.NativeFile | None = None
        self._crops: IO[bytes] | None = None
        self._number = 0

    def parts(self) -> list[Path]:
        """Return the streams in the order in which they were begun."""
        return sorted(self.folder.glob(f"*{ROWS}"), key=lambda path: int(path.stem))

    def read(self) -> pa.Table:
        """Return the rows that count, in the order in which they were written."""
        tables = [_read_stream(path) for path in self.parts()]
        rows = pa.concat_tables([JOURNAL_SCHEMA.empty_table(), *tables])
        if len(tables) < 2:
            return rows
        hashes = rows["hash"].to_numpy()
        part = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        _, last_first = np.unique(hashes[::-1], return_index=True)
        distinct, inverse = np.unique(hashes, return_inverse=True)
        assert len(distinct) == len(last_first)
        latest = part[::-1][last_first]
        return rows.filter(pa.array(latest[inverse] == part))

    def crops_before(self) -> set[tuple[str, int | None]]:
        """Return (path, offset) of all crops in the streams of this and earlier runs; none if there is one stream."""
        parts = self.parts()
        found: set[tuple[str, int | None]] = set()
        for part in parts if len(parts) > 1 else []:
            rows = _read_stream(part)
            found |= set(zip(rows["path"].to_pylist(), rows["crop_offset"].to_pylist(), strict=True))
        return {(path, offset) for path, offset in found if path}

    def clear(self) -> None:
        """Empty the crops folder, but for the lock."""
        for path in [*self.folder.parent.iterdir(), *self.folder.iterdir()]:
            if path.is_dir() and not path.is_symlink() and path != self.folder:
                shutil.rmtree(path)
            elif path != self.folder and path.name != LOCK:
                path.unlink()

    def append(self, rows: list[Row]) -> None:
        """Write the rows of one finished chunk; crops that they carry are kept for packing."""
        if self._writer is None:
            self._begin()
        for row in rows:
            if (content := row.pop(CONTENT, None)) is not None:
                row["path"], row["crop_offset"] = self._keep(content)
        if self._crops is not None:
            self._crops.flush()  # before the row that tells of it
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(rows, schema=JOURNAL_SCHEMA))

    def _begin(self) -> None:
        self._number = max((int(path.stem) for path in self.parts()), default=-1) + 1
        path = self.folder / f"{self._number:05d}{ROWS}"
        path.with_suffix(CROPS).unlink(missing_ok=True)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, JOURNAL_SCHEMA)

    def _keep(self, content: bytes) -> tuple[str, int]:
        """Append an encoded crop to this run's file; return its path below the crops folder and its offset."""
        if self._crops is None:
            self._crops = (self.folder / f"{self._number:05d}{CROPS}").open("wb")
        offset = self._crops.tell()
        self._crops.write(content)
        return f"{FOLDER}/{self._number:05d}{CROPS}", offset

    def close(self) -> None:
        """End this run's stream."""
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None
        if self._crops is not None:
            self._crops.close()
            self._crops = None

    def join(self, rows: pa.Table) -> None:
        """Replace all streams by one with `rows`."""
        self.close()
        old = self.parts()
        if len(old) == 1 and _read_stream(old[0]).equals(rows):
            return
        number = max((int(path.stem) for path in old), default=-1) + 1
        with (
            product.writing(self.folder / f"{number:05d}{ROWS}") as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, JOURNAL_SCHEMA) as writer,
        ):
            writer.write_table(rows, max_chunksize=1 << 16)
        for path in old:
            path.unlink()

    def sweep(self, rows: pa.Table) -> None:
        """Remove what killed runs left behind, and kept crops that none of the `rows` needs."""
        needed = set(pc.unique(rows["path"]).to_pylist()) if any(self.folder.glob(f"*{CROPS}")) else set()
        for path in self.folder.glob(f"*{CROPS}"):
            if f"{FOLDER}/{path.name}" not in needed:
                path.unlink()
        for leftover in [*self.folder.glob("*.tmp"), *self.folder.glob(".*.tmp"), *self.folder.parent.glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)

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
            if not product.lock(file):
                raise OutputError(f"another mefem crop is at work in {out}; wait or name another --out")
            try:
                yield
            finally:
                self.close()


def _read_stream(path: Path) -> pa.Table:
    """Return the rows of a stream up to where a kill or a full disk cut it off."""
    tables = [JOURNAL_SCHEMA.empty_table()]
    batches = []
    try:
        with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                batches.append(batch)
                if len(batches) == BATCHES_AT_ONCE:
                    tables.append(_joined(batches, path))
                    batches = []
    except (pa.ArrowInvalid, OSError, EOFError):
        pass
    return pa.concat_tables([*tables, _joined(batches, path)])


def _joined(batches: list[pa.RecordBatch], path: Path) -> pa.Table:
    if batches and batches[0].schema != JOURNAL_SCHEMA:
        raise OutputError(f"{path} was written by another version of mefem; type --overwrite or name another --out")
    return pa.Table.from_batches(batches, schema=JOURNAL_SCHEMA).combine_chunks()


@dataclass(frozen=True)
class Known:
    """What was known of each source when it was last read; arrays sorted by the hash of the name."""

    names: np.ndarray  # int64 hashes, distinct
    places: np.ndarray
    states: np.ndarray
    is_rejected: np.ndarray  # whether any of its faces is
    row: np.ndarray  # one of its rows in the journal

    def __len__(self) -> int:
        return len(self.names)

    def find(self, names: np.ndarray) -> np.ndarray:
        """Return where each name stands in the arrays, -1 for unknown ones."""
        if not len(self):
            return np.full(len(names), -1)
        index = np.minimum(np.searchsorted(self.names, names), len(self) - 1)
        return np.where(self.names[index] == names, index, -1)


def known_sources(rows: pa.Table, out: Path | None = None) -> Known:
    """Return what is known of each source; one whose crop is gone from `out`, or cut short, is as good as changed."""
    hashes = rows["hash"].to_numpy()
    names, row, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    is_rejected = np.zeros(len(names), bool)
    np.logical_or.at(is_rejected, inverse, pc.equal(rows["status"], REJECTED).to_numpy(zero_copy_only=False))
    states = rows["state"].to_numpy()[row].copy()
    if out is not None:
        states[inverse[_lost(rows, out)]] = -1
    return Known(names, rows["place_hash"].to_numpy()[row], states, is_rejected, row)


def _lost(rows: pa.Table, out: Path) -> np.ndarray:
    """Return the indices of rows whose crop is not there as it was written."""
    columns = (rows[name].to_pylist() for name in ("path", "crop_offset", "crop_bytes"))
    sizes: dict[str, int] = {}
    lost = []
    for index, (path, offset, size) in enumerate(zip(*columns, strict=True)):
        if not path:
            continue
        if offset is None:
            is_lost = _size(out, path) != size
        else:
            if path not in sizes:
                sizes[path] = _size(out, path)
            is_lost = sizes[path] < offset + size
        if is_lost:
            lost.append(index)
    return np.array(lost, dtype=np.int64)


def _size(out: Path, path: str) -> int:
    try:
        return os.stat(f"{out}/{path}").st_size
    except OSError:
        return -1
