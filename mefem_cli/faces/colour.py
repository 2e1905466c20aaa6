"""Pixels of any mode and any embedded colour profile -> sRGB, 8 bits.

Pictures without a profile are taken as sRGB already, as browsers do; CMYK without one by the naive rule
R = (1 - C)(1 - K). Profiles are applied by LittleCMS (through Pillow), relative colorimetric.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

Transform = ImageCms.ImageCmsTransform
INVISIBLE_DIFFERENCE = 2  # of 255: a profile that moves no colour further is sRGB under another name
SPACE = slice(16, 20)  # where a profile says what its colours are (ICC.1:2022, 7.2)
UNFIT = "colour profile ignored: it does not fit the picture"


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
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, Transform | None, str]:
    """Return a flat image as RGB, what brings its colours to sRGB if they are not yet, and a remark or "".

    Pixels of an RGB profile keep their colours: the caller converts those that it needs.
    """
    if image.mode == "L" and profile and profile[SPACE] == b"RGB ":  # saved by a program that works in RGB
        image = image.convert("RGB")
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
