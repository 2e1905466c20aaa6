"""Pictures decoded at reduced scale: the same places, the same crops, the same rejects as at full scale."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mefem_cli.faces import colour, geometry, images
from mefem_cli.faces import picture as picture_module
from mefem_cli.faces.geometry import Square
from mefem_cli.faces.images import ImageRejected, Picture

LIMIT = 50_000_000
orientations = st.integers(1, 8)


@cache
def photo_like(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Noise whose amplitude falls as 1 / frequency, as that of photos does (Field, 1987): uint8 [height, width, 3].

    Its colours differ less than its brightness.
    """
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    rng = np.random.default_rng(seed)
    waves = rng.normal(0, 1, (3, *frequency.shape)) * np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    field = np.fft.irfft2(waves / frequency, s=(height, width))
    field /= field.std(axis=(1, 2), keepdims=True)
    field = 0.9 * field[0] + 0.3 * field
    return np.ascontiguousarray(np.clip(128 + 40 * field, 0, 255).round().astype(np.uint8).transpose(1, 2, 0))


def jpeg(pixels: np.ndarray, orientation: int = 1, quality: int = 92, **options) -> bytes:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Picture:
    return images.open_picture(content, LIMIT)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(float(np.mean((first.astype(float) - second) ** 2)), 1e-6))


@pytest.fixture
def decoded_factors(monkeypatch) -> list[int]:
    """The factors at which JPEGs were decoded, in order."""
    factors: list[int] = []
    original = images._PlainJpeg._decode

    def noting(self, factor):
        factors.append(factor)
        return original(self, factor)

    monkeypatch.setattr(images._PlainJpeg, "_decode", noting)
    return factors


# Where things are ----------------------------------------------------------------------------------------------------


def place_of_spot(pixels: np.ndarray) -> np.ndarray:
    weights = np.clip(pixels[..., 0].astype(float) - 60, 0, None)
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    return np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()


def with_spot(width: int, height: int, x: float, y: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    spot = 50 + 200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 7.0**2))
    return np.repeat(spot.round().astype(np.uint8)[..., None], 3, axis=2)


