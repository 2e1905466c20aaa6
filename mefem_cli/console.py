"""stdout carries the product and nothing else; stderr carries notes, progress and errors."""

from __future__ import annotations

import json as json_module
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli.errors import NoInputError

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_LINE_SECONDS = 30.0  # progress without a terminal: one line so often
PIPE_NOTICE_SECONDS = 2.0  # waiting on a pipe is silent for so long


@dataclass(frozen=True)
class ConsoleOptions:
    """How a command talks."""

    quiet: bool = False  # say nothing on stderr but errors
    json: bool = False  # print JSON on stdout
    config: str | None = None  # read options from a YAML file; flags and MEFEM_* variables win over it
    debug: bool = False  # show the traceback of an error


@dataclass
class _State:
    quiet: bool = False
    json: bool = False


_state = _State()


def configure(options: ConsoleOptions) -> None:
    """Set once per command what `note`, `progress` and `product` do."""
    _state.quiet = options.quiet
    _state.json = options.json


def wants_json() -> bool:
    """Return whether the command was asked for JSON."""
    return _state.json


def note(message: str) -> None:
    """Tell the user something on stderr, unless `--quiet`."""
    if not _state.quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Warn on stderr, unless `--quiet`."""
    note(f"warning: {message}")


def product(path: Path, seconds: float, **counts: Any) -> None:
    """Print the absolute path of a complete product as the only stdout line, or with `--json` one object."""
    if _state.json:
        emit({"out": str(path.absolute()), "seconds": round(seconds, 3), **counts})
    else:
        _print(str(path.absolute()))


def emit(row: dict[str, Any]) -> None:
    """Print one JSON object on one line of stdout; NaN becomes null, as JSON has no NaN."""
    _print(json_module.dumps(_without_nan(row), ensure_ascii=True, allow_nan=False))


def _print(line: str) -> None:
    """Print a line on stdout. If nobody reads it, as in `| head -0`, the product is there all the same."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        ignore_stdout()


def ignore_stdout() -> None:
    """Drop what is written from now on, as nobody reads it: Python's last flush must not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value


def plural(count: int, thing: str, things: str | None = None) -> str:
    """Return a count with its noun.

    >>> plural(1, "crop"), plural(0, "crop"), plural(2, "reject by", "rejects by")
    ('1 crop', '0 crops', '2 rejects by')
    """
    return f"{count} {thing if count == 1 else things or thing + 's'}"


def table(content: Table, wraps: bool = False) -> None:
    """Print a rich table on stdout: as wide as the terminal, or as wide as it needs in a pipe.

    `wraps`: in a pipe too it is no wider than COLUMNS, 80 where that is not set.
    """
    from rich.console import Console

    class Terminal(Console):
        """Ends quietly where nobody reads on, as in `| head -1`."""

        def on_broken_pipe(self) -> None:
            ignore_stdout()

    terminal = Terminal(soft_wrap=False)
    if not terminal.is_terminal and not wraps:
        unlimited = Console(width=1 << 14)  # a measure never exceeds its console
        terminal = Terminal(width=max(80, unlimited.measure(content).maximum), color_system=None)
    terminal.print(content)


class Progress:
    """Counts finished work; shown as a bar on a terminal, else as a line every 30 s. Use `progress(...)`."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.done = label, total, 0
        self.status = ""
        self._begun = self._last_line = time.monotonic()

    def advance(self, amount: int = 1, status: str = "") -> None:
        """Count `amount` more pieces of work as done; `status` is a short text beside the count."""
        self.done += amount
        self.status = status or self.status
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not _state.quiet and now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            rate = self.done / max(now - self._begun, 1e-9)
            of_total = f"/{self.total}" if self.total is not None else ""
            note(f"{self.label}: {self.done}{of_total}, {rate:.1f}/s {self.status}".rstrip())


class _BarProgress(Progress):
    def __init__(self, label: str, total: int | None, bar: Any):
        super().__init__(label, total)
        self._bar = bar
        self._task = bar.add_task(label, total=total, status="")

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, status=self.status)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Progress]:
    """Show how far a long piece of work is: `with progress("crop", 100) as bar: bar.advance()`."""
    if _state.quiet or not sys.stderr.isatty():
        yield Progress(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _BarProgress(label, total, bar)


def stdin_is_pipe() -> bool:
    """Return whether another command's output may arrive on stdin (a FIFO, as a shell pipe is)."""
    try:
        return stat.S_ISFIFO(os.fstat(0).st_mode)
    except OSError:
        return False


def read_pipe(awaited: str) -> Path:
    """Read the path of a product from the command before this one in a pipe.

    Understands the plain line and the `--json` object with `out`. After two seconds of waiting a note on stderr
    says what is awaited. Raises NoInputError where nothing arrives or what arrives is no existing path.
    """
    return _path_in(_first_line(awaited), awaited)


def read_pipe_all(awaited: str) -> list[Path]:
    """Read the paths of all products of the command before this one, a line each, as `read_pipe` reads the first."""
    return [_path_in(line, awaited) for line in [_first_line(awaited), *filter(None, map(str.strip, sys.stdin))]]


def _first_line(awaited: str) -> str:
    if not select.select([0], [], [], PIPE_NOTICE_SECONDS)[0]:
        note(f"waiting for {awaited} from the command before this one in the pipe ...")
    line = next((line.strip() for line in sys.stdin if line.strip()), "")
    if not line:
        raise NoInputError("the command before it in the pipe made nothing; see its message above")
    return line


def _path_in(line: str, awaited: str) -> Path:
    if line.startswith("{"):
        try:
            line = str(json_module.loads(line)["out"])
        except (ValueError, KeyError) as error:
            raise NoInputError(f'the pipe brought JSON without "out": {line[:80]}') from error
    path = Path(line)
    if not path.exists():
        raise NoInputError(f"the pipe brought {line[:200]!r}, which is no existing path; wanted {awaited}")
    return path
