"""Where pieces of work run: on this machine side by side, or on a Ray cluster.

A piece of work is a function `work(item, launch)` of a module, and picklable items: `Executor.run` calls it once for
each, as many at once as there is room for, and hands the results on as they come. What takes long in it goes through
`launch(words, log)`: a `mefem` command as a process of its own (see `processes.py`), whose death takes nothing else
down. An item may be done again, when a machine is lost or the whole is started anew, so the work lies in files and
takes a lock on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Done = Callable[[Any, Any], None]  # of an item and its result


class Launch(Protocol):
    """Runs commands for one item."""

    def __call__(self, words: Sequence[str], log: Path, lock: int | None = None) -> int:
        """Run `mefem WORDS` to its end and return its exit code; its stderr goes to the file `log`.

        `lock`: a file descriptor that the process keeps open, so that a lock on it is held as long as it lives.
        """

    def wait(self, seconds: float) -> None:
        """Sleep; raises Stopping where the work is to end."""


Work = Callable[[Any, Launch], Any]


class Executor(Protocol):
    """A place that runs pieces of work."""

    def run(self, work: Work, items: Sequence[Any], done: Done) -> None:
        """Do the work on each item, begun in their order, and call `done` in this thread with each result or Lost.

        On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP what is at work gets SIGTERM and a minute to save what it has; then
        KeyboardInterrupt or Stopped is raised.
        """


@dataclass(frozen=True)
class Lost:
    """Instead of a result: the machines that were to do it were lost, again and again."""

    reason: str


class Stopping(Exception):
    """The whole is being stopped; this piece of work has no result."""
