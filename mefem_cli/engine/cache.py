"""Decoded crops kept in memory, so that each is decoded once: in the process, or shared by all of one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from mefem_cli.engine import launch
from mefem_cli.errors import UsageError

AUTO_SHARE = 0.25  # of the memory that is free: so much may the cache take without being asked for
RAM_SHARE = 0.9  # and so much if it is
SHARED_MEMORY = Path("/dev/shm")  # a file system in memory
UNKNOWN, READABLE, CORRUPT = 0, 1, 2

Choice = Literal["auto", "ram", "off"]


class DecodedCache:
    """uint8 [N, S, S, 3] in memory that is taken up as crops come in, and what is known of each.

    Several processes may share it: whichever decodes a crop first keeps it for all, and two that do so at once write
    the same bytes. The state of a crop is set after its pixels are there.
    """

    def __init__(self, num_crops: int, size: int, shared_as: str | None = None):
        shape = (num_crops, size, size, 3)
        if shared_as is None:
            self._images, self._state = np.zeros(shape, np.uint8), np.zeros(num_crops, np.uint8)
            return
        path = SHARED_MEMORY / shared_as
        with open(path, "ab") as file:  # whoever is first makes it; to its length all others do too
            file.truncate(num_crops * (size * size * 3 + 1))
        memory = np.memmap(path, np.uint8, "r+")
        self._images, self._state = memory[num_crops:].reshape(shape), memory[:num_crops]
        self._path = path

    def get(self, row: int, image: np.ndarray) -> bool | None:
        """Copy a crop into `image` if it is known; return whether it is readable, None for one that is not known."""
        state = self._state[row]
        if state == READABLE:
            image[:] = self._images[row]
        return None if state == UNKNOWN else bool(state == READABLE)

    def put(self, row: int, image: np.ndarray | None) -> None:
        """Keep a crop, or that it is corrupt."""
        if image is not None:
            self._images[row] = image
        self._state[row] = CORRUPT if image is None else READABLE

    def forget_name(self) -> None:
        """Take the shared file's name away, so that its memory ends with the last process."""
        if hasattr(self, "_path"):
            self._path.unlink(missing_ok=True)


def make_cache(choice: Choice, num_crops: int, size: int) -> DecodedCache | None:
    """Return the cache that `--cache` asks for, None for none. Raises UsageError where `ram` does not fit.

    `auto` takes a quarter of the free memory at most. Processes of one job on one machine share it.
    """
    wanted, free = num_crops * (size * size * 3 + 1), free_memory()
    if choice == "off" or (choice == "auto" and wanted > AUTO_SHARE * free):
        return None
    place = launch.place()
    if wanted > RAM_SHARE * free:
        needed = f"{num_crops} crops of {size} px take {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        raise UsageError(f"--cache ram: {needed}; leave it out or type --limit")
    shared = place.local_size > 1 and _fits_shared_memory(wanted)
    if place.local_size > 1 and not shared and wanted * place.local_size > AUTO_SHARE * free:
        return None
    return DecodedCache(num_crops, size, f"mefem-{os.getuid()}-{_job_name()}" if shared else None)


def _job_name() -> str:
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    return "-".join(os.environ.get(name, "").replace("/", "_") for name in names)


def _fits_shared_memory(wanted: int) -> bool:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return False
    return wanted < RAM_SHARE * status.f_bavail * status.f_frsize


def free_memory() -> int:
    """Return how many bytes of memory this process may still take: the machine's, or less in a container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    groups = Path("/sys/fs/cgroup")
    try:
        limit, used = ((groups / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return max(free, 0)
