"""Decoding: every kind of file a folder of photos holds, and every way it can be broken."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps

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
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
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
        (b"\xff\xd8\xff" + bytes(60), "unreadable", "damaged"),
        (b"%PDF-1.7", "unreadable", "PDF"),
        (truncated("JPEG"), "unreadable", "cut short"),
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


def test_limit_itself_is_allowed_and_pillows_own_limit_returns(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    assert images.decode(encoded(smooth(1000, 10), "PNG"), 10_000).pixels.shape == (10, 1000, 3)
    assert Image.MAX_IMAGE_PIXELS == 12_345
    with pytest.raises(ImageRejected, match="too-large"):
        images.decode(encoded(smooth(1000, 10), "PNG"), 9_999)
    assert Image.MAX_IMAGE_PIXELS == 12_345


def test_one_pixel_is_a_picture():
    assert decoded(encoded(Image.new("RGB", (1, 1), "blue"), "PNG")).tolist() == [[[0, 0, 255]]]


# What a file is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "big TIFF", "second byte order"]
)
def test_pictures_are_known_by_their_beginning(kind):
    options = {"big_tiff": True} if kind == "big TIFF" else {}
    content = encoded(smooth(), "TIFF" if "TIFF" in kind else "JPEG" if " " in kind else kind, **options)
    if kind == "second byte order":
        content = b"MM\0*\0\0\0\x08"
    assert images.kind_of(content[:64]) == "image"
    assert images.begins_like_image(content[:64])


def brands(*names: bytes) -> bytes:
    """The first box of an ISO media file: its main brand, a version, and what else it can be read as."""
    return struct.pack(">I4s4s4x", 12 + 4 * len(names), b"ftyp", names[0]) + b"".join(names[1:])


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (brands(b"heic", b"mif1"), "heif"),
        (brands(b"mif1", b"heic"), "heif"),
        (brands(b"mif1", b"avif", b"miaf"), "image"),
        (brands(b"avis", b"msf1"), "image"),
        (brands(b"isom", b"iso2", b"mp41"), None),
        (brands(b"qt  "), None),
        (brands(b"isom") + b"heicheic", None),  # beyond the box
        (b"\0\0\0\x18ftyp", None),
        (b"\xef\xbb\xbf  <!DOCTYPE HTML>", "html"),
        (b"<?xml version='1.0'?>\n<html>", "html"),
        (b"%PDF-1.7", "pdf"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "postscript"),
        (b"BMW,price\n", None),
        (b"P1,age\n", None),
        (b"path,age\na.jpg,3\n", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_other_beginnings(start, kind):
    assert images.kind_of(start) == kind
    assert images.begins_like_image(start) == (kind in ("image", "heif"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_file(monkeypatch):
    """Pillow would hand PostScript to Ghostscript."""
    started: list[object] = []
    white = Image.new("RGB", (10, 10)).im
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: started.append(given) or white)
    Image.open(io.BytesIO(EPS)).load()
    assert started
    started.clear()
    with pytest.raises(ImageRejected, match="PostScript"):
        decoded(EPS)
    assert started == []


def test_too_large_pictures_are_described_as_they_are_seen():
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    with pytest.raises(ImageRejected, match="40 x 60 px; --max-pixels is 2399") as rejected:
        images.open_picture(encoded(smooth(60, 40), "JPEG", exif=exif), 2399)
    assert (rejected.value.width, rejected.value.height) == (40, 60)


# HEIC ----------------------------------------------------------------------------------------------------------------


def heic(image: Image.Image, **options) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra heif)")
    pillow_heif.register_heif_opener()
    try:
        return encoded(image, "HEIF", quality=-1, chroma=444, **options)
    except RuntimeError as error:
        pytest.skip(f"this pillow-heif cannot write HEIC: {error}")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation):
    """HEIC stores its orientation twice: as a property, which the decoder follows, and in EXIF."""
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    stored = smooth(64, 40)
    picture = images.open_picture(heic(stored, exif=exif.tobytes()), LIMIT)
    upright = images.turn_upright(np.asarray(stored), orientation)
    assert (picture.width, picture.height) == upright.shape[1::-1]
    np.testing.assert_allclose(picture.pixels.astype(int), upright, atol=4)


def test_heic_of_ten_bits():
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra heif)")
    heic(smooth())  # skips where HEIC cannot be written
    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    deep = np.ascontiguousarray(np.broadcast_to(levels[None, :, None], (64, 64, 3)))
    buffer = io.BytesIO()
    file = pillow_heif.from_bytes("RGB;16", (64, 64), deep.tobytes())
    file.save(buffer, quality=-1, chroma=444, bit_depth=10)
    assert pillow_heif.open_heif(buffer.getvalue(), convert_hdr_to_8bit=False).info["bit_depth"] == 10
    np.testing.assert_allclose(decoded(buffer.getvalue())[32], deep[32] / 257, atol=2)


def test_heic_profile_becomes_srgb():
    red, _, blue = decoded(heic(Image.new("RGB", (64, 64), (250, 10, 10)), icc_profile=swapped_profile()))[32, 32]
    assert int(blue) > 200 > 60 > int(red)


def test_heic_transparency_lies_over_white():
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    np.testing.assert_allclose(decoded(heic(clear))[32, 32], 255, atol=2)


def test_heic_too_large_is_not_decoded(monkeypatch):
    content = heic(smooth(64, 40))
    monkeypatch.setattr("pillow_heif.heif.BaseImage.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageRejected, match="64 x 40 px; --max-pixels is 2559"):
        images.decode(content, 2559)


def test_heic_cut_short_is_rejected():
    content = heic(smooth(64, 40))
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ImageRejected, match="unreadable"):
            decoded(content[: int(len(content) * share)])


def test_heic_without_the_extra_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._reads_heif.cache_clear()
    with pytest.raises(ImageRejected) as rejected:
        decoded(brands(b"heic", b"mif1") + bytes(60))
    images._reads_heif.cache_clear()
    assert rejected.value.reason == "unreadable"
    assert 'pip install "mefem-cli[heif]"' in rejected.value.detail


# Crops as files ------------------------------------------------------------------------------------------------------


def test_crop_jpeg_has_full_colour_resolution():
    content = images.encode(np.asarray(smooth(224, 224)), "jpeg", quality=95)
    with Image.open(io.BytesIO(content)) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
        assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth(224, 224))).max() <= 8


@pytest.mark.parametrize(("format", "quality"), [("png", 1), ("png", 100), ("webp", 100)])
def test_lossless_crops_keep_every_pixel(format, quality):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    content = images.encode(pixels[:, ::-1], format, quality)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels[:, ::-1])


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_views_are_encoded_as_their_copies_are(format):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    for view in (pixels[:, ::-1], pixels.swapaxes(0, 1), pixels[10:30, 5:20]):
        assert images.encode(view, format, 90) == images.encode(view.copy(), format, 90)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_buys_likeness_for_bytes(format):
    pixels = np.random.default_rng(0).integers(90, 160, (64, 64, 3), dtype=np.uint8)
    files = [images.encode(pixels, format, quality) for quality in (20, 90)]
    errors = [np.abs(np.asarray(Image.open(io.BytesIO(file))) - pixels.astype(int)).mean() for file in files]
    assert len(files[0]) < len(files[1])
    assert errors[0] > errors[1]


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_crops_hold_no_metadata(format):
    content = images.encode(np.asarray(smooth(224, 224)), format, quality=95)
    assert images.SUFFIXES[format] == {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}[format]
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == (format.upper(), "RGB", (224, 224))
        assert not image.getexif()
        known = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration"}
        assert set(image.info) <= known


@given(st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_a_reject(content):
    for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0"):
        try:
            pixels = decoded(start + content)
        except ImageRejected:
            continue
        assert pixels.ndim == 3
