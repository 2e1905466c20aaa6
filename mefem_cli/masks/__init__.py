"""Mask strategies, one per file: which patches of a face are the source and which are the target.

A part here has `Options` and `build(options, grid_size)`, which returns a `Masker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from mefem_cli.masks._table import SplitTable


@dataclass(frozen=True)
class Split:
    """Source and target patches of a batch of faces, as row-major indices into the grid; no patch is in both.

    The last column of `source` is the patch that gives its place to a CLS token in the source.
    """

    source: torch.Tensor  # [B, num_source] integers
    target: torch.Tensor  # [B, num_target] integers


class Masker(Protocol):
    """Draws splits of a grid of `grid_size` x `grid_size` patches."""

    grid_size: int
    table: SplitTable | None  # every split there is, where they are few: then a draw is the number of a row

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Split]:
        """Return one split per mode for `num_faces` faces; shapes depend on nothing but `num_faces`."""
        ...

    def p_source(self) -> torch.Tensor:
        """Return each patch's probability of being source, float64 [L, L]; the mean over modes."""
        ...
