"""Embedded colour profiles become sRGB: against float colorimetry, with profiles built from the published primaries."""

from __future__ import annotations

import io
import struct
from itertools import product

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mefem_cli.faces import colour, images

D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ of the white that profiles refer to
D65 = (0.3127, 0.3290)  # the white of screens, x and y
# x, y of red, green and blue: IEC 61966-2-1, SMPTE EG 432-1, Adobe RGB (1998) 4.3.1
SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

LIMIT = 1_000_000


# Float colorimetry ---------------------------------------------------------------------------------------------------


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ seen under D50, from the chromaticities alone [3, 3]."""
    columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
    under_d65 = columns * np.linalg.solve(columns, xyz(*D65))
    gains = (BRADFORD @ D50) / (BRADFORD @ xyz(*D65))
    return np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ under_d65


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def xyz_to_srgb(values: np.ndarray) -> np.ndarray:
    """Return 0 ... 255 float; colours that sRGB does not have are clipped."""
    linear = np.clip(values @ np.linalg.inv(to_xyz(SRGB)).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lab_to_xyz(lab: np.ndarray) -> np.ndarray:
    lightness = (lab[..., 0] + 16) / 116
    f = np.stack([lightness + lab[..., 1] / 500, lightness, lightness - lab[..., 2] / 200], axis=-1)
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


# Profiles (ICC.1:2022) -----------------------------------------------------------------------------------------------


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", between: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 4.3; clause 7.2 has the header, 7.3 the table of tags."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    beginning = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04300000, kind, space, between)
    header = beginning + bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return header + bytes(128 - len(header)) + table + body


def gamma(exponent: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(exponent * 256))


SRGB_CURVE = b"para" + bytes(4) + b"\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(primaries: tuple[tuple[float, float], ...], curve: bytes) -> bytes:
    matrix = to_xyz(primaries)
    tags = {name: b"XYZ " + bytes(4) + fixed(*matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def lab_of_inks(inks: np.ndarray) -> np.ndarray:
    """An invented press, [..., 4] of 0 ... 1 -> Lab, of which paper is white: linear, so that its corners say all."""
    cyan, magenta, yellow, black = np.moveaxis(inks, -1, 0)
    lightness = 100 - 22 * cyan - 25 * magenta - 6 * yellow - 40 * black
    return np.stack([lightness, 40 * magenta - 18 * cyan, 50 * yellow - 25 * cyan], axis=-1)


def cmyk_profile() -> bytes:
    """The press as a table of 2 x 2 x 2 x 2 points (lut16Type, 10.10; its Lab is that of table 42)."""
    lab = lab_of_inks(np.array(list(product((0.0, 1.0), repeat=4))))
    coded = np.round(np.stack([lab[:, 0] * 652.8, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], 1)).astype(">u2")
    straight = struct.pack(">HH", 0, 65535)
    table = struct.pack(">4s4xBBBx", b"mft2", 4, 3, 2) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 2, 2)
    table += straight * 4 + coded.tobytes() + straight * 3
    paper = b"XYZ " + bytes(4) + fixed(0.83, 0.86, 0.63)  # yellowish: it is shown as white all the same
    return profile(b"CMYK", {b"wtpt": paper, b"A2B0": table, b"A2B1": table}, kind=b"prtr", between=b"Lab ")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    picture = images.decode(content, LIMIT)
    assert picture.remark == ""
    return picture.pixels


CUBE = np.array(list(product(range(0, 256, 17), repeat=3)), np.uint8).reshape(64, 64, 3)


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["display-p3", "adobe-rgb"])
@pytest.mark.parametrize("exponent", [None, 563 / 256, 1.8])
def test_rgb_profiles_become_srgb(primaries, exponent):
    curve = SRGB_CURVE if exponent is None else gamma(exponent)
    pixels = decoded(encoded(Image.fromarray(CUBE), "PNG", icc_profile=rgb_profile(primaries, curve)))
    values = CUBE / 255
    linear = srgb_to_linear(values) if exponent is None else values ** (round(exponent * 256) / 256)
    expected = xyz_to_srgb(linear @ to_xyz(primaries).T)
    assert np.abs(pixels - expected).max() < 2.5
    assert np.abs(pixels - expected).mean() < 0.5
    assert np.abs(pixels.astype(int) - CUBE).max() > 20


BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))  # ITU-R BT.2020, table 3


def named(primaries: int, transfer: int, **options) -> Image.Image:
    """The cube as pillow-heif gives a picture that names its colours by the numbers of ITU-T H.273."""
    image = Image.fromarray(CUBE)
    image.info["nclx_profile"] = {"color_primaries": primaries, "transfer_characteristics": transfer}
    image.info.update(options)
    return image


@pytest.mark.parametrize(("number", "primaries"), [(12, DISPLAY_P3), (9, BT2020)])
@pytest.mark.parametrize("transparent", [False, True])
def test_named_wide_colours_become_srgb(number, primaries, transparent):
    image = named(number, 13)
    if transparent:
        image.putalpha(255)
    image, transform, remark = colour.to_rgb(colour.flatten(image), None)
    expected = xyz_to_srgb(srgb_to_linear(CUBE / 255) @ to_xyz(primaries).T)
    pixels = colour.to_srgb(np.asarray(image), transform)
    assert remark == ""
    assert np.abs(pixels - expected).max() < 2.5
    assert np.abs(pixels - expected).mean() < 0.5


@pytest.mark.parametrize(
    ("primaries", "transfer", "remark"),
    [(1, 13, ""), (2, 2, ""), (6, 6, ""), (9, 16, "HDR (PQ)"), (9, 18, "HDR (HLG)"), (11, 13, "11"), (12, 4, "fer 4")],
)
def test_named_colours_that_stay_as_they_are_say_so_unless_they_are_srgb(primaries, transfer, remark):
    _, transform, told = colour.to_rgb(named(primaries, transfer), None)
    assert transform is None
    assert remark in told
    assert bool(remark) == ("not converted to sRGB" in told)


def test_an_embedded_profile_goes_before_named_colours():
    own = rgb_profile(ADOBE_RGB, SRGB_CURVE)
    image, transform, _ = colour.to_rgb(named(12, 13), own)
    _, alone, _ = colour.to_rgb(Image.fromarray(CUBE), own)
    assert np.array_equal(colour.to_srgb(CUBE, transform), colour.to_srgb(CUBE, alone))


def test_heic_with_named_colours_of_8_and_10_bits(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    names = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6, "full_range_flag": 1}
    pixels = np.full((64, 64, 3), (60, 200, 90), np.uint8)
    expected = xyz_to_srgb(srgb_to_linear(pixels[0, 0] / 255) @ to_xyz(DISPLAY_P3).T)
    for mode, stored in (("RGB", pixels), ("RGB;16", pixels.astype(np.uint16) * 257)):
        heif.from_bytes(mode, (64, 64), stored.tobytes()).save(tmp_path / "p3.heic", quality=-1, chroma=444, **names)
        found = images.decode((tmp_path / "p3.heic").read_bytes(), LIMIT)
        assert found.remark == ""
        assert np.abs(found.pixels - expected).max() < 5
        assert np.abs(expected - pixels[0, 0]).max() > 20


def test_profile_that_is_srgb_by_another_name_changes_nothing():
    content = encoded(Image.fromarray(CUBE), "PNG", icc_profile=rgb_profile(SRGB, SRGB_CURVE))
    np.testing.assert_array_equal(decoded(content), CUBE)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "AVIF"])
def test_profiles_are_found_in_every_format(kind):
    options = {"quality": 100}
    if kind in ("WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(
        Image.new("RGB", (32, 32), (60, 180, 90)), kind, icc_profile=rgb_profile(DISPLAY_P3, SRGB_CURVE), **options
    )
    expected = xyz_to_srgb(srgb_to_linear(np.array([60, 180, 90]) / 255) @ to_xyz(DISPLAY_P3).T)
    np.testing.assert_allclose(decoded(content)[16, 16], expected, atol=2.5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_gray_profile_becomes_srgb(kind):
    levels = np.repeat(np.arange(0, 256, 5, dtype=np.uint8), 8)[None].repeat(8, axis=0)
    gray = profile(b"GRAY", {b"kTRC": gamma(1.8)})
    options = {"quality": 100} if kind == "JPEG" else {}
    pixels = decoded(encoded(Image.fromarray(levels), kind, icc_profile=gray, **options))
    expected = xyz_to_srgb((levels[..., None] / 255.0) ** (461 / 256) * D50)
    assert np.abs(pixels - expected).max() < (4 if kind == "JPEG" else 1.5)
    assert np.abs(pixels[0, :, 0].astype(int) - levels[0]).max() > 15


def test_gray_picture_with_an_rgb_profile_keeps_its_tones():
    levels = np.arange(256, dtype=np.uint8)[None].repeat(4, axis=0)
    pixels = decoded(encoded(Image.fromarray(levels), "PNG", icc_profile=rgb_profile(ADOBE_RGB, gamma(563 / 256))))
    expected = xyz_to_srgb((levels[..., None] / 255.0) ** (563 / 256) * D50)
    assert np.abs(pixels - expected).max() < 2
    assert np.ptp(pixels.astype(int), axis=-1).max() <= 1


INKS = np.array(list(product((0, 40, 90, 128), repeat=4)), np.uint8).reshape(16, 16, 4)


def inked(size: int = 1) -> Image.Image:
    """Patches of ink, 0 none, 255 full, each of `size` x `size` px."""
    plates = INKS.repeat(size, axis=0).repeat(size, axis=1)
    return Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(plates[..., i])) for i in range(4)])


def test_cmyk_profile_becomes_srgb():
    pixels = decoded(encoded(inked(), "TIFF", icc_profile=cmyk_profile()))
    expected = xyz_to_srgb(lab_to_xyz(lab_of_inks(INKS / 255)))
    assert np.abs(pixels - expected).max() < 3
    assert np.abs(pixels - expected).mean() < 0.7


def test_cmyk_jpeg_with_profile_becomes_srgb():
    content = encoded(inked(8), "JPEG", quality=100, icc_profile=cmyk_profile())
    expected = xyz_to_srgb(lab_to_xyz(lab_of_inks(INKS / 255)))
    assert np.abs(decoded(content)[4::8, 4::8] - expected).max() < 5


def naive(inks: np.ndarray) -> np.ndarray:
    return 255 * (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_without_profile_follows_the_naive_rule(kind):
    options = {"quality": 100} if kind == "JPEG" else {}
    pixels = decoded(encoded(inked(8), kind, **options))[4::8, 4::8]
    assert np.abs(pixels - naive(INKS)).max() < (4 if kind == "JPEG" else 1.5)


def test_ycck_jpeg_as_photoshop_writes_it():
    """Adobe's JPEGs hold 255 - ink, and say with transform 2 that C, M and Y are stored as if they were RGB."""
    plates = 255 - INKS.repeat(8, axis=0).repeat(8, axis=1)
    content = simplejpeg.encode_jpeg(
        np.ascontiguousarray(plates), quality=100, colorspace="CMYK", colorsubsampling="444"
    )
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 2
    assert np.abs(decoded(content)[4::8, 4::8] - naive(INKS)).max() < 4


@pytest.mark.parametrize(
    ("mode", "unfit"),
    [("RGB", cmyk_profile()), ("RGB", profile(b"GRAY", {b"kTRC": gamma(1.8)})), ("CMYK", rgb_profile(SRGB, SRGB_CURVE))]
    + [(mode, b"no profile" * 20) for mode in ("L", "RGB", "CMYK")],
)
def test_unfit_profiles_are_ignored_and_told(mode, unfit):
    image = Image.new(mode, (8, 8), (9, 99, 90, 30)[: len(mode)] if mode != "L" else 77)
    picture = images.decode(encoded(image, "TIFF", icc_profile=unfit), LIMIT)
    assert picture.remark == colour.UNFIT
    np.testing.assert_array_equal(picture.pixels, images.decode(encoded(image, "TIFF"), LIMIT).pixels)


def test_damaged_profiles_never_break_a_picture():
    good = rgb_profile(DISPLAY_P3, SRGB_CURVE)
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 4):
            bad[place] = rng.integers(256)
        picture = images.decode(encoded(Image.new("RGB", (4, 4), "red"), "PNG", icc_profile=bytes(bad)), LIMIT)
        assert picture.pixels.shape == (4, 4, 3)
