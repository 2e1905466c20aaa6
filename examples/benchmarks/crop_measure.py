"""What the sections of crop.py share: tables, intervals, and commands whose processes are watched."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEBI = 1 << 20
INTERVAL_SECONDS = 0.1  # between two looks at the processes of a command
Z = 1.959964  # of a 95 % interval


class Skipped(Exception):
    """A section that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where a benchmark reads and writes."""

    shared: Path  # the folder with `data/`
    work: Path  # a temporary folder, emptied at the end
    num_paths: int  # for the listing
    num_inputs: int  # for the memory

    def data(self, name: str) -> Path:
        """Return a folder of test data. Raises Skipped where it is absent."""
        folder = self.shared / "data" / name
        if not folder.is_dir():
            raise Skipped(f"there is no {folder}")
        return folder

    def folder(self, name: str) -> Path:
        """Return a new empty folder below the temporary one."""
        folder = self.work / name
        folder.mkdir(parents=True)
        return folder


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a Markdown table; floats with three significant digits."""
    cells = [list(header), *([_shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    print("\n".join([f"| {lines[0]} |", f"|{'|'.join('-' * (width + 2) for width in widths)}|"]))
    print("".join(f"| {line} |\n" for line in lines[1:]), flush=True)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (E. B. Wilson, 1927).

    >>> [round(end, 3) for end in wilson(58, 61)]
    [0.865, 0.983]
    """
    if not trials:
        return 0.0, 1.0
    share = successes / trials
    middle = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / (1 + Z**2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(successes: int, trials: int) -> str:
    """Return `58/61 = .951 (.865 ... .983)`."""
    low, high = wilson(successes, trials)
    return f"{successes}/{trials} = {successes / max(trials, 1):.3f} ({low:.3f} ... {high:.3f})"


def load() -> str:
    """Say how busy the machine is: a figure of wall time means little where it is."""
    one, five, _ = os.getloadavg()
    return f"load {one:.1f} (1 min), {five:.1f} (5 min) on {len(os.sched_getaffinity(0))} cores"


@dataclass
class Watched:
    """What a command and its processes took."""

    wall: float = 0.0  # s
    cpu: float = 0.0  # s, of all its processes, up to 0.1 s before the end of each
    parent_peak: int = 0  # bytes of resident memory, pages shared with others included
    worker_peak: int = 0  # the largest of the other processes
    samples: list[tuple[float, int, int, Any]] = field(default_factory=list)  # s, parent, largest worker, `look()`
    output: str = ""


def mefem_crop(
    *arguments: str | os.PathLike[str], cores: int | None = None, look: Callable[[], Any] | None = None
) -> Watched:
    """Run `mefem crop` quietly and watch it; see `watch`."""
    return watch([sys.executable, "-m", "mefem_cli", "crop", "-q", *map(os.fspath, arguments)], cores, look)


def watch(
    command: Sequence[str],
    cores: int | None = None,
    look: Callable[[], Any] | None = None,
    stderr: int | None = None,
) -> Watched:
    """Run a command on the first `cores` cores; at each look at its processes `look()` is noted too.

    Raises RuntimeError where the command fails; exit code 3 of `mefem crop` (too few faces) is none.
    """
    if not Path("/proc/self/stat").exists():
        raise Skipped("processes are watched through /proc, which only Linux has")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    watcher = _Watcher(process.pid, look)
    thread = threading.Thread(target=watcher.run, daemon=True)
    thread.start()
    output, _ = process.communicate()
    wall = time.monotonic() - begun
    watcher.is_over = True
    thread.join()
    if process.returncode not in (0, 3):
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    watcher.result.wall, watcher.result.cpu, watcher.result.output = wall, sum(watcher.cpu.values()), output.strip()
    return watcher.result


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class _Watcher:
    """Looks at a process and its descendants until `is_over`."""

    def __init__(self, root: int, look: Callable[[], Any] | None):
        self.root, self.look, self.is_over = root, look, False
        self.result = Watched()
        self.cpu: dict[int, float] = {}  # by process, s

    def run(self) -> None:
        begun = time.monotonic()
        while not self.is_over:
            resident = self._look_at_processes()
            parent = resident.pop(self.root, 0)
            worker = max(resident.values(), default=0)
            self.result.parent_peak = max(self.result.parent_peak, parent)
            self.result.worker_peak = max(self.result.worker_peak, worker)
            if self.look is not None:
                self.result.samples.append((time.monotonic() - begun, parent, worker, self.look()))
            time.sleep(INTERVAL_SECONDS)

    def _look_at_processes(self) -> dict[int, int]:
        """Return the resident bytes of each process; note the time it has used."""
        found = {int(name): status for name in os.listdir("/proc") if name.isdigit() and (status := _status(name))}
        family, size = {self.root}, 0
        while len(family) > size:
            size = len(family)
            family |= {number for number, status in found.items() if int(status[1]) in family}
        for number in family & set(found):
            self.cpu[number] = (int(found[number][11]) + int(found[number][12])) / TICKS
        return {number: int(found[number][21]) * PAGE for number in family & set(found)}


def _status(process: str) -> list[str]:
    """Return the fields of /proc/N/stat from the third one on; none where the process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
