"""`mefem crop --merge A B -o C`: crops folders of one recipe, made on several machines or days, become one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mefem_cli import console
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.faces import job
from mefem_cli.faces.crop import CropOptions
from mefem_cli.faces.journal import Journal
from mefem_cli.faces.source import Given
from mefem_cli.stores import product
from mefem_cli.stores.crops import LABEL, MANIFEST, PROVENANCE, SHARDS, read_manifest
from mefem_cli.stores.product import ProductOptions

MISSING_SHOWN = 5  # parts named in a warning


def merge(arguments: list[str], options: CropOptions, product_options: ProductOptions) -> job.CropReport:
    """Join crops folders into a new one; crops are linked where the file system can, else copied.

    A face that is in several folders, unchanged, is taken once. Labels travel along. Raises UsageError where the
    recipes differ or a source was read differently, NoInputError for what is no finished crops folder, OutputError if
    the output exists.
    """
    begun = time.monotonic()
    folders = _folders(arguments)
    out = Path(product_options.out or job.DEFAULT_OUT)
    _refuse_itself(out, folders)
    recipe = _common_recipe(folders)
    _tell_missing_parts(folders)
    inputs = {str(folder.absolute() / MANIFEST): product.file_sha256(folder / MANIFEST) for folder in folders}
    if not product_options.overwrite and _is_made_of(out, inputs, options):
        console.note("nothing has changed since it was merged")
        return job.report_of(out, read_manifest(out), None)
    _refuse_output(out, product_options.overwrite)
    rows = _rows(folders)
    merged = CropOptions(**recipe, labels=options.labels, key=options.key, max_rejects=options.max_rejects)
    with product.writing(out) as building:
        rows = _gather(building, folders, rows)
        with Journal(building).locked():
            report = job.finish(building, merged, product_options, Journal(building), None, rows, inputs)
        if out.exists():
            shutil.rmtree(out)
    report.out, report.seconds = out, time.monotonic() - begun
    job.refuse_too_few(report, merged)
    return report


def preview(arguments: list[str], options: CropOptions, product_options: ProductOptions) -> dict[str, Any]:
    """Return what `merge` would do, touching nothing. Raises the same errors."""
    folders = _folders(arguments)
    out = Path(product_options.out or job.DEFAULT_OUT)
    _refuse_itself(out, folders)
    recipe = _common_recipe(folders)
    _tell_missing_parts(folders)
    _refuse_output(out, product_options.overwrite)
    rows = _rows(folders)
    crops = sum(map(bool, rows["path"].to_pylist()))
    return {"out": str(out.absolute()), "folders": len(folders), "rows": len(rows), "crops": crops, "options": recipe}


def _folders(arguments: list[str]) -> list[Path]:
    if len(arguments) < 2:
        raise UsageError("--merge wants two crops folders or more; type mefem crop --merge A B -o C")
    folders = [Path(one) for one in arguments]
    twice = [path for path, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise UsageError(f"--merge: {twice[0]} is named twice")
    return folders


def _refuse_itself(out: Path, folders: list[Path]) -> None:
    if any(folder.exists() and out.exists() and folder.samefile(out) for folder in folders):
        raise UsageError(f"{out} is both a source and the output; name another --out")


def _refuse_output(out: Path, overwrite: bool) -> None:
    job.check_output(out, overwrite)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out} exists; type --overwrite to replace it or -o for another place")


def _is_made_of(out: Path, inputs: dict[str, str], options: CropOptions) -> bool:
    """Return whether the output is these folders merged, as they are now."""
    try:
        recorded = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
        same_labels = recorded["options"]["labels"] == options.labels
        is_whole = (out / MANIFEST).is_file()
        return is_whole and same_labels and {**recorded["inputs"], **inputs} == recorded["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _common_recipe(folders: list[Path]) -> dict[str, Any]:
    """Return the recipe that all folders share. Raises UsageError where they differ."""
    names = CropOptions().recipe
    recipes = []
    for folder in folders:
        read_manifest(folder)  # says what is wrong with one that is not finished
        recorded = _options(folder)
        recipes.append({name: recorded.get(name) for name in names})
        if changes := product.difference(recipes[0], recipes[-1]):
            raise UsageError(f"{folders[0]} and {folder} have other options: {changes}; crop one of them anew")
    return recipes[0]


def _options(folder: Path) -> dict[str, Any]:
    """Return the options that a folder was made with. Raises NoInputError if it does not tell."""
    try:
        return json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError) as error:
        raise NoInputError(f"{folder / PROVENANCE} is missing or damaged; crop it anew") from error


def _tell_missing_parts(folders: list[Path]) -> None:
    """Warn where the folders are parts i/N of one work and some part of it is not among them."""
    shards = [_options(folder).get("shard") for folder in folders]
    parts = {tuple(map(int, shard.split("/"))) for shard in shards if shard}
    if None in shards:  # a folder of its own, or one merged before, which may hold the others
        return
    for count in sorted({count for _, count in parts}):
        missing = (f"{number}/{count}" for number in range(1, count + 1) if (number, count) not in parts)
        shown = list(islice(missing, MISSING_SHOWN))
        more = count - sum(one == count for _, one in parts) - len(shown)
        if shown:
            told = f"{', '.join(shown)}{f' and {more} more' if more else ''}"
            console.warn(f"not all parts are here: what --shard {told} holds is missing in the merged folder")


def _rows(folders: list[Path]) -> pa.Table:
    """Return the journal rows of all folders, with their folder's index, sources sorted by their path."""
    tables = []
    for index, folder in enumerate(folders):
        rows = _with_labels(Journal(folder).read(), read_manifest(folder))
        tables.append(rows.append_column("folder", pa.array(np.full(len(rows), index))))
    rows = pa.concat_tables(tables)
    hashes, states, folder = (rows[name].to_numpy() for name in ("hash", "state", "folder"))
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    changed = np.flatnonzero(states != states[first[inverse]])
    if len(changed):
        row = int(changed[0])
        one, other = folders[folder[first[inverse[row]]]], folders[folder[row]]
        source = rows["source"][row].as_py()
        raise UsageError(
            f"{source} changed between {one} and {other}; crop it anew in one and leave it out of the other"
        )
    is_first = folder == folder[first[inverse]]
    if not is_first.all():
        console.note(f"{int((~is_first).sum())} rows of the manifests are in several folders and taken once")
    rows = rows.filter(pa.array(is_first))
    keys = [source.split("/") for source in rows["source"].to_pylist()]
    return rows.take(pa.array(sorted(range(len(keys)), key=keys.__getitem__), pa.int64()))


