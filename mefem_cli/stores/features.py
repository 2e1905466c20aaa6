"""The feature store: one HDF5 file with the features of every crop, its labels and where it came from.

    /id (N,) utf-8    /cls (N, D)    /mean (N, D)    /patches (N, T, D), chunk (1, T, D)
    /labels/<name> (N,)    /meta/<manifest column> (N,)
    /unreadable/id, /unreadable/sha256 (M,): crops that could not be read, and of which bytes
    attributes: format, version, complete, provenance (JSON)

Features are float16 unless asked otherwise. A store is written under a temporary name and renamed when complete, so a
reader never sees half of one.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np

from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores import joining, product
from mefem_cli.stores.crops import LABEL, to_numpy

FORMAT = "mefem-features"
VERSION = 1
KINDS = ("cls", "mean", "patches")
SPACE_MARGIN_BYTES = 8 << 20  # what HDF5 may still hold in its caches
COLUMN_BYTES_A_ROW = 2048  # labels and manifest columns, generously
READ_BATCH = 256  # rows
CHUNK_BYTES = 1 << 18  # of /cls and /mean; a chunk of /patches is one face
ZSTD_FILTER = 32015  # as registered with the HDF5 Group
MAKE_ANEW = "make it anew with `mefem embed --overwrite`"
JOINED = "joined_labels"  # in the provenance: tables whose columns `mefem store labels` joined
Rows = slice | np.ndarray  # of a store; an array holds row numbers


class FeatureWriter:
    """Writes a feature store in runs of rows; used as a context manager.

    `provenance` is `product.provenance(...)`, plus `model: {"name": ..., "sha256": ...}` of the encoder. Features
    arrive as float arrays of any precision and are stored as `dtype` ("float16" or "float32"). `compress` is None or
    "zstd", which wants the package hdf5plugin here and wherever the store is read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "features.h5"
    >>> with FeatureWriter(path, {"model": {"name": "tiny"}}, embed_dim=2, has_mean=False) as writer:
    ...     writer.append(["a", "b"], cls=np.ones((2, 2)))
    ...     writer.finish(labels={"age": np.array([31, 58])}, meta={})
    >>> FeatureStore.open(path).labels["age"]
    array([31., 58.])
    """

    def __init__(
        self,
        path: Path,
        provenance: Mapping[str, Any],
        embed_dim: int,
        dtype: str = "float16",
        num_patches: int = 0,
        has_cls: bool = True,
        has_mean: bool = True,
        compress: str | None = None,
    ):
        self.path = path
        self._filter = _zstd(f"--compress {compress}") if compress else {}
        self._provenance = dict(provenance)
        self._dtype = np.dtype(dtype)
        self._row_shapes: dict[str, tuple[int, ...]] = {}
        if has_cls:
            self._row_shapes["cls"] = (embed_dim,)
        if has_mean:
            self._row_shapes["mean"] = (embed_dim,)
        if num_patches:
            self._row_shapes["patches"] = (num_patches, embed_dim)
        self._ids: list[str] = []
        self._stack = ExitStack()
        self._finished = False

    def __enter__(self) -> FeatureWriter:
        self._temporary = self._stack.enter_context(product.writing(self.path))
        self._ensure_space(0)
        self._file = self._stack.enter_context(h5py.File(self._temporary, "w"))
        for kind, row_shape in self._row_shapes.items():
            row_bytes = self._dtype.itemsize * int(np.prod(row_shape))
            chunk_rows = 1 if kind == "patches" else max(1, CHUNK_BYTES // row_bytes)
            shape, chunks, most = (0, *row_shape), (chunk_rows, *row_shape), (None, *row_shape)
            self._file.create_dataset(kind, shape, self._dtype, maxshape=most, chunks=chunks, **self._filter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack as stack:  # leaving it closes the file, then renames it or, after an error, removes it
            if error is not None:
                stack.__exit__(kind, error, traceback)
            assert error is not None or self._finished, "finish() was not called"

    def append(
        self,
        ids: Sequence[str],
        cls: np.ndarray | None = None,
        mean: np.ndarray | None = None,
        patches: np.ndarray | None = None,
    ) -> None:
        """Write a run of rows: `cls` and `mean` [n, D], `patches` [n, T, D].

        Raises OutputError for a value that float16 cannot hold and NoInputError for NaN, each naming the crop.
        """
        features = {"cls": cls, "mean": mean, "patches": patches}
        stored = {}
        for kind, values in features.items():
            if values is not None:
                with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported below, with its id
                    stored[kind] = values.astype(self._dtype)
                largest = np.abs(values.reshape(len(ids), -1)).max(axis=1)
                refuse_unstorable(lambda row: str(ids[row]), kind, stored[kind], largest)
        self.append_stored(ids, stored)

    def append_stored(self, ids: Sequence[str], features: Mapping[str, np.ndarray]) -> None:
        """Write a run of rows as `append` does, of features that are finite and in the precision of the store."""
        assert features.keys() == self._row_shapes.keys(), f"wanted {[*self._row_shapes]}, got {[*features]}"
        self._ensure_space(sum(values.nbytes for values in features.values()))
        begin, end = len(self._ids), len(self._ids) + len(ids)
        for kind, values in features.items():
            assert values.shape == (len(ids), *self._row_shapes[kind]), f"{kind}: {values.shape}"
            assert values.dtype == self._dtype, f"{kind}: {values.dtype}"
            self._file[kind].resize(end, axis=0)
            self._file[kind][begin:end] = values
        self._file.flush()
        self._ids += [str(one) for one in ids]

    def _ensure_space(self, num_bytes: int) -> None:
        """Raise OSError before the disk is full: HDF5 crashes when it cannot flush what it holds."""
        if shutil.disk_usage(self.path.parent).free < num_bytes + SPACE_MARGIN_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def finish(
        self,
        labels: Mapping[str, np.ndarray],
        meta: Mapping[str, np.ndarray],
        unreadable: Mapping[str, str] | None = None,
    ) -> None:
        """Write ids, labels (numbers as float64, text as utf-8) and manifest columns, check all, mark it complete.

        `unreadable` maps the ids of crops that could not be read to the sha256 of their bytes.
        """
        self._ensure_space(COLUMN_BYTES_A_ROW * len(self._ids))
        wrong = [kind for kind in self._row_shapes if len(self._file[kind]) != len(self._ids)]
        assert not wrong, f"{len(self._ids)} ids, but not so many rows of {wrong}"
        assert len(set(self._ids)) == len(self._ids), "two crops have one id"
        self._file.create_dataset("id", data=np.array(self._ids, dtype=object), dtype=h5py.string_dtype())
        for group, columns in (("labels", labels), ("meta", meta)):
            self._file.create_group(group)
            for name in columns:  # one at a time, as a mapping may read them when they are asked for
                values = np.asarray(columns[name])
                assert len(values) == len(self._ids), f"{len(self._ids)} ids, but {len(values)} of {name}"
                _write_column(self._file[group], name, values, as_label=group == "labels")
        if unreadable:
            for name, texts in (("id", [*unreadable]), ("sha256", [*unreadable.values()])):
                _write_column(self._file.require_group("unreadable"), name, np.array(texts, object), as_label=False)
        self._file.attrs.update({"format": FORMAT, "version": VERSION, "provenance": json.dumps(self._provenance)})
        self._file.flush()
        self._file.attrs["complete"] = True
        self._finished = True


class FeatureStore:
    """A complete feature store, open for reading; columns and features are read when asked for.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "features.h5"
    >>> with FeatureWriter(path, {}, embed_dim=2, has_mean=False) as writer:
    ...     writer.append(["a", "b", "c"], cls=np.eye(3, 2))
    ...     writer.finish({"age": np.array([31, 58, np.nan])}, {})
    >>> with FeatureStore.open(path) as store:
    ...     known = store.select(np.isfinite(store.labels["age"]))
    ...     print(known.ids, known.read("cls").tolist())
    ['a' 'b'] [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, path: Path, file: h5py.File, rows: np.ndarray | None = None):
        self.path = path
        self._file = file
        self._rows = rows  # of the file, (N,) int64; None: all of them
        self.provenance: dict[str, Any] = json.loads(file.attrs.get("provenance", "{}"))
        self.labels = Columns(self, "labels")
        self.meta = Columns(self, "meta")

    @classmethod
    def open(cls, path: Path | str) -> FeatureStore:
        """Open a store.

        Raises NoInputError where there is none, or a damaged or incomplete one, and UsageError for a store of a
        newer version, or a compressed one where hdf5plugin is missing.
        """
        path = Path(path)
        file = _open_file(path)
        try:
            _check(path, file)
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file, also for what `select` and `join_labels` returned; what was read stays."""
        self._file.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._file["id"].shape[0]) if self._rows is None else len(self._rows)

    @cached_property
    def ids(self) -> np.ndarray:
        """The crops' ids, (N,) str objects, in the order of the rows."""
        return self.read_rows("id", slice(None))

    @property
    def model_name(self) -> str:
        """The encoder's name as `mefem embed` recorded it, else the store's file name."""
        return str(self.model.get("name") or self.path.stem)

    @property
    def model_sha256(self) -> str | None:
        """The sha256 of the encoder's weights, where recorded."""
        return self.model.get("sha256")

    @property
    def model(self) -> Mapping[str, Any]:
        """What tells the encoder from others: `name`, `sha256` of its weights, and what of them was taken."""
        model = self.provenance.get("model") or {}
        return model if isinstance(model, Mapping) else {"name": model}

    @property
    def unreadable(self) -> dict[str, str]:
        """The crops that could not be read: id -> sha256 of the bytes that were there."""
        if "unreadable" not in self._file:
            return {}
        ids, digests = (_read_dataset(self.path, self._file[f"unreadable/{name}"]) for name in ("id", "sha256"))
        return dict(zip(ids, digests, strict=True))

    @property
    def joined_labels(self) -> list[str]:
        """The labels that `mefem store labels` joined."""
        joined = [name for table in self.provenance.get(JOINED, []) for name in table["columns"]]
        return [name for name in dict.fromkeys(joined) if name in self.labels]

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the store's bytes; it reads the whole file once."""
        return product.file_sha256(self.path)

    @property
    def kinds(self) -> list[str]:
        """The kinds of features that are stored, of cls, mean and patches."""
        return [kind for kind in KINDS if self.has(kind)]

    def shape(self, kind: str) -> tuple[int, ...]:
        """Return the shape of a kind of features: (N, D), of patches (N, T, D)."""
        return (len(self), *self._file[kind].shape[1:])

    @property
    def embed_dim(self) -> int:
        """Values in a feature vector or token."""
        return int(self._file[self.kinds[0]].shape[-1])

    @property
    def num_patches(self) -> int:
        """Patch tokens of a face; 0 where none are stored."""
        return int(self._file["patches"].shape[1]) if self.has("patches") else 0

    @property
    def dtype(self) -> str:
        """The precision that features are stored in."""
        return str(self._file[self.kinds[0]].dtype.name)

    @property
    def compression(self) -> str | None:
        """What features are compressed with: None or "zstd"."""
        return "zstd" if _is_compressed(self._file[self.kinds[0]]) else None

    def has(self, kind: str) -> bool:
        """Whether features of this kind (cls, mean, patches) are stored."""
        return kind in KINDS and kind in self._file

    def read(self, kind: str) -> np.ndarray:
        """Return all features of a kind as float32: [N, D], patches [N, T, D]."""
        return self.read_rows(kind, slice(None)).astype(np.float32)

    def read_rows(self, name: str, rows: Rows) -> np.ndarray:
        """Return rows of a data set as stored, text as str objects. Raises NoInputError if unreadable.

        `rows` is a slice, or an array of row numbers in any order; what lies side by side is read in one go.
        """
        if self._rows is not None:
            rows = self._rows[rows]
        return _read_dataset(self.path, self._file[name], rows)

    def iter_batches(
        self, kind: str, rows: np.ndarray | None = None, batch_size: int = READ_BATCH
    ) -> Iterator[np.ndarray]:
        """Yield features of a kind as float32: [batch_size, D] or [batch_size, T, D], the last batch shorter.

        `rows` are row numbers (n,) or a mask (N,) bool; None means all. Features come in the order of `rows`; each
        batch reads runs of neighbouring rows in one go, which for patches is many times faster than h5py's indexing.
        """
        chosen = None if rows is None else self._row_numbers(rows)
        for begin in range(0, len(self) if chosen is None else len(chosen), batch_size):
            part = slice(begin, begin + batch_size)
            yield self.read_rows(kind, part if chosen is None else chosen[part]).astype(np.float32)

    def select(self, rows: Any) -> FeatureStore:
        """Return a view of some rows: numbers (n,) in any order, a mask (N,) bool, or a slice. Nothing is copied.

        It shares the open file. Raises IndexError for a row that does not exist.
        """
        numbers = self._row_numbers(rows)
        chosen = FeatureStore(self.path, self._file, numbers if self._rows is None else self._rows[numbers])
        chosen.labels = Columns(chosen, "labels", {name: one[numbers] for name, one in self.labels.added.items()})
        return chosen

    def _row_numbers(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return np.arange(len(self), dtype=np.int64)[rows]
        numbers = np.asarray(rows)
        if numbers.dtype == bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"{self.path} has {len(self)} rows, the mask {numbers.shape}")
            return np.flatnonzero(numbers)
        numbers = numbers.astype(np.int64)
        if numbers.size and not (-len(self) <= numbers.min() and numbers.max() < len(self)):
            raise IndexError(f"{self.path} has {len(self)} rows, not one of number {numbers.max()}")
        return np.where(numbers < 0, numbers + len(self), numbers)

    def join_labels(self, table: Path | str, key: str | None = None) -> FeatureStore:
        """Return this store with the columns of a CSV or Parquet table as labels too, NaN or "" where they are missing.

        They win over labels of the same name. `key` names the table's column that tells rows, "path" by default; see
        `joining.rows_of_faces`. Nothing is written; `mefem store labels` does that. Raises UsageError for an unfit
        table.
        """
        labels = joining.read_labels(Path(table), key)
        columns = joining.label_columns(labels, joining.rows_of_faces(labels, self))
        joined = FeatureStore(self.path, self._file, self._rows)
        added = {name.removeprefix(LABEL): to_numpy(column) for name, column in columns.items()}
        joined.labels = Columns(joined, "labels", {**self.labels.added, **added})
        return joined

    def copy_rows_into(
        self, writer: FeatureWriter, keep: np.ndarray | None = None, batch_size: int = READ_BATCH
    ) -> None:
        """Append this store's features to a new one, in order, so that only new crops need the encoder.

        `keep` is a mask (N,), True: copy the row. The copy is exact; both stores have the same precision.
        """
        chosen = np.arange(len(self)) if keep is None else np.flatnonzero(keep)
        for begin in range(0, len(chosen), batch_size):
            rows = chosen[begin : begin + batch_size]
            writer.append_stored(list(self.ids[rows]), {kind: self.read_rows(kind, rows) for kind in self.kinds})


