"""`mefem show run RUN...`: the health page of a run, written anew where its metrics are younger; several as curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from mefem_cli.engine import alarm
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.reports import curves, health, html
from mefem_cli.reports.curves import Curve, Panel
from mefem_cli.reports.panels import panels
from mefem_cli.reports.show_crops import clipped
from mefem_cli.reports.show_sheet import Row, Sheet, Tile, axes_at, plain, without_axes
from mefem_cli.stores import ablations, runs
from mefem_cli.stores.product import file_sha256
from mefem_cli.stores.runs import ENCODER_FILES, Run

Metrics = dict[str, Any]
RUNS = Path("runs")
PANEL, LINE = (4.6, 2.4), 0.078  # inches; a line of the title as a share of the height
TITLE_LETTERS = 58  # of a panel's title, in a line
KEY_WIDTH, KEY_LINE, KEY_LETTERS = 2 * PANEL[0], 0.2, 120  # of the key above all panels: inches, and letters of a line
ONE_LINE_EACH = len(curves.COLOURS)  # runs; those beyond are dashed in the same colours
MOST_RUNS = 2 * ONE_LINE_EACH
# The key stays in view where a screen has room for it and for curves.
STYLE = """<style>
.runs { background: var(--paper); margin-bottom: .8rem; } .runs svg { width: 100%; height: auto; min-width: 40rem; }
.runs { overflow-x: auto; } @media (min-height: 44rem) { .runs { position: sticky; top: 0; z-index: 1; } }
</style>"""
# Of each panel of the health page the curve that tells runs apart; panels that follow from the options are left out.
COMPARED = {
    "loss": 1,  # on held-out faces
    "loss_over_position": 0,
    "rings": -1,  # at the end
    "rankme": 0,
    "feature_std": 0,
    "spectrum": -1,
    "loss_rings": -1,
    "ema_distance": 0,
    "grad_norm": 0,
    "throughput": 0,
}
READINGS = {"throughput": "Faces per second."}  # of panels that have another axis on the health page


def opened(path: Path | None) -> Run:
    """Return a run, runs/latest where none is named. Raises NoInputError where there is none."""
    if path is None:
        if not (RUNS / "latest").exists():
            raise NoInputError(f"{RUNS / 'latest'}: no finished run; name one, as in mefem show run RUN")
        return Run.open(runs.latest_run(RUNS))
    return Run.open(path.parent if path.is_file() else path)


def health_page(path: Path | None) -> Path:
    """Return the path of a run's report.html, written anew unless it is younger than the metrics.

    Raises NoInputError for what is no run or has measured nothing yet.
    """
    run = opened(path)
    with _readable([run]):
        return _health_page(run)


def _health_page(run: Run) -> Path:
    report = run.path / health.REPORT
    if not run.metrics_path.is_file():
        raise NoInputError(f"{run.path}: nothing is measured yet (no metrics.jsonl); wait for the first epoch")
    if not report.is_file() or report.stat().st_mtime_ns < run.metrics_path.stat().st_mtime_ns:
        state = "it is finished" if run.is_finished else "it is running or was stopped"
        health.write(run, about(run), state)
    return report


@contextmanager
def _readable(found: Sequence[Run]) -> Iterator[None]:
    """Raise NoInputError in place of what a metrics.jsonl or config.yaml that somebody changed leads to."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        places = ", ".join(str(run.path) for run in found)
        raise NoInputError(
            f"{places}: metrics.jsonl or config.yaml is damaged ({type(error).__name__}: {error}); name other runs"
        ) from error


