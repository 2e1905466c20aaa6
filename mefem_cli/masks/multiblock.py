"""Multiblock: targets are unions of random blocks, the source is what they leave; two modes in every step.

Short-range: 8 blocks of 15 % of the image; long-range: 2 blocks of 70 % (V-JEPA's masks on a single image; the sizes
below are ours). Shapes are static: each mode shows and predicts a fixed number of patches. Faces whose blocks leave too
few source or target patches are drawn again, surplus patches are dropped at random.

There are more unions than a table could hold, but few blocks (some 350 at L = 14). So blocks are bit sets in a table, a
union is an `or` of 8 or 2 of them, and one sort of random numbers picks the patches that stay.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from mefem_cli.errors import UsageError
from mefem_cli.masks import Split
from mefem_cli.masks._grid import farthest_last

PAPER_GRID_PATCHES = 14 * 14
MIN_GRID, MAX_GRID = 5, 64  # smaller ones have no room for the blocks, larger ones no memory for the table
ASPECT_RATIOS = (0.75, 1.5)  # height over width of a block, uniform
SPARE_CANDIDATES = 1.2  # candidates drawn per face: about one in ten is unfit
MAX_REDRAWS = 1000
FACES_FOR_P_SOURCE = 20_000


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
    """Return the masker. Raises UsageError for a grid that the blocks do not fit."""
    return Multiblock(grid_size)


class Multiblock:
    """Unions of blocks, one split per mode."""

    table = None

    def __init__(self, grid_size: int):
        if not MIN_GRID <= grid_size <= MAX_GRID:
            raise UsageError(
                f"--mask multiblock: a grid of {grid_size} x {grid_size} patches; wanted {MIN_GRID} to {MAX_GRID} a "
                "side, try another --image-size or --patch-size"
            )
        self.grid_size = grid_size
        by_distance = farthest_last(torch.arange(grid_size * grid_size)[None], grid_size)[0]
        self._by_distance = by_distance.numpy().astype(np.int16)  # the patches, the one farthest from the centre last
        self._blocks = [Blocks(grid_size, mode.block_share, self._by_distance) for mode in MODES]

    def num_source(self, mode: Mode) -> int:
        """Return the mode's fixed number of source patches on this grid."""
        return mode.num_source * self.grid_size**2 // PAPER_GRID_PATCHES

    def num_target(self, mode: Mode) -> int:
        """Return the mode's fixed number of target patches on this grid."""
        return mode.num_target * self.grid_size**2 // PAPER_GRID_PATCHES

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Split]:
        """Return a split per mode, int16: at L = 14, `[B, 48]` and `[B, 100]`, then `[B, 12]` and `[B, 144]`."""
        random = _numpy_generator(generator)
        return [
            self._split(mode, self._draw_covered(mode, blocks, num_faces, random), random)
            for mode, blocks in zip(MODES, self._blocks, strict=True)
        ]

    def p_source(self) -> torch.Tensor:
        """Return each patch's probability of being source, float64 [L, L], mean over modes; from 20,000 draws."""
        splits = self.draw(FACES_FOR_P_SOURCE, torch.Generator().manual_seed(0))
        counts = [torch.bincount(split.source.flatten(), minlength=self.grid_size**2) for split in splits]
        return torch.stack(counts).double().mean(0).view(self.grid_size, self.grid_size) / FACES_FOR_P_SOURCE

    def _draw_covered(self, mode: Mode, blocks: Blocks, num_faces: int, random: np.random.Generator) -> np.ndarray:
        """Return 1 where a block covers the patch, uint8 [B, N]: the first fit unions of a sequence of candidates.

        A union is fit if it covers enough patches for the target and leaves enough for the source.
        """
        fit: list[np.ndarray] = []
        for _ in range(MAX_REDRAWS):
            missing = num_faces - sum(map(len, fit))
            if missing <= 0:
                return np.concatenate(fit)[:num_faces]
            candidates = blocks.draw_unions(math.ceil(SPARE_CANDIDATES * missing), mode.num_blocks, random)
            num_covered = candidates.sum(axis=1, dtype=np.int32)
            most = self.grid_size**2 - self.num_source(mode)
            fit.append(candidates[(num_covered >= self.num_target(mode)) & (num_covered <= most)])
        raise UsageError(
            f"--mask multiblock: its blocks do not fit a grid of {self.grid_size}; try a smaller --patch-size"
        )

    def _split(self, mode: Mode, covered: np.ndarray, random: np.random.Generator) -> Split:
        """Choose source and target patches at random: sort a random key per patch, the uncovered before the covered.

        Then the first patches are a random choice of the uncovered, the last ones of the covered. A key holds one bit
        for covered, then random ones (23 at L = 14), then the patch, so that no index has to be sorted along.
        """
        num_patches = self.grid_size**2
        patch_bits = (1 << (num_patches - 1).bit_length()) - 1
        keys = _random_uint32(covered.shape, random)
        keys &= np.uint32(0x7FFFFFFF & ~patch_bits)
        keys |= np.arange(num_patches, dtype=np.uint32)
        keys |= np.left_shift(covered, 31, dtype=np.uint32)
        keys.sort(axis=1)
        keys &= np.uint32(patch_bits)  # what is left are patches [B, N], numbered by distance from the centre
        source = np.sort(keys[:, : self.num_source(mode)], axis=1)  # so the farthest one is the last
        target = keys[:, num_patches - self.num_target(mode) :]
        return Split(*(torch.from_numpy(self._by_distance.take(patches)) for patches in (source, target)))


