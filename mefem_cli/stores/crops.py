"""A crops folder on disk: `manifest.parquet` with one row per face or failed source, crops in `images/` or `shards/`.

The manifest is written last: a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores import ablations, product, shards

MANIFEST, REJECTS, CONTACT, PROVENANCE = "manifest.parquet", "rejects.csv", "contact.html", "provenance.json"
IMAGES, SHARDS = "images", "shards"
FORMAT, VERSION = "mefem-crops", 1
HEADER_KEY = b"mefem"  # the parquet metadata entry that holds format and version
LABEL = "label:"
OK, REJECTED = "ok", "rejected"
REASONS = ("unreadable", "too-large", "no-face", "border", "small", "low-score", "not-one-face", "bad-box")
KEYPOINTS = tuple(f"kp_{index}_{axis}" for index in range(6) for axis in "xy")

INDEX = ("id", "path", "crop_offset", "crop_bytes")  # the columns that reading a crop takes
PIECE = 1 << 16  # rows of a manifest that are read at once

_SHARDS = shards.ShardReader()
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


def read_manifest(folder: Path, names: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of a crops folder, with all columns or those of some names.

    Raises NoInputError where `folder` is none, UsageError where a newer version of mefem wrote it.
    """
    with _opened_manifest(folder) as file:
        there = file.schema_arrow.names  # an earlier mefem wrote fewer columns
        rows = file.read([name for name in names if name in there] if names is not None else None)
    for field in SCHEMA:
        if field.name not in rows.column_names and (names is None or field.name in names):
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


@contextmanager
def _opened_manifest(folder: Path) -> Iterator[pq.ParquetFile]:
    path = folder / MANIFEST
    if not path.is_file():
        raise NoInputError(_why_no_crops(folder))
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _refuse_other_format(path, file.schema_arrow)
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise NoInputError(f"{path} is damaged ({str(error)[:100]}); type mefem crop ... --overwrite") from error


def _refuse_other_format(path: Path, schema: pa.Schema) -> None:
    header = json.loads((schema.metadata or {}).get(HEADER_KEY, b"{}"))
    if header.get("format") != FORMAT:
        raise NoInputError(f"{path} was not written by mefem crop")
    if header["version"] > VERSION:
        raise UsageError(f"{path} has version {header['version']}, this mefem reads up to {VERSION}; upgrade mefem-cli")


def _read_index(folder: Path) -> tuple[pa.Table, np.ndarray]:
    """Return INDEX of the faces that count and their rows in the manifest, read in pieces to hold no more than that."""
    schema = pa.schema([SCHEMA.field(name) for name in INDEX])
    with _opened_manifest(folder) as file:
        there = file.schema_arrow.names
        pieces, rows, begin = [], [], 0
        wanted = [name for name in ("status", *INDEX) if name in there]
        for batch in file.iter_batches(PIECE, columns=wanted, use_threads=False):  # threads decode more at once
            is_ok = pc.equal(batch["status"], OK)
            known = [batch[one.name] if one.name in there else pa.nulls(len(batch), one.type) for one in schema]
            pieces.append(pa.record_batch(known, schema=schema).filter(is_ok))
            rows.append(begin + np.flatnonzero(is_ok.to_numpy(zero_copy_only=False)))
            begin += len(batch)
    return pa.Table.from_batches(pieces, schema), np.concatenate([np.empty(0, np.int64), *rows])


def _why_no_crops(folder: Path) -> str:
    if not folder.exists():
        return f"no such crops folder: {folder}; make it with mefem crop PHOTOS -o {folder}"
    if (folder / ablations.CELLS).is_dir():
        return f"{folder} is an ablation, no crops folder; name the crops that it was made of"
    if (folder / PROVENANCE).is_file():
        return f"{folder} is not finished: mefem crop was stopped there; run it again with the same options"
    return f"{folder} is no crops folder (no {MANIFEST}); make one with mefem crop {folder} -o crops"


def face_id(name: str, frame: int, face: int) -> str:
    """Return a face's id: the first 16 hex digits of sha256 over name, frame and face rank.

    The bytes are the name as the file system spells it, a zero byte, the frame in decimal digits, a zero byte and the
    rank in decimal digits. A source without a face has the id of rank 0.

    >>> face_id("photos/anna.jpg", 0, 0)
    '52116577a20d4a22'
    """
    content = b"\0".join([os.fsencode(name), str(frame).encode(), str(face).encode()])
    return hashlib.sha256(content).hexdigest()[:16]