@settings(max_examples=40, deadline=None)
@given(orientations, st.integers(150, 230), st.integers(150, 230), st.sampled_from([2, 4, 8]), st.booleans())
def test_points_map_back_exactly(orientation, width, height, factor, in_the_far_corner):
    """A spot is found at the same place in the full and in the reduced picture, whatever is left over of its sides."""
    place = (width - 30, height - 32) if in_the_far_corner else (31, 30)
    picture = opened(jpeg(with_spot(width, height, *place), orientation))
    pixels, scale = picture.for_detection(longest_at_least=max(width, height) // factor)
    assert scale.factor == factor
    assert pixels.shape == (scale.height, scale.width, 3) == (picture.height // factor, picture.width // factor, 3)
    found = scale.points_in_picture(place_of_spot(pixels))
    np.testing.assert_allclose(found, place_of_spot(picture.pixels), atol=0.2)


@settings(max_examples=20, deadline=None)
@given(orientations, st.integers(150, 230), st.integers(150, 230))
def test_points_map_back_from_a_thinned_picture(orientation, width, height):
    """PNGs are not decoded at reduced scale: pixels are left out, which moves a point by half a pixel at most."""
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    Image.fromarray(with_spot(width, height, width - 30, height - 32)).save(buffer, "PNG", exif=exif)
    picture = opened(buffer.getvalue())
    pixels, scale = picture.for_detection(longest_at_least=max(width, height) // 4)
    assert pixels.shape == (scale.height, scale.width, 3) == (picture.height // 4, picture.width // 4, 3)
    found = scale.points_in_picture(place_of_spot(pixels))
    np.testing.assert_allclose(found, place_of_spot(picture.pixels), atol=0.7)


@given(orientations, st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 2, 4, 8]))
def test_boxes_points_and_squares_map_alike(orientation, width, height, factor):
    picture = Picture((width, height), lambda: np.zeros(0), orientation=orientation)
    scale = picture.scale(factor)
    assert 0 <= scale.left < factor
    assert 0 <= scale.top < factor
    assert scale.left + factor * scale.width <= picture.width
    x, y, *sides = scale.box_in_picture((3.5, 4.25, 10, 20))
    assert sides == [10 * factor, 20 * factor]
    np.testing.assert_array_equal(scale.points_in_picture(np.array([3.5, 4.25])), (x, y))
    assert scale.square(Square(x, y, 8 * factor)) == Square(3.5, 4.25, 8)


def test_small_and_thin_pictures_are_not_reduced():
    for width, height in ((1919, 1200), (960, 960), (4000, 1), (1, 4000), (1, 1)):
        picture = opened(jpeg(np.full((height, width, 3), 99, np.uint8)))
        pixels, scale = picture.for_detection()
        assert scale == picture_module.Scale(1, 0, 0, width, height)
        assert pixels.shape == (height, width, 3)


@pytest.mark.parametrize(("longest", "factor"), [(1919, 1), (1920, 2), (7679, 2), (7680, 4), (15360, 8)])
def test_detection_sees_at_least_960_px(longest, factor):
    _, scale = opened(jpeg(np.full((64, longest, 3), 99, np.uint8))).for_detection()
    assert scale.factor == factor


@pytest.mark.parametrize(("longest", "factor"), [(3839, 1), (3840, 4), (7680, 8)])
def test_pictures_that_no_decoder_reduces_are_thinned(longest, factor):
    _, scale = Picture.of(np.full((64, longest, 3), 99, np.uint8)).for_detection()
    assert scale.factor == factor


@pytest.mark.parametrize(("side", "factors"), [(2300, [2]), (1010, [2]), (1000, [2, 1])])
def test_a_crop_comes_from_the_decoding_in_which_its_face_was_found(decoded_factors, side, factors):
    """A second decoding costs as much as the first: only a crop with too few pixels there is worth it."""
    picture = opened(jpeg(np.full((2400, 3000, 3), 99, np.uint8)))
    picture.for_detection()
    picture.crop(Square(20, 30, side), 224)
    assert decoded_factors == factors


def test_a_crop_of_a_picture_decoded_in_full_comes_from_that(decoded_factors):
    picture = opened(jpeg(np.full((1300, 1300, 3), 99, np.uint8)))
    picture.for_detection()
    picture.crop(Square(20, 30, 1200), 224)
    assert decoded_factors == [1]


# What the crops look like --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    orientations,
    st.integers(300, 420),
    st.integers(300, 420),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([2, 4]),
    st.sampled_from([0.0, 0.4]),
)
def test_crop_of_a_reduced_picture_equals_that_of_the_full_one(orientation, width, height, x, y, factor, angle):
    """The rule's own limit: the square has just MARGIN times the crop's pixels in the reduced picture."""
    content = jpeg(photo_like(width, height), orientation)
    picture = opened(content)
    side = 150 if angle else 230
    size = int(side / factor / picture_module.MARGIN)
    reach = 35 if angle else 0
    room = (picture.width - 8 - side - 2 * reach, picture.height - 8 - side - 2 * reach)
    square = Square(4 + reach + x * room[0], 4 + reach + y * room[1], side)
    crop = picture.crop(square, size, angle=angle)
    assert set(picture._upright) == {factor}
    expected = geometry.resample(images.decode(content, LIMIT).pixels, square, size, angle=angle)
    assert np.abs(crop.astype(float) - expected).mean() < 1
    assert psnr(crop, expected) > 45


@pytest.mark.parametrize("factor", [2, 4])
def test_faces_look_the_same(shared_data: Path, factor):
    """Pictures as sharp as they come: not enlarged. The worst of 254 had 46 dB."""
    for path in sorted((shared_data / "faces" / "t2i").iterdir())[::90]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        content = jpeg(pixels)
        side = min(pixels.shape[:2]) - 17
        square, size = Square(8.3, 7.6, side), int(side / factor / picture_module.MARGIN)
        picture = opened(content)
        crop = picture.crop(square, size)
        assert set(picture._upright) == {factor}
        expected = geometry.resample(images.decode(content, LIMIT).pixels, square, size)
        assert psnr(crop, expected) > 45
        assert np.abs(crop.astype(float) - expected).mean() < 1


def test_zone_plate_differs_by_less_than_its_jpeg():
    """All detail there is, at full contrast: the worst case has a limit too."""
    rows, columns = np.mgrid[:700, :700] - 350.0
    plate = (127.5 + 127.5 * np.cos(np.pi * (rows**2 + columns**2) / 1400)).round().astype(np.uint8)
    content = jpeg(np.repeat(plate[..., None], 3, axis=2), quality=95, subsampling=0)
    square, size = Square(4.3, 3.6, 690), int(690 / 2 / picture_module.MARGIN)
    expected = geometry.resample(images.decode(content, LIMIT).pixels, square, size)
    assert np.abs(opened(content).crop(square, size).astype(float) - expected).mean() < 3


@pytest.mark.parametrize(
    ("side", "factors"), [(2 * 2.25 * 60, [2]), (2 * 2.25 * 60 - 0.1, [1]), (4 * 2.25 * 60, [4]), (60, [1])]
)
def test_only_crops_with_pixels_to_spare_come_from_a_reduced_picture(decoded_factors, side, factors):
    content = jpeg(photo_like(600, 620))
    picture = opened(content)
    assert decoded_factors == []
    crop = picture.crop(Square(10.5, 20.25, side), 60)
    assert decoded_factors == factors
    if factors == [1]:
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(crop, geometry.resample(pixels, Square(10.5, 20.25, side), 60))


@pytest.mark.parametrize(("width", "height", "square"), [(601, 600, (1, 0)), (600, 603, (0, 3)), (600, 600, (-1, 0))])
def test_squares_that_leave_whole_blocks_come_from_the_full_picture(decoded_factors, width, height, square):
    """The encoder invented the rest of the last block; and padding continues the picture from its true edge."""
    opened(jpeg(photo_like(width, height))).crop(Square(*square, 600), 100)
    assert decoded_factors == [1]


def test_every_scale_is_decoded_once(decoded_factors):
    picture = opened(jpeg(photo_like(600, 600)))
    for _ in range(2):
        picture.for_detection(150)
        picture.crop(Square(10, 10, 500), 50)
        picture.crop(Square(10, 10, 250), 50)
        assert picture.pixels is picture.pixels
    assert decoded_factors == [4, 2, 1]


def test_decoding_does_not_depend_on_what_was_asked_before():
    content = jpeg(photo_like(600, 600))
    square = Square(10.2, 20.4, 540)
    fresh, used = opened(content), opened(content)
    assert used.pixels.shape == (600, 600, 3)
    used.for_detection(75)
    np.testing.assert_array_equal(fresh.crop(square, 100), used.crop(square, 100))


def test_picture_of_pixels_is_not_copied_and_not_reduced():
    pixels = photo_like(400, 300)
    picture = Picture.of(pixels, "a frame")
    assert (picture.width, picture.height, picture.remark) == (400, 300, "a frame")
    assert np.shares_memory(picture.pixels, pixels)
    np.testing.assert_array_equal(picture.crop(Square(5, 5, 280), 20), geometry.resample(pixels, Square(5, 5, 280), 20))


# Colours and damage --------------------------------------------------------------------------------------------------


def test_profile_is_applied_to_what_is_cut():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    reddish = photo_like(330, 310) // 2 + np.array([100, 40, 0], np.uint8)
    picture = opened(jpeg(reddish, orientation=6, icc_profile=bytes(profile)))
    swapped = opened(jpeg(reddish, orientation=6)).pixels[..., ::-1]
    for side, size in ((120, 60), (280, 30), (290, 60)):
        square = Square(6.2, 8.4, side)
        crop = picture.crop(square, size)
        assert np.abs(crop.astype(float) - geometry.resample(swapped, square, size)).mean() < 1
    assert {1, 2} <= set(picture._upright)
    pixels, _ = picture.for_detection(40)
    assert np.abs(pixels.astype(float).mean(axis=(0, 1)) - swapped.mean(axis=(0, 1))).max() < 2


def test_colours_of_a_crop_alone_are_converted(monkeypatch):
    converted: list[int] = []
    original: Callable = colour.to_srgb
    monkeypatch.setattr(
        colour, "to_srgb", lambda pixels, transform: converted.append(pixels.size) or original(pixels, transform)
    )
    opened(jpeg(photo_like(900, 900))).crop(Square(400, 400, 60), 50)
    assert max(converted) < 100 * 100 * 3


ASKED: dict[str, Callable[[Picture], object]] = {
    "pixels": lambda picture: picture.pixels,
    "detection": lambda picture: picture.for_detection(100),
    "crop": lambda picture: picture.crop(Square(10, 10, 560), 30),
    "full crop": lambda picture: picture.crop(Square(10, 10, 100), 100),
}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_truncated_jpegs_are_rejected_at_every_scale(what, progressive, share):
    content = jpeg(photo_like(600, 600), progressive=progressive)
    picture = opened(content[: int(len(content) * share)])
    with pytest.raises(ImageRejected, match="cut short") as rejected:
        ASKED[what](picture)
    assert rejected.value.reason == "unreadable"


def test_harmless_damage_costs_the_speed_alone():
    """Bytes that belong to nothing, between two scans: libjpeg-turbo warns, Pillow reads on."""
    content = jpeg(photo_like(600, 600), progressive=True)
    second_scan = content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)
    damaged = content[:second_scan] + b"\0\0\0" + content[second_scan:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(damaged)
    np.testing.assert_array_equal(opened(damaged).pixels, opened(content).pixels)
    square = Square(20, 20, 500)
    expected = geometry.resample(opened(content).pixels, square, 50)
    np.testing.assert_array_equal(opened(damaged).crop(square, 50), expected)
    pixels, scale = opened(damaged).for_detection(150)
    assert scale.factor == 4
    assert np.abs(pixels.astype(float).mean() - expected.mean()) < 10
