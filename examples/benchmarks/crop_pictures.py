"""Pictures to measure on: face photos enlarged, with the grain that a sensor leaves, as JPEG of usual quality."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from crop_measure import Setting, Skipped
from PIL import Image

from mefem_cli.faces.crop import CropOptions, Cropper
from mefem_cli.faces.source import Source
from mefem_cli.stores.crops import OK

GRAIN = 3.0  # levels, standard deviation: JPEGs of 2 bits a px, as cameras write them
LEAST_WIDTH = 400  # px of a photo that is worth enlarging
LINKS_PER_FILE = 60_000  # ext4 allows 65,000


def portraits(setting: Setting, folder: Path, count: int) -> list[Path]:
    """Write `count` different JPEGs of 1024 x 1024 px, quality 90, with a face that becomes a crop."""
    return _written(setting, folder, count, lambda photo: photo.resize((1024, 1024), Image.Resampling.BICUBIC), 90)


def phone_photos(setting: Setting, folder: Path, count: int) -> list[Path]:
    """Write `count` different JPEGs of 4032 x 3024 px, quality 92: the photo in the middle, mirrored beside."""
    return _written(setting, folder, count, _in_landscape, 92)


def _in_landscape(photo: Image.Image) -> Image.Image:
    tall = np.asarray(photo.resize((3024, 3024), Image.Resampling.BICUBIC))
    return Image.fromarray(np.pad(tall, ((0, 0), (504, 504), (0, 0)), mode="reflect"))


def _written(setting: Setting, folder: Path, count: int, enlarge, quality: int) -> list[Path]:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(0)
    cropper = Cropper(CropOptions(), None)
    written: list[Path] = []
    for photo in _photos(setting):
        path = folder / f"{len(written):03d}.jpg"
        path.write_bytes(_grainy_jpeg(enlarge(photo), generator, quality))
        if cropper.crop_source(source_of(path))[0]["status"] == OK:
            written.append(path)
        if len(written) == count:
            break
    cropper.close()
    return written


def _photos(setting: Setting) -> Iterator[Image.Image]:
    for path in sorted((setting.data("faces") / "t2i").glob("*.jpg")):
        with Image.open(path) as photo:
            if photo.width >= LEAST_WIDTH:
                yield photo.convert("RGB")


def _grainy_jpeg(image: Image.Image, generator: np.random.Generator, quality: int) -> bytes:
    pixels = np.asarray(image)
    grain = generator.normal(0, GRAIN, (*pixels.shape[:2], 1)).round().astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def mixed_small(setting: Setting, folder: Path) -> list[Path]:
    """Write small pictures of several formats and sizes, some without a face, two of them broken."""
    photos = [photo for photo, _ in zip(_photos(setting), range(14), strict=False)]
    if not photos:
        raise Skipped("there are no photos")
    kinds = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp")]
    written = []
    for index, photo in enumerate(photos):
        format, suffix = kinds[index % len(kinds)] if index % 2 else kinds[0]
        side = 96 + 12 * index
        path = folder / f"{index:02d}{suffix}"
        photo.resize((side, side), Image.Resampling.BICUBIC).save(path, format)
        written.append(path)
    blank, broken, page = folder / "blank.jpg", folder / "broken.jpg", folder / "page.jpg"
    Image.new("RGB", (128, 96), (120, 140, 90)).save(blank)
    broken.write_bytes(written[0].read_bytes()[:900])
    page.write_text("<!doctype html><title>404</title>")
    return [*written, blank, broken, page]


def hard_links(files: list[Path], folder: Path, count: int) -> None:
    """Make `count` hard links to the files by turns, a thousand to a folder; their names are all different."""
    if count > LINKS_PER_FILE * len(files):
        raise Skipped(f"{count} links to {len(files)} files are more than a file system allows")
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04d}").mkdir(parents=True)
        file = files[number % len(files)]
        os.link(file, f"{folder}/{number // 1000:04d}/{number:07d}{file.suffix}")


def source_of(path: Path) -> Source:
    """Return a file as a source."""
    status = path.stat()
    return Source(f"{path.parent.name}/{path.name}", str(path), status.st_size, status.st_mtime_ns)
