"""From crops on disk to uint8 batches: threads decode ahead of the device, in an order fixed beforehand."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Batch:
    """Decoded crops; rows that could not be decoded hold a copy of another row."""

    images: torch.Tensor  # uint8 [B, 3, S, S]
    index: np.ndarray  # [B], rows of the crops
    readable: np.ndarray  # [B] bool, False: this crop is corrupt


@dataclass(frozen=True)
class _Pending:
    """A batch while threads fill it."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    index: np.ndarray
    tasks: list[Future[np.ndarray]]  # each tells which of its crops are readable


class ImageStream:
    """Decodes crops to `image_size` px in `workers` threads (the decoders release the interpreter lock).

    A corrupt crop is counted, named on stderr and stands in the batch as a copy of a readable neighbour, so that
    shapes and the order of all others stay the same. `cache` keeps what is decoded.
    """

    def __init__(self, crops: Crops, image_size: int, workers: int | None = None, cache: DecodedCache | None = None):
        self.crops = crops
        self.image_size = image_size
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
        shape = (len(index), self.image_size, self.image_size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        starts = range(0, len(index), TASK)
        tasks = [pool.submit(self._fill, images.numpy()[at : at + TASK], index[at : at + TASK]) for at in starts]
        return _Pending(images, index, tasks)

    def _fill(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Decode some crops into `images` [n, S, S, 3]; return which of them are readable, bool [n]."""
        return np.array(
            [self._read_into(image, int(row)) for image, row in zip(images, index, strict=True)], dtype=bool
        )

    def _read_into(self, image: np.ndarray, row: int) -> bool:
        if self.cache is not None and (known := self.cache.get(row, image)) is not None:
            return known
        try:
            decode_into(self.crops.read_bytes(row), image)
            readable = True
        except (OSError, ValueError, SyntaxError, MefemError):  # what the decoders and stores raise on damaged files
            readable = False
        if self.cache is not None:
            self.cache.put(row, image if readable else None)
        return readable

    def _collect(self, pending: _Pending, device: torch.device) -> Batch:
        begun = time.perf_counter()
        readable = np.concatenate([task.result() for task in pending.tasks])
        self.waited += time.perf_counter() - begun
        images, index = pending.images, pending.index
        if not readable.all():
            self._report_corrupt(index[~readable])
            if not readable.any():
                such = self.crops.describe(int(index[0]))
                raise NoInputError(f"no crop of a whole batch can be read, such as {such}; rerun mefem crop")
            stand_ins = np.resize(np.flatnonzero(readable), int((~readable).sum()))
            images[torch.from_numpy(np.flatnonzero(~readable))] = images[torch.from_numpy(stand_ins)]
        return Batch(images.to(device, non_blocking=True).permute(0, 3, 1, 2), index, readable)

    def _report_corrupt(self, rows: np.ndarray) -> None:
        for row in rows:
            name = self.crops.ids[int(row)]
            if name not in self.corrupt:
                self.corrupt.append(name)
                if len(self.corrupt) <= NAMED_CORRUPT_CROPS:
                    console.warn(f"crop {self.crops.describe(int(row))} cannot be read; it is left out")


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
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    else:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if pixels.shape[:2] != image.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    image[:] = pixels