class Columns(Mapping[str, np.ndarray]):
    """Columns of a store by name, each (N,): float64 or str objects; read when asked for, once.

    `added` columns (N,) stand beside those of the file and win over them.
    """

    def __init__(self, store: FeatureStore, group: str, added: Mapping[str, np.ndarray] | None = None):
        self._store, self._group = store, group
        self.added = dict(added or {})
        self._stored_names = {_decode_name(name): name for name in store._file.get(group, {})}
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.added:
            return self.added[name]
        if name not in self._read:
            self._read[name] = self._store.read_rows(f"{self._group}/{self._stored_names[name]}", slice(None))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._stored_names, *self.added]))

    def __len__(self) -> int:
        return len({*self._stored_names, *self.added})

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names or name in self.added


def replace_labels(file: h5py.File, columns: Mapping[str, np.ndarray], source: Mapping[str, Any]) -> None:
    """Write label columns (N,) into an open store, instead of those of the same names, and record their source."""
    group = file.require_group("labels")
    for name, values in columns.items():
        if _encode_name(name) in group:
            del group[_encode_name(name)]
        _write_column(group, name, np.asarray(values), as_label=True)
    record = json.loads(file.attrs.get("provenance", "{}"))
    record.setdefault(JOINED, []).append({**source, "columns": list(columns)})
    file.attrs["provenance"] = json.dumps(record)