class _Folder:
    """A crops folder: its index in memory, other columns of its manifest when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.index, self.rows = _read_index(path)

    @cached_property
    def size(self) -> int:
        """The side of every crop, px."""
        return _recorded_size(self.path)

    @cached_property
    def names(self) -> list[str]:
        """The manifest's columns."""
        return pq.read_schema(self.path / MANIFEST).names

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Return a column of the faces that count, None if the manifest has none of that name."""
        return read_manifest(self.path, [name])[name].take(pa.array(self.rows)) if name in self.names else None

    def digest(self) -> str:
        """Return the sha256 of the manifest."""
        return product.file_sha256(self.path / MANIFEST)


class _Shard:
    """A tar shard of pictures that are crops already, made by another program; it has no labels."""

    names: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.path = path
        members = shards.index(path)
        is_crop = pc.match_substring_regex(members["name"], rb"(?i)\.(jpe?g|png|webp)$")
        members = members.filter(is_crop)
        names = [os.fsdecode(name) for name in members["name"].to_pylist()]
        ids = [face_id(f"{path.name}/{name}", 0, 0) for name in names]
        columns = [pa.array(ids), pa.array([""] * len(ids), pa.string()), members["offset"], members["size"]]
        self.index = pa.table(dict(zip(INDEX, columns, strict=True)))

    @cached_property
    def size(self) -> int:
        """The side of the first crop, px; the others are taken to have it too."""
        if not len(self.index):
            return 0
        offset, size = (self.index[name][0].as_py() for name in INDEX[2:])
        with Image.open(io.BytesIO(_SHARDS.read(self.path, offset, size))) as image:
            return int(min(image.size))

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Return None: a shard has no manifest."""
        return None

    def digest(self) -> str:
        """Return the sha256 of names, places and sizes, as hashing the pictures would take as long as reading them."""
        content = hashlib.sha256()
        for batch in self.index.to_batches():
            for column in batch.columns:
                content.update(repr(column.to_pylist()).encode())
        return content.hexdigest()


