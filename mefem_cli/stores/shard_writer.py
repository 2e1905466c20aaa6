"""Tar shards in webdataset layout, written: equal bytes for equal files, each under its name when it is complete."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mefem_cli.errors import OutputError
from mefem_cli.stores import product
from mefem_cli.stores.samples import key_and_extension, why_not_data
from mefem_cli.stores.shards import BLOCK, NAME_ENCODING, RECORD, padded, unsafe_name

WRITE_BUFFER_BYTES = 1 << 20


class Place(NamedTuple):
    """Where a file was written: the shard's name in its folder, the offset of the content in it, and its size."""

    shard: str
    offset: int
    size: int


class ShardWriter:
    """Writes `00000.tar`, `00001.tar` ... in a folder: equal bytes for equal files, readable by any tar program.

    A shard gets its name when it is complete, and replaces an older one of that name; after an error the one that was
    being written is removed. One writer at a time may use a folder.

    >>> import tempfile
    >>> with ShardWriter(Path(tempfile.mkdtemp())) as writer:
    ...     writer.add_sample("anna", {"jpg": b"picture", "json": b"{}"})["json"]
    Place(shard='00000.tar', offset=1536, size=2)
    """

    def __init__(self, folder: Path, bytes_per_shard: int = 1 << 30, first: int = 0):
        assert bytes_per_shard > 0
        assert first >= 0
        self.folder, self.bytes_per_shard = folder, bytes_per_shard
        self._number = first - 1  # of the shard in hand
        self._size = 0  # its bytes so far; 0: none is in hand
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        for left in self.folder.glob(".*.tar.*.tmp"):  # of a writer that was killed
            left.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._telling():
            if error is None:
                self._finish()
            else:
                self._stack.__exit__(kind, error, traceback)

    @property
    def _name(self) -> str:
        return f"{self._number:05d}.tar"

    def add(self, name: str, content: bytes) -> Place:
        """Write one file. Raises OutputError where the disk is full or the like."""
        return self._write([(name, content)])[0]

    def add_sample(self, key: str, files: Mapping[str, bytes]) -> dict[str, Place]:
        """Write the files of a sample, by extension in lower case, into one shard. Raises OutputError as `add` does."""
        assert files
        named = {f"{key}.{extension}": content for extension, content in files.items()}
        assert [key_and_extension(name) for name in named] == [(key, extension) for extension in files], key
        assert not any(why_not_data(name) for name in named), key
        return dict(zip(files, self._write(list(named.items())), strict=True))

    def _write(self, files: list[tuple[str, bytes]]) -> list[Place]:
        headers = [_header(name, len(content)) for name, content in files]
        wanted = sum(len(header) + padded(len(content)) for header, (_, content) in zip(headers, files, strict=True))
        places = []
        with self._telling():
            if self._size and _archive_size(self._size + wanted) > self.bytes_per_shard:
                self._finish()
            if not self._size:
                self._begin()
            for header, (_, content) in zip(headers, files, strict=True):
                places.append(Place(self._name, self._size + len(header), len(content)))
                self._file.writelines((header, content, bytes(-len(content) % BLOCK)))
                self._size += len(header) + padded(len(content))
        return places

    def _begin(self) -> None:
        self._number += 1
        temporary = self._stack.enter_context(product.writing(self.folder / self._name))
        self._file = self._stack.enter_context(temporary.open("wb", WRITE_BUFFER_BYTES))

    def _finish(self) -> None:
        if self._size:
            self._file.write(bytes(_archive_size(self._size) - self._size))
            self._size = 0
            self._stack.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{self.folder / self._name} cannot be written: {error.strerror}"
            raise OutputError(f"{what}; make room or name another --out, then run the command again") from error


def _archive_size(size: int) -> int:
    """Return the bytes of a shard with `size` bytes of members: two zero blocks end it, and it fills whole records."""
    size += 2 * BLOCK
    return size + -size % RECORD


def _header(name: str, size: int) -> bytes:
    """Return the header of a regular file: always the same, in POSIX form where that can spell it, else in GNU's."""
    assert not unsafe_name(name), f"{name!r}: {unsafe_name(name)}"
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, NAME_ENCODING, "surrogateescape")
    except ValueError:  # a name of more than 100 bytes that no slash divides well, or 8 GiB
        return info.tobuf(tarfile.GNU_FORMAT, NAME_ENCODING, "surrogateescape")