def refuse_unstorable(name: Callable[[int], str], kind: str, stored: np.ndarray, largest: np.ndarray) -> None:
    """Raise an error that names the first crop whose features the store cannot hold.

    `name` tells a row's crop; `stored` are features [n, ...] in the precision of the store; `largest` (n,) is the
    largest absolute value of each row before it was rounded, NaN or infinite where one is no number. Raises
    OutputError for an overflow, else NoInputError.
    """
    for row in np.flatnonzero(~(largest <= float(np.finfo(stored.dtype).max))).tolist():
        if np.isfinite(stored[row]).all():
            continue  # it was rounded down to the largest number there is
        if np.isfinite(largest[row]):
            raise OutputError(
                f"crop {name(row)}: its {kind} features reach {largest[row]:.3g}, more than {stored.dtype} holds; "
                "type --dtype float32 --overwrite"
            )
        raise NoInputError(
            f"crop {name(row)}: the encoder gives {kind} features that are not finite; use another encoder"
        )


def _read_dataset(path: Path, dataset: h5py.Dataset, rows: Rows = slice(None)) -> np.ndarray:
    """Return rows of a data set, text as str objects."""
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    read = dataset.asstr(errors="surrogateescape") if is_text else dataset
    try:
        if isinstance(rows, slice):
            return read[rows]
        return _read_runs(read, rows, dataset, np.dtype(object) if is_text else dataset.dtype)
    except OSError as error:
        raise NoInputError(f"{path}: {dataset.name} is damaged; {MAKE_ANEW}") from error


