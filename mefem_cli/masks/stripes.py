"""Axial stripes: the source is a full-width stripe of rows or columns near the centre, the rest is the target.

The stripe's centre is normal around the middle of the face, so eyes, nose and mouth are shown often and the hair seldom
(paper: stripes and width 3; ours: equal odds for rows and columns, the clamp at the edges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mefem_cli.errors import UsageError
from mefem_cli.masks import Split
from mefem_cli.masks._table import SplitTable, complement

MAX_SPREAD = 1000  # at which all starts but the outermost are equally likely already


@dataclass(frozen=True)
class Options:
    """Axial stripes."""

    width: int = 3  # stripe width, patches
    spread: float = 0.175  # standard deviation of the stripe's centre, as a share of the grid


def build(options: Options, grid_size: int) -> Stripes:
    """Return the masker. Raises UsageError for a width that leaves no source or no target."""
    return Stripes(grid_size, options.width, options.spread)


class Stripes:
    """One of `2 * (L - width + 1)` stripes per face, drawn from a finite table."""

    def __init__(self, grid_size: int, width: int = 3, spread: float = 0.175):
        if not 1 <= width < grid_size:
            grid = f"--width {width}: a grid of {grid_size} x {grid_size} patches has"
            if grid_size < 2:
                raise UsageError(f"{grid} no stripes; try a larger --image-size or a smaller --patch-size")
            raise UsageError(f"{grid} stripes of 1 to {grid_size - 1}; try --width {min(3, grid_size - 1)}")
        if not 0 < spread <= MAX_SPREAD:
            raise UsageError(
                f"--spread {spread}: wanted a share of the grid over 0, at most {MAX_SPREAD}; try --spread 0.175"
            )
        self.grid_size = grid_size
        self.start_probabilities = start_probabilities(grid_size, width, spread)
        sources = _stripes(grid_size, width)
        splits = Split(sources, complement(sources, grid_size * grid_size))
        self.table = SplitTable(splits, torch.cat([self.start_probabilities, self.start_probabilities]) / 2)

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Split]:
        """Return one split: `[B, width * L]` source and `[B, L * L - width * L]` target patches."""
        return [self.table.draw(num_faces, generator)]

    def p_source(self) -> torch.Tensor:
        """Return each patch's probability of being source, float64 [L, L]: .455 in the middle of 14 x 14 patches."""
        return self.table.p_source(self.grid_size)


def start_probabilities(grid_size: int, width: int, spread: float = 0.175) -> torch.Tensor:
    """Return P(first row or column of the stripe), float64 of shape [L - width + 1].

    The centre c is normal(mean (L-1)/2, std spread * L) truncated to [0, L-1]; the start is
    clamp(round(c - (width-1)/2), 0, L-width). So start s takes the mass of c between s - 1/2 and s + 1/2, shifted by
    (width-1)/2, and the first and last start also take the tails.

    >>> [round(p, 4) for p in start_probabilities(14, 3).tolist()[:3]]
    [0.0168, 0.0309, 0.0596]
    """
    last = grid_size - 1
    num_starts = grid_size - width + 1

    def mass_below(c: float) -> float:
        return 0.5 * (1 + math.erf((c - last / 2) / (spread * grid_size * math.sqrt(2))))

    inner_edges = [
        start + width / 2 for start in range(num_starts - 1)
    ]  # c at which the start changes: s + 1/2 + (w-1)/2
    below = [mass_below(c) for c in (0.0, *inner_edges, float(last))]
    mass = torch.tensor([high - low for low, high in zip(below[:-1], below[1:], strict=True)], dtype=torch.float64)
    return mass / mass.sum()


def _stripes(grid_size: int, width: int) -> torch.Tensor:
    """Return the patches of every stripe, int64 [2 * (L - w + 1), w * L]: row stripes by start, then column stripes.

    Patches are in row-major order, so the last of a stripe lies at the image border.
    """
    patches = torch.arange(grid_size * grid_size).view(grid_size, grid_size)
    starts = range(grid_size - width + 1)
    return torch.stack([patches.narrow(axis, start, width).flatten() for axis in (0, 1) for start in starts])
