"""Tar shards: what is in one, listed from its headers, and bytes read where they lie.

A shard is a plain tar. An index (name, offset, size) reads headers only. Whatever bytes a shard holds, listing it
ends, in bounded memory, with the whole members before the first damage and then `DamagedShard`.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mefem_cli.errors import NoInputError

BLOCK = 512  # bytes; headers and contents fill whole ones
RECORD = 20 * BLOCK  # tar programs end an archive at a multiple of it
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header; real ones have a few hundred
INDEX_BATCH = 1 << 16  # members
READ_AHEAD = 4 << 20  # bytes; one header at a time, a disk takes 0.15 ms for each of a million crops; ahead, 0.01 ms
READ_AHEAD_BELOW = 1 << 18  # bytes of a member; larger ones are better passed over
MAX_SHOWN_NAME = 200  # bytes of a name in a message
MAX_NAME_PART = 255  # bytes between two slashes that a file system takes

REGULAR = frozenset({b"0", b"\0", b"7"})
WITHOUT_CONTENT = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "", b"6": "device"}
LONG_NAME, PAX, SPARSE = b"L", frozenset({b"x", b"X"}), b"S"
EXTENSIONS = frozenset({LONG_NAME, b"K", b"g"}) | PAX  # K: a long link; g: attributes of the whole archive
NAME_ENCODING = sys.getfilesystemencoding()
COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}


class DamagedShard(NoInputError):
    """A shard cannot be read, or not to its end; `detail` says why, without the path."""

    def __init__(self, path: str | Path, detail: str):
        super().__init__(f"{path}: {detail}")
        self.detail = detail


class Member(NamedTuple):
    """A regular file in a shard: its name as the file system spells it, where its bytes begin, how many there are."""

    name: str
    offset: int
    size: int


def is_tar(start: bytes) -> bool:
    """Whether a file is an uncompressed tar, by its first 512 bytes: a header whose checksum holds, or only zeros."""
    header = start[:BLOCK]
    return len(header) == BLOCK and (_checksum_holds(header) or not header.strip(b"\0"))


def compressed(start: bytes) -> str:
    """Return what to do about a file that begins like a compressed one; "" for others.

    >>> compressed(bytes.fromhex("1f8b0800"))
    'compressed with gzip; unpack it with gunzip first'
    """
    for magic, (name, program) in COMPRESSIONS.items():
        if start.startswith(magic):
            return f"compressed with {name}; unpack it with {program} first"
    return ""


def unsafe_name(name: str) -> str:
    r"""Return why a member's name must not become an output path; "" where it may.

    >>> unsafe_name("../../etc/passwd"), unsafe_name("2024/anna.jpg")
    ('its name leads out of the shard', '')
    """
    parts = re.split(r"[/\\]", name)
    if "\0" in name:
        return "its name has a zero byte"
    if name[:1] in ("/", "\\") or re.match("[A-Za-z]:", name):
        return "its name is an absolute path"
    if ".." in parts:
        return "its name leads out of the shard"
    if parts[-1] in ("", "."):
        return "its name is that of a folder"
    if max(len(os.fsencode(part)) for part in parts) > MAX_NAME_PART:
        return f"a part of its name has more than {MAX_NAME_PART} bytes"
    return ""


# The index


def members(path: str | Path, skipped: Counter[str] | None = None) -> Iterator[Member]:
    """Yield the regular files of a shard in its order; `skipped` counts links, devices and sparse files by kind.

    Raises DamagedShard after the last whole member: for a tar that is cut short (also if all that it lacks is the mark
    at its end), a damaged header, something after the end, a compressed file, or one that cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for ever
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _Damage("not a file")
            yield from _members(descriptor, status.st_size, Counter() if skipped is None else skipped)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DamagedShard(path, error.strerror or "cannot be read") from error
    except _Damage as error:
        raise DamagedShard(path, str(error)) from None


