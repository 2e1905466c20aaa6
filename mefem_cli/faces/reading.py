"""The bytes of a source, wherever they lie: a file or a member of a shard; pictures whole, videos as they are asked."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from mefem_cli.faces import images
from mefem_cli.faces.source import WHOLE_FILE, Source
from mefem_cli.faces.video_kinds import begins_like_video

BEGINNING = 64  # bytes that tell a video from a picture
LONGEST_HASHED_VIDEO = 256 << 20  # bytes; to hash a longer one would cost more than to read a frame of it


@dataclass(frozen=True)
class OpenSource:
    """A source while it is read: `content` is the whole of a picture, `file` gives what is asked of a video."""

    file: BinaryIO
    content: bytes
    is_video: bool
    sha256: str  # of the source's bytes; "" for a video of more than LONGEST_HASHED_VIDEO


@contextmanager
def opened(source: Source, max_pixels: int) -> Iterator[OpenSource]:
    """Open a source. Raises ImageRejected where it cannot be read, or is larger than a picture of `max_pixels` is."""
    if source.problem:
        raise images.ImageRejected(images.UNREADABLE, source.problem)
    try:
        descriptor = os.open(source.path, os.O_RDONLY)
        with Section(descriptor, max(source.offset, 0), source.size) as file:
            is_video = begins_like_video(file.read(BEGINNING))
            if not is_video and source.size > max_pixels * images.MAX_BYTES_PER_PIXEL:
                detail = f"the file has {source.size} bytes; --max-pixels is {max_pixels}"
                raise images.ImageRejected(images.TOO_LARGE, detail)
            file.seek(0)
            content = b"" if is_video else file.read()
            if source.offset != WHOLE_FILE and not is_video and len(content) < source.size:
                raise images.ImageRejected(images.UNREADABLE, "the tar shard ends before it")
            digest = _video_sha256(file) if is_video else hashlib.sha256(content).hexdigest()
            yield OpenSource(cast(BinaryIO, file), content, is_video, digest)
    except OSError as error:
        raise images.ImageRejected(images.UNREADABLE, error.strerror or "cannot be read") from error


def _video_sha256(file: Section) -> str:
    if file.size > LONGEST_HASHED_VIDEO:
        return ""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


class Section(io.RawIOBase):
    """Part of a file as a file: `size` bytes from `start` of an open descriptor, which it closes at its end."""

    def __init__(self, descriptor: int, start: int, size: int):
        super().__init__()
        self.size = size
        self._descriptor, self._start, self._position = descriptor, start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        """Return the rest in as few pieces as there are; the default asks for 8 KiB at a time."""
        pieces = []
        while piece := os.pread(self._descriptor, max(0, self.size - self._position), self._start + self._position):
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self._position))
        found = os.pread(self._descriptor, wanted, self._start + self._position)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
