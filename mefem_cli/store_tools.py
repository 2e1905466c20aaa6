"""What is done with complete feature stores: a summary, several made one, labels joined, vectors for other programs."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mefem_cli import console
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores import joining, product
from mefem_cli.stores.crops import LABEL
from mefem_cli.stores.features import FeatureStore, FeatureWriter, replace_labels
from mefem_cli.stores.tables import number_text

VECTORS = ("cls", "mean")  # one a face; patches are for FeatureStore.iter_batches
EXPORT_ROWS = 4096  # rows written at once


@dataclass(frozen=True)
class StoreOptions:
    """What to do with a store."""

    out: str | None = None  # path of the product; labels: default is the store itself
    overwrite: bool = False  # replace the product if it exists
    key: str | None = None  # labels: column that names pictures (by path or stem), `id`, or a label; default: path
    features: Literal["cls", "mean", "cls+mean"] | None = None  # export: which vectors; default: all of them


def summary(path: Path) -> dict[str, Any]:
    """Return what is known of a store: rows, features, encoder, labels with how many are missing, size."""
    with FeatureStore.open(path) as store:
        record = store.provenance
        labels = {name: int(_is_missing(store.labels[name]).sum()) for name in store.labels}
        return {
            "store": str(path.absolute()),
            "crops": len(store),
            "unreadable": len(store.unreadable),
            "features": {kind: list(store.shape(kind)[1:]) for kind in store.kinds},
            "dtype": store.dtype,
            "compression": store.compression,
            "bytes": path.stat().st_size,
            "model": {"name": store.model_name, **store.model},
            "preprocessing": record.get("preprocessing"),
            "precision": record.get("options", {}).get("precision"),
            "inputs": record.get("inputs", {}),
            "labels_missing": labels,
            "mefem": record.get("mefem"),
        }


def _is_missing(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" else values == ""


# Merging -------------------------------------------------------------------------------------------------------------


def merge(paths: Sequence[Path], out: Path, overwrite: bool = False) -> int:
    """Write the rows of several stores of one encoder, in their order, as one store; return how many there are.

    Labels and manifest columns that some of them lack are NaN or "" there. Raises UsageError where the stores are of
    different encoders or options or have a crop in common, OutputError where `out` exists.
    """
    if len(paths) < 2:
        raise UsageError("merge: name two stores or more, such as mefem store merge a.h5 b.h5 -o both.h5")
    _refuse_existing(out, overwrite)
    with ExitStack() as stack:
        stores = [stack.enter_context(FeatureStore.open(path)) for path in paths]
        first = stores[0]
        for store in stores[1:]:
            _refuse_other_encoder(first, store)
        _refuse_shared_crops(stores)
        columns = {
            group: {name: _joined(stores, group, name) for name in _names(stores, group)}
            for group in ("labels", "meta")
        }
        unreadable = {name: digest for store in stores for name, digest in store.unreadable.items()}
        written = {name for store in stores for name in store.ids}
        writer = FeatureWriter(
            out,
            _merged_provenance(stores),
            first.embed_dim,
            first.dtype,
            num_patches=first.num_patches,
            has_cls=first.has("cls"),
            has_mean=first.has("mean"),
            compress=first.compression,
        )
        with writer:
            for store in stores:
                store.copy_rows_into(writer)
            left = {name: digest for name, digest in unreadable.items() if name not in written}
            writer.finish(columns["labels"], columns["meta"], left)
        return len(written)


def _identity(store: FeatureStore) -> dict[str, Any]:
    """Return what two stores must share to be merged."""
    record = store.provenance
    model = {name: value for name, value in store.model.items() if name != "name"}
    shapes = {kind: list(store.shape(kind)[1:]) for kind in store.kinds}
    precision = record.get("options", {}).get("precision")
    return {**model, **(record.get("preprocessing") or {}), **shapes, "dtype": store.dtype, "precision": precision}


def _refuse_other_encoder(first: FeatureStore, other: FeatureStore) -> None:
    changes = product.difference(_identity(first), _identity(other))
    if changes:
        raise UsageError(
            f"{first.path} and {other.path} are not of one encoder and one set of options: {changes}; embed one "
            "of them again as the other"
        )


def _refuse_shared_crops(stores: Sequence[FeatureStore]) -> None:
    owner: dict[str, FeatureStore] = {}
    for store in stores:
        shared = [name for name in store.ids if name in owner]
        if shared:
            others = owner[shared[0]].path
            raise UsageError(
                f"{others} and {store.path} have {console.plural(len(shared), 'crop')} in common, the first is "
                f"{shared[0]}; merge stores of different crops"
            )
        owner |= dict.fromkeys(store.ids, store)


def _names(stores: Sequence[FeatureStore], group: str) -> list[str]:
    return list(dict.fromkeys(name for store in stores for name in getattr(store, group)))


def _joined(stores: Sequence[FeatureStore], group: str, name: str) -> np.ndarray:
    """Return a column of all stores' rows; text where one of them has text."""
    columns: list[tuple[FeatureStore, np.ndarray | None]] = [(one, getattr(one, group).get(name)) for one in stores]
    is_text = any(values is not None and values.dtype.kind == "O" for _, values in columns)
    missing: Any = "" if is_text else np.nan
    pieces = []
    for store, values in columns:
        if values is None:
            values = np.full(len(store), missing, dtype=object if is_text else np.float64)
        elif is_text and values.dtype.kind != "O":
            values = np.array([number_text(float(one)) for one in values], dtype=object)
        pieces.append(values)
    return np.concatenate(pieces)


