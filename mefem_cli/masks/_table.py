"""A mask with few possible splits is a table of them: a draw is the number of a row, looked up on the device."""

from __future__ import annotations

import torch

from mefem_cli.masks import Split


class SplitTable:
    """`R` splits, `source` [R, S] and `target` [R, T], int64, of which row r is drawn with `probability[r]`."""

    def __init__(self, splits: Split, probability: torch.Tensor):
        self.splits = splits
        self.probability = probability.double()  # [R]
        cumulative = self.probability.cumsum(0)
        self._cumulative = cumulative / cumulative[-1]  # ends in exactly 1, which no uniform number reaches

    def draw_rows(self, num_faces: int, generator: torch.Generator) -> torch.Tensor:
        """Draw the row of each face by inversion: one uniform number each. Returns int64 [B]."""
        uniform = torch.rand(num_faces, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self._cumulative, uniform, right=True)

    def draw(self, num_faces: int, generator: torch.Generator) -> Split:
        """Draw one split per face."""
        rows = self.draw_rows(num_faces, generator)
        return Split(self.splits.source[rows], self.splits.target[rows])

    def p_source(self, grid_size: int) -> torch.Tensor:
        """Return each patch's probability of being source, float64 [L, L]: exact, as all splits are known."""
        is_source = torch.zeros(len(self.probability), grid_size * grid_size, dtype=torch.float64)
        is_source.scatter_(1, self.splits.source, 1.0)
        return (self.probability @ is_source).view(grid_size, grid_size)


def complement(sources: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Return the patches that are not in each row of `sources` [R, S], ascending, int64 [R, num_patches - S]."""
    is_target = torch.ones(len(sources), num_patches, dtype=torch.bool).scatter_(1, sources, False)
    return is_target.nonzero()[:, 1].view(len(sources), -1)
