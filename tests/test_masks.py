"""Mask strategies against their definitions in docs/method.md."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mefem_cli.errors import UsageError
from mefem_cli.masks import Split, multiblock, quadrants, stripes
from mefem_cli.masks._grid import distance_from_centre, farthest_last
from mefem_cli.masks._table import SplitTable

MASKERS = {
    "stripes": lambda grid: stripes.build(stripes.Options(), grid),
    "quadrants": lambda grid: quadrants.build(quadrants.Options(), grid),
    "multiblock": lambda grid: multiblock.build(multiblock.Options(), grid),
}


CENTRE_PROBABILITY, CORNER_PROBABILITY = 0.455, 0.017  # of stripes of 3 at L = 14, as docs/method.md has them


def slow_multiblock(mode: multiblock.Mode, grid: int, random: np.random.Generator) -> tuple[set[int], set[int]]:
    """The definition in docs/method.md, literally, for one face: source and target patches."""
    scale = grid * grid / 196
    num_source, num_target = int(mode.num_source * scale), int(mode.num_target * scale)
    while True:
        covered = set()
        for _ in range(mode.num_blocks):
            aspect, area = random.uniform(0.75, 1.5), mode.block_share * grid * grid
            height = min(max(round(math.sqrt(area * aspect)), 1), grid)
            width = min(max(round(math.sqrt(area / aspect)), 1), grid)
            top, left = random.integers(grid - height + 1), random.integers(grid - width + 1)
            covered |= {row * grid + col for row in range(top, top + height) for col in range(left, left + width)}
        left_over = sorted(set(range(grid * grid)) - covered)
        if len(covered) >= num_target and len(left_over) >= num_source:
            source = random.choice(left_over, num_source, replace=False)
            return set(source.tolist()), set(random.choice(sorted(covered), num_target, replace=False).tolist())


def membership(patches: list[set[int]] | torch.Tensor, grid: int) -> np.ndarray:
    """Which patches are in each set: float64 [n, L * L] of 0 and 1."""
    rows = [sorted(one) for one in patches] if isinstance(patches, list) else patches.tolist()
    member = np.zeros((len(rows), grid * grid))
    for row, members in zip(member, rows, strict=True):
        row[members] = 1
    return member


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stripe_starts_have_the_published_probabilities():
    expected = [0.0168, 0.0309, 0.0596, 0.0976, 0.1355, 0.1597]
    assert stripes.start_probabilities(14, 3).tolist() == pytest.approx([*expected, *reversed(expected)], abs=5e-5)


@pytest.mark.parametrize(("grid", "width"), [(14, 3), (14, 2), (14, 4), (8, 2), (16, 5), (7, 6)])
def test_stripe_starts_follow_the_truncated_normal(grid, width):
    """The definition, literally: draw c, drop what lies outside, round, clamp, count."""
    random = np.random.default_rng(1)
    centres = random.normal((grid - 1) / 2, 0.175 * grid, 1_000_000)
    centres = centres[(centres >= 0) & (centres <= grid - 1)]
    starts = np.clip(np.round(centres - (width - 1) / 2), 0, grid - width).astype(int)
    counted = np.bincount(starts, minlength=grid - width + 1) / len(starts)
    assert stripes.start_probabilities(grid, width).numpy() == pytest.approx(
        counted, abs=4 * math.sqrt(0.25 / len(starts))
    )


def test_stripes_are_drawn_with_these_probabilities_on_both_axes():
    draws = 60_000
    (split,) = MASKERS["stripes"](14).draw(draws, generator())
    row, column = split.source // 14, split.source % 14
    is_row_stripe = (row.max(1).values - row.min(1).values) == 2
    assert is_row_stripe.float().mean().item() == pytest.approx(0.5, abs=0.01)
    first = torch.where(is_row_stripe, row.min(1).values, column.min(1).values)
    counted = torch.bincount(first, minlength=12) / draws
    assert counted.tolist() == pytest.approx(stripes.start_probabilities(14, 3).tolist(), abs=0.006)


def test_probability_of_being_source_is_highest_in_the_centre_of_the_face():
    (split,) = MASKERS["stripes"](14).draw(60_000, generator())
    drawn = torch.bincount(split.source.flatten(), minlength=196).view(14, 14) / 60_000
    stated = MASKERS["stripes"](14).p_source()
    for share, tolerance in ((drawn, 0.01), (stated, 5e-4)):
        assert share[6:8, 6:8].mean().item() == pytest.approx(CENTRE_PROBABILITY, abs=tolerance)
        assert share[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item() == pytest.approx(CORNER_PROBABILITY, abs=tolerance)


@pytest.mark.parametrize("name", MASKERS)
@pytest.mark.parametrize("grid", [8, 14])
def test_stated_probabilities_of_being_source_are_those_of_the_draws(name, grid):
    masker, draws = MASKERS[name](grid), 20_000
    splits = masker.draw(draws, generator(11))
    counted = np.mean([membership(split.source, grid).mean(0) for split in splits], axis=0)
    stated = masker.p_source()
    assert (stated.shape, stated.dtype) == ((grid, grid), torch.float64)
    assert stated.sum().item() == pytest.approx(np.mean([split.source.shape[1] for split in splits]))
    assert counted == pytest.approx(stated.flatten().numpy(), abs=0.02)  # over 4 standard errors of each


@pytest.mark.parametrize("name", ["stripes", "quadrants"])
def test_a_table_holds_every_split_once_and_draws_follow_its_probabilities(name):
    masker, draws = MASKERS[name](14), 60_000
    rows = masker.table.draw_rows(draws, generator(2))
    (split,) = masker.draw(draws, generator(2))
    assert torch.equal(masker.table.splits.source[rows], split.source)
    assert torch.equal(masker.table.splits.target[rows], split.target)
    sources = {tuple(sorted(source)) for source in masker.table.splits.source.tolist()}
    assert len(sources) == len(masker.table.probability) == {"stripes": 24, "quadrants": 4}[name]
    counted = torch.bincount(rows, minlength=len(sources)) / draws
    assert counted.tolist() == pytest.approx(masker.table.probability.tolist(), abs=0.008)


def test_a_table_never_draws_what_has_no_probability():
    table = SplitTable(
        Split(torch.arange(5)[:, None], torch.arange(5)[:, None]), torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    )
    assert set(table.draw_rows(10_000, generator()).tolist()) == {1, 3}


def test_a_stripe_is_three_whole_rows_or_columns_in_row_major_order():
    (split,) = MASKERS["stripes"](14).draw(200, generator())
    for source in split.source.tolist():
        rows, columns = {patch // 14 for patch in source}, {patch % 14 for patch in source}
        assert sorted((len(rows), len(columns))) == [3, 14]
        assert source == sorted(source)


@pytest.mark.parametrize("name", MASKERS)
def test_source_and_target_are_disjoint_and_every_patch_serves_as_both(name):
    splits = MASKERS[name](14).draw(3000, generator())
    for split in splits:
        for source, target in zip(split.source[:50].tolist(), split.target[:50].tolist(), strict=True):
            assert len(set(source)) == len(source)
            assert len(set(target)) == len(target)
            assert not set(source) & set(target)
    for side in ("source", "target"):  # over the modes of a step: blocks of 70 % always hide the centre
        used = torch.cat([getattr(split, side).flatten() for split in splits])
        assert set(used.unique().tolist()) == set(range(196))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("stripes", [(42, 154)]), ("quadrants", [(49, 147)]), ("multiblock", [(48, 100), (12, 144)])],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sizes_are_fixed(name, sizes, seed):
    splits = MASKERS[name](14).draw(257, generator(seed))
    assert [(split.source.shape, split.target.shape) for split in splits] == [((257, s), (257, t)) for s, t in sizes]


@pytest.mark.parametrize("name", MASKERS)
def test_the_same_seed_draws_the_same_masks(name):
    first, second, other = (MASKERS[name](14).draw(20, generator(seed)) for seed in (3, 3, 4))
    assert all(
        torch.equal(a.source, b.source) and torch.equal(a.target, b.target) for a, b in zip(first, second, strict=True)
    )
    assert not torch.equal(first[0].source, other[0].source)


def test_quadrants_are_the_four_corners_equally_often():
    (split,) = MASKERS["quadrants"](14).draw(8000, generator())
    corner = split.source[:, -1]  # the patch farthest from the centre is the image corner
    values, counts = corner.unique(return_counts=True)
    assert values.tolist() == [0, 13, 182, 195]
    assert (counts / 8000).tolist() == pytest.approx([0.25] * 4, abs=0.025)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("grid", [8, 14])
def test_multiblock_is_distributed_as_its_definition_says(number, grid):
    """Every patch alone, and every pair of neighbours, which tells blocks from scattered patches."""
    num_slow, num_fast = 1500, 15_000
    random = np.random.default_rng(3)
    mode = multiblock.MODES[number]
    slow = [slow_multiblock(mode, grid, random) for _ in range(num_slow)]
    split = MASKERS["multiblock"](grid).draw(num_fast, generator(5))[number]
    for side, fast in enumerate((split.source, split.target)):
        ours, theirs = membership(fast, grid), membership([one[side] for one in slow], grid)
        for shift in (1, grid, 5 * grid + 3):  # the patch to the right, the one below and a distant one
            pairs = [member[:, :-shift] * member[:, shift:] for member in (ours, theirs)]
            for first, second in ((ours, theirs), pairs):
                p = first.mean(0)
                error = np.sqrt(p * (1 - p) * (1 / num_slow + 1 / num_fast)) + 1e-3
                assert np.abs((first.mean(0) - second.mean(0)) / error).max() < 5


@pytest.mark.parametrize(("grid", "share"), [(14, 0.15), (14, 0.7), (5, 0.15), (8, 0.7), (28, 0.15)])
def test_block_shapes_have_the_probabilities_of_a_uniform_aspect_ratio(grid, share):
    aspect = np.random.default_rng(0).uniform(0.75, 1.5, 200_000)
    height = np.sqrt(share * grid * grid * aspect).round().clip(1, grid).astype(int)
    width = np.sqrt(share * grid * grid / aspect).round().clip(1, grid).astype(int)
    counted = Counter(zip(height.tolist(), width.tolist(), strict=True))
    stated = multiblock.block_shapes(grid, share)
    assert sum(stated.values()) == pytest.approx(1)
    for shape in {*counted, *stated}:
        assert counted[shape] / len(aspect) == pytest.approx(stated.get(shape, 0.0), abs=0.006)


def test_multiblock_surplus_is_dropped_without_regard_to_position():
    """Dropping by index (or min-length truncation) would starve the last rows of the long-range mode's source."""
    _, long_range = MASKERS["multiblock"](14).draw(20_000, generator())
    used = torch.bincount(long_range.source.flatten(), minlength=196).view(14, 14).float()
    assert used.sum(1)[:7].sum().item() == pytest.approx(used.sum(1)[7:].sum().item(), rel=0.03)
    assert used.sum(0)[:7].sum().item() == pytest.approx(used.sum(0)[7:].sum().item(), rel=0.03)


