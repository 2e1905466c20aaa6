"""A feature store in the making: parts on disk, so that a killed run loses no more than the last of them.

    .features.h5.parts/plan.json       what the features are of, and how they are made
    .features.h5.parts/000007-1.npz    some rows from process 1: id, sha256 of the crops, cls, mean, patches; and the
                                       crops among them that could not be read: unreadable_id, unreadable_sha256

A part is complete or not there. When all rows are, they are copied into the store and the folder is removed.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.errors import OutputError
from mefem_cli.stores import product
from mefem_cli.stores.features import KINDS, READ_BATCH, FeatureWriter

FORMAT, VERSION = "mefem-feature-parts", 1
PLAN, LOCK = "plan.json", "lock"
PART_BYTES = 32 << 20  # of features; a part waits in memory until it is full
PART_SECONDS = 60.0  # or so old: what a kill can cost
SPELLINGS = {"id": str, "sha256": str, "unreadable_id": str, "unreadable_sha256": str}
DAMAGED = (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError)


def folder_of(store: Path) -> Path:
    """Return where the parts of a store lie.

    >>> folder_of(Path("out/features.h5")).as_posix()
    'out/.features.h5.parts'
    """
    return store.with_name(f".{store.name}.parts")


class PartWriter:
    """Collects rows of one process and writes them as parts; features are finite and as the store will hold them."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self._rank = folder, rank
        numbers = [int(path.name.partition("-")[0]) for path in folder.glob(f"*-{rank}.npz")]
        self._number = max(numbers, default=-1) + 1
        self._begin()

    def _begin(self) -> None:
        self._rows: dict[str, list[Any]] = {name: [] for name in SPELLINGS}
        self._features: dict[str, list[np.ndarray]] = {}
        self._bytes, self._begun = 0, time.monotonic()

    def append(self, ids: Sequence[str], digests: Sequence[str], features: Mapping[str, np.ndarray]) -> None:
        """Add rows: `cls` and `mean` [n, D], `patches` [n, T, D]; `digests` are the sha256 of the crops."""
        self._rows["id"] += ids
        self._rows["sha256"] += digests
        for kind, values in features.items():
            self._features.setdefault(kind, []).append(values)
            self._bytes += values.nbytes
        if self._bytes >= PART_BYTES or time.monotonic() - self._begun >= PART_SECONDS:
            self.flush()

    def append_unreadable(self, ids: Sequence[str], digests: Sequence[str]) -> None:
        """Note crops that could not be read, with the sha256 of the bytes that were there."""
        self._rows["unreadable_id"] += ids
        self._rows["unreadable_sha256"] += digests

    def flush(self) -> None:
        """Write what has been collected, if anything, as a part."""
        if not any(self._rows.values()):
            return
        arrays: dict[str, np.ndarray] = {name: np.array(self._rows[name], dtype=str) for name in SPELLINGS}
        arrays |= {kind: np.concatenate(pieces) for kind, pieces in self._features.items()}
        path = self.folder / f"{self._number:06d}-{self._rank}.npz"
        with product.writing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self._number += 1
        self._begin()