def about(run: Run) -> health.About:
    """Return what the page tells beside the metrics, from the record of a run."""
    config = run.config()
    epochs = int(config.get("epochs") or 0)
    per_epoch = _steps_per_epoch(list(run.metrics()))
    warmup = min(math.ceil(float(config.get("warmup_epochs") or 0) * per_epoch), epochs * per_epoch // 2)
    facts = {
        "crops": ", ".join(map(str, config["crops"])),
        "plan": f"{epochs} epochs of {per_epoch} steps of {config.get('batch_size', '?')} faces",
        "learning rate": f"up to {config.get('lr')} after {warmup} steps, then falling",
        "EMA momentum": str(config.get("ema", "none")),
    }
    return health.About(list(facts.items()), warmup, epochs)


def _steps_per_epoch(rows: Sequence[Metrics]) -> int:
    """Return how many steps an epoch has, 0 before the end of the first."""
    ends = [row for row in rows if row.get("kind") == "epoch" and row.get("epoch")]
    return round(ends[-1]["step"] / ends[-1]["epoch"]) if ends else 0


# Several runs ---------------------------------------------------------------------------------------------------------


def sheet(paths: Sequence[Path]) -> Sheet:
    """Return the curves of runs over one another. Raises UsageError for more than can be told apart."""
    if len(paths) > MOST_RUNS:
        raise UsageError(f"{len(paths)} runs: at most {MOST_RUNS} can be told apart; name fewer")
    found = [opened(path) for path in paths] or [opened(None)]
    with _readable(found):
        return _sheet(found)


def _sheet(found: Sequence[Run]) -> Sheet:
    names = names_of([run.path for run in found])
    compared = compare({name: list(run.metrics()) for name, run in zip(names, found, strict=True)})
    if not compared:
        raise NoInputError(f"{', '.join(str(run.path) for run in found)}: nothing is measured yet")
    lines = list(map(_line, names, found))
    key, size = _key([f"{name}: {verdict}" for name, _, _, verdict, _ in lines]), (KEY_WIDTH, KEY_LINE * len(lines))
    unnamed = [replace(panel, curves=[replace(one, label="") for one in panel.curves]) for panel in compared]
    tiles = [Tile("", key, size=size), *(Tile(panel.reading, _drawer(panel), size=PANEL) for panel in unnamed)]
    figures = "".join(
        f"<figure><h3>{escape(panel.title)}</h3>{curves.draw(panel)}<figcaption>{escape(panel.reading)}</figcaption></figure>"
        for panel in unnamed
    )
    shown_key = f'<div class="runs">{curves.svg_element(key, size)}</div>'
    rows = [Row("", tiles, page=f'{health.STYLE}{STYLE}{shown_key}<div class="panels">{figures}</div>')]
    body = [html.table(("run", "state", "epoch", "verdict", "measured"), lines)]
    changed = _differences(names, found)
    if changed:
        body += [html.heading("Options that differ"), html.table(("option", *names), changed)]
    inputs = {str(run.path.absolute()): _digest(run) for run in found}
    dashes = f", dashed from run {ONE_LINE_EACH + 1} on" if len(found) > ONE_LINE_EACH else ""
    return Sheet("Runs", f"In each figure a line for each run that has the measure{dashes}.", rows, body, inputs)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return short names of runs that tell them apart: of one of a grid its cell, else the name of its folder."""
    names = [_cell_of(path.absolute()) or path.absolute().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.absolute().parts[-2:]) for path in paths]
    return (
        names if len(set(names)) == len(names) else [f"{number} {name}" for number, name in enumerate(names, start=1)]
    )


def _cell_of(run: Path) -> str:
    """Return cell and seed of a run that `mefem ablate` made, `cells/<key>/run`; empty for any other."""
    grid = run.parents[2] if len(run.parents) > 2 else run
    try:
        strands = ablations.read(grid).strands
    except NoInputError:
        return ""
    own = next((one for one in strands if grid / one.folder == run.parent), None)
    if own is None or not own.cells:
        return ""
    return own.cells[0].cell + (f" seed {own.seed}" if len({one.seed for one in strands}) > 1 else "")


def compare(metrics: dict[str, list[Metrics]]) -> list[Panel]:
    """Return the panels of the health page with one curve for each run, by its name; panels without any left out."""
    by_run = {name: {panel.name: panel for panel in _panels(rows)} for name, rows in metrics.items()}
    watched = [name for panels_of in by_run.values() for name in panels_of if name.startswith("watch_")]
    found = []
    for name, which in {**COMPARED, **dict.fromkeys(watched, 0)}.items():
        of_runs = {
            run: panels_of[name]
            for run, panels_of in by_run.items()
            if name in panels_of and panels_of[name].curves and curves.is_drawn(_chosen(panels_of[name], which))
        }
        if of_runs:
            found.append(_compared(of_runs, which, list(by_run)))
    return found


def _chosen(panel: Panel, which: int) -> Curve:
    """Return the curve of a panel that is compared: that of the number `which`, or the last of fewer."""
    return panel.curves[min(which, len(panel.curves) - 1)]


def _compared(of_runs: dict[str, Panel], which: int, names: Sequence[str]) -> Panel:
    """Return one panel with the curve of the number `which` of each run, in the run's colour."""
    chosen = []
    for run, panel in of_runs.items():
        turn, colour = divmod(names.index(run), ONE_LINE_EACH)
        chosen.append(replace(_chosen(panel, which), label=run, colour=colour, dashed=bool(turn), faint=False))
    panel = next(iter(of_runs.values()))
    title = panel.title
    if which < 0:
        title += " (at the end)"
    elif len(panel.curves) > 1 and panel.curves[which].label:
        title += f": {panel.curves[which].label}"
    return replace(panel, title=title, reading=READINGS.get(panel.name, panel.reading), curves=chosen, right=[])


def _panels(rows: Sequence[Metrics]) -> Iterator[Panel]:
    steps = [row for row in rows if row.get("kind") == "step"]
    return panels(steps, [row for row in rows if row.get("kind") == "epoch"])


def _key(texts: Sequence[str]) -> Callable[[Any], None]:
    """Draw whose line is which, once for all panels."""

    def draw(figure: Any) -> None:
        axis = without_axes(axes_at(figure, 0, 0, 1, 1))
        axis.set(xlim=(0, KEY_WIDTH), ylim=(len(texts) - 0.5, -0.5))
        for place, text in enumerate(texts):
            turn, colour = divmod(place, ONE_LINE_EACH)
            axis.plot([0.1, 0.5], [place] * 2, "--" if turn else "-", color=curves.COLOURS[colour], linewidth=1.6)
            axis.text(0.6, place, plain(clipped(text, KEY_LETTERS)), size=8.5, va="center")

    return draw


def _drawer(panel: Panel) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        title = textwrap.fill(panel.title, TITLE_LETTERS)
        figure.text(0.02, 0.95, plain(title), size=9, weight="bold", va="top")
        curves.draw_panel(_Placed(figure, len(title.splitlines())), panel)  # type: ignore[arg-type]

    return draw


class _Placed:
    """A figure for `curves.draw_panel` whose axis has its place."""

    def __init__(self, figure: Any, num_lines: int):
        self._figure = figure
        self._top = 0.935 - LINE * num_lines  # of the axis, below its title

    def add_subplot(self) -> Any:
        """Return the one axis."""
        return axes_at(self._figure, 0.13, 0.205, 0.85, self._top - 0.205)

    @property
    def axes(self) -> list[Any]:
        """All axes so far."""
        return self._figure.axes


def _line(name: str, run: Run) -> tuple[str, str, str, str, str]:
    epochs = [row for row in run.metrics() if row.get("kind") == "epoch"]
    facts = about(run)
    verdict = alarm.judge(epochs, facts.warmup_steps)
    state = "finished" if run.is_finished else "not finished"
    epoch = str(epochs[-1]["epoch"]) if epochs else "-"
    measured = verdict.measured or verdict.meaning
    return name, state, epoch, health.headline(verdict, epochs, facts), measured


def _differences(names: Sequence[str], found: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the options in which runs differ, with the value of each."""
    configs = [run.config() for run in found]
    options = dict.fromkeys(name for config in configs for name in config if name != "inputs")
    lines = [(name, *(str(config.get(name, "")) for config in configs)) for name in options]
    return [line for line in lines if len(set(line[1:])) > 1]


def _digest(run: Run) -> str:
    weights = run.path / ENCODER_FILES["target"]
    return file_sha256(weights) if weights.is_file() else "not finished"
