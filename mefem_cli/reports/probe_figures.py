"""Figures of scores as SVG in the colours of the page: truth and prediction, calibration, intervals, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.reports.curves import COLOURS, INK, svg_element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mefem_cli.evaluation.bootstrap import Interval

NORMAL_95 = 1.96  # standard deviations that hold 95 % of a normal distribution
MOST_VECTOR_POINTS = 400  # more points are a picture in the figure: the page stays small
NUM_BINS, LEAST_BIN = 10, 10  # of a calibration curve; faces in a bin
LONGEST_NAME, LONGEST_OF_ONE, LONGEST_LABEL = 46, 18, 40  # characters beside axes, beside a lone one, under one
ONE_PANEL, WIDE = 3.4, 9.2  # inches


@dataclass(frozen=True)
class Panel:
    """A value with its interval for each row of a figure, and a value to compare with."""

    xlabel: str
    intervals: Sequence[Interval]
    mark: float | None


@dataclass(frozen=True)
class Bins:
    """What was observed where something was predicted, each (b,): means, and a 95 % interval of `observed`."""

    predicted: np.ndarray
    observed: np.ndarray
    half_width: np.ndarray
    count: np.ndarray


def bins(predicted: np.ndarray, observed: np.ndarray, group: np.ndarray) -> Bins:
    """Cut faces (n,) into up to ten bins of equal size by what was predicted; the interval counts people, not faces."""
    num_bins = int(np.clip(len(predicted) // LEAST_BIN, 1, NUM_BINS))
    parts = np.array_split(np.argsort(predicted, kind="stable"), num_bins)
    people = [len(np.unique(group[part])) for part in parts]
    spread = [observed[part].std() / math.sqrt(max(count - 1, 1)) for part, count in zip(parts, people, strict=True)]
    return Bins(
        np.array([predicted[part].mean() for part in parts]),
        np.array([observed[part].mean() for part in parts]),
        NORMAL_95 * np.array(spread),
        np.array([len(part) for part in parts]),
    )


def limits_of_agreement(target: np.ndarray, prediction: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of predicted - true, and the limits that hold 95 % of it if it is normal (Bland, Altman 1986)."""
    error = prediction - target
    mean, deviation = float(error.mean()), float(error.std(ddof=1))
    return mean, mean - NORMAL_95 * deviation, mean + NORMAL_95 * deviation


def scatter(target: np.ndarray, prediction: np.ndarray, unit: str) -> str:
    """Draw predicted against true, with the line on which they are equal."""
    both = np.concatenate([target, prediction])
    low, high = float(both.min()), float(both.max())
    margin = 0.03 * (high - low or 1)

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        axis.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        _points(axis, target, prediction)
        axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axis.set(xlabel=_short(f"true{unit}"), ylabel=_short(f"predicted{unit}"))
        axis.locator_params(nbins=6)

    return svg_element(draw, (ONE_PANEL, 3.1))


def bland_altman(target: np.ndarray, prediction: np.ndarray, unit: str) -> str:
    """Draw predicted - true against the mean of both, with the mean and the limits of agreement."""
    mean, low, high = limits_of_agreement(target, prediction)

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        _points(axis, (target + prediction) / 2, prediction - target)
        axis.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for value, style in ((mean, "-"), (low, "--"), (high, "--")):
            axis.axhline(value, color=COLOURS[1], linewidth=1.2, linestyle=style)
        axis.set(xlabel=_short(f"mean of true and predicted{unit}"), ylabel=_short(f"predicted - true{unit}"))
        axis.locator_params(nbins=6)

    return svg_element(draw, (ONE_PANEL, 3.1))


def _points(axis: Any, x: np.ndarray, y: np.ndarray) -> None:
    many = len(x) > MOST_VECTOR_POINTS
    axis.scatter(
        x,
        y,
        s=9 if len(x) <= 2000 else 4,
        alpha=0.55 if len(x) <= 2000 else 0.3,
        color=COLOURS[0],
        linewidths=0,
        rasterized=many,
    )


