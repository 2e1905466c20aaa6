"""Features of a store as heads take them: in memory, or patches read again for each batch where they do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mefem_cli.stores.features import FeatureStore

GIB = 1 << 30
SHARE_OF_FREE_MEMORY = 0.5


class StreamedTokens:
    """Tokens of some rows of a store, [n, T, D]; `tokens[rows]` reads these rows from the file, as an array would give.

    Heads that learn from batches of tokens need no more; each epoch reads the file once.
    """

    ndim = 3

    def __init__(self, store: FeatureStore, kinds: list[str], rows: np.ndarray):
        self._store, self._kinds, self._rows = store, kinds, rows
        shapes = [store.shape(kind) for kind in kinds]
        self.shape = (len(rows), sum(shape[1] if len(shape) == 3 else 1 for shape in shapes), shapes[0][-1])
        self.dtype = np.dtype(store.dtype)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        """Return tokens [m, T, D] of row numbers (m,), or [T, D] of one."""
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        return read(self._store, self._kinds, self._rows[rows])


def read(store: FeatureStore, kinds: list[str], rows: np.ndarray) -> np.ndarray:
    """Return features of some rows side by side, in the stored precision: [m, D * kinds], with patches [m, T, D]."""
    arrays = [store.read_rows(kind, rows) for kind in kinds]
    if "patches" in kinds:
        return np.concatenate([one if one.ndim == 3 else one[:, None] for one in arrays], axis=1)
    return np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]


def open_features(
    store: FeatureStore, features: str, rows: np.ndarray, max_memory: float | None = None
) -> np.ndarray | StreamedTokens:
    """Return features of some rows, such as `patches+cls`: an array, or where patches take too much memory a stream.

    `max_memory` is in GiB; None is half of what is free.
    """
    kinds = features.split("+")
    if "patches" in kinds:
        streamed = StreamedTokens(store, kinds, rows)
        limit = SHARE_OF_FREE_MEMORY * free_memory() if max_memory is None else max_memory * GIB
        if int(np.prod(streamed.shape)) * streamed.dtype.itemsize > limit:
            return streamed
    return read(store, kinds, rows)


def free_memory() -> int:
    """Return the bytes of memory that programs can still take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # no Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
