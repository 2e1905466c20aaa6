"""The server behind `processes.py`: it imports what the commands need, once, and forks for each of them.

Run as `python -m mefem_cli.executors.warm FD`, a socket on which requests come: 8 bytes that say how long the JSON is
that follows, and with them the descriptors of the pipe for process id and exit code, of the log, and of what else the
command is to keep open. When the socket is closed, the commands get SIGTERM and the server ends with the last of them.
It has one thread and starts none (those of OpenBLAS and jemalloc know how to live through a fork), and uses no GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

MODULES = (
    "mefem_cli.main",
    "mefem_cli.commands.pretrain",
    "mefem_cli.commands.embed",
    "mefem_cli.commands.probe",
    "mefem_cli.pretraining",
    "mefem_cli.objectives.mefem",
    "mefem_cli.embedding",
    "mefem_cli.evaluation.job",
    "mefem_cli.evaluation.report",
    "mefem_cli.evaluation.saved",
    "mefem_cli.probes.linear",
    "mefem_cli.probes.mlp",
    "mefem_cli.probes.attentive",
    "mefem_cli.reports.probe",
    "mefem_cli.reports.plan",
    "sklearn.linear_model",
)
COMMANDS = ("pretrain", "embed", "probe")  # that need them
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # prctl(2)
MOST_DESCRIPTORS = 8


@dataclass(frozen=True)
class Request:
    """A command to run in this process, which was forked for it."""

    words: list[str]
    environment: dict[str, str]
    program: list[str]  # to run it with instead of mefem itself
    log: int


def serve(connection: socket.socket) -> Request | None:
    """Fork for each request and return it in the child; return None when there is nothing more to wait for."""
    server = os.getpid()
    wake, wake_end = os.pipe()
    os.set_blocking(wake_end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    pipes: dict[int, int] = {}  # process id -> where its exit code goes
    is_open = True
    while is_open or pipes:
        sources: list[int | socket.socket] = [wake, connection] if is_open else [wake]
        readable = select.select(sources, [], [])[0]
        if wake in readable:
            os.read(wake, 1024)
            _report_ended(pipes)
        if connection in readable:
            received = _receive(connection)
            if received is None:
                is_open = False
                for pid in pipes:
                    os.kill(pid, signal.SIGTERM)
                continue
            content, (status, log, *kept) = received
            if content["words"][0] in COMMANDS and not content["program"]:
                _import_all()
            pid = os.fork()
            if pid == 0:
                _become_a_command(server, [wake, wake_end, connection.detach(), status, *pipes.values()])
                return Request(content["words"], content["environment"], content["program"], log)
            os.write(status, b"%d\n" % pid)
            pipes[pid] = status
            for descriptor in (log, *kept):
                os.close(descriptor)
    return None


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return a request with its descriptors, None when the other side is gone."""
    try:
        header, descriptors, _, _ = socket.recv_fds(connection, 8, MOST_DESCRIPTORS)
        if len(header) < 8:
            return None
        length, content = int.from_bytes(header, "big"), b""
        while len(content) < length:
            received = connection.recv(length - len(content))
            if not received:
                return None
            content += received
    except ConnectionError:
        return None
    return json.loads(content), descriptors


def _report_ended(pipes: dict[int, int]) -> None:
    """Write the exit codes of the children that have ended."""
    while pipes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(pipes[pid], b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(pipes.pop(pid))


def _become_a_command(server: int, descriptors: list[int]) -> None:
    """Leave the server behind: its session, signals and descriptors; if it is killed, this process gets SIGTERM."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != server:  # gone before it was asked for
            os.kill(os.getpid(), signal.SIGTERM)
    for descriptor in descriptors:
        os.close(descriptor)


def _run(request: Request) -> None:
    """Run the command; does not return."""
    os.environ.update(request.environment)
    os.dup2(request.log, 2)
    os.close(request.log)
    if request.program:
        os.execv(request.program[0], [*request.program, *request.words])
    sys.argv = ["mefem", *request.words]
    if sys.platform == "linux":  # what `top` shows, 15 characters
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"mefem {request.words[0]}".encode())
    from mefem_cli.main import main

    try:
        main()
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else 0)


def _end(code: int) -> NoReturn:
    """End as Python does but for freeing every object: that would copy all memory that is shared with the server.

    It takes a second and a half, where a command that does nothing takes 0.15 s. Threads are joined and exit functions
    run, as `multiprocessing` does in its forks.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _import_all() -> None:
    """Import what commands need, where a process may be forked after that: on macOS its frameworks may not."""
    if sys.platform == "linux":
        for name in MODULES:
            importlib.import_module(name)
        gc.freeze()  # a collection in a fork would copy the pages of all these objects


if __name__ == "__main__":
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        _end(0)
    _run(request)
