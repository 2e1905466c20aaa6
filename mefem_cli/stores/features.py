"""The feature store: one HDF5 file with the features of every crop, its labels and where it came from.

    /id (N,) utf-8    /cls (N, D)    /mean (N, D)    /patches (N, T, D), chunk (1, T, D)
    /labels/<name> (N,)    /meta/<manifest column> (N,)
    attributes: format, version, complete, provenance (JSON)

Features are float16 unless asked otherwise. A store is written under a temporary name and renamed when complete, so a
reader never sees half of one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np

from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores import product

FORMAT = "mefem-features"
VERSION = 1
KINDS = ("cls", "mean", "patches")
SPACE_MARGIN_BYTES = 8 << 20  # what HDF5 may still hold in its caches
COLUMN_BYTES_A_ROW = 2048  # labels and manifest columns, generously
CHUNK_BYTES = 1 << 18  # of /cls and /mean; a chunk of /patches is one face
MAKE_ANEW = "make it anew with `mefem embed --overwrite`"


class FeatureWriter:
    """Writes a feature store in runs of rows; used as a context manager.

    `provenance` is `product.provenance(...)`, plus `model: {"name": ..., "sha256": ...}` of the encoder. Features
    arrive as float arrays of any precision and are stored as `dtype` ("float16" or "float32").

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
    ):
        self.path = path
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
            self._file.create_dataset(
                kind, (0, *row_shape), self._dtype, maxshape=(None, *row_shape), chunks=(chunk_rows, *row_shape)
            )
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
        given = {kind: values for kind, values in features.items() if values is not None}
        assert given.keys() == self._row_shapes.keys(), f"wanted {[*self._row_shapes]}, got {[*given]}"
        self._ensure_space(sum(values.size for values in given.values()) * self._dtype.itemsize)
        begin, end = len(self._ids), len(self._ids) + len(ids)
        for kind, values in given.items():
            assert values.shape == (len(ids), *self._row_shapes[kind]), f"{kind}: {values.shape}"
            with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported below, with its id
                stored = values.astype(self._dtype)
            self._refuse_non_finite(ids, kind, values, stored)
            self._file[kind].resize(end, axis=0)
            self._file[kind][begin:end] = stored
        self._file.flush()
        self._ids += ids

    def _ensure_space(self, num_bytes: int) -> None:
        """Raise OSError before the disk is full: HDF5 crashes when it cannot flush what it holds."""
        if shutil.disk_usage(self.path.parent).free < num_bytes + SPACE_MARGIN_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _refuse_non_finite(self, ids: Sequence[str], kind: str, values: np.ndarray, stored: np.ndarray) -> None:
        finite = np.isfinite(stored).reshape(len(ids), -1).all(axis=1)
        if finite.all():
            return
        row = int(np.argmin(finite))
        if np.isfinite(values[row]).all():
            largest = float(np.abs(values[row]).max())
            raise OutputError(
                f"crop {ids[row]}: its {kind} features reach {largest:.3g}, more than {self._dtype} holds; "
                "type --dtype float32"
            )
        raise NoInputError(
            f"crop {ids[row]}: the encoder gives {kind} features that are not finite; use another encoder"
        )

    def finish(self, labels: Mapping[str, np.ndarray], meta: Mapping[str, np.ndarray]) -> None:
        """Write ids, labels (numbers as float64, text as utf-8) and manifest columns, check all, mark it complete."""
        self._ensure_space(COLUMN_BYTES_A_ROW * len(self._ids))
        rows = {name: len(values) for columns in (labels, meta) for name, values in columns.items()}
        rows |= {kind: len(self._file[kind]) for kind in self._row_shapes}
        wrong = {name: count for name, count in rows.items() if count != len(self._ids)}
        assert not wrong, f"{len(self._ids)} ids, but {wrong}"
        assert len(set(self._ids)) == len(self._ids), "two crops have one id"
        self._file.create_dataset("id", data=np.array(self._ids, dtype=object), dtype=h5py.string_dtype())
        for group, columns in (("labels", labels), ("meta", meta)):
            self._file.create_group(group)
            for name, values in columns.items():
                _write_column(self._file[group], name, np.asarray(values), as_label=group == "labels")
        self._file.attrs.update({"format": FORMAT, "version": VERSION, "provenance": json.dumps(self._provenance)})
        self._file.flush()
        self._file.attrs["complete"] = True
        self._finished = True