def _with_labels(rows: pa.Table, manifest: pa.Table) -> pa.Table:
    """Write a manifest's labels into the journal's rows, as the tables that they came from stay behind."""
    names = [name for name in manifest.column_names if name.startswith(LABEL)]
    if not names:
        return rows
    columns = [manifest[name].to_pylist() for name in names]
    by_id = dict(zip(manifest["id"].to_pylist(), zip(*columns, strict=True), strict=True))
    texts = []
    for one in rows["id"].to_pylist():
        pairs = zip(names, by_id.get(one, [None] * len(names)), strict=True)
        labels = {name.removeprefix(LABEL): value for name, value in pairs if value not in (None, "")}
        texts.append(Given(labels=labels or None).to_json())
    return rows.set_column(rows.schema.get_field_index("labels"), "labels", pa.array(texts, pa.string()))


def _gather(building: Path, folders: list[Path], rows: pa.Table) -> pa.Table:
    """Link or copy the crops into the new folder; return the rows with the paths that they have there."""
    renamed: dict[tuple[int, str], str] = {}
    num_shards = 0
    paths = []
    for folder, path in zip(rows["folder"].to_pylist(), rows["path"].to_pylist(), strict=True):
        if path and (folder, path) not in renamed:
            renamed[folder, path] = path
            if path.startswith(f"{SHARDS}/"):
                renamed[folder, path] = f"{SHARDS}/{num_shards:05d}.tar"
                num_shards += 1
            _link(folders[folder] / path, building / renamed[folder, path])
        paths.append(renamed[folder, path] if path else path)
    index = rows.schema.get_field_index("path")
    return rows.set_column(index, "path", pa.array(paths, pa.string())).drop_columns(["folder"])


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise NoInputError(f"{source} is gone; run mefem crop again on its sources, then merge")
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
