"""The square, its decisions and its pixels, against independent float computations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
    crop = geometry.resample(ramp(240, 230), Square(x, y, side), size).astype(float)
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


@given(st.floats(0, 60), st.floats(0, 50), st.floats(20, 130), st.sampled_from([16, 50, 112]))
def test_crop_is_what_pillow_makes_of_the_whole_image(x, y, side, size):
    picture = np.random.default_rng(size).integers(90, 165, (180, 190, 3), dtype=np.uint8)
    expected = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    difference = np.abs(geometry.resample(picture, Square(x, y, side), size) - np.asarray(expected).astype(int))
    assert difference.max() <= 2  # rounding: Pillow begins with rows or columns by the sizes, and stores whole levels


def exact_rows(pixels: np.ndarray, start: float, side: float, size: int) -> np.ndarray:
    """Filter the rows of float64 [n, ...] one by one, by Pillow's rule for which of them count."""
    reduction = max(1.0, side / size)
    rows = []
    for index in range(size):
        middle = start + (index + 0.5) * side / size
        first = max(0, int(middle - 2 * reduction + 0.5))
        stop = min(len(pixels), int(middle + 2 * reduction + 0.5))
        weights = keys((np.arange(first, stop) + 0.5 - middle) / reduction)
        rows.append(np.tensordot(weights / weights.sum(), pixels[first:stop], 1))
    return np.array(rows)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.02, 1)),
    st.integers(1, 50),
)
def test_crop_equals_an_exact_float_computation(seed, sides, place, size):
    """Whatever the square, up to the edges of the picture; nothing is rounded or clipped before the end."""
    height, width = sides
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = place[2] * min(sides)
    square = Square(place[0] * (width - side), place[1] * (height - side), side)
    across = exact_rows(picture.astype(np.float64).swapaxes(0, 1), square.x, side, size)
    exact = np.clip(exact_rows(across.swapaxes(0, 1), square.y, side, size), 0, 255)
    assert np.abs(geometry.resample(picture, square, size) - exact).max() < 0.501


def test_crops_of_faces_are_those_of_pillow(shared_data):
    """Within 1 level, but where Pillow clips between the directions (0.03 % at most); the mean difference is 0.2."""
    for path in sorted((shared_data / "faces" / "t2i").glob("*.jpg"))[::100]:
        with Image.open(path) as image:
            side = 0.83 * min(image.size)
            box = (3.4, 5.7, 3.4 + side, 5.7 + side)
            expected = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=box))
            crop = geometry.resample(np.asarray(image.convert("RGB")), Square(3.4, 5.7, side), 224)
        difference = np.abs(crop.astype(int) - expected)
        assert (difference > 1).mean() < 1e-3
        assert difference.mean() < 0.25


def test_pictures_that_are_views_are_filtered_as_their_copies():
    picture = soft_noise(120, 130)
    for view in (picture[::-1, ::-1], picture.swapaxes(0, 1), picture[3:110, 5:120], np.asfortranarray(picture)):
        crop = geometry.resample(view, Square(7.3, 9.1, 90.5), 40)
        assert crop.flags.c_contiguous
        np.testing.assert_array_equal(crop, geometry.resample(view.copy(), Square(7.3, 9.1, 90.5), 40))


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


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_square_that_would_fill_the_memory_is_refused(angle):
    """A table of boxes may name any number; with padding the square is then larger than any picture."""
    with pytest.raises(MemoryError):
        geometry.resample(np.zeros((50, 60, 3), np.uint8), Square(-1e6, -1e6, 2e6), 32, "edge", angle)


# Turned squares ------------------------------------------------------------------------------------------------------

angles = st.floats(-math.pi, math.pi)


