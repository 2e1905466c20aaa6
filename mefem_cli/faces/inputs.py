"""What was named on the command line -> the pictures and videos to read, in a stable order.

A folder is read to its depth, following symbolic links but no loops. In folders and globs, what is neither named like
an image, a video or a tar shard nor begins like an image is skipped and counted; a file that is named like one counts
as one, so that a broken one is a reject and not silently lost. A file named itself is always taken; if it is a tar
shard or a table, what it holds or names is.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.faces import images, tables
from mefem_cli.faces.listing import Listing, without_repeats
from mefem_cli.faces.source import DAMAGED_SHARD, NOTHING, Given, GivenFace, Label, Source, hash63, printable
from mefem_cli.faces.video_kinds import VIDEO_SUFFIXES
from mefem_cli.stores import shards
from mefem_cli.stores.crops import MANIFEST, PROVENANCE
from mefem_cli.stores.samples import Sample, sample_labels, samples

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})
IMAGE_SUFFIXES |= {".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pnm"}
SHARD_SUFFIX = ".tar"
PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})  # behind .tar; read after unpacking only
LABELS_FILE = "labels.csv"  # beside or in a folder of photos, it is worth a hint
STDIN = "-"
BEGINNING = 512  # bytes that tell what a file is

GivenBoxes = Callable[[str, dict[str, Label]], tuple[GivenFace, ...]]  # place, labels -> the faces of a source


@dataclass(frozen=True)
class Wanted:
    """What the options ask of the listing."""

    limit: int | None = None  # sources
    part: tuple[int, int] = (1, 1)  # i of N: the i-th of N parts, by the hash of the name
    boxes: GivenBoxes | None = None
    null: bool = False  # paths on stdin end with a zero byte, not with a line


def list_sources(arguments: list[str], out: Path, wanted: Wanted = Wanted()) -> Listing:  # noqa: B008
    """Find what `arguments` name: folders, files, globs, tar shards, tables, or `-` for one path a line on stdin.

    What is in `out`, the product of an earlier run, is no source. Raises NoInputError for a path that does not exist,
    UsageError where two files would become one id.
    """
    listing = Listing()
    index, count = wanted.part
    for source in _Finder(listing, os.path.realpath(out), wanted).find(arguments):
        if count > 1 and hash63(source.name) % count != index - 1:
            continue
        listing.sources.append(source)
        if wanted.limit is not None and len(listing.sources) >= wanted.limit:
            break
    listing.sources.close()
    listing.sources = without_repeats(listing.sources)
    return listing


class _Finder:
    """Walks what was named; counts what it skips in `listing`."""

    def __init__(self, listing: Listing, out: str, wanted: Wanted):
        self.listing, self.out, self.wanted = listing, out, wanted
        self._sidecars = _Sidecars()
        self._is_one_of_many = False  # whether several sources are named

    def find(self, arguments: list[str]) -> Iterator[Source]:
        self._is_one_of_many = len(arguments) > 1
        for argument in arguments:
            if argument == STDIN:
                yield from self._stdin()
            elif os.path.lexists(argument):
                path = os.path.abspath(argument)
                yield from self._named(path, os.path.basename(path))
            elif glob.has_magic(argument):
                yield from self._glob(argument)
            else:
                raise NoInputError(f"no such file or folder: {printable(argument)}{_similar_sibling(argument)}")

    def _stdin(self) -> Iterator[Source]:
        for given in _records(b"\0" if self.wanted.null else b"\n"):
            name = os.path.normpath(given)
            if name.startswith(os.pardir):
                name = os.path.abspath(given)
            name = name.lstrip("/") if name != os.curdir else os.path.basename(os.getcwd())
            if os.path.lexists(given):
                yield from self._named(os.path.abspath(given), name)
            else:
                yield Source(name, os.path.abspath(given), problem="no such file")

    def _named(self, path: str, name: str) -> Iterator[Source]:
        """Yield what a path that the user wrote down stands for; what it is, its content tells."""
        self._refuse_output(path)
        status = _status(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            self._look_for_labels(path)
            yield from self._walk(path, name)
            return
        start = _beginning(path) if status is not None and stat.S_ISREG(status.st_mode) else b""
        if start and _is_shard(path, start):
            yield from self._shard(path, name)
        elif start and _is_table(path, start):
            if not self._is_label_table(path):
                yield from self._table(path, name)
        else:
            _refuse_list(path, start)
            yield self._source(name, path, status)

    def _is_label_table(self, path: str) -> bool:
        """Whether a table named with other files is there because a shell's `photos/*` named all; then it is a hint."""
        is_labels = self._is_one_of_many and os.path.basename(path) == LABELS_FILE
        if is_labels:
            self.listing.label_tables.append(path)
        return is_labels

    def _refuse_output(self, path: str) -> None:
        if os.path.realpath(path).startswith(self.out + os.sep):
            raise UsageError(f"{printable(path)} lies in the output {printable(self.out)}; name another --out")

    def _glob(self, pattern: str) -> Iterator[Source]:
        """Walk below the pattern's fixed folder and keep what matches; a folder that matches is taken whole."""
        pieces = pattern.split("/")
        fixed = next(index for index, piece in enumerate(pieces) if glob.has_magic(piece))
        folder = os.path.abspath("/".join(pieces[:fixed]) + "/" if fixed else ".")
        if not os.path.isdir(folder):
            shown = f"{printable(folder)} (in {printable(pattern)})"
            raise NoInputError(f"no such folder: {shown}{_similar_sibling(folder)}")
        self._refuse_output(folder)
        wanted = glob_expression("/".join(pieces[fixed:]))
        found = False
        for source in self._walk(folder, os.path.basename(folder), wanted):
            found = True
            yield source
        if not found:
            raise NoInputError(f"no image matches {printable(pattern)}")

    def _walk(self, folder: str, name: str, wanted: re.Pattern[str] | None = None) -> Iterator[Source]:
        """Yield the pictures below a folder, sorted by the bytes of their names, depth first."""
        open_folders = [self._entries(folder, "", frozenset())]
        while open_folders:
            entry = next(open_folders[-1], None)
            if entry is None:
                open_folders.pop()
                continue
            path, relative, above = entry
            status = _status(path)
            if status is not None and stat.S_ISDIR(status.st_mode):
                open_folders.append(self._entries(path, relative, above))
            elif wanted is None or wanted.fullmatch(relative):
                yield from self._file(path, f"{name}/{relative}" if name else relative, status)

    def _entries(self, folder: str, relative: str, above: frozenset) -> Iterator[tuple[str, str, frozenset]]:
        """Yield (path, path below the folder named, identities of the folders above) of what is in a folder."""
        status = _status(folder)
        identity = None if status is None else (status.st_dev, status.st_ino)
        if identity in above:
            self.listing.skipped["symbolic link loop"] += 1
            return
        if f"{os.path.realpath(folder)}/".startswith(f"{self.out}/"):
            return
        if relative and _is_crops_folder(folder):
            self.listing.skipped[f"crops folder ({printable(relative)})"] += 1
            return
        try:
            names = sorted(os.listdir(folder), key=os.fsencode)
        except OSError:
            self.listing.skipped["folder that cannot be read"] += 1
            return
        prefix = f"{relative}/" if relative else ""
        for name in names:
            if name.startswith("."):
                self.listing.skipped["hidden"] += 1
            else:
                yield f"{folder}/{name}", prefix + name, above | {identity}

    def _file(self, path: str, name: str, status: os.stat_result | None) -> Iterator[Source]:
        """Yield what a file in a folder holds, if it is a picture, a video or a shard."""
        suffix = os.path.splitext(path)[1].lower()
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.listing.skipped["special file"] += 1
        elif suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
            yield self._source(name, path, status)
        elif _is_called_shard(path):
            yield from self._shard(path, name)
        elif images.begins_like_image(_beginning(path)):
            yield self._source(name, path, status)
        else:
            self.listing.skipped[printable(suffix) or "no suffix"] += 1

    def _source(self, name: str, path: str, status: os.stat_result | None) -> Source:
        if status is None:
            return Source(name, path, problem="broken symbolic link" if os.path.islink(path) else "no such file")
        problem = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
        labels = self._sidecars.of_file(path)
        given = self._given(path, labels)
        return Source(name, path, status.st_size, status.st_mtime_ns, problem, given=given)

    def _given(self, place: str, labels: dict[str, Label], given: Given = NOTHING) -> str:
        """Return what is known of a source beforehand: sidecars, a table's row, and the table of boxes."""
        if not labels and given is NOTHING and self.wanted.boxes is None:
            return ""
        labels = {**labels, **(given.labels or {})}
        faces = given.faces
        if self.wanted.boxes is not None and not faces:
            faces = self.wanted.boxes(place, labels)
        return replace(given, labels=labels or None, faces=faces).to_json()

    def _shard(self, path: str, name: str) -> Iterator[Source]:
        """Yield the pictures and videos in a tar shard; the other files of a sample are its labels."""
        status = _status(path)
        if status is None:
            yield self._source(name, path, status)
            return
        try:
            with open(path, "rb") as file:
                for sample in samples(path, self.listing.skipped):
                    labels = {**self._sidecars.of_sample(path, sample.key), **self._labels(sample, file.fileno())}
                    for member in _media(sample):
                        yield self._member(path, name, member, labels, status.st_mtime_ns)
        except (shards.DamagedShard, OSError) as error:
            why = error.detail if isinstance(error, shards.DamagedShard) else error.strerror
            yield Source(f"{name}/", path, status.st_size, status.st_mtime_ns, f"{DAMAGED_SHARD}{why}")

    def _member(self, path: str, name: str, member: shards.Member, labels: dict[str, Label], mtime: int) -> Source:
        problem = shards.unsafe_name(member.name)
        given = self._given(f"{path}/{member.name}", labels)
        inside = member.name if problem else os.path.normpath(member.name)
        where: dict[str, Any] = {"member": member.name, "offset": member.offset, "given": given}
        return Source(f"{name}/{inside}", path, member.size, mtime, problem, **where)

    def _labels(self, sample: Sample, descriptor: int) -> dict[str, Label]:
        labels, remark = sample_labels(sample, descriptor)
        if remark:
            self.listing.skipped["sidecar that is not used"] += 1
        return tables.useful(labels)

    def _table(self, path: str, name: str) -> Iterator[Source]:
        """Yield the files that a table names."""
        folder = os.path.dirname(path)
        for row in tables.rows_of(Path(path)):
            place = os.path.join(folder, row.path)
            inside = f"{name}/{row.path.lstrip('/')}{row.tag}"
            given = self._given(place, {}, row.given)
            status = _status(place)
            problem = row.problem or ("no such file" if status is None else "")
            size, mtime = (0, 0) if status is None or row.problem else (status.st_size, status.st_mtime_ns)
            yield Source(inside, place, size, mtime, problem, given=given)

    def _look_for_labels(self, folder: str) -> None:
        for place in (folder, os.path.dirname(folder)):
            table = os.path.join(place, LABELS_FILE)
            if os.path.isfile(table) and table not in self.listing.label_tables:
                self.listing.label_tables.append(table)