@pytest.mark.parametrize("name", ["quadrants", "multiblock"])
def test_the_last_source_patch_is_the_farthest_from_the_centre(name):
    for split in MASKERS[name](14).draw(100, generator()):
        for source in split.source.tolist():
            distance = [math.hypot(patch // 14 - 6.5, patch % 14 - 6.5) for patch in source]
            farthest = max(distance)
            assert source[-1] == max(patch for patch, r in zip(source, distance, strict=True) if r > farthest - 1e-9)


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(2, 24), data=st.data())
def test_stripes_of_every_size_cover_the_grid_once(grid, data):
    width = data.draw(st.integers(1, grid - 1))
    masker = stripes.Stripes(grid, width)
    (split,) = masker.draw(16, generator())
    together = torch.cat([split.source, split.target], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(grid * grid).expand(16, -1))
    assert masker.start_probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.0, -1.0, math.inf, math.nan, 1e9])
def test_impossible_spreads_are_refused(spread):
    with pytest.raises(UsageError, match="--spread"):
        stripes.build(stripes.Options(spread=spread), 14)


@pytest.mark.parametrize("grid", [4, 65])
def test_grids_that_blocks_do_not_fit_are_refused(grid):
    with pytest.raises(UsageError, match="--mask multiblock"):
        MASKERS["multiblock"](grid)