def soft_noise(height: int, width: int, seed: int = 0, blur: int = 2) -> np.ndarray:
    """Noise without the finest detail, as photos are: uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3))
    for axis in (0, 1):
        for _ in range(blur):
            noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return np.clip(128 + 40 * noise / noise.std(), 0, 255).round().astype(np.uint8)


def keys(t: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -1/2 (Keys, 1981)."""
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def interpolated(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The picture as a function of continuous coordinates, float64 [..., 3]: from the 16 pixels around."""
    column, row = np.floor(x - 0.5).astype(int), np.floor(y - 0.5).astype(int)
    total = np.zeros((*x.shape, 3))
    for down in range(-1, 3):
        for right in range(-1, 3):
            weight = keys(x - 0.5 - column - right) * keys(y - 0.5 - row - down)
            total += weight[..., None] * picture[row + down, column + right]
    return total


def slow_crop(picture: np.ndarray, square: Square, size: int, angle: float) -> np.ndarray:
    """Weigh the continuous picture around every pixel of the crop by the filter, in its own turned coordinates."""
    reduction = square.side / size
    spacing = 0.5 / max(1.0, reduction)  # crop px; at least two samples per pixel of the picture
    reach = np.arange(-2 + spacing / 2, 2, spacing) if reduction > 1 else np.zeros(1)
    weights = keys(reach) / keys(reach).sum()
    positions = (np.arange(size)[:, None] + 0.5 + reach).ravel() * reduction - square.side / 2  # [size * reach]
    right, down = np.meshgrid(positions, positions)
    x = square.x + square.side / 2 + math.cos(angle) * right - math.sin(angle) * down
    y = square.y + square.side / 2 + math.sin(angle) * right + math.cos(angle) * down
    samples = interpolated(picture, x, y).reshape(size, reach.size, size, reach.size, 3)
    return np.einsum("iajbc,a,b->ijc", samples, weights, weights)


@settings(max_examples=12, deadline=None)
@given(angles, st.floats(40, 50), st.floats(40, 50), st.floats(6, 48), st.sampled_from([8, 11]))
def test_turned_crop_equals_a_slow_float_reference(angle, x, y, side, size):
    picture, angle = soft_noise(140, 140), angle or 1e-9  # of 0: not filtered twice, as the reference is
    square = Square(x, y, side)
    difference = geometry.resample(picture, square, size, angle=angle) - slow_crop(picture, square, size, angle)
    assert np.abs(difference).max() < 5
    assert np.abs(difference).mean() < 1.2
    assert abs(difference.mean()) < 0.4


@pytest.mark.parametrize("quarters", [-1, 1, 2])
@pytest.mark.parametrize("square", [Square(10.25, 13.5, 77.3), Square(60, 50, 64), Square(30, 40, 20.5)])
def test_quarter_turns_are_numpys(quarters, square):
    """A square turned clockwise by a quarter shows the picture turned counter-clockwise."""
    picture = soft_noise(120, 130)
    turned = geometry.resample(picture, square, 32, angle=quarters * math.pi / 2)
    expected = np.rot90(geometry.resample(picture, square, 32), quarters)
    assert np.abs(turned.astype(int) - expected).max() <= 6


@pytest.mark.parametrize("side", [20.3, 64, 97.7, 160])
def test_crop_turned_by_next_to_nothing_is_the_unturned_one(side):
    """So the turned path is as sharp, as antialiased and as well placed as the other."""
    picture = soft_noise(200, 200)
    square = Square(12.4, 17.8, side)
    turned = geometry.resample(picture, square, 32, angle=1e-9).astype(int)
    difference = np.abs(turned - geometry.resample(picture, square, 32))
    assert difference.max() <= 6
    assert difference.mean() < 1.1


@given(angles)
@settings(deadline=None)
def test_turned_reduction_is_antialiased(angle):
    picture = np.zeros((240, 240, 3), np.uint8)
    picture[:, ::2] = 255
    crop = geometry.resample(picture, Square(50, 50, 140), 14, angle=angle)
    assert np.abs(crop.astype(int) - 127).max() <= 3


@pytest.mark.parametrize(("pad", "numpy_mode"), [("reflect", "reflect"), ("edge", "edge")])
@pytest.mark.parametrize("square", [Square(-30, -10, 60), Square(30, 20, 40), Square(-70, -70, 200)])
def test_turned_padding_equals_numpys(pad, numpy_mode, square):
    picture = soft_noise(50, 60)
    padded = np.pad(picture, ((300, 300), (300, 300), (0, 0)), numpy_mode)
    expected = geometry.resample(padded, Square(square.x + 300, square.y + 300, square.side), 40, angle=0.6)
    np.testing.assert_array_equal(geometry.resample(picture, square, 40, pad, 0.6), expected)


@settings(max_examples=30, deadline=None)
@given(angles, st.floats(-80, 120), st.floats(-80, 120), st.floats(10, 200), st.sampled_from(["reflect", "edge"]))
def test_turned_crop_of_one_colour_is_that_colour(angle, x, y, side, pad):
    """No pixel of it comes from beyond what was cut."""
    crop = geometry.resample(np.full((100, 110, 3), 200, np.uint8), Square(x, y, side), 16, pad, angle)
    assert np.abs(crop.astype(int) - 200).max() <= 1


@given(angles, st.floats(-80, 120), st.floats(10, 200), st.sampled_from([8, 30, 300]))
def test_cut_holds_all_that_the_filters_see(angle, x, side, size):
    """The square, two pixels of the crop around it for its filter, and two of the (reduced) picture for the cubic."""
    angle = angle or 1e-9
    region, place = geometry.cut(np.zeros((100, 100, 3), np.uint8), Square(x, 20, side), size, "edge", angle)
    reduction = side / size
    reach = 2 * reduction + 2 * max(1, reduction / geometry.FINEST)
    seen = Square(place.x - reach, place.y - reach, place.side + 2 * reach)
    lost = reduction / geometry.FINEST if reduction > geometry.FINEST else 0  # up to one pixel of the reduced picture
    left, top, right, bottom = geometry.bounds(seen, angle)
    assert min(left, top) >= 0
    assert right <= region.shape[1] - lost
    assert bottom <= region.shape[0] - lost


@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_padding_does_not_matter_inside(angle):
    picture = np.random.default_rng(2).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    square = Square(12, 12, 56)
    assert geometry.is_inside(square, 80, 80, angle)
    crops = [geometry.resample(picture, square, 20, pad, angle) for pad in ("reflect", "edge")]
    np.testing.assert_array_equal(*crops)


def spot(picture: np.ndarray, x: float, y: float, channel: int) -> None:
    """Draw a soft spot around a point."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    picture[..., channel] = np.round(250 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 50))


def place_of(crop: np.ndarray, channel: int) -> np.ndarray:
    weights = crop[..., channel].astype(float)
    rows, columns = np.mgrid[: crop.shape[0], : crop.shape[1]] + 0.5
    return np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()


@settings(max_examples=25, deadline=None)
@given(angles, st.floats(20, 35), st.sampled_from([64, 150]))
def test_eyes_become_level_and_land_where_in_crop_says(angle, apart, size):
    """The person's right eye (red) comes to lie on the left of the left one (green), at the same height."""
    picture = np.zeros((200, 210, 3), np.uint8)
    toward = np.array([math.cos(angle), math.sin(angle)])
    eyes = np.array([[103, 98] - apart / 2 * toward, [103, 98] + apart / 2 * toward])
    for channel, eye in enumerate(eyes):
        spot(picture, *eye, channel)
    turn = geometry.eye_angle(eyes)
    assert math.remainder(turn - angle, 2 * math.pi) == pytest.approx(0, abs=1e-9)
    square = Square(40, 35, 120)
    crop = geometry.resample(picture, square, size, angle=turn)
    expected = geometry.in_crop(eyes, square, size, turn)
    np.testing.assert_allclose([place_of(crop, 0), place_of(crop, 1)], expected, atol=0.1 * size / 120)
    assert expected[0, 1] == pytest.approx(expected[1, 1])
    assert expected[1, 0] - expected[0, 0] == pytest.approx(apart * size / 120)


@given(boxes, angles, st.integers(1, 2500), st.integers(1, 2500))
def test_turned_inside_means_that_all_corners_are(box, angle, width, height):
    square = geometry.square_around(box)
    places = geometry.in_crop(np.array(geometry.corners(square, angle)), square, 100, angle)
    np.testing.assert_allclose(places, [(0, 0), (100, 0), (100, 100), (0, 100)], atol=1e-6)
    inside = all(0 <= x <= width and 0 <= y <= height for x, y in geometry.corners(square, angle))
    assert geometry.is_inside(square, width, height, angle) == inside
    if inside:
        assert geometry.outside_fraction(square, width, height, angle) == 0


@settings(max_examples=40)
@given(angles, st.floats(-150, 350), st.floats(-150, 250), st.floats(5, 400))
def test_turned_outside_fraction_counts_what_is_outside(angle, x, y, side):
    width, height, count = 200, 100, 300
    square = Square(x, y, side)
    steps = ((np.arange(count) + 0.5) / count - 0.5) * side
    right, down = np.meshgrid(steps, steps)
    across = x + side / 2 + math.cos(angle) * right - math.sin(angle) * down
    along = y + side / 2 + math.sin(angle) * right + math.cos(angle) * down
    outside = np.mean((across < 0) | (across > width) | (along < 0) | (along > height))
    assert geometry.outside_fraction(square, width, height, angle) == pytest.approx(outside, abs=0.01)


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
