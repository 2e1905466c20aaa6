"""Forest plots of a grid: one line for each row of its table, and one for each paired difference, as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mefem_cli.ablation.reading import Entry, Table, label, title
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.numbers import TITLES
from mefem_cli.reports import fonts
from mefem_cli.reports.curves import COLOURS, INK, STYLE, svg_element
from mefem_cli.stores import product

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.2  # inches
LONGEST_LABEL, LONGEST_HEADING = 46, 60  # characters
LONGEST_FILE = 100  # characters of a file's name
GAP = 0.4  # rows between groups
DPI = 200
COLOUR, REFERENCE_COLOUR = COLOURS[0], COLOURS[1]
VERDICT_COLOURS = {"better": COLOURS[2], "worse": COLOURS[1], "unclear": INK}


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in any form."""

    draw: Callable[[Figure], None]
    size: tuple[float, float]  # inches

    @cached_property
    def svg(self) -> str:
        """The figure as an `<svg>` element in the colours of the page around it."""
        return svg_element(self.draw, self.size)


@dataclass(frozen=True)
class _Place:
    """One line of a figure: an entry, or a heading."""

    y: float
    name: str
    entry: Entry | None = None


def draw(table: Table) -> dict[str, Drawing]:
    """Return the figures of a task: `scores`, and `differences` where rows are compared with a reference."""
    found = {"scores": _drawing(table, list(_places(table)), _draw_score, "")}
    if table.is_compared:
        found["differences"] = _drawing(table, list(_places(table, True)), _draw_difference, " - reference")
    return found


def _places(table: Table, is_compared: bool = False) -> Iterator[_Place]:
    """Yield the lines of a figure from top to bottom; with `is_compared` those that have differences."""
    y = 0.0
    for group in table.groups:
        entries = [one for one in group.entries if one.differences or not is_compared]
        if not entries:
            continue
        if group.heading:
            yield _Place(y, _short(title(group, table), LONGEST_HEADING))
            y += 1
        for entry in entries:
            yield _Place(y, _short(label(entry, group, table), LONGEST_LABEL), entry)
            y += 1
        y += GAP


def _drawing(table: Table, places: Sequence[_Place], draw_entry: Callable[..., None], minus: str) -> Drawing:
    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(table.metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, table.metrics, strict=True):
            if minus:
                axis.axvline(0, color=INK, linewidth=0.9)
            for place in places:
                if place.entry is not None:
                    draw_entry(axis, place.entry, metric, place.y)
            axis.grid(False, axis="y")
            axis.set_xlabel(TITLES[metric] + minus)
            axis.locator_params(axis="x", nbins=5)
            axis.tick_params(axis="y", length=0)
            axis.spines[["left", "right"]].set_visible(False)
        _name_rows(axes[0], places)

    return Drawing(draw, (WIDTH, 0.75 + 0.24 * (places[-1].y + 1)))


def _name_rows(axis: Any, places: Sequence[_Place]) -> None:
    axis.set_yticks([place.y for place in places], [place.name for place in places])
    axis.set_ylim(places[-1].y + 0.6, -0.6)
    for tick, place in zip(axis.get_yticklabels(), places, strict=True):
        tick.set_parse_math(False)  # a "$" in a name is no mathematics
        if place.entry is None:
            tick.set_fontweight("bold")


def _draw_score(axis: Any, entry: Entry, metric: str, y: float) -> None:
    """Draw a mean with its interval, the seeds as small dots, and the reference's mean as a dashed line beside it."""
    interval = entry.line.metrics.get(metric)
    if interval is None or not math.isfinite(interval.value):
        words = "failed" if interval is None else "undefined"
        axis.text(0.01, y, words, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        return
    colour = REFERENCE_COLOUR if entry.is_reference else COLOUR
    if entry.reference is not None and metric in entry.reference.metrics:
        value = entry.reference.metrics[metric].value
        axis.plot([value, value], [y - 0.5, y + 0.5], color=REFERENCE_COLOUR, linewidth=1, linestyle=(0, (3, 2)))
    _draw_interval(axis, interval, y, colour)
    seeds = [score["metrics"][metric]["value"] for score in entry.line.seeds.values()]
    if len(seeds) > 1:
        known = [value for value in seeds if value is not None]
        axis.plot(known, [y + 0.28] * len(known), "o", color=colour, markersize=2.2, alpha=0.7)


def _draw_difference(axis: Any, entry: Entry, metric: str, y: float) -> None:
    """Draw a paired difference in the colour of its verdict, which stands beside it."""
    if metric not in entry.differences:
        return
    verdict = entry.verdict(metric)
    _draw_interval(axis, entry.differences[metric], y, VERDICT_COLOURS[verdict], 0.6 if verdict == "unclear" else 1.0)
    axis.text(
        1.02,
        y,
        verdict,
        transform=axis.get_yaxis_transform(),
        color=VERDICT_COLOURS[verdict],
        va="center",
        fontsize=8,
        alpha=0.6 if verdict == "unclear" else 1.0,
    )


def _draw_interval(axis: Any, interval: Interval, y: float, colour: str, alpha: float = 1.0) -> None:
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axis.plot([interval.low, interval.high], [y, y], color=colour, linewidth=1.8, alpha=alpha)
    axis.plot(interval.value, y, "o", color=colour, markersize=5, alpha=alpha)


def _short(name: str, longest: int) -> str:
    shown = name if len(name) <= longest else name[: longest - 1] + "…"
    return "".join(char if char.isprintable() else "?" for char in shown)


def save(drawing: Drawing, folder: Path, name: str) -> list[str]:
    """Write a figure as SVG and PNG; `name` may hold any characters. Returns texts that lack letters in the PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stem = quote(name, safe="-. ")[:LONGEST_FILE]
    product.write_text(folder / f"{stem}.svg", drawing.svg + "\n")
    with rc_context(STYLE), fonts.letters_may_lack(), product.writing(folder / f"{stem}.png") as temporary:
        figure = Figure(figsize=drawing.size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        drawing.draw(figure)
        lost = fonts.lend(figure)
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return lost