class FeatureStore:
    """A complete feature store, open for reading; columns and features are read when asked for."""

    def __init__(self, path: Path, file: h5py.File):
        self.path = path
        self._file = file
        self.provenance: dict[str, Any] = json.loads(file.attrs.get("provenance", "{}"))
        self.labels: Mapping[str, np.ndarray] = Columns(self, "labels")
        self.meta: Mapping[str, np.ndarray] = Columns(self, "meta")

    @classmethod
    def open(cls, path: Path | str) -> FeatureStore:
        """Open a store.

        Raises NoInputError where there is none, or a damaged or incomplete one, and UsageError for a store of a
        newer version.
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
        """Close the file; what was read stays."""
        self._file.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._file["id"].shape[0])

    @cached_property
    def ids(self) -> np.ndarray:
        """The crops' ids, (N,) str objects, in the order of the rows."""
        return self.read_rows("id", slice(None))

    @property
    def model_name(self) -> str:
        """The encoder's name as `mefem embed` recorded it, else the store's file name."""
        return str(self._model.get("name") or self.path.stem)

    @property
    def model_sha256(self) -> str | None:
        """The sha256 of the encoder's weights, where recorded."""
        return self._model.get("sha256")

    @property
    def _model(self) -> Mapping[str, Any]:
        model = self.provenance.get("model") or {}
        return model if isinstance(model, Mapping) else {"name": model}

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the store's bytes; it reads the whole file once."""
        return product.file_sha256(self.path)

    @property
    def embed_dim(self) -> int:
        """Values in a feature vector or token."""
        return int(next(self._file[kind].shape[-1] for kind in KINDS if self.has(kind)))

    @property
    def num_patches(self) -> int:
        """Patch tokens of a face; 0 where none are stored."""
        return int(self._file["patches"].shape[1]) if self.has("patches") else 0

    @property
    def dtype(self) -> str:
        """The precision that features are stored in."""
        return next(self._file[kind].dtype.name for kind in KINDS if self.has(kind))

    def has(self, kind: str) -> bool:
        """Whether features of this kind (cls, mean, patches) are stored."""
        return kind in KINDS and kind in self._file

    def read(self, kind: str) -> np.ndarray:
        """Return all features of a kind as float32: [N, D], patches [N, T, D]."""
        return self.read_rows(kind, slice(None)).astype(np.float32)

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        """Return a run of rows of a data set as stored, text as str objects. Raises NoInputError if unreadable."""
        try:
            dataset = self._file[name]
            is_text = h5py.check_string_dtype(dataset.dtype) is not None
            return dataset.asstr(errors="surrogateescape")[rows] if is_text else dataset[rows]
        except OSError as error:
            raise NoInputError(f"{self.path}: /{name} is damaged; {MAKE_ANEW}") from error

    def iter_batches(self, kind: str, batch_size: int) -> Iterator[np.ndarray]:
        """Yield features of a kind in runs of rows as float32: [batch_size, D] or [batch_size, T, D]."""
        for begin in range(0, len(self), batch_size):
            yield self.read_rows(kind, slice(begin, begin + batch_size)).astype(np.float32)

    def copy_rows_into(self, writer: FeatureWriter, keep: np.ndarray | None = None, batch_size: int = 256) -> None:
        """Append this store's features to a new one, in order, so that only new crops need the encoder.

        `keep` is a mask (N,), True: copy the row. The copy is exact where both stores have the same precision.
        """
        for begin in range(0, len(self), batch_size):
            rows = slice(begin, begin + batch_size)
            kept = np.ones(len(self.ids[rows]), bool) if keep is None else keep[rows]
            features = {kind: self.read_rows(kind, rows)[kept] for kind in KINDS if self.has(kind)}
            writer.append([str(one) for one in self.ids[rows][kept]], **features)


class Columns(Mapping[str, np.ndarray]):
    """Columns of a store by name, each (N,): float64 or str objects; read when asked for, once."""

    def __init__(self, store: FeatureStore, group: str):
        self._store, self._group = store, group
        self._stored_names = {_decode_name(name): name for name in store._file.get(group, {})}
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            self._read[name] = self._store.read_rows(f"{self._group}/{self._stored_names[name]}", slice(None))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names


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
