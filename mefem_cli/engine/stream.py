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
from mefem_cli.engine.device import cores
from mefem_cli.errors import NoInputError
from mefem_cli.stores.crops import Crops

BATCHES_AHEAD = 3
CACHE_BYTES = 1 << 30  # decoded crops are kept in memory when all of them fit in this
NAMED_CORRUPT_CROPS = 5


@dataclass(frozen=True)
class Batch:
    """Decoded crops; rows that could not be decoded hold a copy of another row."""

    images: torch.Tensor  # uint8 [B, 3, S, S]
    index: np.ndarray  # [B], rows of the crops
    readable: np.ndarray  # [B] bool, False: this crop is corrupt


class ImageStream:
    """Decodes crops to `image_size` px in `workers` threads (the decoders release the interpreter lock).

    A corrupt crop is counted, named on stderr and stands in the batch as a copy of a readable neighbour, so that
    shapes and the order of all others stay the same.
    """

    def __init__(self, crops: Crops, image_size: int, workers: int | None = None, keep_decoded: bool = False):
        self.crops = crops
        self.image_size = image_size
        self.workers = workers or cores()
        self.corrupt: list[str] = []
        self.waited = 0.0  # seconds spent waiting for decoded batches
        fits = len(crops) * image_size * image_size * 3 <= CACHE_BYTES
        self._decoded: dict[int, np.ndarray | None] | None = {} if keep_decoded and fits else None

    def batches(self, batches: Iterable[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """Yield a batch of images on `device` for each array of row numbers, in order, decoding ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            pending: deque[tuple[np.ndarray, list[Future[np.ndarray | None]]]] = deque()
            try:
                for index in batches:
                    pending.append((index, [pool.submit(self.read, int(row)) for row in index]))
                    if len(pending) > BATCHES_AHEAD:
                        yield self._collect(*pending.popleft(), device)
                while pending:
                    yield self._collect(*pending.popleft(), device)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def read(self, row: int) -> np.ndarray | None:
        """Return one crop as uint8 [S, S, 3], or None if its file is missing or corrupt."""
        if self._decoded is not None and row in self._decoded:
            return self._decoded[row]
        try:
            image: np.ndarray | None = decode(self.crops.read_bytes(row), self.image_size)
        except (OSError, ValueError, SyntaxError):  # what the decoders raise on damaged files
            image = None
        if self._decoded is not None:
            self._decoded[row] = image
        return image

    def _collect(self, index: np.ndarray, futures: list[Future[np.ndarray | None]], device: torch.device) -> Batch:
        begun = time.perf_counter()
        images = [future.result() for future in futures]
        self.waited += time.perf_counter() - begun
        readable = np.array([image is not None for image in images])
        if not readable.all():
            self._report_corrupt(index[~readable])
        present = [image for image in images if image is not None]
        if not present:
            raise NoInputError(
                f"no crop of a whole batch can be read, such as {self.crops.ids[int(index[0])]}; rerun mefem crop"
            )
        stand_in = iter(present * len(images))
        stacked = torch.from_numpy(np.stack([next(stand_in) if image is None else image for image in images]))
        if device.type == "cuda":
            stacked = stacked.pin_memory()
        return Batch(stacked.to(device, non_blocking=True).permute(0, 3, 1, 2), index, readable)

    def _report_corrupt(self, rows: np.ndarray) -> None:
        for row in rows:
            name = self.crops.ids[int(row)]
            if name not in self.corrupt:
                self.corrupt.append(name)
                if len(self.corrupt) <= NAMED_CORRUPT_CROPS:
                    console.warn(f"crop {name} ({self.crops.columns['path'][int(row)]}) cannot be read; it is left out")


def decode(data: bytes, image_size: int) -> np.ndarray:
    """Decode an image file to uint8 RGB [image_size, image_size, 3], resampled with an antialiased bicubic filter.

    Raises ValueError or OSError for a damaged file.
    """
    if data[:2] == b"\xff\xd8":
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    else:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if image.shape[:2] == (image_size, image_size):
        return image
    return np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC))
