"""`--shards`: crops into tar files of about 1 GiB, in the manifest's order, each with its labels as JSON beside it.

While a run is at work its crops lie in one file in the journal's folder; at its end they are packed. What is packed
stays where it is, unless its labels have changed or its shard holds crops that no longer count: then the whole shard is
packed anew under a new number. A reader sees the old shards until the manifest names the new ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.faces.journal import FOLDER
from mefem_cli.faces.source import hash63
from mefem_cli.stores.crops import KEYPOINTS, LABEL, SHARDS, read_crop
from mefem_cli.stores.shard_writer import ShardWriter

BYTES_PER_SHARD = 1 << 30
BATCH = 4096  # rows described at a time
BOX_AND_SQUARE = ("box_x", "box_y", "box_w", "box_h", "crop_x", "crop_y", "crop_side")
DESCRIBED = ("id", "frame", "face", "score", *BOX_AND_SQUARE, "sha256")


def pack(
    out: Path, rows: pa.Table, shown: pa.Table, stale: set[str], suffix: str, bytes_per_shard: int = BYTES_PER_SHARD
) -> tuple[pa.Table, pa.Table]:
    """Pack what is not packed yet; return the journal's `rows` and the manifest's, `shown`, with the new places.

    `stale` are shards with crops that no longer count; `suffix` is that of the crops' format, as in ".jpg".
    """
    paths = np.array(rows["path"].to_pylist(), dtype=object)
    texts = _descriptions(shown)
    described = np.array([hash63(text) for text in texts], dtype=np.int64)
    anew = stale | {path for path in paths[_integers(rows, "packed") != described] if path}
    chosen = np.flatnonzero([path in anew for path in paths])
    if not len(chosen):
        return rows, shown
    staying = {path for path in paths if path.startswith(f"{SHARDS}/")}
    offsets, sizes = _integers(rows, "crop_offset"), _integers(rows, "crop_bytes")
    ids = rows["id"].to_pylist()
    first = max((int(Path(path).stem) for path in staying), default=-1) + 1
    with ShardWriter(out / SHARDS, bytes_per_shard, first) as writer:
        for index in chosen.tolist():
            content = read_crop(out, paths[index], offsets[index], sizes[index])
            files = {suffix[1:]: content, "json": texts[index].encode()}
            place = writer.add_sample(ids[index], files)[suffix[1:]]
            paths[index], offsets[index] = f"{SHARDS}/{place.shard}", place.offset
    is_none = paths == ""
    places = {
        "path": pa.array(paths.tolist(), pa.string()),
        "crop_offset": pa.array(offsets, pa.int64(), mask=is_none),
    }
    packed = pa.array(described, pa.int64(), mask=is_none)
    return _with_columns(rows, {**places, "packed": packed}), _with_columns(shown, places)


def _integers(rows: pa.Table, name: str) -> np.ndarray:
    """Return a column as int64, -1 where there is none."""
    return pc.fill_null(rows[name], -1).to_numpy().copy()


def _with_columns(rows: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    for name, column in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def _descriptions(shown: pa.Table) -> list[str]:
    """Return what the JSON beside each crop says: id, frame, face, box, square, keypoints and labels; no path."""
    labels = [name for name in shown.column_names if name.startswith(LABEL)]
    wanted = shown.select([*DESCRIBED, *KEYPOINTS, *labels])
    texts = []
    for start in range(0, len(wanted), BATCH):
        for row in wanted.slice(start, BATCH).to_pylist():
            texts.append(json.dumps(_description(row, labels), ensure_ascii=False, separators=(",", ":")))
    return texts


def _description(row: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    said = {name: row[name] for name in DESCRIBED if row[name] is not None}
    if row[KEYPOINTS[0]] is not None:
        said["keypoints"] = [row[name] for name in KEYPOINTS]
    return said | {name.removeprefix(LABEL): row[name] for name in labels if row[name] not in (None, "")}


def stale_shards(before: set[tuple[str, int | None]], rows: pa.Table) -> set[str]:
    """Return the shards with crops that `rows` no longer name; `before` are all crops ever written: path and offset."""
    now = set(zip(rows["path"].to_pylist(), rows["crop_offset"].to_pylist(), strict=True))
    return {path for path, offset in before - now if path.startswith(f"{SHARDS}/")}


def sweep(out: Path, rows: pa.Table, before: set[tuple[str, int | None]]) -> None:
    """Remove crops of sources that were read again and have fewer faces now, and shards that hold none."""
    now = set(rows["path"].to_pylist())
    for path in {path for path, _ in before} - now:
        if not path.startswith(FOLDER):
            (out / path).unlink(missing_ok=True)
    for shard in (out / SHARDS).glob("*.tar"):
        if f"{SHARDS}/{shard.name}" not in now:
            shard.unlink()
