"""All sources of a run, in order: on disk, with three numbers each in memory, so that millions of them fit.

What a run asks of its sources (is a name there twice, is it known, has it changed, where does it stand) is asked of
64-bit hashes in sorted arrays; the sources themselves are read back in batches when their turn comes.
"""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter

import numpy as np
import pyarrow as pa

from mefem_cli.errors import UsageError
from mefem_cli.faces.source import Source, hash63, printable

BATCH = 8192  # sources
COLUMNS = [one.name for one in fields(Source)]
TEXTS = {"name", "path", "problem", "member", "given"}  # kept as bytes: paths need not be UTF-8
SPOOL_SCHEMA = pa.schema([(name, pa.binary() if name in TEXTS else pa.int64()) for name in COLUMNS])


class SourceList:
    """A list of sources that lies in a temporary file; append, then `close`, then read.

    `names`, `places` and `states` are int64 hashes by position: of the name, of the file or shard with the member, and
    of all that makes a source another one.
    """

    def __init__(self) -> None:
        self._batch: list[Source] = []
        self._hashes = tuple(array("q") for _ in range(3))
        self._file = tempfile.NamedTemporaryFile(prefix="mefem-sources-", suffix=".arrow")  # noqa: SIM115
        self._writer = pa.ipc.new_file(self._file, SPOOL_SCHEMA)
        self._batches: list[pa.RecordBatch] = []
        self.names = self.places = self.states = np.empty(0, np.int64)

    def append(self, source: Source) -> None:
        """Add one source at the end."""
        self._batch.append(source)
        hashes = (hash63(source.name), hash63(source.path, source.member), source.state)
        for column, value in zip(self._hashes, hashes, strict=True):
            column.append(value)
        if len(self._batch) == BATCH:
            self._flush()

    def _flush(self) -> None:
        columns = []
        for name in COLUMNS:
            values = list(map(attrgetter(name), self._batch))
            if name in TEXTS:
                values = [value.encode("utf-8", "surrogateescape") for value in values]
            columns.append(pa.array(values, SPOOL_SCHEMA.field(name).type))
        self._writer.write_batch(pa.record_batch(columns, schema=SPOOL_SCHEMA))
        self._batch = []

    def close(self) -> None:
        """End the writing: map the file into memory; its name is gone then, and it ends with the process."""
        if self._batch:
            self._flush()
        self._writer.close()
        self._file.flush()
        reader = pa.ipc.open_file(pa.memory_map(self._file.name))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._file.close()
        self.names, self.places, self.states = (np.frombuffer(column, np.int64) for column in self._hashes)

    def __len__(self) -> int:
        return len(self._hashes[0])

    def __iter__(self) -> Iterator[Source]:
        for batch in self._batches:
            yield from _sources(batch)

    def take(self, positions: np.ndarray) -> Iterator[Source]:
        """Yield the sources at increasing positions."""
        batch_of = positions // BATCH
        for index in np.unique(batch_of):
            within = positions[batch_of == index] - index * BATCH
            yield from _sources(self._batches[index].take(pa.array(within)))

    def __getitem__(self, position: int) -> Source:
        return next(self.take(np.array([range(len(self))[position]])))


def _sources(batch: pa.RecordBatch) -> Iterator[Source]:
    columns = []
    for name in COLUMNS:
        values = batch.column(name).to_pylist()
        columns.append([one.decode("utf-8", "surrogateescape") for one in values] if name in TEXTS else values)
    return map(Source, *columns)


@dataclass
class Listing:
    """All sources of a run; `skipped` counts other files by kind, `label_tables` are tables seen beside them."""

    sources: SourceList = field(default_factory=SourceList)
    skipped: Counter[str] = field(default_factory=Counter)
    label_tables: list[str] = field(default_factory=list)


def without_repeats(sources: SourceList) -> SourceList:
    """Return the sources without those that were named twice. Raises UsageError where two files would become one id."""
    distinct, first = np.unique(sources.names, return_index=True)
    if len(distinct) == len(sources):
        return sources
    first_of = first[np.searchsorted(distinct, sources.names)]
    repeats = np.flatnonzero(first_of != np.arange(len(sources)))
    for position in repeats[sources.places[repeats] != sources.places[first_of[repeats]]].tolist():
        one, other = sources[int(first_of[position])], sources[position]
        both = f"{printable(one.place)} and {printable(other.place)}"
        raise UsageError(
            f"{both} would share one id, as both are {printable(other.name)}; name a folder above both instead"
        )
    kept = SourceList()
    for source in sources.take(np.setdiff1d(np.arange(len(sources)), repeats)):
        kept.append(source)
    kept.close()
    return kept
