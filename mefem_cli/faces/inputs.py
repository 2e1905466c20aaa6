"""What was named on the command line -> the pictures to read, in a stable order.

A folder is read to its depth, following symbolic links but no loops. In folders and globs, what is neither named like
an image nor begins like one is skipped and counted; a file that is named like an image counts as one, so that a broken
one is a reject and not silently lost. A file named itself is always taken.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores.crops import path_to_text

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})
IMAGE_SUFFIXES |= {".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pnm"}
LABELS_FILE = "labels.csv"  # beside or in a folder of photos, it is worth a hint
STDIN = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """A picture to read. `name` makes its id: the argument's base name / the path below it."""

    name: str
    path: str  # absolute
    size: int = 0  # bytes
    mtime: int = 0  # ns; with `size`, what tells that a file has changed
    problem: str = ""  # why it cannot be read, if that is known already


@dataclass
class Listing:
    """All sources of a run; `skipped` counts other files by kind, `label_tables` are tables seen beside them."""

    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    label_tables: list[str] = field(default_factory=list)


def face_id(name: str, frame: int, face: int) -> str:
    """Return a face's id: the first 16 hex digits of sha256 over name, frame and face rank.

    The bytes are the name as the file system spells it, a zero byte, the frame in decimal digits, a zero byte and the
    rank in decimal digits. A source without a face has the id of rank 0.

    >>> face_id("photos/anna.jpg", 0, 0)
    '52116577a20d4a22'
    """
    content = b"\0".join([os.fsencode(name), str(frame).encode(), str(face).encode()])
    return hashlib.sha256(content).hexdigest()[:16]


def printable(path: str) -> str:
    r"""Return a path for a message: one line, no control characters, whatever its bytes.

    >>> printable("a\nb.jpg")
    'a\\nb.jpg'
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in path_to_text(path))


def list_sources(arguments: list[str], out: Path, limit: int | None = None) -> Listing:
    """Find the pictures that `arguments` name: folders, files, globs, or `-` for one path a line on stdin.

    What is in `out`, the product of an earlier run, is no source. Raises NoInputError for a path that does not exist,
    UsageError where two files would become one id.
    """
    listing = Listing()
    paths: dict[str, str] = {}
    finder = _Finder(listing, os.path.realpath(out))
    for source in finder.find(arguments):
        earlier = paths.get(source.name)
        if earlier == source.path:  # named twice
            continue
        if earlier is not None:
            both = f"{printable(earlier)} and {printable(source.path)}"
            name = printable(source.name)
            raise UsageError(f"{both} would share one id, as both are {name}; name a folder above both instead")
        paths[source.name] = source.path
        listing.sources.append(source)
        if limit is not None and len(listing.sources) >= limit:
            break
    return listing


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file or folder below the folder that was named; `above` is the (device, inode) of each folder it is in."""

    path: str
    relative: str
    above: frozenset[tuple[int, int]]