class Crops:
    """Crops folders, and tar shards of crops, opened for reading; only faces with status `ok` count.

    In memory are about 100 bytes a face; labels and other columns are read when they are asked for.

    >>> crops = Crops.open(Path("crops"))  # doctest: +SKIP
    >>> crops.read_bytes(0)[:2]  # doctest: +SKIP
    b'\xff\xd8'
    """

    def __init__(self, parts: Sequence[_Folder | _Shard], index: pa.Table, part_of: np.ndarray, row_of: np.ndarray):
        self.folders = [part.path for part in parts]
        self._parts = list(parts)
        self._index = index
        self.part_of, self._row_of = part_of, row_of  # of each face: its part, and where it stands in that one's index
        self._paths = index["path"]
        self._offsets, self._sizes = (_or_minus_one(index[name]) for name in INDEX[2:])

    @classmethod
    def open(cls, *folders: Path) -> Crops:
        """Open folders that `mefem crop` made, or tar shards of crops.

        Raises NoInputError if one is neither or no face is ok, UsageError if a face's id is in two folders, if crops
        differ in size, or if a manifest is of a newer version.
        """
        parts = [_Shard(Path(one)) if str(one).endswith(".tar") else _Folder(Path(one)) for one in folders]
        index = pa.concat_tables([part.index for part in parts]) if parts else pa.table({name: [] for name in INDEX})
        if not index.num_rows:
            raise NoInputError(f"no usable face in {', '.join(map(str, folders))}; see its {CONTACT} for the reasons")
        counts = [len(part.index) for part in parts]
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        row_of = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
        crops = cls(parts, index, part_of, row_of)
        crops._refuse_equal_ids()
        assert crops.size > 0  # raises where sizes differ
        return crops

    def _refuse_equal_ids(self) -> None:
        beginnings = np.concatenate([chunk.to_numpy(False).astype("S16") for chunk in self._index["id"].chunks])
        beginnings.sort()
        if not (beginnings[1:] == beginnings[:-1]).any():
            return
        order = np.argsort(np.array(self.ids), kind="stable")
        for first, second in zip(order, order[1:], strict=False):
            if self.ids[first] == self.ids[second]:
                one, other = (self.folders[self.part_of[index]] for index in (first, second))
                shown = f"the face {self.ids[first]} ({self.columns['source'][first]})"
                raise UsageError(f"{shown} is in both {one} and {other}; name only one of them")

    def __len__(self) -> int:
        return len(self.part_of)

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the faces, unique."""
        return self._index["id"].to_pylist()

    def describe(self, index: int) -> str:
        """Return a face's id and where its crop lies, for a message."""
        path = self._paths[index].as_py()
        return f"{self._index['id'][index].as_py()} ({path or self.folders[self.part_of[index]]})"

    @cached_property
    def size(self) -> int:
        """The side of every crop, px. Raises UsageError where folders differ."""
        sizes = [part.size for part in self._parts if len(part.index)]
        if len(set(sizes)) > 1:
            shown = ", ".join(f"{folder}: {size} px" for folder, size in zip(self.folders, sizes, strict=False))
            raise UsageError(f"crops of different sizes ({shown}); crop one of them again with the other's --size")
        return sizes[0]

    @cached_property
    def columns(self) -> Mapping[str, np.ndarray]:
        """The manifest's columns without the labels: numbers float64 or int64, texts objects."""
        return _Columns(SCHEMA.names, self._manifest_column)

    @cached_property
    def labels(self) -> Mapping[str, np.ndarray]:
        """The labels by name: numbers float64 with NaN, texts objects with "" where they are missing."""
        names = dict.fromkeys(name for part in self._parts for name in part.names if name.startswith(LABEL))
        return _Columns([name.removeprefix(LABEL) for name in names], self._label_column)

    def read_column(self, name: str) -> np.ndarray:
        """Return a column of the manifest as `columns` does, but read anew and not kept in memory."""
        return self._manifest_column(name)

    def _manifest_column(self, name: str) -> np.ndarray:
        return self._joined([part.column(name) for part in self._parts], SCHEMA.field(name).type)

    def _label_column(self, name: str) -> np.ndarray:
        columns = [part.column(LABEL + name) for part in self._parts]
        is_text = any(column is not None and pa.types.is_string(column.type) for column in columns)
        return self._joined(columns, _TEXT if is_text else _REAL)

    def _joined(self, columns: list[pa.ChunkedArray | None], kind: pa.DataType) -> np.ndarray:
        """Return a column of all faces from that of each part."""
        pieces = [
            pa.chunked_array([pa.nulls(len(part.index), kind)]) if column is None else column.cast(kind)
            for part, column in zip(self._parts, columns, strict=True)
        ]
        whole = pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], kind)
        starts = np.cumsum([0, *(len(part.index) for part in self._parts)])
        return to_numpy(whole.take(pa.array(starts[self.part_of] + self._row_of)))

    def read_bytes(self, index: int) -> bytes:
        """Return one crop as the encoded image file."""
        folder, offset = self.folders[self.part_of[index]], int(self._offsets[index])
        path = self._paths[index].as_py()
        if offset < 0:
            with open(f"{folder}/{path}", "rb", buffering=0) as file:
                return file.read()
        return _SHARDS.read(f"{folder}/{path}" if path else folder, offset, int(self._sizes[index]))

    def inputs(self) -> dict[str, str]:
        """Return what provenance records of these crops: folder -> sha256 of its manifest."""
        return {str(part.path.absolute()): part.digest() for part in self._parts}

    def select(self, indices: Iterable[int]) -> Crops:
        """Return a view of some of the faces, in the given order."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return Crops(self._parts, self._index.take(pa.array(chosen)), self.part_of[chosen], self._row_of[chosen])


class _Columns(Mapping[str, np.ndarray]):
    """Columns by name, each read once, when it is first asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = list(names), read
        self._known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_crop(folder: Path, path: str, offset: int | None, size: int | None) -> bytes:
    """Return an encoded crop: the file at `path` below a crops folder, or `size` bytes from `offset` of it, a shard."""
    if offset is None or size is None:
        return (folder / path).read_bytes()
    return _SHARDS.read(folder / path, offset, size)


def _recorded_size(folder: Path) -> int:
    try:
        return int(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["options"]["size"])
    except (OSError, ValueError, KeyError) as error:
        raise NoInputError(f"{folder / PROVENANCE} is missing or damaged; type mefem crop ... --overwrite") from error


def _or_minus_one(column: pa.ChunkedArray) -> np.ndarray:
    """Return integers, -1 where there is none; a column without any, as of crops that are files, takes no memory."""
    if column.null_count == len(column):
        return np.broadcast_to(np.int64(-1), len(column))
    return pc.fill_null(column, -1).to_numpy()


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as numbers, NaN where one is missing, or as str objects, "" where one is missing."""
    if pa.types.is_floating(column.type):
        return pc.fill_null(column, float("nan")).to_numpy()
    if pa.types.is_string(column.type):
        return pc.fill_null(column, "").to_numpy()
    return column.to_numpy()
