"""Any image file -> a picture: upright, sRGB; what cannot be read says why. And crops -> files.

What a file is, its content says, not its name. The header is read first: a picture too large is never decoded. Plain
JPEGs go through simplejpeg (libjpeg-turbo), everything else through Pillow, which also decides in doubtful cases; HEIC
through pillow-heif (extra `heif`). Of animations the first frame is taken, of a HEIC file its primary image.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from mefem_cli.faces import colour
from mefem_cli.faces.picture import Picture, Scale, turn_upright

__all__ = ["ImageRejected", "Picture", "Scale", "begins_like_image", "decode", "encode", "open_picture", "turn_upright"]

Kind = Literal["image", "heif", "html", "pdf", "postscript"]

ORIENTATION_TAG = 0x0112
TURNED = (5, 6, 7, 8)  # the orientations that swap width and height
UNREADABLE, TOO_LARGE = "unreadable", "too-large"
MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA without compression; a file larger than that times the limit is not read

# What Pillow may be asked to read: it knows formats, too, that start programs (EPS) or that nobody has photos in.
PILLOW_FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PSD"]
SIGNATURES: dict[bytes, Kind] = {
    b"\xff\xd8\xff": "image",  # JPEG
    b"\x89PNG\r\n\x1a\n": "image",
    b"GIF87a": "image",
    b"GIF89a": "image",
    b"II*\0": "image",  # TIFF, and the two orders of BigTIFF
    b"MM\0*": "image",
    b"II+\0": "image",
    b"MM\0+": "image",
    b"\0\0\0\x0cjP  ": "image",  # JPEG 2000
    b"\xff\x4f\xff\x51": "image",
    b"8BPS": "image",  # Photoshop
    b"%!PS": "postscript",
    b"\xc5\xd0\xd3\xc6": "postscript",
    b"%PDF": "pdf",
}
AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
NOT_PICTURES = {
    "html": "a web page, not an image (a download that failed?)",
    "pdf": "a PDF document, not an image",
    "postscript": "a PostScript program, not an image; convert it to PNG first",
}
WITHOUT_HEIF = 'HEIC needs one more package; type: pip install "mefem-cli[heif]"'

Format = Literal["jpeg", "png", "webp"]
SUFFIXES: dict[Format, str] = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
LOSSLESS = 100  # the WebP quality from which pixels are kept as they are
# How hard the encoders try: half the time of Pillow's defaults or less, for 1 % (WebP), 3 % (PNG) and 6 % (lossless
# WebP) more bytes: 2.7, 6.4 and 7.5 ms a crop of 224 px; JPEG takes 0.2.
PNG_EFFORT = {"compress_level": 4}
WEBP_EFFORT = {"method": 2}
LOSSLESS_EFFORT = {"method": 1, "quality": 20}  # of lossless WebP, "quality" is no quality but an effort, too


class ImageRejected(Exception):
    """A picture that cannot be used: `reason` is `unreadable` or `too-large`, `detail` says more."""

    def __init__(self, reason: str, detail: str, width: int | None = None, height: int | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.width, self.height = reason, detail, width, height


def kind_of(start: bytes) -> Kind | None:
    """Say what a file is by its first bytes, 64 or more: `image` and `heif` can be read; None is anything else.

    >>> kind_of(b"GIF89a"), kind_of(b"<!doctype html>"), kind_of(b"path,age")
    ('image', 'html', None)
    """
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if start[4:8] == b"ftyp":  # ISO media: the brands say if it is a picture or a video
        end = min(int.from_bytes(start[:4], "big"), len(start))
        brands = {start[at : at + 4] for at in (8, *range(16, end - 3, 4))}
        return "image" if brands & AVIF_BRANDS else "heif" if brands & HEIF_BRANDS else None
    is_bitmap = start.startswith(b"BM") and start[6:10] == b"\0\0\0\0"
    is_webp = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    is_netpbm = start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace()
    if is_bitmap or is_webp or is_netpbm:
        return "image"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "html" if text.startswith(b"<!doctype html") or b"<html" in text else None


def begins_like_image(start: bytes) -> bool:
    """Return whether the first bytes of a file, 64 or more, are those of a picture that can be read."""
    return kind_of(start) in ("image", "heif")


def decode(content: bytes, max_pixels: int) -> Picture:
    """Decode an image file's bytes. Raises ImageRejected where it is broken, or larger than `max_pixels`.

    >>> buffer = io.BytesIO()
    >>> Image.new("CMYK", (2, 1)).save(buffer, "JPEG")
    >>> decode(buffer.getvalue(), max_pixels=100).pixels.shape
    (1, 2, 3)
    """
    picture = open_picture(content, max_pixels)
    return Picture.of(picture.pixels, picture.remark)


def open_picture(content: bytes, max_pixels: int) -> Picture:
    """Read an image file's header, and its pixels no sooner than they are needed (of plain JPEGs; else at once).

    Raises ImageRejected where the file is broken, or larger than `max_pixels`; so do the picture's methods.
    """
    if not content:
        raise ImageRejected(UNREADABLE, "the file is empty")
    is_heif = kind_of(content[:512]) == "heif"
    if is_heif and not _reads_heif():
        raise ImageRejected(UNREADABLE, WITHOUT_HEIF)
    with _rejecting(content, max_pixels), Image.open(io.BytesIO(content), formats=_formats(is_heif)) as image:
        width, height = image.size
        if width * height > max_pixels:
            size = (height, width) if _orientation(image) in TURNED else (width, height)
            detail = f"{size[0]} x {size[1]} px; --max-pixels is {max_pixels}"
            raise ImageRejected(TOO_LARGE, detail, *size)
        Image.MAX_IMAGE_PIXELS = max_pixels  # for pictures inside the file that its header does not tell of
        if image.format in ("JPEG", "MPO") and image.mode == "RGB":
            colours, remark = colour.transform_for("RGB", image.info.get("icc_profile"))
            jpeg = _PlainJpeg(content, max_pixels)
            return Picture(image.size, jpeg.full, jpeg.reduced, _orientation(image), colours, remark)
        pixels, colours, remark = _load(image)
        orientation = _orientation(image)  # after loading: some formats turn the picture while they load it
        return Picture((pixels.shape[1], pixels.shape[0]), lambda: pixels, None, orientation, colours, remark)


class _PlainJpeg:
    """An RGB JPEG with a sound header: its stored pixels, uint8 [h, w, 3], in the colours of the file."""

    def __init__(self, content: bytes, max_pixels: int):
        self.content, self.max_pixels = content, max_pixels

    def full(self) -> np.ndarray:
        with _rejecting(self.content, self.max_pixels):
            pixels = self._decode(1)
            if pixels is None:  # Pillow knows harmless damage
                with Image.open(io.BytesIO(self.content), formats=_formats(is_heif=False)) as image:
                    pixels = np.asarray(image.convert("RGB"))
            return pixels

    def reduced(self, factor: int) -> np.ndarray | None:
        """Return the pixels at 1/factor, sides rounded up, or None if the file is damaged."""
        with _rejecting(self.content, self.max_pixels):
            return self._decode(factor)

    def _decode(self, factor: int) -> np.ndarray | None:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(self.content)
            size = {"min_height": math.ceil(height / factor), "min_width": math.ceil(width / factor)}
            options = {"colorspace": "RGB", "fastdct": False, "fastupsample": False, "min_factor": factor}
            return simplejpeg.decode_jpeg(self.content, **options, **size)
        except ValueError:
            return None


def _load(image: Image.Image) -> tuple[np.ndarray, colour.Transform | None, str]:
    """Return an image's stored pixels as RGB, what brings them to sRGB, and a remark."""
    image.load()
    try:
        flat = colour.flatten(image)
    except colour.UnclearColours as error:
        raise ImageRejected(UNREADABLE, str(error)) from error
    rgb, colours, remark = colour.to_rgb(flat, image.info.get("icc_profile"))
    return np.asarray(rgb), colours, remark