class _Finder:
    """Walks what was named; counts what it skips in `listing`."""

    def __init__(self, listing: Listing, out: str):
        self.listing, self.out = listing, out

    def find(self, arguments: list[str]) -> Iterator[Source]:
        for argument in arguments:
            if argument == STDIN:
                yield from self._stdin()
            elif os.path.lexists(argument):
                yield from self._named(os.path.abspath(argument), os.path.basename(os.path.abspath(argument)))
            elif glob.has_magic(argument):
                yield from self._glob(argument)
            else:
                raise NoInputError(f"no such file or folder: {printable(argument)}{_similar_sibling(argument)}")

    def _stdin(self) -> Iterator[Source]:
        for line in sys.stdin.buffer:
            given = os.fsdecode(line.rstrip(b"\r\n"))
            if not given:
                continue
            name = os.path.normpath(given)
            if name.startswith(os.pardir):
                name = os.path.abspath(given)
            name = name.lstrip("/") if name != os.curdir else os.path.basename(os.getcwd())
            if os.path.lexists(given):
                yield from self._named(os.path.abspath(given), name)
            else:
                yield Source(name, os.path.abspath(given), problem="no such file")

    def _named(self, path: str, name: str) -> Iterator[Source]:
        if os.path.isdir(path):
            self._look_for_labels(path)
            yield from self._walk(path, name)
        else:
            yield _source(name, path, _status(path))

    def _glob(self, pattern: str) -> Iterator[Source]:
        """Walk below the pattern's fixed folder and keep what matches; a folder that matches is taken whole."""
        pieces = pattern.split("/")
        fixed = next(index for index, piece in enumerate(pieces) if glob.has_magic(piece))
        folder = os.path.abspath("/".join(pieces[:fixed]) + "/" if fixed else ".")
        if not os.path.isdir(folder):
            shown = f"{printable(folder)} (in {printable(pattern)})"
            raise NoInputError(f"no such folder: {shown}{_similar_sibling(folder)}")
        name = os.path.basename(folder)
        wanted = glob_expression("/".join(pieces[fixed:]))
        found = False
        for source in self._walk(folder, name, wanted):
            found = True
            yield source
        if not found:
            raise NoInputError(f"no image matches {printable(pattern)}")

    def _walk(self, folder: str, name: str, wanted: re.Pattern[str] | None = None) -> Iterator[Source]:
        """Yield the pictures below a folder, sorted by the bytes of their names, depth first."""
        pending = [_Entry(folder, "", frozenset())]
        while pending:
            entry = pending.pop()
            status = _status(entry.path)
            if status is not None and stat.S_ISDIR(status.st_mode):
                pending += self._open_folder(entry, status)
            elif (wanted is None or wanted.fullmatch(entry.relative)) and self._is_candidate(entry.path, status):
                yield _source(f"{name}/{entry.relative}" if name else entry.relative, entry.path, status)

    def _open_folder(self, folder: _Entry, status: os.stat_result) -> list[_Entry]:
        """Return a folder's entries, the last one first, as a stack wants them."""
        identity = (status.st_dev, status.st_ino)
        if identity in folder.above:
            self.listing.skipped["symbolic link loop"] += 1
            return []
        if os.path.realpath(folder.path) == self.out:
            return []
        try:
            names = sorted(os.listdir(folder.path), key=os.fsencode, reverse=True)
        except OSError:
            self.listing.skipped["folder that cannot be read"] += 1
            return []
        visible = [one for one in names if not one.startswith(".")]
        if len(visible) < len(names):
            self.listing.skipped["hidden"] += len(names) - len(visible)
        prefix = f"{folder.relative}/" if folder.relative else ""
        above = folder.above | {identity}
        return [_Entry(os.path.join(folder.path, one), prefix + one, above) for one in visible]

    def _is_candidate(self, path: str, status: os.stat_result | None) -> bool:
        suffix = os.path.splitext(path)[1].lower()
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.listing.skipped["special file"] += 1
        elif suffix in IMAGE_SUFFIXES or _begins_like_image(path):
            return True
        else:
            self.listing.skipped[printable(suffix) or "no suffix"] += 1
        return False

    def _look_for_labels(self, folder: str) -> None:
        for place in (folder, os.path.dirname(folder)):
            table = os.path.join(place, LABELS_FILE)
            if os.path.isfile(table) and table not in self.listing.label_tables:
                self.listing.label_tables.append(table)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _source(name: str, path: str, status: os.stat_result | None) -> Source:
    if status is None:
        return Source(name, path, problem="broken symbolic link" if os.path.islink(path) else "cannot be read")
    problem = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    return Source(name, path, status.st_size, status.st_mtime_ns, problem)


def _begins_like_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return False
    is_bitmap = start.startswith(b"BM") and start[6:10] == b"\0\0\0\0"
    is_webp = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    is_heif = start[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1")
    signatures = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
    return start.startswith(signatures) or is_bitmap or is_webp or is_heif


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
