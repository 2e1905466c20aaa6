"""Features of images, as they will be stored: forward passes that fit into memory, and copies that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.engine.device import Device
from mefem_cli.errors import OutOfMemory

AUTO_BATCH = {"cpu": 32, "mps": 64}
TRIAL, MOST = 8, 1024  # images
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for what the stream has ahead, and for neighbours


class Encoder(Protocol):
    """What gives features; `FrozenEncoder` in backbones/ is one."""

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return float32 features of uint8 images [B, 3, S, S]: "cls", "mean" [B, D], "patches" [B, T, D]."""


@dataclass
class Features:
    """Features of some images on their way to the host."""

    values: dict[str, torch.Tensor]  # on the host: [B, ...], in the precision of the store
    largest: dict[str, torch.Tensor]  # on the host: [B] float32, largest absolute value before it was rounded
    copied: Any  # an event of the device, None where nothing had to be copied

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return values and largest values once they have arrived."""
        if self.copied is None:
            values = {kind: one.numpy() for kind, one in self.values.items()}
        else:
            self.copied.synchronize()
            values = {kind: one.numpy().copy() for kind, one in self.values.items()}  # pinned memory is used again
        return values, {kind: one.numpy() for kind, one in self.largest.items()}


class Encoding:
    """Runs an encoder on batches; out of memory it takes half as many images at a time from then on."""

    def __init__(self, encoder: Encoder, device: Device, kinds: Sequence[str], dtype: str):
        self.encoder, self.device, self.kinds = encoder, device, tuple(kinds)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.most = MOST  # images at a time

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Features:
        """Return features of uint8 images [B, 3, S, S]. Raises OutOfMemory if one image does not fit."""
        pieces: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        begin = 0
        while begin < len(images):
            try:
                pieces.append(self._forward(images[begin : begin + self.most]))
                begin += self.most
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = error
            else:
                continue
            self._take_half(min(self.most, len(images) - begin), out_of_memory)  # outside: the error holds tensors
        # It copies, also a single piece: a view of the tokens would keep all of them in memory until it is written.
        values, largest = (
            {kind: torch.cat([piece[side][kind] for piece in pieces]) for kind in self.kinds} for side in (0, 1)
        )
        return self._to_host(values, largest)

    def _forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with self.device.autocast():
            features = self.encoder.features(images)
        # Looked at where it was made: a store's worth of patches is more than the host could look at in time.
        largest = {kind: features[kind].flatten(1).abs().amax(1).float() for kind in self.kinds}
        return {kind: features[kind].to(self.dtype) for kind in self.kinds}, largest

    def _take_half(self, tried: int, error: Exception) -> None:
        if tried == 1:
            raise OutOfMemory("out of memory with one face at a time; try --device cpu") from error
        self.most = tried // 2
        if self.device.is_cuda:
            torch.cuda.empty_cache()
        console.note(f"out of memory with {tried} images at a time; going on with {self.most}")

    def _to_host(self, values: dict[str, torch.Tensor], largest: dict[str, torch.Tensor]) -> Features:
        if self.device.torch.type == "cpu":
            return Features(values, largest, None)
        if not self.device.is_cuda:  # mps
            return Features(
                {k: one.cpu() for k, one in values.items()}, {k: one.cpu() for k, one in largest.items()}, None
            )
        host = [{kind: _pinned_copy(one) for kind, one in tree.items()} for tree in (values, largest)]
        copied = torch.cuda.Event()
        copied.record()
        return Features(host[0], host[1], copied)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left; on the host torch and onnxruntime say so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError | OSError) is not False and any(
        words in text
        for words in ("can't allocate memory", "Failed to allocate memory", "not enough memory: you tried")
    )


def auto_batch(encodings: Sequence[Encoding], image_sizes: Sequence[int]) -> int:
    """Return how many images to take at a time: on a GPU as many as fit into half of what is free, by a trial each."""
    device = encodings[0].device
    if not device.is_cuda:
        return AUTO_BATCH.get(device.torch.type, 32)
    return min(_fitting(one, size) for one, size in zip(encodings, image_sizes, strict=True))


def _fitting(encoding: Encoding, image_size: int) -> int:
    """Return the power of two whose forward pass takes half of the free memory, judged by one of a few images."""
    device = encoding.device.torch
    encoding(torch.zeros((TRIAL, 3, image_size, image_size), dtype=torch.uint8, device=device))  # workspaces once
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    encoding(torch.zeros((TRIAL, 3, image_size, image_size), dtype=torch.uint8, device=device))
    torch.cuda.synchronize(device)
    bytes_an_image = max(1, (torch.cuda.max_memory_allocated(device) - before) // TRIAL)
    free, _ = torch.cuda.mem_get_info(device)
    fitting = int(free * SHARE_OF_FREE_MEMORY / bytes_an_image)
    return max(1, min(MOST, 1 << max(0, fitting.bit_length() - 1)))