class _Sidecars:
    """What a downloader (img2dataset) wrote beside the files of a folder or the samples of a shard."""

    def __init__(self) -> None:
        self._table = lru_cache(maxsize=2)(tables.sidecars_of)  # sources come folder by folder
        self._is_downloaded = lru_cache(maxsize=2)(lambda folder: os.path.isfile(f"{folder}_stats.json"))

    def of_file(self, path: str) -> dict[str, Label]:
        """Return the labels of a file."""
        folder, name = os.path.split(path)
        table = self._table(folder)
        labels = {} if table is None else table.labels(name.partition(".")[0])
        return {**labels, **tables.file_sidecar(path)} if self._is_downloaded(folder) else labels

    def of_sample(self, shard: str, key: str) -> dict[str, Label]:
        """Return the labels of a sample."""
        table = self._table(shard)
        return {} if table is None else table.labels(key)


def _records(end: bytes) -> Iterator[str]:
    """Yield the paths on stdin, each of which ends with `end`."""
    rest = b""
    while block := sys.stdin.buffer.read(1 << 16):
        if end == b"\n" and b"\0" in block:
            raise UsageError("the paths on stdin end with zero bytes; type -0 to read them so")
        *records, rest = (rest + block).split(end)
        yield from (os.fsdecode(one) for one in map(_stripped, records) if one)
    if last := _stripped(rest):
        if end == b"\0" and b"\n" in last and not os.path.lexists(last):
            raise UsageError("the paths on stdin end with lines, not with zero bytes; leave -0 away")
        yield os.fsdecode(last)


