"""Pieces of work as tasks of a Ray cluster: done again elsewhere when a machine is lost.

A task gets a GPU if the cluster has some, and a share of the cores. Its state lies in files, on a file system that all
machines share; an attempt whose machine is gone leaves its lock, and the next one goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mefem_cli import __version__, console
from mefem_cli.errors import MefemError, NoInputError, OutputError, UsageError
from mefem_cli.executors import Done, Lost, Work
from mefem_cli.executors.local import Launcher, environment, stop_signals
from mefem_cli.executors.options import OnOptions
from mefem_cli.executors.processes import STOP_SECONDS, Processes

MOST_ATTEMPTS = 10  # of a piece of work whose machines are lost, or run out of memory
WAIT_SECONDS = 1.0  # so often a signal is noticed
CONNECT_SECONDS = 5.0  # for a cluster to answer
ALIVE, CPU, GPU = "Alive", "CPU", "GPU"


class OnRay:
    """A Ray cluster: that of an address, else the one that this machine belongs to, else one of this machine alone."""

    def __init__(self, where: str, jobs: int | None, wants_gpu: bool, shared: Path):
        """`shared` is a file that all machines must see. Raises NoInputError where Ray or the cluster is missing."""
        self._jobs, self._shared = jobs, shared.absolute()
        OnOptions(where).require_ray()
        import ray

        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            self._connect(where)
        machines = [one["Resources"] for one in ray.nodes() if one[ALIVE]]
        self.num_machines = len(machines)
        self.resources = task_resources(machines, jobs, wants_gpu)

    def _connect(self, where: str) -> None:
        address = where if where.startswith("ray://") else where.partition(":")[2] or None
        refuse_silence(where, address or os.environ.get("RAY_ADDRESS") or _last_cluster())
        try:
            self._ray.init(address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise NoInputError(f"--on {where}: no Ray cluster answers there ({reason}); see ray status") from error

    def run(self, work: Work, items: Sequence[Any], done: Done) -> None:
        """Do the work as tasks; see `executors.Executor`."""
        ray = self._ray
        cores = int(self.resources["num_cpus"])
        options = {**self.resources, "max_retries": MOST_ATTEMPTS - 1, "retry_exceptions": False, "max_calls": 0}
        task = ray.remote(**options)(_attempt)
        given = (work, cores, os.getcwd(), self._shared, __version__)
        waiting, at_work = list(items), dict[Any, Any]()
        with stop_signals():
            try:
                while waiting or at_work:
                    while waiting and (self._jobs is None or len(at_work) < self._jobs):
                        item = waiting.pop(0)
                        at_work[task.remote(item, *given)] = item
                    ready, _ = ray.wait(list(at_work), timeout=WAIT_SECONDS)
                    for reference in ready:
                        done(at_work.pop(reference), self._result(reference))
            except BaseException:
                self._stop(list(at_work))
                raise
            finally:
                if self._is_ours:
                    ray.shutdown()

    def _result(self, reference: Any) -> Any:
        """Return what a task returned, or that it is lost. Raises MefemError where a machine is not fit for any."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, MefemError):
                raise cause from error
            if isinstance(cause, ModuleNotFoundError):
                raise NoInputError(f"a machine of the cluster lacks a module ({cause}); install mefem there") from error
            raise
        except self._ray.exceptions.RayError as error:
            return Lost(f"lost by Ray: {' '.join(str(error).split())[:300]}")

    def _stop(self, references: list[Any]) -> None:
        """Cancel tasks, which stop their commands first, and wait for them."""
        for reference in references:
            self._ray.cancel(reference)
        if references:
            with contextlib.suppress(KeyboardInterrupt):  # pressed again: now
                self._ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)


def refuse_silence(where: str, address: str) -> None:
    """Raise NoInputError where nothing listens at HOST:PORT, as Ray itself would go on trying for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # none is named, or in words of Ray, such as `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise NoInputError(
            f"--on {where}: no Ray cluster answers at {address} ({reason}); see ray status, "
            "or type ray stop where it was a cluster of this machine that is gone"
        ) from error


def _last_cluster() -> str:
    """Return the address of the cluster that was last started on this machine, as Ray looks it up, or an empty text."""
    try:
        return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def task_resources(machines: Sequence[Mapping[str, float]], jobs: int | None, wants_gpu: bool) -> dict[str, float]:
    """Return cores and GPUs of a task, from the resources of each machine.

    With GPUs one each, and an equal share of the cores of the machine that has fewest for each GPU; else the cores of
    the smallest machine, or of `jobs` tasks at once an equal share of all, as far as they fit into a machine.

    >>> task_resources([{"CPU": 8, "GPU": 2}, {"CPU": 16}], None, True)
    {'num_cpus': 4, 'num_gpus': 1}
    >>> task_resources([{"CPU": 8}, {"CPU": 16}], None, True)
    {'num_cpus': 8}
    >>> task_resources([{"CPU": 8}, {"CPU": 16}], 12, True)
    {'num_cpus': 2}
    """
    with_gpus = [one for one in machines if one.get(GPU)]
    if wants_gpu and with_gpus:
        return {"num_cpus": max(1, int(min(one.get(CPU, 0) // one[GPU] for one in with_gpus))), "num_gpus": 1}
    cores = sorted(int(one[CPU]) for one in machines if one.get(CPU, 0) >= 1)
    if not cores:
        raise UsageError("--on ray: no machine of the cluster offers cores; see ray status")
    share = cores[0] if jobs is None else min(cores[-1], sum(cores) // jobs)
    return {"num_cpus": max(1, share)}


# In a worker of the cluster -----------------------------------------------------------------------------------------

_processes: Processes | None = None  # kept for this worker's next task, as its server takes seconds to start


def _attempt(item: Any, work: Work, cores: int, folder: str, shared: Path, version: str) -> Any:
    """Do a piece of work on this machine."""
    global _processes
    if version != __version__:
        raise UsageError(f"{socket.gethostname()} has mefem {__version__}, you have {version}; install the same")
    if not shared.exists():
        raise OutputError(
            f"{socket.gethostname()} does not see {shared}; it must lie where every machine of the cluster has it"
        )
    with contextlib.suppress(OSError):  # paths in options are relative to the folder of the one who typed them
        os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    console.configure(console.ConsoleOptions(quiet=True))
    if _processes is None or _processes.is_stopping:
        _processes = Processes(environment(1))
    return work(item, Launcher(_processes, os.environ.get("CUDA_VISIBLE_DEVICES")))
