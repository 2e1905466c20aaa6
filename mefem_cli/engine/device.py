"""The device and the precision of a command, chosen once, with the reason."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import device as torch_device
from torch import dtype as torch_dtype  # the field named `torch` would hide them

from mefem_cli import console
from mefem_cli.errors import UsageError


@dataclass(frozen=True)
class DeviceOptions:
    """The machine."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it natively
    workers: int | None = None  # threads that read and decode images; default: the cores
    batch_size: str = "auto"  # images in a batch, auto or N

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers}: wanted 1 or more")


@dataclass(frozen=True)
class Device:
    """Where tensors live and in which precision matrix products run."""

    torch: torch_device
    dtype: torch_dtype
    reason: str

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA (or ROCm) GPU."""
        return self.torch.type == "cuda"

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run; it does nothing in fp32."""
        return torch.autocast(self.torch.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def put(self, tree: Any) -> Any:
        """Return the tensors of a tree on this device; copies to a GPU start from pinned memory, so nobody waits."""
        return map_tensors(
            tree,
            lambda one: (one.pin_memory() if self.is_cuda and not one.is_cuda else one).to(
                self.torch, non_blocking=True
            ),
        )

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.torch) if self.is_cuda else self.torch.type
        return f"{name}, {'bf16' if self.dtype is torch.bfloat16 else 'fp32'} ({self.reason})"


def map_tensors(tree: Any, function: Any) -> Any:
    """Apply a function to every tensor nested in lists, tuples, dicts or dataclasses."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return type(tree)(**{name: map_tensors(value, function) for name, value in vars(tree).items()})


def choose_device(device: str = "auto", precision: str = "auto") -> Device:
    """Choose device and precision. Raises UsageError for an unknown or absent one."""
    chosen = _torch_device(device)
    if precision not in ("auto", "bf16", "fp32"):
        raise UsageError(f"--precision {precision}: wanted auto, bf16 or fp32")
    if precision != "auto":
        return Device(chosen, torch.bfloat16 if precision == "bf16" else torch.float32, "as asked")
    native, reason = _multiplies_bf16(chosen)
    return Device(chosen, torch.bfloat16 if native else torch.float32, reason)


def _torch_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: wanted auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine; try --device cpu")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {device}: wanted auto, cpu, cuda, cuda:N or mps")
    return chosen


def _multiplies_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    if device.type == "cpu":
        native = _cpu_has_avx512_bf16()
        return native, "the CPU has avx512_bf16" if native else "the CPU lacks avx512_bf16"
    return False, "mps runs in fp32"


def _cpu_has_avx512_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def announce(device: Device) -> None:
    """Say once which device and precision are used, and why."""
    console.note(f"device: {device}")


def cores() -> int:
    """Return how many cores this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