def _read_runs(read: Any, rows: np.ndarray, dataset: h5py.Dataset, dtype: np.dtype) -> np.ndarray:
    """Return rows in any order, read in runs: rows that no chunk lies between are one run."""
    result = np.empty((len(rows), *dataset.shape[1:]), dtype)
    order = np.argsort(rows, kind="stable")
    wanted = rows[order]
    chunk_rows = dataset.chunks[0] if dataset.chunks else len(dataset)
    ends = np.flatnonzero(np.diff(wanted) > chunk_rows) + 1
    for begin, end in itertools.pairwise([0, *ends.tolist(), len(rows)]):
        if begin < end:
            first = int(wanted[begin])
            run = read[first : int(wanted[end - 1]) + 1]
            is_whole = len(run) == end - begin and bool((np.diff(wanted[begin:end]) == 1).all())
            result[order[begin:end]] = run if is_whole else run[wanted[begin:end] - first]
    return result


def _is_compressed(dataset: h5py.Dataset) -> bool:
    return str(ZSTD_FILTER) in dataset._filters


def _zstd(asked_by: str) -> dict[str, Any]:
    """Return the options that make h5py compress a data set. Raises UsageError where hdf5plugin is not installed."""
    try:
        import hdf5plugin  # also registers the filter for reading
    except ImportError as error:
        raise UsageError(f"{asked_by}: wants the package hdf5plugin; type pip install 'mefem-cli[zstd]'") from error
    return {**hdf5plugin.Zstd(clevel=3), "shuffle": True}  # exponents apart from mantissas: they compress