def index(path: str | Path) -> pa.Table:
    """Return a shard's index as columns `name` (bytes), `offset` and `size`: 16 bytes a member and its name.

    Raises DamagedShard as `members` does.
    """
    schema = pa.schema([("name", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())])
    found, batches = members(path), []
    while batch := list(islice(found, INDEX_BATCH)):
        names, offsets, sizes = zip(*batch, strict=True)
        columns = zip(([os.fsencode(name) for name in names], offsets, sizes), schema.types, strict=True)
        batches.append(pa.record_batch([pa.array(column, kind) for column, kind in columns], schema=schema))
    return pa.Table.from_batches(batches, schema)


class _Damage(Exception):
    """What is wrong with a shard; `members` adds its path."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What extension headers say of the member after them: bytes of its name, its size, whether it has holes."""

    name: bytes = b""
    size: int | None = None
    is_sparse: bool = False


NOTHING_TOLD = _Told()


def _members(descriptor: int, end: int, skipped: Counter[str]) -> Iterator[Member]:
    """Walk the headers of a file of `end` bytes. Raises _Damage at the first one."""
    at, ahead, told = 0, 0, NOTHING_TOLD
    while not _is_end(header := os.pread(descriptor, BLOCK, at)):
        _check(header, at)
        kind, size, begin = header[156:157], _number(header[124:136]), at + BLOCK
        if kind in EXTENSIONS:
            told = _read_extension(told, kind, descriptor, begin, size)
            at = begin + padded(size)
            continue
        name, size = told.name or _name(header), size if told.size is None else told.size
        if kind in WITHOUT_CONTENT or (kind == b"\0" and name.endswith(b"/")):  # the latter is a folder in old tars
            what, size = WITHOUT_CONTENT.get(kind, ""), 0
        elif begin + size > end:
            raise _Damage(f"cut short: {_shown(name)} has {size} bytes, {end - begin} are there")
        elif kind == SPARSE or told.is_sparse:
            what, begin = "sparse file", _after_sparse_map(descriptor, header, begin) if kind == SPARSE else begin
        elif kind in REGULAR:
            what = ""
            yield Member(name.decode(NAME_ENCODING, "surrogateescape"), begin, size)
        else:
            what = "special member"
        if what:
            skipped[what] += 1
        at = begin + padded(size)
        told = NOTHING_TOLD
        if at + READ_AHEAD // 2 > ahead and size < READ_AHEAD_BELOW:
            ahead = _read_ahead(descriptor, max(at, ahead))
    _check_end(descriptor, at, end)


def _read_ahead(descriptor: int, begin: int) -> int:
    """Have the system read what comes next while this program goes on; return where that ends."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, begin, READ_AHEAD, os.POSIX_FADV_WILLNEED)
    return begin + READ_AHEAD


def _is_end(header: bytes) -> bool:
    """Whether the file or the archive ends here: nothing or zeros."""
    return header[:1] in b"\0" and not header.strip(b"\0")


def _check_end(descriptor: int, at: int, end: int) -> None:
    """Raise _Damage where the file just stops at byte `at`, or goes on after the zeros that are there."""
    if end - at < BLOCK:
        raise _Damage("cut short: the mark at the end of a tar is missing" if end else "empty")
    if os.pread(descriptor, 8 * RECORD, at).strip(b"\0"):
        raise _Damage(f"something follows its end at byte {at}; tars are joined with tar -A, not with cat")


def _check(header: bytes, at: int) -> None:
    """Raise _Damage unless these bytes, at `at` in the file, are a header."""
    if len(header) == BLOCK and _checksum_holds(header):
        return
    if not at:
        raise _Damage(compressed(header) or "not a tar")
    what = "damaged: no header" if len(header) == BLOCK else "cut short in the header"
    raise _Damage(f"{what} at byte {at}")


def _checksum_holds(header: bytes) -> bool:
    """Whether a header's checksum is the sum of its 512 bytes, its own 8 counting as spaces."""
    try:
        stated = _number(header[148:156])
    except _Damage:
        return False
    # The low half of adler32 is the sum of all bytes + 1, modulo 65521, in a tenth of the time of sum().
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return (stated - total) % 65521 == 0 or stated == _signed_sum(header)


def _signed_sum(header: bytes) -> int:
    """Return the checksum as some old programs take it, with bytes from -128 to 127."""
    return sum(byte - 256 * (byte > 127) for byte in header[:148] + b" " * 8 + header[156:])


