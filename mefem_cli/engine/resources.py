"""What a run takes of its machine: memory, and on a GPU the share of the peak arithmetic rate (MFU)."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mefem_cli.engine import seeds
from mefem_cli.engine.device import Device, map_tensors
from mefem_cli.engine.fit import Observer, Trainer

MIB = 1 << 20
PEAK_SIDE, PEAK_REPEATS = 8192, 20  # of the matrix product whose rate counts as the peak


class Resources(Observer):
    """Adds peak memory to epoch rows, and on CUDA `mfu`: operations counted from shapes, over the measured peak."""

    def __init__(self) -> None:
        self._operations: int | None = None  # of a training step, per face
        self._peak: float | None = None  # operations per second of one GPU

    def measure(self, trainer: Trainer, row: dict[str, Any]) -> dict[str, Any]:
        """Return `memory_mib` (host, peak of this process), and on CUDA `cuda_memory_mib` and `mfu`."""
        peak = peak_host_memory()
        values: dict[str, Any] = {} if peak is None else {"memory_mib": round(peak / MIB)}
        if trainer.device.is_cuda:
            values["cuda_memory_mib"] = round(torch.cuda.max_memory_allocated(trainer.device.torch) / MIB)
            if row.get("images_per_second"):
                values["mfu"] = self._mfu(trainer, row["images_per_second"])
        return values

    def _mfu(self, trainer: Trainer, images_per_second: float) -> float | None:
        if self._operations is None:
            self._operations = operations_per_face(trainer.objective)
            self._peak = measured_peak(trainer.device) if self._operations else None
        if not self._operations or not self._peak:
            return None
        return round(images_per_second * self._operations / (self._peak * trainer.world.size), 4)


def peak_host_memory() -> int | None:
    """Return the peak resident memory of this process in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def operations_per_face(objective: Any) -> int | None:
    """Return the floating-point operations of a training step per face: matrix products and attention, both passes.

    A copy without data ("meta") is run, so nothing is computed and nothing changes. Activations that are computed
    twice to save memory count once. None for an objective whose shapes depend on its data.
    """
    try:
        shadow = _without_data(objective)
        draws = map_tensors(shadow.draw(1, seeds.torch_generator(0, seeds.MASKS)), lambda tensor: tensor.to("meta"))
        images = torch.zeros((1, 3, shadow.image_size, shadow.image_size), dtype=torch.uint8, device="meta")
        with FlopCounterMode(display=False) as counter:
            terms, _ = shadow(images, draws)
            torch.stack(list(terms.values())).sum().backward()
    except (NotImplementedError, RuntimeError):  # an operation has no meta form
        return None
    return counter.get_total_flops()


def _without_data(objective: Any) -> Any:
    """Return a copy whose parameters and buffers have shapes but no memory, and whose forward passes are plain."""
    copies: dict[int, Any] = {}
    for parameter in objective.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in objective.buffers():
        copies[id(buffer)] = buffer.to("meta")
    shadow = copy.deepcopy(objective, copies)
    for module in shadow.modules():
        vars(module).pop("forward", None)  # a wrapper on the instance that recomputes activations
    return shadow


def measured_peak(device: Device) -> float | None:
    """Return the operations per second of an 8192^3 matrix product in the device's precision; None if out of memory."""
    try:
        left, right = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device.torch, dtype=device.dtype) for _ in range(2))
        for repeats in (3, PEAK_REPEATS):  # the first ones wake the device up
            torch.cuda.synchronize(device.torch)
            begun = time.perf_counter()
            for _ in range(repeats):
                left @ right
            torch.cuda.synchronize(device.torch)
            seconds = time.perf_counter() - begun
    except torch.OutOfMemoryError:
        return None
    return 2 * PEAK_SIDE**3 * PEAK_REPEATS / seconds