def _merged_provenance(stores: Sequence[FeatureStore]) -> dict[str, Any]:
    first = stores[0].provenance
    inputs = {str(store.path.absolute()): store.sha256 for store in stores}
    record = product.provenance(first.get("options", {}), inputs, seed=0, device=str(first.get("device")))
    return {**record, "model": dict(stores[0].model), "preprocessing": first.get("preprocessing")}


# Labels --------------------------------------------------------------------------------------------------------------


def attach(path: Path, table: Path, key: str | None, out: Path | None, overwrite: bool = False) -> tuple[Path, int]:
    """Join a table to a store's rows as labels and write the store, in its place or at `out`; features are copied.

    Returns where the store is and how many of its rows have labels now; says on stderr what did not fit. Raises
    UsageError for an unfit table and NoInputError where no row fits.
    """
    target = out or path
    if out is not None and out.absolute() != path.absolute():
        _refuse_existing(out, overwrite)
    labels = joining.read_labels(table, key)
    with FeatureStore.open(path) as store:
        rows = joining.rows_of_faces(labels, store)
        num_labelled = int((rows >= 0).sum())
        _tell(labels, rows)
        replaced = [name for name in labels.columns.column_names if name in store.labels]
        if replaced:
            console.note(f"labels of the store are replaced: {', '.join(replaced)}")
        joined = store.join_labels(table, key)
        columns = {name: joined.labels[name] for name in labels.columns.column_names}
        source = {"table": str(table.absolute()), "sha256": product.file_sha256(table), "key": labels.key}
    with product.writing(target) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            replace_labels(file, columns, source)
    return target, num_labelled


def _tell(labels: joining.Labels, rows: np.ndarray) -> None:
    num_labelled = int((rows >= 0).sum())
    if not num_labelled:
        raise NoInputError(
            f"{labels.path}: no row fits a crop of the store by its column {labels.key}; type --key with the column "
            "that holds paths, file names or ids"
        )
    unused = np.setdiff1d(np.arange(len(labels.keys)), rows)
    first = f", the first is {labels.keys[int(unused[0])].as_py()[:200]!r}" if len(unused) else ""
    console.note(
        f"labels from {labels.path}: {num_labelled} of {len(rows)} crops have labels; "
        f"{len(unused)} rows of the table fit no crop{first}"
    )


