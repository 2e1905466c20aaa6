"""How far an ablation is, read from its files: by anybody who sees the folder, while it runs and after.

`provenance.json` says which strands there are, the folder of each what is at work (`now.json`, while its lock is held),
what failed (`failures.json`) and, by the run's metrics, how far training is.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli import console
from mefem_cli.ablation import timing
from mefem_cli.ablation.runner import FAILURES, NOW
from mefem_cli.ablation.tables import about, duration
from mefem_cli.errors import NoInputError
from mefem_cli.executors.locks import is_claimed
from mefem_cli.stores import ablations
from mefem_cli.stores.ablations import StrandRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WAITING, FINISHED, FAILED = "waiting", "finished", "failed"
AT_WORK = {"pretrain": "training", "embed": "embedding", "probe": "probing"}  # step -> what it is called
ORDER = (*AT_WORK.values(), FAILED, WAITING, FINISHED)  # where not all fit on a screen
REFRESH_SECONDS = 2.0
LONGEST_LIVE_STATE = 36  # characters, so that a failure has one line
STEPS_PER_EPOCH = re.compile(r"steps_per_epoch=(\d+)")  # of the plan in run.log
TAIL_BYTES = 1 << 16  # of metrics.jsonl: its last rows


@dataclass(frozen=True)
class CellStatus:
    """How far a cell with one seed is."""

    cell: str
    reads: str  # its heads and features
    seed: int
    state: str  # waiting, training, embedding, probing, finished or failed
    detail: str = ""  # `epoch 3/66`, or why it failed
    progress: float | None = None  # of what is at work, 0 to 1, where that is known
    seconds: float | None = None  # for how long it has been at work
    left: float | None = None  # seconds until it is done, where that is known


@dataclass(frozen=True)
class Status:
    """How far a grid is."""

    cells: list[CellStatus]
    is_running: bool  # a driver is at work
    left: float | None  # seconds, from those that finished cells took
    command: str = ""  # that began it


def read(out: Path) -> Status:
    """Read the folder of an ablation. Raises NoInputError where none was begun."""
    try:
        there = ablations.read(out)
    except NoInputError as error:
        raise NoInputError(
            f"{out}: no ablation was begun there; start it without --status, or name it with -o"
        ) from error
    found = [(one, list(_strand_cells(out, one))) for one in there.strands]
    cells = [cell for _, several in found for cell in several]
    return Status(cells, is_claimed(out), _seconds_left(out, found), there.command)


def _strand_cells(out: Path, strand: StrandRecord) -> Iterator[CellStatus]:
    """Yield the status of each cell of a strand, as it is on record."""
    folder = out / strand.folder
    failures = _read_json(folder / FAILURES)
    now = _read_json(folder / NOW) if is_claimed(folder) else {}
    step, makes = AT_WORK.get(now.get("step", ""), ""), now.get("makes")
    since = max(0.0, time.time() - now["since"]) if isinstance(now.get("since"), float) else None
    done, total, speed = _training(folder / "run")
    for cell in strand.cells:
        own, scores = (cell.cell, cell.reads, strand.seed), cell.scores
        if all((folder / one / "scores.json").is_file() for one in scores):
            yield CellStatus(*own, FINISHED)
        elif step == AT_WORK["pretrain"]:
            left = (total - done) / speed if speed and total else None
            detail = f"epoch {done * strand.epochs // total}/{strand.epochs}" if total else ""
            yield CellStatus(*own, step, detail, done / total if total else None, since, left)
        elif failure := next((failures[one] for one in ("run", cell.store, *scores) if one in failures), None):
            yield CellStatus(*own, FAILED, failure)
        elif step and makes in (Path(cell.store).stem, *scores):
            yield CellStatus(*own, step, seconds=since)
        else:
            is_stopped = not now and total and done < total
            yield CellStatus(*own, WAITING, f"stopped at step {done} of {total}" if is_stopped else "")


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is gone, damaged, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _training(run: Path) -> tuple[int, int, float | None]:
    """Return the steps done and all steps of a run (0 where that is not known yet), and the steps per second."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            row = json.loads(file.read().splitlines()[-1])
        plans = STEPS_PER_EPOCH.findall((run / "run.log").read_text(encoding="utf-8", errors="replace"))
        config = (run / "config.yaml").read_text(encoding="utf-8")
        epochs, batch = (_number(config, name) for name in ("epochs", "batch_size"))
        speed = row.get("images_per_second")
        return row["step"], int(plans[-1]) * epochs, speed / batch if speed else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # not begun yet, or a line cut short
        return 0, 0, None


