"""Stops on request: a signal is noted, the loop finishes its step, saves a checkpoint and raises."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mefem_cli.errors import Interrupted, Stopped
from mefem_cli.stores.runs import Run

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Which signal asked for a stop; 0 if none did."""

    signal: int = 0

    def error(self, run: Run) -> BaseException:
        """Return what to raise once the checkpoint is saved."""
        run.log(f"stopped by signal {self.signal} after saving {run.checkpoint_path.name}")
        again = f"go on with mefem pretrain --resume -o {shlex.quote(str(run.path))}"
        if self.signal == signal.SIGINT:
            return Interrupted(f"stopped by Ctrl-C with a checkpoint saved; {again}")
        return Stopped(f"stopped by {signal.Signals(self.signal).name} with a checkpoint saved; {again}")


@contextmanager
def stop_signals(in_a_job: bool = False) -> Iterator[Stop]:
    """Note SIGTERM, SIGUSR1 and the first Ctrl-C instead of dying.

    In a job of several processes the launcher may repeat a signal when it reaches some of them sooner; once a stop is
    under way such repeats are ignored, as they must not keep a process from ending with its own exit code.
    """
    stop = Stop()

    def take_note(number: int, frame: FrameType | None) -> None:
        if stop.signal == signal.SIGINT and number == signal.SIGINT and not in_a_job:
            raise KeyboardInterrupt  # pressed twice: now
        stop.signal = number

    before = {number: signal.signal(number, take_note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if in_a_job and stop.signal else handler)