class Blocks:
    """Every place of a block with a given share of the image, as bit sets over the patches in the order given."""

    def __init__(self, grid_size: int, share: float, order: np.ndarray):
        shapes = block_shapes(grid_size, share)
        self._num_patches = grid_size * grid_size
        self._cumulative = np.cumsum(list(shapes.values()))[:-1]
        self._num_places = np.array([(grid_size - height + 1) * (grid_size - width + 1) for height, width in shapes])
        self._first_row = np.cumsum(self._num_places) - self._num_places
        self._bits = np.concatenate([_pack(_places(grid_size, *shape)[:, order]) for shape in shapes])  # [R, words]

    def draw_unions(self, num_faces: int, num_blocks: int, random: np.random.Generator) -> np.ndarray:
        """Draw a union of blocks for each face, each block's shape, then its place: uint8 [B, N], 1: covered."""
        uniform = random.random((2, num_blocks, num_faces))
        shape = np.searchsorted(self._cumulative, uniform[0], side="right")
        rows = self._first_row[shape] + (uniform[1] * self._num_places[shape]).astype(np.int64)
        union = self._bits.take(rows[0], axis=0)
        for more in rows[1:]:
            union |= self._bits.take(more, axis=0)
        return np.unpackbits(union.view(np.uint8), axis=1, count=self._num_patches)


def block_shapes(grid_size: int, share: float) -> dict[tuple[int, int], float]:
    """Return the probability of every (height, width) of a block, in patches.

    The aspect ratio a is uniform, height = round(sqrt(area * a)) and width = round(sqrt(area / a)), clamped to the
    grid. Both are constant between the ratios at which one of them is rounded the other way.
    """
    low, high = ASPECT_RATIOS
    area = share * grid_size * grid_size
    halves = [(side + 0.5) ** 2 for side in range(2 * grid_size)]
    turns = [half / area for half in halves] + [area / half for half in halves]
    edges = [low, *sorted(turn for turn in turns if low < turn < high), high]
    shapes: dict[tuple[int, int], float] = {}
    for start, end in itertools.pairwise(edges):
        ratio = (start + end) / 2
        height, width = (min(max(round(math.sqrt(squared)), 1), grid_size) for squared in (area * ratio, area / ratio))
        shapes[height, width] = shapes.get((height, width), 0.0) + (end - start) / (high - low)
    return shapes


def _places(grid_size: int, height: int, width: int) -> np.ndarray:
    """Return the patches of a block at every place, bool [places, L * L]; the last row and column are reached too."""
    rows, columns = _runs(grid_size, height), _runs(grid_size, width)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, grid_size * grid_size)


def _runs(grid_size: int, length: int) -> np.ndarray:
    """Return the lines that a run of `length` covers from every start, bool [L - length + 1, L]."""
    line, start = np.arange(grid_size), np.arange(grid_size - length + 1)[:, None]
    return (start <= line) & (line < start + length)


def _pack(sets: np.ndarray) -> np.ndarray:
    """Return bool [R, N] as bit sets, uint64 [R, ceil(N / 64)]."""
    padded = np.pad(sets, ((0, 0), (0, -sets.shape[1] % 64)))
    return np.ascontiguousarray(np.packbits(padded, axis=1)).view(np.uint64)


def _random_uint32(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return random bits: as many 64-bit words as are needed are twice as fast as 32-bit ones."""
    count = math.prod(shape)
    words = random.integers(0, 1 << 64, -(-count // 2), dtype=np.uint64)
    return words.view(np.uint32)[:count].reshape(shape)


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """Return a numpy generator that continues a torch one: numpy draws and sorts many small rows ten times faster."""
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,), generator=generator).item()
    return np.random.Generator(np.random.SFC64(int(seed)))
