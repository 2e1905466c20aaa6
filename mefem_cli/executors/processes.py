"""Commands as processes of their own that begin at once.

Importing torch takes seconds, which three steps of each of many cells would all pay. So a server of our own (see
`warm.py`) imports everything once, and each command is a fork of it: as much on its own as a process that was started
anew, and there within milliseconds. When the process that asked is gone, even by SIGKILL, the server stops its
commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mefem_cli.executors import Stopping

STOP_SECONDS = 60.0  # a command that was asked to stop may take so long to save a checkpoint
POLL_SECONDS = 0.5  # so often Ray's cancellation of a task is noticed
PROGRAM: tuple[str, ...] = ()  # run instead of mefem itself: for tests
LOST = -int(signal.SIGKILL)  # the exit code of a command whose server is gone with it


class Processes:
    """Starts commands, each in a fork of a server, and stops them; for any number of threads."""

    def __init__(self, environment: Mapping[str, str]):
        """`environment` is that of all commands."""
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._server: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._running: set[int] = set()  # process ids
        self._stopping = False

    def run(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, lock: int | None = None
    ) -> int:
        """Run `mefem WORDS` to its end and return its exit code, negative for a signal; its stderr goes to `log`.

        Raises Stopping once `stop` was called. Any exception in this thread, such as Ctrl-C, stops the command first.
        """
        status, status_end = os.pipe()
        try:
            with log.open("wb") as stderr:
                descriptors = [status_end, stderr.fileno(), *([lock] if lock is not None else [])]
                with self._lock:
                    if self._stopping:
                        raise Stopping
                    self._ask({"words": list(words), "environment": dict(environment or {})}, descriptors)
            os.close(status_end)
            status_end = -1
            code = self._follow(status)
            if self._stopping:  # it ended because of that, or is not to be followed by another one
                raise Stopping
            return code
        finally:
            for descriptor in (status, status_end):
                if descriptor >= 0:
                    os.close(descriptor)

    def stop(self) -> None:
        """Send SIGTERM to the commands at work and wait for them; after a minute, or another Ctrl-C, SIGKILL."""
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + STOP_SECONDS
        self._signal_all(signal.SIGTERM)
        try:
            while self._running and time.monotonic() < deadline:
                time.sleep(0.05)
        except KeyboardInterrupt:
            pass
        finally:
            self._signal_all(signal.SIGKILL)

    def close(self) -> None:
        """End the server; it stops what is still at work."""
        with self._lock:
            if self._server is not None:
                process, connection = self._server
                connection.close()
                process.wait()
                self._server = None

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def _ask(self, request: Mapping[str, object], descriptors: list[int]) -> None:
        """Send a request to the server, started where there is none."""
        if self._server is not None and self._server[0].poll() is not None:
            self._server[1].close()
            self._server = None
        if self._server is None:
            self._server = self._start_server()
        content = json.dumps({**request, "program": PROGRAM}).encode()
        connection = self._server[1]
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], descriptors)
        connection.sendall(content)

    def _start_server(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "mefem_cli.executors.warm", str(theirs.fileno())]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C reaches the commands through us only, once
            )
        return process, ours

    def _follow(self, status: int) -> int:
        """Wait for a command and return its exit code."""
        command = _Command(status)
        try:
            while command.code is None:
                if command.listen() and command.pid not in self._running:
                    self._running.add(command.pid)
                    if self._stopping:  # it was not there yet when all were told
                        _signal(command.pid, signal.SIGTERM)
            return command.code
        except BaseException:
            self._stopping = True
            deadline = time.monotonic() + STOP_SECONDS
            told = command.pid
            _signal(told, signal.SIGTERM)
            while command.code is None and time.monotonic() < deadline:
                if command.listen() and not told:
                    told = command.pid
                    _signal(told, signal.SIGTERM)
            if command.code is None:
                _signal(command.pid, signal.SIGKILL)
            raise
        finally:
            self._running.discard(command.pid)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in list(self._running):
            _signal(pid, number)


class _Command:
    """What the server tells of a command: its process id, then its exit code."""

    def __init__(self, status: int):
        self.pid = 0  # not there yet
        self.code: int | None = None
        self._status, self._received = status, b""

    def listen(self) -> bool:
        """Wait for half a second at most; return whether the process is there."""
        if select.select([self._status], [], [], POLL_SECONDS)[0]:
            content = os.read(self._status, 100)
            self._received += content
            lines = self._received.split(b"\n")[:-1]
            self.pid = int(lines[0]) if lines else 0
            if len(lines) == 2 or not content:
                self.code = int(lines[1]) if len(lines) == 2 else LOST
        return self.pid != 0


def _signal(pid: int, number: signal.Signals) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
