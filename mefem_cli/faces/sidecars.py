"""What the downloader img2dataset leaves beside pictures: labels of many in a table, or of one in json and txt files.

It writes `00000/000000012.jpg` or, in the tar `00000.tar`, `000000012.jpg`, and beside them `00000.parquet` with a row
for each link and `00000_stats.json`. A picture's name is the row's `key`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mefem_cli import console
from mefem_cli.errors import UsageError
from mefem_cli.faces.source import Label, hash63, printable
from mefem_cli.stores.samples import MAX_SIDECAR_BYTES, SIDECARS
from mefem_cli.stores.tables import HashIndex, ParquetTable, Rows, as_texts, open_table, spooled

KEY = "key"
DOWNLOADER = frozenset({KEY, "status", "error_message"})  # columns that only img2dataset writes together
# What the manifest has itself or of other bytes (sizes, hashes of the picture before it was resized), what is the same
# for all pictures that are there, and what holds places and names.
USELESS = DOWNLOADER | {"width", "height", "original_width", "original_height", "sha256", "sha512", "md5", "exif"}


class SidecarTable:
    """The table beside a shard or a folder of pictures; its rows lie on disk."""

    def __init__(self, table: ParquetTable):
        self.path = table.path
        is_useless = USELESS if DOWNLOADER.issubset(table.names) else {KEY}
        self._names = [name for name in table.can_label if name not in is_useless]
        hashes = array("q")
        self._rows = Rows(spooled(_noting_keys(table.batches(self._names, [KEY]), hashes)))
        self._by_key = HashIndex(np.frombuffer(hashes, np.int64))

    def labels(self, key: str) -> dict[str, Label]:
        """Return the labels of the picture with this key, none if the table has no such row, or two."""
        rows = self._by_key.find(hash63(key))
        if len(rows) != 1:
            return {}
        _, *values = self._rows[int(rows[0])]
        return {name: None if value == "" else value for name, value in zip(self._names, values, strict=True)}


def _noting_keys(batches: Iterator[pa.RecordBatch], hashes: array[int]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        hashes.extend(hash63(key) for key in as_texts(batch.column(0)).to_pylist())
        yield batch


def sidecars_of(path: str) -> SidecarTable | None:
    """Return the labels of the pictures in the shard `X.tar` or the folder `X`, if `X.parquet` with a key lies beside.

    A damaged table is told on stderr and left out: nobody named it.
    """
    beside = Path(path.rstrip("/").removesuffix(".tar") + ".parquet")
    if not beside.is_file():
        return None
    try:
        table = open_table(beside)
        return SidecarTable(table) if isinstance(table, ParquetTable) and KEY in table.names else None
    except UsageError as error:
        console.warn(f"labels beside {printable(path)} are not used: {error}")
        return None


def file_sidecar(path: str) -> dict[str, Label]:
    """Return what `.json` and `.txt` files beside a picture say of it, where img2dataset made the folder; else nothing.

    It made it if `X_stats.json` lies beside the folder `X`. Other folders may hold such files for other reasons.
    """
    folder = os.path.dirname(path)
    if not os.path.isfile(f"{folder}_stats.json"):
        return {}
    labels: dict[str, Label] = {}
    for suffix in ("txt", "json"):
        try:
            with open(f"{os.path.splitext(path)[0]}.{suffix}", "rb") as file:
                content = file.read(MAX_SIDECAR_BYTES + 1)
        except OSError:
            continue
        if len(content) <= MAX_SIDECAR_BYTES:
            labels |= SIDECARS[suffix](content)[0]
    return useful(labels)


def useful(labels: dict[str, Label]) -> dict[str, Label]:
    """Return the labels of a json sidecar without those that only img2dataset needs, if it wrote them.

    >>> useful({"key": "0", "status": "success", "error_message": None, "width": 256.0, "url": "http://a"})
    {'url': 'http://a'}
    """
    if not DOWNLOADER.issubset(labels):
        return labels
    return {name: value for name, value in labels.items() if name not in USELESS}
