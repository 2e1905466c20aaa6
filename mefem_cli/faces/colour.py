"""Pixels of any mode and any embedded colour profile -> sRGB, 8 bits.

Pictures without a profile are taken as sRGB already, as browsers do; CMYK without one by the naive rule
R = (1 - C)(1 - K). Profiles are applied by LittleCMS (through Pillow), relative colorimetric. HEIC files may name their
colours by the numbers of ITU-T H.273 instead (`nclx`): Display P3 and BT.2020 become sRGB; HDR stays as it is, with a
remark.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

Transform = ImageCms.ImageCmsTransform
INVISIBLE_DIFFERENCE = 2  # of 255: a profile that moves no colour further is sRGB under another name
SPACE = slice(16, 20)  # where a profile says what its colours are (ICC.1:2022, 7.2)
UNFIT = "colour profile ignored: it does not fit the picture"

NCLX = "nclx_profile"  # where pillow-heif says how a HEIC file names its colours
LIKE_SRGB = frozenset({0, 1, 2, 5, 6, 7})  # primaries of BT.709 and of standard definition, taken as the same
LIKE_SRGB_CURVE = frozenset({0, 1, 2, 6, 13, 14, 15})  # and of BT.709 and BT.2020, as browsers take them
HDR = {16: "PQ", 18: "HLG"}
WIDE = {  # primaries -> XYZ of red, green and blue, seen under D50
    12: ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),  # Display P3
    9: ((0.67348, 0.27904, -0.00194), (0.16567, 0.67535, 0.02998), (0.12505, 0.04561, 0.79686)),  # BT.2020
}
D50 = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC.1:2022, 10.18, function 3


class UnclearColours(Exception):
    """The pixels have no agreed meaning as colours; the message says why and what to do."""


def flatten(image: Image.Image) -> Image.Image:
    """Bring a loaded image to mode L, RGB or CMYK: 8 bits, without palette, transparency laid over white."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnclearColours("32-bit gray values have no agreed range; convert it to 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise UnclearColours("floating-point pixels have no agreed range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        flat.info[NCLX] = image.info.get(NCLX)
        return flat
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, Transform | None, str]:
    """Return a flat image as RGB, what brings its colours to sRGB if they are not yet, and a remark or "".

    Pixels of an RGB profile keep their colours: the caller converts those that it needs.
    """
    if image.mode == "L" and profile and profile[SPACE] == b"RGB ":  # saved by a program that works in RGB
        image = image.convert("RGB")
    if image.mode == "RGB" and not profile:
        return image, *_transform_for_codes(image.info.get(NCLX))
    transform, remark = transform_for(image.mode, profile)
    if image.mode == "RGB":
        return image, transform, remark
    return image.convert("RGB") if transform is None else transform.apply(image), None, remark


def transform_for(mode: str, profile: bytes | None) -> tuple[Transform | None, str]:
    """Return what converts pixels of an embedded profile to sRGB, if needed, and a remark if it does not fit them."""
    if not profile:
        return None, ""
    try:
        return _transform(profile, mode), ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, UNFIT


def _transform_for_codes(nclx: dict[str, int] | None) -> tuple[Transform | None, str]:
    """Return what converts RGB pixels of named primaries and transfer to sRGB, if needed, and a remark if it cannot."""
    if not nclx:
        return None, ""
    primaries, transfer = (nclx.get(name, 2) for name in ("color_primaries", "transfer_characteristics"))
    if transfer in HDR:
        return None, f"HDR ({HDR[transfer]}): colours not converted to sRGB"
    if transfer not in LIKE_SRGB_CURVE or primaries not in LIKE_SRGB | WIDE.keys():
        return None, f"colours not converted to sRGB: primaries {primaries}, transfer {transfer} of ITU-T H.273"
    return (_transform(_profile(primaries), "RGB") if primaries in WIDE else None), ""


def _profile(primaries: int) -> bytes:
    """Return an ICC profile (version 4) of one of the WIDE primaries with sRGB's curve."""
    numbers = lambda *values: struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))  # noqa: E731
    curve = b"para" + struct.pack(">I2H", 0, 3, 0) + numbers(*SRGB_CURVE)
    points = zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (*WIDE[primaries], D50), strict=True)
    tags = [(name, b"XYZ " + bytes(4) + numbers(*point)) for name, point in points]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    directory, content, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags:
        directory += name + struct.pack(">2I", at + len(content), len(data))
        content += data
    header = struct.pack(">2I", at + len(content), 0) + bytes.fromhex("04300000") + b"mntrRGB XYZ "
    header = header.ljust(36, b"\0") + b"acsp" + bytes(28) + numbers(*D50)
    return header.ljust(128, b"\0") + directory + content


def to_srgb(pixels: np.ndarray, transform: Transform | None) -> np.ndarray:
    """Apply a transform to uint8 [H, W, 3]; without one the pixels are returned as they are."""
    return pixels if transform is None else np.asarray(transform.apply(Image.fromarray(np.ascontiguousarray(pixels))))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """Return the conversion to sRGB, or None where it would change nothing visible (most profiles are sRGB's own)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    if mode != "RGB":
        return transform
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    samples = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    change = np.abs(to_srgb(samples, transform).astype(int) - samples).max()
    return None if change <= INVISIBLE_DIFFERENCE else transform
