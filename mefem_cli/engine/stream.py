"""From crops on disk to uint8 batches: threads decode ahead of the device, in an order fixed beforehand."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mefem_cli import console
from mefem_cli.engine.cache import DecodedCache
from mefem_cli.engine.device import cores
from mefem_cli.errors import MefemError, NoInputError
from mefem_cli.stores.crops import Crops

BATCHES_AHEAD = 3
TASK = 8  # crops that a thread decodes in one go: fewer cost more in handing over, more leave threads idle at the end
NAMED_CORRUPT_CROPS = 5
UNREADABLE = (OSError, ValueError, SyntaxError, MefemError)  # what the decoders and stores raise on damaged files


class View(Protocol):
    """What one encoder sees of a crop: all of it at another size, or a part of it turned upright."""

    @property
    def image_size(self) -> int:
        """Side of the view, px."""

    def fill(self, crop: np.ndarray, row: int, image: np.ndarray) -> None:
        """Write the view of a crop, uint8 RGB [H, W, 3], row `row`, into `image`, uint8 [S, S, 3]; threads call it."""


@dataclass(frozen=True)
class Resized:
    """All of the crop, resampled by Pillow's antialiased filter of the name."""

    image_size: int
    interpolation: str = "bicubic"

    def fill(self, crop: np.ndarray, row: int, image: np.ndarray) -> None:
        """Resample the crop into `image`."""
        if crop.shape != image.shape:
            how = Image.Resampling[self.interpolation.upper()]
            crop = np.asarray(Image.fromarray(crop).resize(image.shape[1::-1], how))
        image[:] = crop


@dataclass(frozen=True)
class Batch:
    """Decoded crops; rows that could not be decoded hold a copy of another row."""

    images: torch.Tensor  # uint8 [B, 3, S, S]
    index: np.ndarray  # [B], rows of the crops
    readable: np.ndarray  # [B] bool, False: this crop is corrupt
    views: tuple[torch.Tensor, ...] = ()  # uint8 [B, 3, S, S] each, `images` first; one for each view of the stream


@dataclass(frozen=True)
class _Pending:
    """A batch while threads fill it."""

    views: tuple[torch.Tensor, ...]  # uint8 [B, S, S, 3]
    index: np.ndarray
    tasks: list[Future[np.ndarray]]  # each tells which of its crops are readable