def _number(config: str, name: str) -> int:
    """Return a whole number of a config.yaml without reading all of it, which takes longer. Raises IndexError."""
    return int(re.findall(rf"^{name}: (\d+)$", config, re.MULTILINE)[0])


def _seconds_left(out: Path, found: list[tuple[StrandRecord, list[CellStatus]]]) -> float | None:
    """Return how long the rest takes, judged by the strands that are finished; None before the first one is."""
    took = [
        sum(timing.read(out / strand.folder).values())
        for strand, cells in found
        if all(cell.state == FINISHED for cell in cells)
    ]
    if not any(took):
        return None
    mean = statistics.fmean(one for one in took if one)
    open_strands = [cells for _, cells in found if any(cell.state not in (FINISHED, FAILED) for cell in cells)]
    at_work = [cells for cells in open_strands if any(cell.state in AT_WORK.values() for cell in cells)]
    done = [min(mean, max(cell.seconds or 0.0 for cell in cells)) for cells in at_work]
    return (mean * len(open_strands) - sum(done)) / max(1, len(at_work))


# Shown ----------------------------------------------------------------------------------------------------------


def show(out: Path) -> None:
    """Print how far an ablation is: live on a terminal while it runs, else once, with `--json` a row for each cell."""
    status = read(out)
    if console.wants_json():
        for cell in status.cells:
            console.emit({"row": "cell", **asdict(cell)})
        return
    from rich.console import Console
    from rich.live import Live

    console.note(f"{out}, begun by: {_printable(status.command)}")  # which need not be what was typed with --status
    terminal = Console()
    if not (terminal.is_terminal and status.is_running):
        console.table(to_table(status))
        print(summary(status))
        return
    live = Live(console=terminal, screen=False, auto_refresh=False)
    with suppress(KeyboardInterrupt), live:  # Ctrl-C ends the view, not the grid
        while status.is_running:
            live.update(_fitting(status, terminal), refresh=True)
            time.sleep(REFRESH_SECONDS)
            status = read(out)
        live.update(_fitting(status, terminal), refresh=True)


def to_table(status: Status, most: int | None = None) -> Table:
    """Return a table of the cells; of more than `most`, those at work, failed and next, failures cut to a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {FINISHED: "green", FAILED: "red", WAITING: "dim"}
    cells = status.cells
    if most is not None and len(cells) > most:
        kept = sorted(range(len(cells)), key=lambda number: ORDER.index(cells[number].state))[:most]
        cells = [cells[number] for number in sorted(kept)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cell", overflow="fold")
    table.add_column("heads")
    table.add_column("seed", justify="right")
    if most is None:
        table.add_column("state", overflow="fold")
    else:
        table.add_column("state", overflow="ellipsis", no_wrap=True, max_width=LONGEST_LIVE_STATE)
    table.add_column("left", justify="right")
    for cell in cells:
        shown = (cell.cell, cell.reads, str(cell.seed), _shown_state(cell), _shown(cell.left))
        table.add_row(*(Text(_printable(one), style=styles.get(cell.state, "bold")) for one in shown))
    return table


def _shown_state(cell: CellStatus) -> str:
    """Return `training 30 %`, `probing, 12 s` or `failed: why`."""
    if cell.progress is not None:
        return f"{cell.state} {100 * cell.progress:.0f} %"
    between = ": " if cell.state == FAILED else ", "
    return between.join(filter(None, (cell.state, cell.detail or _shown(cell.seconds))))


def summary(status: Status) -> str:
    """Return one line: `8 finished, 1 failed, 2 training, 5 waiting; about 20 min left`."""
    counts = Counter(cell.state for cell in status.cells)
    shown = ", ".join(
        f"{counts[state]} {state}" for state in (FINISHED, FAILED, *AT_WORK.values(), WAITING) if counts[state]
    )
    is_open = any(cell.state not in (FINISHED, FAILED) for cell in status.cells)
    if not status.is_running:
        return shown + ("; nobody is at work: run the same command without --status to go on" if is_open else "")
    return shown + (f"; {about(status.left)} left" if status.left is not None and is_open else "")


def _fitting(status: Status, terminal: Console) -> Any:
    """Return what fits on a terminal: the table, or its most telling rows, and the summary."""
    from rich.console import Group
    from rich.text import Text

    def shown(num_rows: int) -> Group:
        hidden = len(status.cells) - num_rows
        more = [Text(f"... and {hidden} more", style="dim")] if hidden else []
        return Group(to_table(status, num_rows), *more, Text(summary(status)))

    def num_lines(num_rows: int) -> int:
        return len(terminal.render_lines(shown(num_rows)))

    most = min(len(status.cells), terminal.height)
    return shown(max(1, bisect_right(range(1, most + 1), terminal.height - 1, key=num_lines)))


def _shown(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