def _write_column(group: h5py.Group, name: str, values: np.ndarray, as_label: bool) -> None:
    if values.dtype.kind in "biuf":
        group.create_dataset(_encode_name(name), data=values.astype(np.float64) if as_label else values)
        return
    if as_label and all(one is None or isinstance(one, int | float) for one in values):
        group.create_dataset(_encode_name(name), data=values.astype(np.float64))  # None becomes NaN
        return
    texts = ["" if one is None or one != one else str(one) for one in values]
    encoded = np.array([text.encode("utf-8", errors="surrogateescape") for text in texts], dtype=object)
    group.create_dataset(_encode_name(name), data=encoded, shape=(len(values),), dtype=h5py.string_dtype())


def _encode_name(name: str) -> str:
    """HDF5 splits names at "/" and reads "." as "here"; "%" is encoded so that decoding is exact."""
    encoded = name.replace("%", "%25").replace("/", "%2F")
    return encoded.replace(".", "%2E") if set(encoded) <= {"."} else encoded


def _decode_name(name: str) -> str:
    return unquote(name)


def _open_file(path: Path) -> h5py.File:
    if path.is_dir():
        raise NoInputError(_folder_instead(path))
    if not path.exists():
        raise NoInputError(f"{path} does not exist; make a feature store with `mefem embed`")
    if not h5py.is_hdf5(path):
        what = "is empty" if path.stat().st_size == 0 else "is not an HDF5 file"
        raise NoInputError(f"{path} {what}; wanted a feature store from `mefem embed`")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise NoInputError(f"{path} is cut short or damaged; {MAKE_ANEW}") from error


def _folder_instead(path: Path) -> str:
    if (path / "manifest.parquet").exists():
        return f"{path} is a crops folder, not a feature store; put `mefem embed` between"
    if (path / "model.json").exists() or (path / "config.yaml").exists():
        return f"{path} is a run folder, not a feature store; put `mefem embed` between"
    return f"{path} is a folder; wanted a feature store, the .h5 file from `mefem embed`"


def _check(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != FORMAT:
        raise NoInputError(f"{path} is an HDF5 file, but not a feature store from `mefem embed`")
    version = int(file.attrs.get("version", VERSION))
    if version > VERSION:
        raise UsageError(
            f"{path} was written by a newer mefem (store version {version}, this one reads {VERSION}); "
            "upgrade with `pip install -U mefem-cli`"
        )
    if not file.attrs.get("complete", False):
        raise NoInputError(f"{path} is incomplete; {MAKE_ANEW}")
    kinds = [kind for kind in KINDS if kind in file]
    datasets = ["id", *kinds]
    datasets += [f"{group}/{name}" for group in ("labels", "meta") for name in file.get(group, {})]
    num_rows = {len(file[name]) if name in file else -1 for name in datasets}
    if not kinds or len(num_rows) != 1:
        raise NoInputError(f"{path}: its columns differ in length or are missing; {MAKE_ANEW}")
    if any(_is_compressed(file[kind]) for kind in kinds):
        _zstd(f"{path} is compressed with zstd")