def _stripped(record: bytes) -> bytes:
    return record.rstrip(b"\r\n")


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING)
    except OSError:
        return b""


def _is_shard(path: str, start: bytes) -> bool:
    """Whether a named file is a tar shard, or is called one: what it is instead will be its reject."""
    return _is_called_shard(path) or (shards.is_tar(start) and start.strip(b"\0") != b"")


def _is_called_shard(path: str) -> bool:
    """Whether a file is named like a tar shard, packed ones too."""
    stem, suffix = os.path.splitext(path.lower())
    return suffix in (SHARD_SUFFIX, ".tgz") or (suffix in PACKED_SUFFIXES and stem.endswith(SHARD_SUFFIX))


def _is_crops_folder(folder: str) -> bool:
    return all(os.path.isfile(f"{folder}/{name}") for name in (MANIFEST, PROVENANCE))


def _is_table(path: str, start: bytes) -> bool:
    """Whether a named file is a table; plain text only if its first line names a column `path`."""
    is_text = path.lower().endswith(".txt")
    return tables.is_table(path, start) and (not is_text or b"path" in start.partition(b"\n")[0].lower())


def _refuse_list(path: str, start: bytes) -> None:
    """Raise UsageError for a text that lists paths, which stdin takes."""
    first = os.fsdecode(start.partition(b"\n")[0].strip())
    if first and b"\0" not in start and not images.begins_like_image(start) and os.path.lexists(first):
        shown = printable(path)
        raise UsageError(f"{shown} begins with the path of a file; for a list of paths type mefem crop - < {shown}")


