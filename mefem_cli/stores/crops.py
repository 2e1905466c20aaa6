"""A crops folder on disk: `manifest.parquet` with one row per face or failed source, and the crops under `images/`.

The manifest is written last: a folder that has one is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores import product
from mefem_cli.stores.shards import ShardReader

MANIFEST, REJECTS, CONTACT, PROVENANCE = "manifest.parquet", "rejects.csv", "contact.html", "provenance.json"
IMAGES, SHARDS = "images", "shards"
FORMAT, VERSION = "mefem-crops", 1
HEADER_KEY = b"mefem"  # the parquet metadata entry that holds format and version
LABEL = "label:"
OK, REJECTED = "ok", "rejected"
REASONS = ("unreadable", "too-large", "no-face", "border", "small", "low-score", "not-one-face", "bad-box")
KEYPOINTS = tuple(f"kp_{index}_{axis}" for index in range(6) for axis in "xy")

_SHARDS = ShardReader()
_TEXT, _INTEGER, _REAL = pa.string(), pa.int64(), pa.float64()
SCHEMA = pa.schema(
    [
        ("id", _TEXT),
        ("source", _TEXT),
        ("frame", _INTEGER),
        ("face", _INTEGER),
        ("status", _TEXT),
        ("reason", _TEXT),
        ("detail", _TEXT),
        ("detector", _TEXT),
        ("score", _REAL),
        *((name, _REAL) for name in ("box_x", "box_y", "box_w", "box_h")),
        *((name, _REAL) for name in KEYPOINTS),
        *((name, _REAL) for name in ("crop_x", "crop_y", "crop_side")),
        ("width", _INTEGER),
        ("height", _INTEGER),
        ("path", _TEXT),
        ("sha256", _TEXT),
        ("crop_sha256", _TEXT),
        ("phash", _TEXT),  # 16 hex digits; crops that look alike differ in few bits
        ("duplicate_of", _TEXT),  # id of the first row with the same source bytes, frame and face
        ("padded", _REAL),  # share of the crop that lies outside the picture and is invented
        ("angle", _REAL),  # degrees that the crop's square is turned by, clockwise in the picture
        ("crop_offset", _INTEGER),  # where the crop begins in the tar shard that `path` names; none: `path` is the crop
        ("crop_bytes", _INTEGER),  # size of the encoded crop
    ]
)


def path_to_text(path: str) -> str:
    r"""Return a path as valid UTF-8 from which `text_to_path` gets the same bytes back.

    Bytes that are no UTF-8 become `\xff`, and a backslash becomes two.

    >>> path_to_text(os.fsdecode(b"caf\xe9.jpg"))
    'caf\\xe9.jpg'
    """
    escaped = path if os.sep == "\\" else path.replace("\\", "\\\\")
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_to_path(text: str) -> str:
    """Return the path that `path_to_text` wrote down."""
    if os.sep == "\\":
        return text

    def restore(match: re.Match[str]) -> str:
        return "\\" if match[0] == "\\\\" else os.fsdecode(bytes([int(match[1], 16)]))

    return re.sub(r"\\\\|\\x([0-9a-f]{2})", restore, text)


def write_manifest(folder: Path, rows: pa.Table) -> None:
    """Write the manifest of a crops folder, columns in the order of SCHEMA, then the labels."""
    labels = [name for name in rows.column_names if name.startswith(LABEL)]
    header = json.dumps({"format": FORMAT, "version": VERSION}).encode()
    ordered = rows.select([*SCHEMA.names, *labels]).replace_schema_metadata({HEADER_KEY: header})
    with product.writing(folder / MANIFEST) as temporary:
        pq.write_table(ordered, temporary, compression="zstd")


def read_manifest(folder: Path) -> pa.Table:
    """Return all rows of a crops folder.

    Raises NoInputError where `folder` is none, UsageError where a newer version of mefem wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NoInputError(_why_no_crops(folder))
    try:
        rows = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise NoInputError(f"{path} is damaged ({str(error)[:100]}); type mefem crop ... --overwrite") from error
    header = json.loads((rows.schema.metadata or {}).get(HEADER_KEY, b"{}"))
    if header.get("format") != FORMAT:
        raise NoInputError(f"{path} was not written by mefem crop")
    if header["version"] > VERSION:
        raise UsageError(f"{path} has version {header['version']}, this mefem reads up to {VERSION}; upgrade mefem-cli")
    for field in SCHEMA:  # columns that an earlier mefem did not write
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def _why_no_crops(folder: Path) -> str:
    if not folder.exists():
        return f"no such crops folder: {folder}; make it with mefem crop PHOTOS -o {folder}"
    if (folder / PROVENANCE).is_file():
        return f"{folder} is not finished: mefem crop was stopped there; run it again with the same options"
    return f"{folder} is no crops folder (no {MANIFEST}); make one with mefem crop {folder} -o crops"


