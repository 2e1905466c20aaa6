"""The square, its decisions and its pixels, against independent float computations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mefem_cli.faces import geometry
from mefem_cli.faces.geometry import Square

coordinates = st.integers(-500, 2000)
sides = st.integers(1, 900)
boxes = st.tuples(coordinates, coordinates, sides, sides)


@given(boxes, st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_square_is_centred_and_as_large_as_the_rule_says(box, scale):
    square = geometry.square_around(box, scale)
    x, y, width, height = (Fraction(value) for value in box)
    side = Fraction(scale) * max(width, height)
    assert Fraction(square.side) == side
    assert Fraction(square.x) == x + (width - side) / 2
    assert Fraction(square.y) == y + (height - side) / 2


@given(boxes, st.integers(1, 2500), st.integers(1, 2500))
def test_inside_means_that_padding_invents_nothing(box, width, height):
    square = geometry.square_around(box)
    outside = geometry.outside_fraction(square, width, height)
    assert (outside == 0) == geometry.is_inside(square, width, height)
    assert 0 <= outside <= 1


@pytest.mark.parametrize(
    ("square", "inside"),
    [
        (Square(0, 0, 100), True),
        (Square(-0.5, 0, 100), False),
        (Square(0, -0.5, 100), False),
        (Square(100, 20, 100), True),
        (Square(100.5, 20, 100), False),
        (Square(20, 50.5, 100), False),
    ],
)
def test_touching_the_edge_is_inside(square, inside):
    assert geometry.is_inside(square, width=200, height=150) is inside


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_centred_square_is_the_largest_one_inside(width, height):
    square = geometry.centred_square(width, height)
    assert geometry.is_inside(square, width, height)
    assert square.side == min(width, height)
    assert 2 * square.x + square.side == width
    assert 2 * square.y + square.side == height


def ramp(width: int, height: int) -> np.ndarray:
    """A picture whose red is a linear function of x and whose green is one of y, without rounding."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x, y, np.full_like(x, 7)], axis=-1).astype(np.uint8)


@given(st.floats(20, 60), st.floats(20, 60), st.floats(30, 120), st.sampled_from([8, 16, 50, 112]))
def test_crop_of_a_linear_picture_is_linear_and_in_place(x, y, side, size):
    """Pixel j of the crop is the mean of the source around x + (j + 0.5) side / size; a pixel's centre is at + 0.5."""
    crop = geometry.resample(ramp(200, 190), Square(x, y, side), size).astype(float)
    positions = (np.arange(size) + 0.5) * side / size - 0.5
    np.testing.assert_allclose(crop[..., 0], np.broadcast_to(x + positions, (size, size)), atol=0.55)
    np.testing.assert_allclose(crop[..., 1], np.broadcast_to((y + positions)[:, None], (size, size)), atol=0.55)


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.integers(-20, 20), st.floats(30, 90))
def test_shifting_the_box_shifts_the_crop_by_exactly_that(seed, right, down, side):
    picture = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    shifted = np.roll(picture, (down, right), axis=(0, 1))
    first = geometry.resample(picture, Square(50.25, 50.5, side), 32)
    second = geometry.resample(shifted, Square(50.25 + right, 50.5 + down, side), 32)
    np.testing.assert_array_equal(first, second)


def test_one_to_one_crop_copies_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8)
    np.testing.assert_array_equal(geometry.resample(picture, Square(10, 20, 50), 50), picture[20:70, 10:60])


def test_reduction_is_antialiased():
    """One-pixel stripes vanish into gray; a sampler without a wide filter would return black or white."""
    picture = np.zeros((240, 240, 3), np.uint8)
    picture[:, ::2] = 255
    crop = geometry.resample(picture, Square(0, 0, 240), 24)[4:-4, 4:-4]
    assert np.abs(crop.astype(int) - 127).max() <= 2


@pytest.mark.parametrize(("pad", "numpy_mode"), [("reflect", "reflect"), ("edge", "edge")])
@pytest.mark.parametrize("square", [Square(-30, -10, 60), Square(40, 30, 80), Square(-70, -70, 200)])
def test_padding_equals_numpys(pad, numpy_mode, square):
    picture = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    padded = np.pad(picture, ((200, 200), (200, 200), (0, 0)), numpy_mode)
    expected = geometry.resample(padded, Square(square.x + 200, square.y + 200, square.side), 40)
    np.testing.assert_array_equal(geometry.resample(picture, square, 40, pad), expected)


def test_keypoints_map_into_the_crop():
    square = Square(10, 20, 448)
    corners = [(10, 20), (458, 468), (234, 244)]
    np.testing.assert_allclose(geometry.in_crop(np.array(corners), square, 224), [(0, 0), (224, 224), (112, 112)])


@given(boxes, boxes)
def test_overlap_is_symmetric_and_bounded(first, second):
    overlap = geometry.intersection_over_union(first, second)
    assert 0 <= overlap <= 1
    assert overlap == geometry.intersection_over_union(second, first)
    assert geometry.intersection_over_union(first, first) == 1
