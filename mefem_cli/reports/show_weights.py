"""`mefem show weights`: how much each target patch counts in the loss, with both signs, and over the radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mefem_cli.reports.curves import COLOURS, INK
from mefem_cli.reports.show_sheet import Row, Sheet, Tile, axes_at, without_axes

PAPER_GRID = 14
SIDE, BAR_WIDTH, PROFILE_WIDTH = 2.1, 0.48, 4.6  # inches; the second map has the bar of both
FACE = 5.5 / PAPER_GRID  # of the image's side: how far the face reaches from its middle, by the paper's r0
STEEP = 2.0  # r0 +- 2 / sigma: the weight is .88 and .12 there


def circular_weight(radius: np.ndarray, r0: float, sigma: float) -> np.ndarray:
    """Return w(r) = 1 / (1 + exp(sigma * (r - r0))); `objectives/mefem.py` has the same for tensors.

    >>> circular_weight(np.array([5.5]), 5.5, 1.5)
    array([0.5])
    """
    return 0.5 * (1 + np.tanh(0.5 * sigma * (r0 - radius)))  # the same function, which does not overflow


def radius_of_patches(grid: int) -> np.ndarray:
    """Return each patch centre's distance from the image centre in patches, [L, L]."""
    offset = np.arange(grid) - (grid - 1) / 2
    return np.hypot(offset[:, None], offset[None, :])


def grid_weights(grid: int, r0: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of each patch [L, L]: as the loss has it, and with the sign that the paper prints.

    r0 and sigma are those of a 14 x 14 grid; r0 scales as L / 14, sigma as 14 / L.
    """
    scale = grid / PAPER_GRID
    radius = radius_of_patches(grid)
    return tuple(circular_weight(radius, r0 * scale, sign * sigma / scale) for sign in (1, -1))  # type: ignore[return-value]


def sheet(grid: int, r0: float, sigma: float) -> Sheet:
    """Return both maps and the profile."""
    ours, printed = grid_weights(grid, r0, sigma)
    scale = grid / PAPER_GRID
    radius, steepness = r0 * scale, sigma / scale
    lead = (
        "Circular weight of a target patch in the loss, w(r) = 1 / (1 + exp(sigma (r - r0))), r the distance of its "
        f"centre from the image's in patches. Grid {grid} x {grid}, r0 = {radius:g}, sigma = {steepness:g}."
    )
    caption = (
        f"Left as trained: {_extremes(ours)}; all {grid * grid} together count as {ours.sum():.1f} of weight 1. "
        "Beside it with exp(-sigma (r - r0)), the sign of the paper's formula, which contradicts its text: "
        f"{printed.sum():.1f}{_where_most(printed)}. The CLS token has weight 1."
    )
    wide = STEEP / steepness
    reading = (
        "The curves show it over the distance from the middle: dots are the distances that occur on the grid. At r0 it "
        f"is 1/2; it falls from .88 to .12 within r0 ± 2 / sigma, from {radius - wide:.2f} to {radius + wide:.2f} "
        f"patches (shaded). A side of the image is {grid / 2:g} {'patch' if grid == 2 else 'patches'} from the middle, "
        f"a corner {grid / 2 * 2**0.5:.1f}."
    )
    tiles = [
        Tile("mefem: the face counts", _map(ours), size=(SIDE, SIDE)),
        Tile("as printed: the corners count", _map(printed, with_bar=True), size=(SIDE + BAR_WIDTH, SIDE)),
        Tile("over the radius", _profile(grid, radius, steepness), size=(PROFILE_WIDTH, SIDE)),
    ]
    return Sheet("Weights of the loss", lead, [Row("", tiles, f"{caption} {reading}")])


def _extremes(weights: np.ndarray) -> str:
    """Say how much the patches in the middle and in the corners of weights [L, L] count."""
    middle, corner = weights[len(weights) // 2, len(weights) // 2], weights[0, 0]
    if np.ptp(weights) < 1e-12:
        why = " on so small a grid" if len(weights) == 2 else ""
        return f"all patches weigh the same{why}, {middle:.3f}"
    return f"{middle:.3f} in the middle, {corner:.3f} in the corners"


def _where_most(weights: np.ndarray) -> str:
    """Say what most of weights [L, L] lies on, where that is what surrounds the face."""
    outside = weights[radius_of_patches(len(weights)) > FACE * len(weights)].sum()
    return ", most of it hair and background" if outside > max(weights.sum() / 2, 0.05) else ""


def _map(weights: np.ndarray, with_bar: bool = False) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        width = SIDE / (SIDE + BAR_WIDTH) if with_bar else 1.0
        axis = without_axes(axes_at(figure, 0, 0, width, 1))
        image = axis.imshow(weights, cmap="viridis", vmin=0, vmax=1, interpolation="none")
        if with_bar:
            bar = figure.colorbar(image, cax=axes_at(figure, width + 0.02, 0.05, 0.045, 0.9))
            bar.outline.set_visible(False)
            bar.ax.grid(False)
            bar.ax.tick_params(labelsize=7, length=2, pad=1)

    return draw


def _profile(grid: int, r0: float, sigma: float) -> Callable[[Any], None]:
    occurring = np.unique(radius_of_patches(grid).round(9))
    fine = np.linspace(0, grid / 2 * 2**0.5, 400)

    def draw(figure: Any) -> None:
        axis = axes_at(figure, 0.115, 0.2, 0.87, 0.71)
        axis.axvspan(max(r0 - STEEP / sigma, 0), r0 + STEEP / sigma, color=INK, alpha=0.07, linewidth=0)
        axis.axvline(r0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for sign, name, colour, style in ((1, "mefem", 0, "-"), (-1, "as printed", 1, "--")):
            heights = circular_weight(fine, r0, sign * sigma)
            axis.plot(fine, heights, style, color=COLOURS[colour], linewidth=1.8, label=name)
            axis.plot(occurring, circular_weight(occurring, r0, sign * sigma), "o", color=COLOURS[colour], ms=3)
        axis.text(r0, 1.03, " r0", size=8, va="bottom", ha="center")
        axis.set(xlabel="distance from the image centre, patches", ylabel="weight", ylim=(-0.03, 1.03))
        axis.set_xlim(0, grid / 2 * 2**0.5)
        axis.legend(loc="center left", bbox_to_anchor=(0.02, 0.5))

    return draw
