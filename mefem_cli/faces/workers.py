"""Processes that may die: chunks of work spread over all cores, where a crash costs one item and not the run.

Image codecs and detectors are native code, and some files kill them; the kernel kills whoever takes too much memory.
A chunk whose process died is tried again item by item; an item whose process dies once more is reported as `Died`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from mefem_cli.errors import MefemError

# A fresh server process forks the workers: quick to start, and free of the parent's threads and open files.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# One process per core wants one thread per process. And memory that one picture leaves is for the next one: by default
# glibc gives megabytes back to the kernel, which clears every page anew; that took 6 % of the time.
WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes; the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
PATIENCE_SECONDS = 5.0  # for a worker to end after it was told to


@dataclass(frozen=True)
class Died:
    """Stands for the result of an item that ended its process; `how` says by which signal or exit code."""

    how: str


@dataclass(frozen=True)
class _Piece:
    """Some items; a second try has one item, from a piece that ended its process."""

    items: list[Any]
    is_second_try: bool = False


@dataclass(frozen=True)
class _Answer:
    """What a worker sends: that it is ready (nothing set), the results of a piece, or an exception."""

    results: list[Any] | None = None
    error: Exception | None = None
    trace: str = ""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    piece: _Piece | None = None  # what it works on
    is_ready: bool = False  # its task is made


def run_chunks(
    make_task: Callable[[], Any], chunks: Iterable[list[Any]], num_workers: int
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield (chunk, results) as chunks finish, in any order; a result is what the task returned, or `Died`.

    Each process calls `make_task()` once (a picklable callable), then `task(chunk)`, which returns one result per
    item, and `task.close()` at its end. An exception in a task ends the run and rises here.
    """
    fresh, again = iter(chunks), deque[_Piece]()
    workers: list[_Worker] = []
    try:
        while True:
            _employ(workers, num_workers, make_task, fresh, again)
            busy = {id(worker.connection): worker for worker in workers if worker.piece is not None}
            if not busy:
                return
            for connection in wait([worker.connection for worker in busy.values()]):
                worker = busy[id(connection)]
                piece, answer = worker.piece, _receive(worker)
                assert piece is not None
                if answer is None:
                    workers.remove(worker)
                    if piece.is_second_try:
                        yield piece.items, [Died(_how_it_ended(worker.process))]
                    else:
                        again += [_Piece([item], is_second_try=True) for item in piece.items]
                elif answer.results is not None:
                    worker.piece = None
                    yield piece.items, answer.results
    finally:
        _stop(workers)


def _employ(
    workers: list[_Worker],
    num_workers: int,
    make_task: Callable[[], Any],
    fresh: Iterator[list[Any]],
    again: deque[_Piece],
) -> None:
    """Give every worker something to do, as long as there is something; start workers up to their number."""
    while True:
        idle = next((worker for worker in workers if worker.piece is None), None)
        if idle is None and len(workers) >= num_workers:
            return
        chunk = None if again else next(fresh, None)
        if not again and chunk is None:
            return
        worker = idle or _start(make_task, workers)
        worker.piece = again.popleft() if again else _Piece(chunk or [])
        with suppress(BrokenPipeError):  # it died between pieces: receiving tells
            worker.connection.send(worker.piece.items)


def _start(make_task: Callable[[], Any], workers: list[_Worker]) -> _Worker:
    context: Any = multiprocessing.get_context(START_METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make_task), daemon=True)
    with _interrupts_held(), _worker_environment():
        process.start()
    theirs.close()  # so that the worker's death is the end of the connection
    workers.append(_Worker(process, ours))
    return workers[-1]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let processes that start meanwhile never see Ctrl-C, which a terminal sends to all; the parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Set the variables that libraries read when they load."""
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _receive(worker: _Worker) -> _Answer | None:
    """Return what a worker says, None if its process died. Raises what its task raised."""
    try:
        answer: _Answer = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        if not worker.is_ready:
            raise MefemError(f"a worker process died while it started: {_how_it_ended(worker.process)}") from None
        return None
    worker.is_ready = True
    if answer.error is not None:
        answer.error.add_note(answer.trace)
        raise answer.error
    return answer


def _work(connection: Connection, make_task: Callable[[], Any]) -> None:
    """The life of a worker: one task, chunk after chunk, until the parent closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = None
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        try:
            task = make_task()
            connection.send(_Answer())
            while True:
                connection.send(_Answer(task(connection.recv())))
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise
        except Exception as error:
            connection.send(_Answer(error=error, trace=traceback.format_exc()))
        finally:
            if task is not None:
                task.close()


def _how_it_ended(process: Any) -> str:
    process.join(PATIENCE_SECONDS)
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


def _stop(workers: list[_Worker]) -> None:
    """End all workers: idle ones by closing their connection, busy ones (an error, Ctrl-C) at once."""
    for worker in workers:
        if worker.piece is not None:
            worker.process.terminate()
        worker.connection.close()
    for worker in workers:
        worker.process.join(PATIENCE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def available_cores() -> int:
    """Return how many cores this process may use, which in a container may be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
