"""Any image file -> EXIF-oriented sRGB pixels, uint8 [H, W, 3]; what cannot be read says why.

Plain JPEGs go through simplejpeg (libjpeg-turbo), everything else through Pillow, which also decides in doubtful cases.
Transparent pictures are laid over white, as viewers print them. Of animations the first frame is taken. Decoding is at
full resolution.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

ORIENTATION_TAG = 0x0112
UNREADABLE, TOO_LARGE = "unreadable", "too-large"
MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA without compression; a file larger than that times the limit is not read
INVISIBLE_DIFFERENCE = 2  # of 255: a profile that moves no colour further is sRGB under another name

# What makes stored pixels stand upright, by EXIF orientation: (transpose, then flip rows, flip columns)
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageRejected(Exception):
    """A picture that cannot be used: `reason` is `unreadable` or `too-large`, `detail` says more."""

    def __init__(self, reason: str, detail: str, width: int | None = None, height: int | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.width, self.height = reason, detail, width, height


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `pixels` is uint8 [H, W, 3], sRGB; `remark` tells what the reader should know, or nothing."""

    pixels: np.ndarray
    remark: str = ""


def decode(content: bytes, max_pixels: int) -> Picture:
    """Decode an image file's bytes. Raises ImageRejected where it is broken, or larger than `max_pixels`.

    >>> buffer = io.BytesIO()
    >>> Image.new("CMYK", (2, 1)).save(buffer, "JPEG")
    >>> decode(buffer.getvalue(), max_pixels=100).pixels.shape
    (1, 2, 3)
    """
    if not content:
        raise ImageRejected(UNREADABLE, "the file is empty")
    with _strict_pillow():
        try:
            return _decode(content, max_pixels)
        except ImageRejected:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageRejected(TOO_LARGE, f"{error}; --max-pixels is {max_pixels}") from error
        except MemoryError as error:
            raise ImageRejected(TOO_LARGE, "not enough memory to decode it") from error
        except Exception as error:  # decoders raise anything on broken files: SyntaxError, struct.error, IndexError ...
            raise ImageRejected(UNREADABLE, _why_unreadable(content, error)) from error


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Silence Pillow's warnings for the block, and give its limit on pixels back afterwards."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(content: bytes, max_pixels: int) -> Picture:
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height} px"
            raise ImageRejected(TOO_LARGE, f"{size}; --max-pixels is {max_pixels}", image.width, image.height)
        Image.MAX_IMAGE_PIXELS = max_pixels  # for pictures inside the file that its header does not tell of
        is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode == "RGB"
        pixels = _decode_plain_jpeg(content) if is_plain_jpeg else None
        if pixels is None:
            image.load()
        orientation = _orientation(image)  # after loading: some formats turn the picture while they load it
        profile = image.info.get("icc_profile")
        flat = _flatten(image) if pixels is None else None
    transform, remark = _to_srgb(profile, "RGB" if flat is None else flat.mode)
    if flat is None and transform is not None:
        assert pixels is not None
        flat = Image.fromarray(pixels)
    if flat is not None:
        pixels = np.asarray(flat.convert("RGB") if transform is None else transform.apply(flat))
    assert pixels is not None
    return Picture(np.ascontiguousarray(turn_upright(pixels, orientation)), remark)


def _decode_plain_jpeg(content: bytes) -> np.ndarray | None:
    """Return the pixels of a sound RGB JPEG; None leaves a damaged one to Pillow, which knows harmless damage."""
    try:
        return simplejpeg.decode_jpeg(content, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None


def _flatten(image: Image.Image) -> Image.Image:
    """Bring a loaded image to mode L, RGB or CMYK: 8 bits, without palette and without transparency."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageRejected(UNREADABLE, "32-bit gray values have no agreed range; convert it to 16 bits")
        return Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    if image.mode == "F":
        raise ImageRejected(UNREADABLE, "floating-point pixels have no agreed range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block is no reason to lose a sound picture
        return 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of stored pixels [H, W, ...] as their EXIF orientation (1 to 8) wants them to be seen."""
    transpose, flip_rows, flip_columns = UPRIGHT.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _to_srgb(profile: bytes | None, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """Return what converts pixels of an embedded colour profile to sRGB, if needed, and a remark if it is unusable."""
    if not profile:
        return None, ""
    try:
        return _transform(profile, mode), ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, "colour profile ignored: it does not fit the picture"


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion to sRGB, or None where it would change nothing visible (most profiles are sRGB's own)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    if mode != "RGB":
        return transform
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    samples = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    converted = np.asarray(transform.apply(Image.fromarray(samples)))
    change = np.abs(converted.astype(int) - samples).max()
    return None if change <= INVISIBLE_DIFFERENCE else transform


def _why_unreadable(content: bytes, error: Exception) -> str:
    """Say in a few words why a file could not be decoded, by what its first bytes say it is."""
    start = content[:512].lstrip().lower()
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC is not read; convert it to JPEG first"
    if start.startswith((b"<!doctype", b"<html")) or b"<html" in start:
        return "a web page, not an image (a download that failed?)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return f"{type(error).__name__}: {str(error)[:160]}"


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] as a JPEG with full colour resolution (4:4:4) and no metadata."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444", fastdct=False
    )


def thumbnail(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Return a copy of uint8 [H, W, 3] whose longer side is at most `longest` px."""
    height, width = pixels.shape[:2]
    factor = min(1.0, longest / max(height, width))
    size = (math.ceil(width * factor), math.ceil(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