def _media(sample: Sample) -> Iterator[shards.Member]:
    for member in sample.files.values():
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
            yield member


def glob_expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob on relative paths: `*` stays in one folder, `**` crosses them.

    >>> bool(glob_expression("**/face*.jpg").fullmatch("2024/may/face_1.jpg"))
    True
    """
    parts = []
    for piece in pattern.split("/"):
        if piece == "**":
            parts.append("(?:[^/]+/)*")
        else:
            parts.append(_piece_expression(piece) + "/")
    body = "".join(parts).removesuffix("/")
    return re.compile(f"{body}[^/]+" if pattern.endswith("**") else f"{body}(?:/.*)?", re.DOTALL)


def _piece_expression(piece: str) -> str:
    """Translate `*`, `?`, `[a-z]` and `[!a-z]` within one folder level."""
    expression, rest = "", piece
    while rest:
        one, rest = rest[0], rest[1:]
        end = rest.find("]", 2 if rest.startswith("!") else 1)
        if one == "[" and end > 0:
            members = rest[:end].replace("\\", "\\\\").replace("^", "\\^").replace("[", "\\[")
            expression += f"[^/{members[1:]}]" if members.startswith("!") else f"[{members}]"
            rest = rest[end + 1 :]
        else:
            expression += {"*": "[^/]*", "?": "[^/]"}.get(one, re.escape(one))
    return expression


def _similar_sibling(path: str) -> str:
    from difflib import get_close_matches

    folder = os.path.dirname(os.path.abspath(path))
    try:
        siblings = os.listdir(folder)
    except OSError:
        return f"; there is no folder {printable(folder)} either"
    nearest = get_close_matches(os.path.basename(os.path.abspath(path)), siblings, n=1)
    return f'; did you mean "{printable(os.path.join(os.path.dirname(path), nearest[0]))}"?' if nearest else ""