def calibration(found: Bins, xlabel: str, ylabel: str, is_share: bool) -> str:
    """Draw what was observed against what was predicted, with the line of a calibrated head; shares go from 0 to 1."""
    edges = [found.predicted.min(), found.predicted.max(), found.observed.min(), found.observed.max()]
    low, high = (0.0, 1.0) if is_share else (float(min(edges)), float(max(edges)))

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        axis.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.errorbar(
            found.predicted,
            found.observed,
            yerr=found.half_width,
            color=COLOURS[0],
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=1,
        )
        axis.set(xlabel=_short(xlabel), ylabel=_short(ylabel))
        axis.locator_params(nbins=6)

    return svg_element(draw, (ONE_PANEL, 3.1))


def intervals(names: Sequence[str], panels: Sequence[Panel], colours: Sequence[int] | None = None) -> str:
    """Draw values with their intervals as rows of dots, panels side by side; `colours` are those of the rows."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            if panel.mark is not None and math.isfinite(panel.mark):
                axis.axvline(panel.mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            for place, one in enumerate(panel.intervals):
                colour = COLOURS[(colours[place] if colours else 0) % len(COLOURS)]
                if math.isfinite(one.low) and math.isfinite(one.high):
                    axis.plot([one.low, one.high], [place, place], color=colour, linewidth=1.8)
                if math.isfinite(one.value):
                    axis.plot(one.value, place, "o", color=colour, markersize=5)
            axis.grid(False, axis="y")
            axis.set_xlabel(panel.xlabel)
            axis.locator_params(axis="x", nbins=6)
        longest = LONGEST_OF_ONE if len(panels) == 1 else LONGEST_NAME
        axes[0].set_yticks(range(len(names)), [_short(name, longest) for name in names])
        axes[0].set_ylim(len(names) - 0.4, -0.6)

    width = ONE_PANEL if len(panels) == 1 else WIDE
    return svg_element(draw, (width, 0.75 + 0.24 * len(names)))


def efficiency(curves: Mapping[str, Sequence[tuple[float, Interval]]], ylabel: str, mark: float | None) -> str:
    """Draw scores with their intervals against the share of the training people, on a logarithmic axis."""

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        if mark is not None and math.isfinite(mark):
            axis.axhline(mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for number, (name, points) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            ordered = sorted(points, key=lambda point: point[0])
            x = [100 * fraction for fraction, _ in ordered]
            low, high = ([getattr(one, side) for _, one in ordered] for side in ("low", "high"))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                x,
                [one.value for _, one in ordered],
                "o-",
                color=colour,
                markersize=4,
                label=_short(name, LONGEST_OF_ONE + 8),
            )
        axis.set_xscale("log")
        shares = sorted({100 * fraction for points in curves.values() for fraction, _ in points})
        axis.set_xticks(shares, [f"{share:g} %" for share in shares])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="people to learn from", ylabel=ylabel)
        figure.legend(loc="outside upper left", ncols=1)

    return svg_element(draw, (ONE_PANEL, 2.6))


def heat(shares: np.ndarray) -> str:
    """Draw attention [L, L], in multiples of an even share."""

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        times_even = shares * shares.size
        image = axis.imshow(times_even, cmap="viridis", vmin=0, vmax=max(2.0, float(times_even.max())))
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axis, shrink=0.85)
        bar.outline.set_visible(False)
        bar.set_label("times an even share")

    return svg_element(draw, (ONE_PANEL, 2.6))


def _short(name: str, longest: int = LONGEST_LABEL) -> str:
    """Return a name that fits beside an axis; matplotlib would read "$" as mathematics."""
    shown = name if len(name) <= longest else name[: longest - 1] + "…"
    return "".join(char if char.isprintable() else "?" for char in shown).replace("$", r"\$")