class Crops:
    """One or several crops folders opened for reading; only faces with status `ok` count.

    >>> crops = Crops.open(Path("crops"))  # doctest: +SKIP
    >>> crops.read_bytes(0)[:2]  # doctest: +SKIP
    b'\xff\xd8'
    """

    def __init__(self, folders: Sequence[Path], rows: pa.Table, folder_index: np.ndarray):
        self.folders = list(folders)
        self._rows = rows
        self._folder_index = folder_index  # of each row, in `folders`

    @classmethod
    def open(cls, *folders: Path) -> Crops:
        """Open folders that `mefem crop` made.

        Raises NoInputError if one is no crops folder or no face is ok, UsageError if a face's id is in two folders, if
        crops differ in size, or if a manifest is of a newer version.
        """
        tables = [_only_ok(read_manifest(Path(folder))) for folder in folders]
        rows = pa.concat_tables(tables, promote_options="permissive") if tables else SCHEMA.empty_table()
        if not rows.num_rows:
            raise NoInputError(f"no usable face in {', '.join(map(str, folders))}; see its {CONTACT} for the reasons")
        folder_index = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        crops = cls([Path(folder) for folder in folders], rows, folder_index)
        crops._refuse_equal_ids()
        assert crops.size > 0  # raises where sizes differ
        return crops

    def _refuse_equal_ids(self) -> None:
        if len(set(self.ids)) == len(self.ids):
            return
        order = np.argsort(np.array(self.ids), kind="stable")
        for first, second in zip(order, order[1:], strict=False):
            if self.ids[first] == self.ids[second]:
                one, other = (self.folders[self._folder_index[index]] for index in (first, second))
                source = self._rows["source"][int(first)].as_py()
                shown = f"the face {self.ids[first]} ({source})"
                raise UsageError(f"{shown} is in both {one} and {other}; name only one of them")

    def __len__(self) -> int:
        return self._rows.num_rows

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the faces, unique."""
        return self._rows["id"].to_pylist()

    @cached_property
    def size(self) -> int:
        """The side of every crop, px. Raises UsageError where folders differ."""
        sizes = [_recorded_size(folder) for folder in self.folders]
        if len(set(sizes)) > 1:
            shown = ", ".join(f"{folder}: {size} px" for folder, size in zip(self.folders, sizes, strict=True))
            raise UsageError(f"crops of different sizes ({shown}); crop one of them again with the other's --size")
        return sizes[0]

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The manifest's columns without the labels: numbers float64 or int64, texts objects."""
        return {name: _to_numpy(self._rows[name]) for name in SCHEMA.names}

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """The labels by name: numbers float64 with NaN, texts objects with "" where they are missing."""
        names = [name for name in self._rows.column_names if name.startswith(LABEL)]
        return {name.removeprefix(LABEL): _to_numpy(self._rows[name]) for name in names}

    def read_bytes(self, index: int) -> bytes:
        """Return one crop as the encoded image file."""
        folder = self.folders[self._folder_index[index]]
        path, offset, size = (self._rows[name][index].as_py() for name in ("path", "crop_offset", "crop_bytes"))
        return read_crop(folder, path, offset, size)

    def inputs(self) -> dict[str, str]:
        """Return what provenance records of these crops: folder -> sha256 of its manifest."""
        return {str(folder.absolute()): product.file_sha256(folder / MANIFEST) for folder in self.folders}

    def select(self, indices: Iterable[int]) -> Crops:
        """Return a view of some of the faces, in the given order."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return Crops(self.folders, self._rows.take(pa.array(chosen)), self._folder_index[chosen])


def read_crop(folder: Path, path: str, offset: int | None, size: int | None) -> bytes:
    """Return an encoded crop: the file at `path` below a crops folder, or `size` bytes from `offset` of it, a shard."""
    if offset is None or size is None:
        return (folder / path).read_bytes()
    return _SHARDS.read(folder / path, offset, size)


def _only_ok(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["status"], OK))


def _recorded_size(folder: Path) -> int:
    try:
        return int(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["options"]["size"])
    except (OSError, ValueError, KeyError) as error:
        raise NoInputError(f"{folder / PROVENANCE} is missing or damaged; type mefem crop ... --overwrite") from error


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_floating(column.type):
        return pc.fill_null(column, float("nan")).to_numpy()
    if pa.types.is_string(column.type):
        return pc.fill_null(column, "").to_numpy()
    return column.to_numpy()