class ImageStream:
    """Decodes crops to `image_size` px in `workers` threads (the decoders release the interpreter lock).

    A corrupt crop is counted, named on stderr and stands in the batch as a copy of a readable neighbour, so that
    shapes and the order of all others stay the same. A batch without a readable crop is an error, unless `tolerant`:
    then it is black. `cache` keeps what is decoded. With `views` each crop is decoded once and seen in several ways.
    """

    def __init__(
        self,
        crops: Crops,
        image_size: int,
        workers: int | None = None,
        cache: DecodedCache | None = None,
        views: Sequence[View] = (),
        tolerant: bool = False,
    ):
        self.crops = crops
        self.image_size = image_size
        self.views = tuple(views)
        self.tolerant = tolerant
        self.workers = workers or cores()
        self.corrupt: list[str] = []
        self.waited = 0.0  # seconds spent waiting for decoded batches
        self.cache = cache

    def batches(self, batches: Iterable[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """Yield a batch of images on `device` for each array of row numbers, in order, decoding ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            pending: deque[_Pending] = deque()
            try:
                for index in batches:
                    pending.append(self._begin(pool, index, device))
                    if len(pending) > BATCHES_AHEAD:
                        yield self._collect(pending.popleft(), device)
                while pending:
                    yield self._collect(pending.popleft(), device)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, index: np.ndarray, device: torch.device) -> _Pending:
        sizes = [view.image_size for view in self.views] or [self.image_size]
        pin = device.type == "cuda"
        views = tuple(torch.empty((len(index), size, size, 3), dtype=torch.uint8, pin_memory=pin) for size in sizes)
        arrays = [images.numpy() for images in views]
        starts = range(0, len(index), TASK)
        tasks = [
            pool.submit(self._fill, [images[at : at + TASK] for images in arrays], index[at : at + TASK])
            for at in starts
        ]
        return _Pending(views, index, tasks)

    def _fill(self, views: Sequence[np.ndarray], index: np.ndarray) -> np.ndarray:
        """Decode some crops into `views`, [n, S, S, 3] each; return which of them are readable, bool [n]."""
        if not self.views:
            return np.array([self._read_into(views[0][at], int(row)) for at, row in enumerate(index)], dtype=bool)
        return np.array(
            [self._read_views([images[at] for images in views], int(row)) for at, row in enumerate(index)], dtype=bool
        )

    def _read_views(self, images: Sequence[np.ndarray], row: int) -> bool:
        try:
            crop = _decoded(self.crops.read_bytes(row))
        except UNREADABLE:
            return False
        for view, image in zip(self.views, images, strict=True):
            view.fill(crop, row, image)  # outside: a face that cannot be aligned is no unreadable crop
        return True

    def _read_into(self, image: np.ndarray, row: int) -> bool:
        if self.cache is not None and (known := self.cache.get(row, image)) is not None:
            return known
        try:
            decode_into(self.crops.read_bytes(row), image)
            readable = True
        except UNREADABLE:
            readable = False
        if self.cache is not None:
            self.cache.put(row, image if readable else None)
        return readable

    def _collect(self, pending: _Pending, device: torch.device) -> Batch:
        begun = time.perf_counter()
        readable = np.concatenate([task.result() for task in pending.tasks])
        self.waited += time.perf_counter() - begun
        index = pending.index
        if not readable.all():
            self._report_corrupt(index[~readable])
            if not readable.any() and not self.tolerant:
                such = self.crops.describe(int(index[0]))
                raise NoInputError(f"no crop of a whole batch can be read, such as {such}; rerun mefem crop")
            for images in pending.views:
                _stand_in(images, readable)
        views = tuple(images.to(device, non_blocking=True).permute(0, 3, 1, 2) for images in pending.views)
        return Batch(views[0], index, readable, views)

    def _report_corrupt(self, rows: np.ndarray) -> None:
        for row in rows:
            name = self.crops.ids[int(row)]
            if name not in self.corrupt:
                self.corrupt.append(name)
                if len(self.corrupt) <= NAMED_CORRUPT_CROPS:
                    console.warn(f"crop {self.crops.describe(int(row))} cannot be read; it is left out")


def _stand_in(images: torch.Tensor, readable: np.ndarray) -> None:
    """Put readable images [B, ...] where there are others, or black if there is none."""
    others = torch.from_numpy(np.flatnonzero(~readable))
    if readable.any():
        images[others] = images[torch.from_numpy(np.resize(np.flatnonzero(readable), len(others)))]
    else:
        images[others] = 0


def decode(data: bytes, image_size: int) -> np.ndarray:
    """Return an image file as uint8 RGB [image_size, image_size, 3]. Raises what `decode_into` does."""
    image = np.empty((image_size, image_size, 3), np.uint8)
    decode_into(data, image)
    return image


def decode_into(data: bytes, image: np.ndarray) -> None:
    """Decode an image file into `image`, uint8 RGB [S, S, 3], resampled with an antialiased bicubic filter.

    Raises ValueError or OSError for a damaged file.
    """
    size = image.shape[0]
    if data[:2] == b"\xff\xd8":
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == (size, size) and image.flags.c_contiguous:
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=image)
            return
    pixels = _decoded(data)
    if pixels.shape[:2] != image.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    image[:] = pixels


def _decoded(data: bytes) -> np.ndarray:
    """Return an image file as uint8 RGB [H, W, 3]. Raises ValueError or OSError for a damaged file."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
