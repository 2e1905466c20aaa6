"""Pieces of work side by side on this machine, each in a slot with a GPU of its own if there are any."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mefem_cli.errors import Stopped
from mefem_cli.executors import Done, Stopping, Work
from mefem_cli.executors.processes import Processes


class Launcher:
    """Runs commands in one slot."""

    def __init__(self, processes: Processes, gpu: str | None = None):
        self._processes = processes
        self._environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}

    def __call__(self, words: Sequence[str], log: Path, lock: int | None = None) -> int:
        """Run a command; see `executors.Launch`."""
        return self._processes.run(words, log, self._environment, lock)

    def wait(self, seconds: float) -> None:
        """Sleep, unless all is to end."""
        if self._processes.is_stopping:
            raise Stopping
        time.sleep(seconds)


class Local:
    """This machine."""

    def __init__(self, jobs: int, gpus: list[str]):
        self.jobs, self.gpus = jobs, gpus

    def run(self, work: Work, items: Sequence[Any], done: Done) -> None:
        """Do the work in `jobs` threads; see `executors.Executor`."""
        processes = Processes(environment(self.jobs))
        slots: queue.Queue[str | None] = queue.Queue()
        for slot in range(self.jobs):
            slots.put(self.gpus[slot % len(self.gpus)] if self.gpus else None)

        def in_a_slot(item: Any) -> Any:
            gpu = slots.get()
            try:
                return work(item, Launcher(processes, gpu))
            finally:
                slots.put(gpu)

        pool = ThreadPoolExecutor(self.jobs)
        with stop_signals():
            try:
                futures = {pool.submit(in_a_slot, item): item for item in items}
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                processes.stop()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                processes.close()


def environment(jobs: int) -> dict[str, str]:
    """Return the environment of commands of which `jobs` run at once: their share of the cores, and no options.

    An option in a variable such as MEFEM_PROBE_HEAD would change a product behind the back of its key.
    """
    options = ("MEFEM_CROP_", "MEFEM_PRETRAIN_", "MEFEM_EMBED_", "MEFEM_PROBE_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(options)}
    found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    return found


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(device: str = "auto") -> list[str]:
    """Return the NVIDIA GPUs that commands on `device` may be spread over, as CUDA_VISIBLE_DEVICES names them.

    Asked of the driver's own tool, as importing torch would cost seconds and a GPU context.
    """
    if device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one.strip() for one in visible.split(",") if one.strip() not in ("", "-1")]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise Stopped on SIGTERM, SIGUSR1 and SIGHUP, so that work is stopped first; Ctrl-C raises by itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; run the same command again to go on")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