class Parts:
    """The parts of a store that are there, to read from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: list[Path] = []
        self.damaged: list[Path] = []  # as a power cut leaves them; their rows are not there
        known: dict[str, list[np.ndarray]] = {name: [] for name in SPELLINGS}
        for path in sorted(folder.glob("*.npz")):
            try:
                with path.open("rb") as file, np.load(file) as part:
                    columns = {name: part[name] for name in SPELLINGS}
            except DAMAGED:
                self.damaged.append(path)
                continue
            self.paths.append(path)
            for name, values in columns.items():
                known[name].append(values)
        counts = [len(ids) for ids in known["id"]]
        self._part_of = np.repeat(np.arange(len(counts)), counts)
        self._row_of = np.concatenate([np.arange(0), *map(np.arange, counts)])
        self._keys = _keys(*(np.concatenate([np.array([], str), *known[name]]) for name in ("id", "sha256")))
        pairs = zip(*(itertools.chain(*known[name]) for name in ("unreadable_id", "unreadable_sha256")), strict=True)
        self.unreadable: dict[str, str] = {str(one): str(digest) for one, digest in pairs}
        self._open: tuple[int, dict[str, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def locate(self, ids: Sequence[str] | np.ndarray, digests: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return where each crop's features stand among all rows, (n,), or -1: not there, or of other bytes."""
        return pc.fill_null(pc.index_in(_keys(ids, digests), value_set=self._keys), -1).to_numpy().astype(np.int64)

    def copy_into(self, writer: FeatureWriter, ids: Sequence[str], places: np.ndarray) -> None:
        """Append rows to a store in the order of `places`, what `locate` returned for `ids`."""
        part, row = self._part_of[places], self._row_of[places]
        ends = np.flatnonzero((np.diff(part) != 0) | (np.diff(row) != 1)) + 1
        # A part may be one long run; in short ones, room on the disk is looked at before each.
        cuts = np.union1d(ends, np.arange(0, len(places), READ_BATCH)).tolist()
        for begin, end in itertools.pairwise([*cuts, len(places)]):
            features = self._features(int(part[begin]))
            rows = slice(int(row[begin]), int(row[end - 1]) + 1)
            writer.append_stored(ids[begin:end], {kind: values[rows] for kind, values in features.items()})

    def _features(self, number: int) -> dict[str, np.ndarray]:
        """Return all features of a part; reading them checks their CRC-32."""
        if self._open is None or self._open[0] != number:
            path = self.paths[number]
            self._open = None  # not two at a time
            try:
                with path.open("rb") as file, np.load(file) as part:
                    self._open = number, {kind: part[kind] for kind in KINDS if kind in part.files}
            except DAMAGED as error:
                path.unlink(missing_ok=True)
                raise OutputError(f"{path} is damaged; type the same again, which embeds its crops anew") from error
        return self._open[1]

    def remove(self) -> None:
        """Remove the folder; its rows are in the store."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _keys(ids: Sequence[str] | np.ndarray, digests: Sequence[str] | np.ndarray) -> pa.Array:
    """Return one text per crop, equal where the crop and its bytes are."""
    return pc.binary_join_element_wise(pa.array(ids, pa.string()), pa.array(digests, pa.string()), " ")


@contextmanager
def begun(store: Path, plan: Mapping[str, Any], overwrite: bool, rank: int | None = None) -> Iterator[None]:
    """Hold the folder for the parts of a store, made where there is none, for this process alone.

    With a `rank` it is held together with processes of other ranks, each of which writes parts of its own. Raises
    OutputError where another process holds it, or where a store was begun by another plan, unless `overwrite`: then
    that one's parts are thrown away.
    """
    folder = folder_of(store)
    content = {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(plan))}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if not product.lock(file, shared=rank is not None):
            raise OutputError(f"{store}: another mefem embed writes it now; wait for it or name another -o")
        known = _read_plan(folder)
        if known is not None and known != content:
            if not overwrite and any(folder.glob("*.npz")):  # nothing is lost of a run that failed at its first batch
                changes = product.difference(_flat(known), _flat(content), frozenset({"name"}))
                raise OutputError(
                    f"{store} was begun differently: {changes}; type --overwrite to throw that away, or another -o"
                )
            for part in folder.glob("*.npz"):
                part.unlink()
        for left_by_a_kill in folder.glob(".*.tmp" if rank is None else f".*-{rank}.npz.*.tmp"):
            left_by_a_kill.unlink(missing_ok=True)
        if known != content:
            product.write_json(folder / PLAN, content)
        yield


def _read_plan(folder: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plan by name, as a message shows them."""
    flat: dict[str, Any] = {}
    for name, value in plan.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat
