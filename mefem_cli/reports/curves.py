"""Curves as SVG that takes its colours from the page around it, light or dark; drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.reports import fonts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#1d2330", "#dcdce2"
COLOURS = ("#2a6fdb", "#d9622b", "#1f9d6b", "#8a5cd6")
# matplotlib writes the colours on the left; a page may set the variables, and a lone SVG file uses what stands beside.
THEMED = {INK: "ink", GRID: "line", **{colour: f"curve-{number}" for number, colour in enumerate(COLOURS, start=1)}}
VARIABLES = """:root { --curve-1: #2a6fdb; --curve-2: #d9622b; --curve-3: #1f9d6b; --curve-4: #8a5cd6; }
@media (prefers-color-scheme: dark) { :root { --curve-1: #6ea8ff; --curve-2: #ff9a66; --curve-3: #4fd0a0;
  --curve-4: #b79cf5; } }
"""  # CSS of a page with curves
MAX_POINTS = 400
SIZE = (5.0, 2.7)  # inches
LEGEND, LEGEND_HANDLE = 60, 7  # letters across a panel, and of the line beside a label
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mefem",  # the same curves give the same bytes
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Curve:
    """One line; values that are None or not finite leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0  # which of the COLOURS
    faint: bool = False  # in the background
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A small figure: its name, how to read it in one sentence, and its curves."""

    name: str
    title: str
    reading: str
    curves: list[Curve]
    xlabel: str = "epoch"
    log: bool = False
    mark: float | None = None  # a horizontal line
    right: list[Curve] = field(default_factory=list)  # on an axis of their own

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(map(is_drawn, [*self.curves, *self.right]))


def is_drawn(curve: Curve) -> bool:
    """Return whether a curve has anything to draw."""
    return any(map(_is_number, curve.y))


def draw(panel: Panel) -> str:
    """Return a panel as an `<svg>` element without fixed colours."""
    return svg_element(lambda figure: draw_panel(figure, panel))


def draw_panel(figure: Figure, panel: Panel) -> None:
    """Draw a panel into an empty figure or a part of one."""
    from matplotlib.ticker import MaxNLocator

    axis = figure.add_subplot()
    _draw_curves(axis, panel.curves)
    if panel.log and any(_is_number(y) and y > 0 for curve in panel.curves for y in curve.y):  # type: ignore[operator]
        _use_log_scale(axis)
    if panel.mark is not None:
        axis.axhline(panel.mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if panel.right:
        other = axis.twinx()
        other.grid(False)
        _draw_curves(other, panel.right)
    for one in figure.axes:
        one.yaxis.set_major_formatter(lambda value, place: f"{value:g}")  # no power of ten above the axis
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))  # 1: of a run of no epochs too
    axis.set_xlabel(panel.xlabel)
    lines = [line for one in figure.axes for line in one.get_legend_handles_labels()[0]]
    if lines:
        figure.legend(
            handles=lines, loc="outside upper left", ncols=_num_columns([str(one.get_label()) for one in lines])
        )


def _num_columns(labels: Sequence[str]) -> int:
    """Return in how many columns a legend has room."""
    return next((count for count in (3, 2) if count <= len(labels) and _num_letters(labels, count) <= LEGEND), 1)


def _num_letters(labels: Sequence[str], count: int) -> int:
    """Return how wide a legend of so many columns is; they are filled one after the other, the first ones fuller."""
    return sum(max(map(len, column)) + LEGEND_HANDLE for column in np.array_split(labels, count))


def svg_element(draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> str:
    """Return what `draw` puts into an empty figure of `size` inches as an `<svg>` element without fixed colours."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(STYLE), fonts.letters_may_lack():  # text stays text: the browser has the letter
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg


def _use_log_scale(axis: Any) -> None:
    """Use a logarithmic scale with some numbers between the powers of ten where there are few of these."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log", nonpositive="mask")
    low, high = axis.get_ylim()
    between = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0) if high / low < 10 else (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=between))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_curves(axis: Any, curves: Sequence[Curve]) -> None:
    for curve in curves:
        if not is_drawn(curve):
            continue
        points = [(x, math.nan if y is None else y) for x, y in zip(curve.x, curve.y, strict=True)]
        xs, ys = zip(*_thinned(points), strict=True)
        axis.plot(
            xs,
            ys,
            color=COLOURS[curve.colour],
            linewidth=1.0 if curve.faint else 1.6,
            alpha=0.45 if curve.faint else 1,
            linestyle="--" if curve.dashed else "-",
            marker="o" if sum(_is_number(y) for y in ys) == 1 else "",
            markersize=4,
            label=curve.label or None,
        )


def _thinned(points: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Return at most MAX_POINTS points: means of neighbours that are as many as it takes."""
    width = math.ceil(len(points) / MAX_POINTS)
    if width < 2:
        return points
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), _mean([y for _, y in group])) for group in groups]


def _mean(values: list[float]) -> float:
    known = [value for value in values if _is_number(value)]
    return sum(known) / len(known) if known else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
