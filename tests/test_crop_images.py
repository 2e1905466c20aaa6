"""Decoding: every kind of file a folder of photos holds, and every way it can be broken."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from mefem_cli.faces import images
from mefem_cli.faces.images import ImageRejected

LIMIT = 1_000_000


def smooth(width: int = 60, height: int = 40) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return images.decode(content, LIMIT).pixels


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    content = b"\x89PNG\r\n\x1a\n"
    for one in (chunk, pixels):
        content += struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one))
    return content


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_as_pillow_does(kind, orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    content = encoded(smooth(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    np.testing.assert_array_equal(decoded(content), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_of_one_view_are_the_same_picture(orientation):
    """Store the picture turned so that its tag turns it back: the result is always the upright one."""
    upright = np.asarray(smooth())
    candidates = [np.rot90(turned, times) for turned in (upright, upright[:, ::-1]) for times in range(4)]
    stored = [one for one in candidates if np.array_equal(images.turn_upright(one, orientation), upright)]
    assert len(stored) == 1


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
def test_turning_keeps_every_pixel(orientation, height, width):
    pixels = np.arange(height * width * 3, dtype=np.int64).reshape(height, width, 3)
    turned = images.turn_upright(pixels, orientation)
    assert sorted(turned.ravel()) == sorted(pixels.ravel())
    assert turned.shape[:2] == ((width, height) if orientation >= 5 else (height, width))


def test_sixteen_bit_gray_keeps_its_tones():
    values = np.linspace(0, 65535, 50 * 20).astype(np.uint16).reshape(20, 50)
    pixels = decoded(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_allclose(pixels[..., 0], values / 257, atol=0.51)


def test_transparency_lies_over_white():
    layer = smooth().convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    alpha = np.asarray(layer)[..., 3:] / 255
    expected = np.asarray(smooth()) * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(decoded(encoded(layer, "PNG")), expected, atol=1)


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    content = encoded(smooth().convert(mode), kind)
    pixels = decoded(content)
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    gray_distance = np.abs(pixels.mean() - np.asarray(smooth()).mean())
    assert gray_distance < 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decoded(content)[5, 5], [255, 0, 0])


def test_plain_jpeg_equals_pillows_decoder():
    content = encoded(smooth(200, 120), "JPEG", quality=90)
    np.testing.assert_array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content))))


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue primaries have changed places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_embedded_profile_is_converted_to_srgb(kind):
    """A profile with red and blue primaries swapped shows red as blue."""
    content = encoded(Image.new("RGB", (20, 20), (250, 10, 10)), kind, icc_profile=swapped_profile())
    red, _, blue = decoded(content)[10, 10].astype(int)
    assert blue > 200 > 60 > red


def test_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = decoded(encoded(smooth(), "JPEG", icc_profile=profile))
    np.testing.assert_array_equal(with_profile, decoded(encoded(smooth(), "JPEG")))


def test_broken_profile_is_ignored_and_told():
    picture = images.decode(encoded(smooth(), "PNG", icc_profile=b"nonsense" * 30), LIMIT)
    assert picture.pixels.shape == (40, 60, 3)
    assert "profile ignored" in picture.remark


def truncated(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (b"", "unreadable", "empty"),
        (b"just text", "unreadable", "not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable", "web page"),
        (b"\x89PNG\r\n\x1a\n", "unreadable", ""),
        (b"\xff\xd8\xff\xe0", "unreadable", ""),
        (b"\0\0\0\x18ftypheic" + b"\0" * 60, "unreadable", "HEIC"),
        (truncated("JPEG"), "unreadable", "truncated"),
        (truncated("PNG"), "unreadable", ""),
        (truncated("WEBP"), "unreadable", ""),
        (png_header(30_000, 30_000), "too-large", "30000 x 30000 px; --max-pixels is 1000000"),
        (png_header(1001, 1000), "too-large", "1001 x 1000"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unreadable", "floating-point"),
    ],
)
def test_broken_files_say_why(content, reason, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warnings must not get out
        with pytest.raises(ImageRejected) as rejected:
            images.decode(content, LIMIT)
    assert rejected.value.reason == reason
    assert words in rejected.value.detail
    assert "\n" not in rejected.value.detail


def test_pillows_warnings_do_not_get_out():
    """An EXIF block that announces five entries and has none makes Pillow warn, not us."""
    content = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(content)).getexif()
        assert len(heard) >= 1
        heard.clear()
        assert decoded(content).shape == (40, 60, 3)
        assert heard == []


def test_limit_itself_is_allowed_and_pillows_own_limit_returns():
    before = Image.MAX_IMAGE_PIXELS
    assert images.decode(encoded(smooth(1000, 10), "PNG"), 10_000).pixels.shape == (10, 1000, 3)
    with pytest.raises(ImageRejected, match="too-large"):
        images.decode(encoded(smooth(1000, 10), "PNG"), 9_999)
    assert before == Image.MAX_IMAGE_PIXELS


def test_one_pixel_is_a_picture():
    assert decoded(encoded(Image.new("RGB", (1, 1), "blue"), "PNG")).tolist() == [[[0, 0, 255]]]


def test_crop_jpeg_has_full_colour_resolution_and_no_metadata():
    content = images.encode_jpeg(np.asarray(smooth(224, 224)), quality=95)
    with Image.open(io.BytesIO(content)) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth(224, 224))).max() <= 8


@given(st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_a_reject(content):
    for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0"):
        try:
            pixels = decoded(start + content)
        except ImageRejected:
            continue
        assert pixels.ndim == 3
