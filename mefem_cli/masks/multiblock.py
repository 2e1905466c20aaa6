"""Multiblock: targets are unions of random blocks, the source is what they leave; two modes in every step.

Short-range: 8 blocks of 15 % of the image; long-range: 2 blocks of 70 % (V-JEPA's masks on a single image; the sizes
below are ours). Shapes are static: each mode shows and predicts a fixed number of patches. Faces whose blocks leave too
few source or target patches are drawn again, surplus patches are dropped at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mefem_cli.errors import UsageError
from mefem_cli.masks import Split
from mefem_cli.masks._grid import farthest_last

PAPER_GRID_PATCHES = 14 * 14
ASPECT_RATIOS = (0.75, 1.5)  # height over width of a block, uniform
MAX_REDRAWS = 1000


@dataclass(frozen=True)
class Options:
    """Multiblock: no options."""


@dataclass(frozen=True)
class Mode:
    """`num_blocks` blocks of `block_share` of the image; the fixed sizes are patches of a 14 x 14 grid.

    With 48 source and 100 target patches (12 and 144) about one draw in ten is drawn again: each is the 5 % quantile
    of what the blocks leave and cover, measured over 50,000 draws.
    """

    num_blocks: int
    block_share: float
    num_source: int
    num_target: int


MODES = (Mode(8, 0.15, 48, 100), Mode(2, 0.70, 12, 144))


def build(options: Options, grid_size: int) -> Multiblock:
    """Return the masker. Raises UsageError for a grid too small for the blocks."""
    return Multiblock(grid_size)


class Multiblock:
    """Unions of blocks, one split per mode."""

    def __init__(self, grid_size: int):
        self.grid_size = grid_size
        self._scale = grid_size * grid_size / PAPER_GRID_PATCHES
        if min(self.num_source(mode) for mode in MODES) < 1:
            raise UsageError(
                f"--mask multiblock: a grid of {grid_size} x {grid_size} patches is too small; wanted 5 or more a side"
            )

    def num_source(self, mode: Mode) -> int:
        """Return the mode's fixed number of source patches on this grid."""
        return int(mode.num_source * self._scale)

    def num_target(self, mode: Mode) -> int:
        """Return the mode's fixed number of target patches on this grid."""
        return int(mode.num_target * self._scale)

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Split]:
        """Return a split per mode: at L = 14, `[B, 48]` and `[B, 100]`, then `[B, 12]` and `[B, 144]` patches."""
        return [self._draw_mode(mode, num_faces, generator) for mode in MODES]

    def _draw_mode(self, mode: Mode, num_faces: int, generator: torch.Generator) -> Split:
        covered = self._draw_blocks(mode, num_faces, generator)  # [B, L * L], True: a block covers the patch
        for _ in range(MAX_REDRAWS):
            num_covered = covered.sum(1)
            too_few = (num_covered < self.num_target(mode)) | (~covered).sum(1).lt(self.num_source(mode))
            if not too_few.any():
                break
            covered[too_few] = self._draw_blocks(mode, int(too_few.sum()), generator)
        else:
            raise UsageError(
                f"--mask multiblock: its blocks do not fit a grid of {self.grid_size}; try a smaller --patch-size"
            )
        source = _choose(~covered, self.num_source(mode), generator)
        return Split(farthest_last(source, self.grid_size), _choose(covered, self.num_target(mode), generator))

    def _draw_blocks(self, mode: Mode, num_faces: int, generator: torch.Generator) -> torch.Tensor:
        side = self.grid_size
        low, high = ASPECT_RATIOS
        aspect = low + (high - low) * torch.rand(num_faces, mode.num_blocks, generator=generator)
        area = mode.block_share * side * side
        height = (area * aspect).sqrt().round().clamp(1, side)  # [B, num_blocks], patches
        width = (area / aspect).sqrt().round().clamp(1, side)
        # The upper bound is inclusive: blocks reach the last row and column as often as the first.
        top = torch.floor(torch.rand(num_faces, mode.num_blocks, generator=generator) * (side - height + 1))
        left = torch.floor(torch.rand(num_faces, mode.num_blocks, generator=generator) * (side - width + 1))
        position = torch.arange(side)
        in_rows = (position >= top[..., None]) & (position < (top + height)[..., None])  # [B, num_blocks, L]
        in_columns = (position >= left[..., None]) & (position < (left + width)[..., None])
        return (in_rows[..., :, None] & in_columns[..., None, :]).any(1).flatten(1)


def _choose(allowed: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Choose `count` of the True patches of each row at random: `[B, L * L]` bool -> `[B, count]` int64."""
    keys = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    return keys.topk(count, dim=1).indices
