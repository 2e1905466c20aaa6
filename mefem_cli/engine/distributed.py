"""Several processes train as one: which part of a batch is whose, sums over all, and one voice.

Every process draws the order and the masks of the whole global batch and takes its slice, so that one process and many
see the same. CPU tensors travel over gloo, CUDA tensors over NCCL.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from mefem_cli import console
from mefem_cli.engine import launch
from mefem_cli.errors import Diverged, MefemError, Stopped, UsageError
from mefem_cli.stores.runs import Run

T = TypeVar("T")
SILENCE_MINUTES = 30  # a process that says nothing for so long counts as lost
COMMON_ERRORS = (Diverged, Stopped, KeyboardInterrupt)  # all processes raise them together, and the first one speaks


class PeerLost(MefemError):
    """Another process of the job has ended."""


@dataclass(frozen=True)
class World:
    """This process among those of its job; alone by default, and then every method is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """Return this process's part of `total` things; the parts follow each other and differ by one at most."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes of a tensor that has the same shape in all of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each number over processes. It waits for the processes, never for a GPU."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers.tolist()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Return the first process's value."""
        return self.gather(value)[0]

    def merge(self, mine: dict[int, T]) -> dict[int, T]:
        """Return the union of every process's entries in the order of their keys, as one process would have made it.

        For work cut into numbered pieces, of which process r does those with `number % size == r`.
        """
        return dict(sorted(item for entries in self.gather(mine) for item in entries.items()))

    def agree(self, make: Callable[[], T]) -> T:
        """Return `make()`. Where it fails in one process it fails in all, and the first that failed says why."""
        error: Exception | None = None
        try:
            result = make()
        except Exception as caught:
            error = caught
            if self.size > 1:  # a launcher stops the others when the first has ended, also the one that has to speak
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        codes = self.gather(exit_code(error) if error else 0)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None:
            return result
        if error is not None and failed == self.rank:
            raise error
        raise SystemExit(codes[failed])

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return the objective with gradients averaged over processes during its backward pass."""
        if self.size == 1:
            return objective
        # Buffers are constants (positions, means, weights of the loss). Newer torch has another name for the option.
        names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True}
        return nn.parallel.DistributedDataParallel(objective, **options)


class ReadOnlyRun(Run):
    """A run folder as all processes but the first see it: what they write goes nowhere."""

    def log(self, message: str) -> None:
        """Say nothing."""

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Write nothing."""

    def truncate_metrics(self, step: int) -> None:
        """Drop nothing."""


def world() -> World:
    """Return this process's place among those that have joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def join(rank: int, size: int, meeting_point: str, cuda: bool = False) -> World:
    """Meet the other processes at a `tcp://host:port` or `file:///path`."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=SILENCE_MINUTES),
    )
    return world()


@contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """Join the job that torchrun or Slurm started this process for, if any.

    The first process speaks for all; the others say nothing but errors that are theirs alone.
    """
    place = launch.place()
    if place.size == 1:
        yield World()
        return
    if place.rank > 0:
        console.configure(console.ConsoleOptions(quiet=True))
    try:
        yield join(place.rank, place.size, f"tcp://{place.address}:{place.port}", cuda=_use_device(place, device))
    except BaseException as error:
        _end(place, error)
    if place.rank == 0:
        launch.write_status(0)
    dist.destroy_process_group()


def _use_device(place: launch.Place, device: str) -> bool:
    """Give each process of a machine its own GPU, or its share of the cores. Return whether it is a GPU."""
    if device == "cpu" or not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
        return False
    if device not in ("auto", "cuda"):
        raise UsageError(f"--device {device}: {place.size} processes take a GPU each; type --device cuda")
    visible = torch.cuda.device_count()  # 1 where Slurm shows each task its own
    if place.local_rank >= visible > 1 or (visible == 1 < place.local_size and launch.is_launched()):
        raise UsageError(f"--gpus {place.local_size}: this machine has {visible} CUDA devices; type --gpus {visible}")
    torch.cuda.set_device(place.local_rank % visible)
    return True


def exit_code(error: BaseException) -> int:
    """Return the code that the program ends with after an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, MefemError) else 1


def _end(place: launch.Place, error: BaseException) -> NoReturn:
    """Raise the error where it is this process's to tell, else end silently with its code."""
    if _is_lost_peer(error):
        if place.rank == 0 and not launch.is_launched():
            raise PeerLost("another process of this job ended, so it stops; go on with --resume") from error
        raise SystemExit(PeerLost.exit_code) from error
    if place.rank == 0:
        launch.write_status(exit_code(error))
    elif isinstance(error, COMMON_ERRORS):
        raise SystemExit(exit_code(error)) from None
    raise error


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed; gloo raises plain RuntimeErrors with its source file's path in the text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
