"""Quadrants: the source is one of the four corners of the face, a quarter of the grid; the rest is the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mefem_cli.errors import UsageError
from mefem_cli.masks import Split
from mefem_cli.masks._grid import farthest_last
from mefem_cli.masks._table import SplitTable, complement


@dataclass(frozen=True)
class Options:
    """Quadrants: no options."""


def build(options: Options, grid_size: int) -> Quadrants:
    """Return the masker. Raises UsageError for a grid with an odd side."""
    return Quadrants(grid_size)


class Quadrants:
    """One of the four quadrants, uniformly."""

    def __init__(self, grid_size: int):
        if grid_size % 2:
            raise UsageError(
                f"--mask quadrants: a grid of {grid_size} x {grid_size} patches has no quadrants; wanted an even side"
            )
        self.grid_size = grid_size
        half = grid_size // 2
        patches = torch.arange(grid_size * grid_size).view(grid_size, grid_size)
        corners = [patches[row : row + half, column : column + half] for row in (0, half) for column in (0, half)]
        sources = farthest_last(torch.stack([corner.flatten() for corner in corners]), grid_size)
        splits = Split(sources, complement(sources, grid_size * grid_size))
        self.table = SplitTable(splits, torch.full((4,), 1 / 4))

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Split]:
        """Return one split: `[B, L * L / 4]` source and `[B, 3 * L * L / 4]` target patches."""
        return [self.table.draw(num_faces, generator)]

    def p_source(self) -> torch.Tensor:
        """Return each patch's probability of being source, float64 [L, L]: 1/4 everywhere."""
        return self.table.p_source(self.grid_size)