@contextmanager
def _rejecting(content: bytes, max_pixels: int) -> Iterator[None]:
    """Turn all that decoders raise on broken files into ImageRejected; silence Pillow, and give its limit back."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except ImageRejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected(TOO_LARGE, f"{error}; --max-pixels is {max_pixels}") from error
    except MemoryError as error:
        raise ImageRejected(TOO_LARGE, "not enough memory to decode it") from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, IndexError ...
        raise ImageRejected(UNREADABLE, _why_unreadable(content, error)) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@lru_cache(maxsize=2)
def _formats(is_heif: bool) -> list[str]:
    Image.init()
    return ["HEIF"] if is_heif else [name for name in PILLOW_FORMATS if name in Image.OPEN]


@lru_cache(maxsize=1)
def _reads_heif() -> bool:
    """Return whether pillow-heif is there; the first call makes Pillow know it."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return True


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block is no reason to lose a sound picture
        return 1


def _why_unreadable(content: bytes, error: Exception) -> str:
    """Say in a few words why a file could not be decoded, by what its first bytes say it is."""
    kind = kind_of(content[:512])
    if kind in NOT_PICTURES:
        return NOT_PICTURES[kind]
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image" if kind is None else "damaged: it begins like an image, but its header cannot be read"
    if "truncated" in str(error).lower():
        return "damaged: cut short"
    return f"{type(error).__name__}: {str(error)[:160]}"


def encode(pixels: np.ndarray, format: Format, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] without metadata. PNG ignores `quality`; WebP of quality 100 is lossless, JPEG never."""
    if format == "jpeg":
        return encode_jpeg(pixels, quality)
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if format == "png":
        image.save(buffer, "PNG", **PNG_EFFORT)
    elif quality >= LOSSLESS:
        image.save(buffer, "WEBP", lossless=True, **LOSSLESS_EFFORT)
    else:
        image.save(buffer, "WEBP", quality=quality, **WEBP_EFFORT)
    return buffer.getvalue()


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