# Export --------------------------------------------------------------------------------------------------------------


def export(path: Path, out: Path, features: str | None = None, overwrite: bool = False) -> int:
    """Write ids, sources, labels and vectors (float32) as a .parquet or .npz file; return how many rows.

    Labels are columns `label:<name>`; in Parquet a vector is a list of fixed size. Rows are written in pieces, so
    memory does not grow with the store. Raises UsageError for another suffix or features that are not stored.
    """
    writers: dict[str, Callable[[FeatureStore, list[str], Path], None]] = {".parquet": _to_parquet, ".npz": _to_numpy}
    if out.suffix not in writers:
        raise UsageError(f"--out {out}: wanted a name that ends in .parquet or .npz")
    _refuse_existing(out, overwrite)
    with FeatureStore.open(path) as store:
        kinds = features.split("+") if features else [kind for kind in VECTORS if store.has(kind)]
        lacking = [kind for kind in kinds if not store.has(kind)]
        if lacking or not kinds:
            raise UsageError(f"--features {features}: {path} has {', '.join(store.kinds)} only")
        with product.writing(out) as temporary:
            writers[out.suffix](store, kinds, temporary)
        return len(store)


def _columns(store: FeatureStore) -> dict[str, np.ndarray]:
    """Return what stands beside the vectors, each (N,)."""
    sources = {"source": store.meta["source"]} if "source" in store.meta else {}
    return {"id": store.ids, **sources, **{LABEL + name: store.labels[name] for name in store.labels}}


def _to_parquet(store: FeatureStore, kinds: Sequence[str], path: Path) -> None:
    columns = _columns(store)
    vector = pa.list_(pa.float32(), store.embed_dim)
    fields = [(name, pa.float64() if one.dtype.kind == "f" else pa.string()) for name, one in columns.items()]
    schema = pa.schema([*fields, *((kind, vector) for kind in kinds)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(store), EXPORT_ROWS):
            rows = slice(begin, begin + EXPORT_ROWS)
            arrays = [pa.array(columns[name][rows], kind) for name, kind in fields]
            for kind in kinds:
                values = store.read_rows(kind, rows).astype(np.float32)
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), store.embed_dim))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _to_numpy(store: FeatureStore, kinds: Sequence[str], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, values in _columns(store).items():
            with archive.open(f"{_member(name)}.npy", "w", force_zip64=True) as file:
                np.save(file, values.astype(str) if values.dtype.kind == "O" else values, allow_pickle=False)
        for kind in kinds:
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as file:
                shape = (len(store), store.embed_dim)
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for values in store.iter_batches(kind, batch_size=EXPORT_ROWS):
                    file.write(values.astype("<f4").tobytes())


def _member(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; type --overwrite to replace it or -o for another place")


def summary_rows(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a summary as lines of a table."""
    model = dict(known["model"])
    dims = {kind: " x ".join(map(str, shape)) for kind, shape in known["features"].items()}
    missing = [f"{name} ({count} missing)" if count else name for name, count in known["labels_missing"].items()]
    return [
        ("store", known["store"]),
        ("crops", f"{known['crops']}" + (f", {known['unreadable']} unreadable" if known["unreadable"] else "")),
        ("features", ", ".join(f"{kind} {shape}" for kind, shape in dims.items())),
        ("stored as", known["dtype"] + (f", {known['compression']}" if known["compression"] else "")),
        ("size", f"{known['bytes'] / 1e6:.1f} MB"),
        ("model", str(model.pop("name"))),
        *((f"model {name}", str(value)) for name, value in model.items()),
        *((f"input {name.replace('_', ' ')}", str(value)) for name, value in (known["preprocessing"] or {}).items()),
        ("encoded in", str(known["precision"] or "unknown precision")),
        *(("made from", name) for name in known["inputs"]),
        ("labels", ", ".join(missing) or "none"),
    ]