def _number(given: bytes) -> int:
    """Return a header's number: octal digits, or binary after a byte of 128. Raises _Damage for another."""
    digits = given.rstrip(b"\0 ")
    if not digits.isdigit():
        if given[0] == 128:
            return int.from_bytes(given[1:], "big")
        digits = given.partition(b"\0")[0].strip(b" ") or b"0"
    if digits.isdigit() and not digits.strip(b"01234567"):
        return int(digits, 8)
    raise _Damage(f"damaged: {given!r} in a header is no number")


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # other formats have times or sparse maps in this place
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def padded(size: int) -> int:
    return size + -size % BLOCK


def _shown(name: bytes) -> str:
    return repr(name[:MAX_SHOWN_NAME].decode("utf-8", "replace"))


def _read_extension(told: _Told, kind: bytes, descriptor: int, begin: int, size: int) -> _Told:
    """Return `told` with what one more extension header says. `K` is of links, `g` of no member; neither is used."""
    if size > MAX_EXTENSION_BYTES:
        raise _Damage(f"damaged: the extended header at byte {begin - BLOCK} has {size} bytes")
    content = os.pread(descriptor, size, begin)
    if len(content) < size:
        raise _Damage(f"cut short at byte {begin + len(content)}")
    if kind == LONG_NAME:
        return replace(told, name=content.partition(b"\0")[0])
    if kind not in PAX:
        return told
    for keyword, value in _pax_records(content):
        if keyword == b"path":
            told = replace(told, name=value)
        elif keyword == b"size":
            told = replace(told, size=_pax_size(value))
        elif keyword.startswith(b"GNU.sparse."):
            told = replace(told, is_sparse=True)
    return told


def _pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (keyword, value) of a pax header's records, `length keyword=value\\n`; the length counts itself too."""
    at = 0
    while at < len(content) and content[at]:
        length = content[at : at + 20].partition(b" ")[0]
        stop = at + int(length) if length.isdigit() else 0
        keyword, equals, value = content[at + len(length) + 1 : max(stop - 1, 0)].partition(b"=")
        if not equals or content[stop - 1 : stop] != b"\n":
            raise _Damage(f"damaged: an extended header says {content[at : at + 40]!r}")
        yield keyword, value
        at = stop


def _pax_size(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise _Damage(f"damaged: an extended header says that a size is {value[:40]!r}")
    return int(value)


def _after_sparse_map(descriptor: int, header: bytes, begin: int) -> int:
    """Return where the content of a GNU sparse member begins: after the blocks that go on with its map."""
    goes_on = header[482]
    while goes_on:
        block = os.pread(descriptor, BLOCK, begin)
        begin += BLOCK
        goes_on = block[504] if len(block) == BLOCK else 0
    return begin


# Reading


class ShardReader:
    """Reads from many shards and keeps the last `max_open` of them open; safe in threads, after fork and in a pickle.

    >>> ShardReader().read("crops/shards/00000.tar", 512, 9_000)  # doctest: +SKIP
    """

    def __init__(self, max_open: int = 64):
        self.max_open = max_open
        self._open = lru_cache(max_open)(_Opened)

    def __reduce__(self) -> tuple[type[ShardReader], tuple[int]]:
        return ShardReader, (self.max_open,)

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of a shard. Raises DamagedShard where there are none or fewer."""
        try:
            status = os.stat(path)  # a shard that was made anew has another inode, and the open one is not used
            # Checked here, as pread sets aside all the memory that it is asked for.
            if min(offset, size) < 0 or offset + size > status.st_size:
                raise DamagedShard(path, f"{size} bytes wanted at byte {offset}, it has {status.st_size}")
            shard = self._open(os.fspath(path), status.st_dev, status.st_ino)  # held here until the bytes are read
            content = os.pread(shard.descriptor, size, offset)
        except OSError as error:
            raise DamagedShard(path, error.strerror or "cannot be read") from error
        if len(content) < size:
            raise DamagedShard(path, f"cut short at byte {offset + len(content)}")
        return content


class _Opened:
    """An open file; closed when the last thread lets go of it, so that none reads from a number used anew."""

    descriptor = -1

    def __init__(self, path: str, device: int, inode: int):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
