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
from typing import Any, Protocol

from mefem_cli.errors import UsageError

LOCAL = "local"
Done = Callable[[Any, Any], None]  # of an item and its result


@dataclass(frozen=True)
class OnOptions:
    """Where it runs."""

    on: str = LOCAL  # local: this machine; ray: the Ray cluster that this machine belongs to, else one of its own;
    # ray://HOST:PORT: one through its client port; ray:HOST:PORT: one by its address

    def __post_init__(self) -> None:
        name, _, address = self.on.partition(":")
        if self.on in (LOCAL, "ray"):
            return
        if name != "ray" or not address.removeprefix("//"):
            raise UsageError(f"--on {self.on}: wanted local, ray, ray://HOST:PORT or ray:HOST:PORT")

    @property
    def is_local(self) -> bool:
        """Whether all runs on this machine, without Ray."""
        return self.on == LOCAL


@dataclass(frozen=True)
class PartsOptions(OnOptions):
    """Parts elsewhere."""

    parts: int | None = None  # with --on: cut the work into so many parts; default: one for each machine of the cluster

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is not None and self.parts < 1:
            raise UsageError(f"--parts {self.parts}: wanted 1 or more")
        if self.parts is not None and self.is_local:
            raise UsageError(f"--parts {self.parts}: says how to cut work for --on ray; add that")


class Launch(Protocol):
    """Runs commands for one item."""

    def __call__(self, words: Sequence[str], log: Any, lock: int | None = None) -> int:
        """Run `mefem WORDS` to its end and return its exit code; its stderr goes to the file `log`.

        `lock`: a file descriptor that the process keeps open, so that a lock on it is held as long as it lives.
        """

    def wait(self, seconds: float) -> None:
        """Sleep; raises Stopping where the work is to end."""


Work = Callable[[Any, Launch], Any]


class Executor(Protocol):
    """A place that runs pieces of work."""

    def run(self, work: Work, items: Sequence[Any], done: Done) -> None:
        """Do the work on each item, begun in their order, and call `done` in this thread with each result.

        On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP what is at work gets SIGTERM and a minute to save what it has; then
        KeyboardInterrupt or Stopped is raised.
        """


class Stopping(Exception):
    """The whole is being stopped; this piece of work has no result."""


def open_executor(options: OnOptions, jobs: int | None, gpus: Sequence[str], wants_gpu: bool) -> Executor:
    """Return the executor for `--on`, `jobs` pieces of work at once (None: as many as it has room for).

    `gpus` are those of this machine; `wants_gpu`: a piece of work on Ray gets one if the cluster has some.
    """
    if options.is_local:
        from mefem_cli.executors.local import Local

        return Local(jobs or len(gpus) or 1, list(gpus))
    from mefem_cli.executors.on_ray import OnRay

    return OnRay(options.on, jobs, wants_gpu)