@pytest.mark.parametrize("width", [0, -1, 14, 15])
def test_impossible_widths_are_refused(width):
    with pytest.raises(UsageError, match=f"--width {width}"):
        stripes.build(stripes.Options(width=width), 14)


@pytest.mark.parametrize(("grid", "advice"), [(2, "--width 1"), (3, "--width 2"), (14, "--width 3")])
def test_the_width_that_is_advised_fits(grid, advice):
    with pytest.raises(UsageError, match=f"try {advice}$"):
        stripes.build(stripes.Options(width=grid), grid)
    stripes.build(stripes.Options(width=int(advice[-1])), grid)
    with pytest.raises(UsageError, match="a larger --image-size"):
        stripes.build(stripes.Options(width=1), 1)


def test_odd_grids_have_no_quadrants():
    with pytest.raises(UsageError, match="even"):
        quadrants.build(quadrants.Options(), 7)


@pytest.mark.parametrize("grid", [5, 7, 8, 16, 28])
def test_multiblock_fits_other_grids(grid):
    for split in MASKERS["multiblock"](grid).draw(64, generator()):
        assert int(split.source.max()) < grid * grid
        assert split.source.shape[1] + split.target.shape[1] <= grid * grid


def test_distances_are_from_the_image_centre_in_patches():
    expected = [math.hypot(row - 6.5, column - 6.5) for row in range(14) for column in range(14)]
    assert distance_from_centre(14).tolist() == pytest.approx(expected)


def test_farthest_last_breaks_ties_by_index():
    assert farthest_last(torch.tensor([[15, 0, 5, 3, 12]]), 4).tolist() == [[5, 0, 3, 12, 15]]
