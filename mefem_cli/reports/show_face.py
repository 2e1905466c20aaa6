"""The faces that `mefem show` draws on: crops that are named, and one that is rendered where none is."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from mefem_cli import console
from mefem_cli.errors import NoInputError

if TYPE_CHECKING:
    from mefem_cli.stores.crops import Crops

Read = TypeVar("Read")
RENDERED = (0, 17)  # seed and number of the rendered person
CROP_UNITS = 2.6  # side of a crop in units of the drawn head; faces/render.py leaves room for it
CROP_DOWN = 0.33  # units from the head's origin to the middle of its crop
MOST_NAMED = 3  # crops that cannot be read
MAX_PIXELS = 120_000_000  # of a picture, as mefem crop has it


def rendered_face(side: int) -> np.ndarray:
    """Return the crop of an imaginary person who looks into the camera, uint8 [side, side, 3]."""
    from mefem_cli.faces import geometry, render
    from mefem_cli.faces.render_draw import draw_portrait

    seed, number = RENDERED
    person = render.draw_person(seed, number)
    scene = render.draw_scene(person, 0, seed)
    scene = replace(scene, yaw=0.0, pitch=0.0, roll=0.0, keystone=0.0, eye_open=1.1, gaze=(0.0, 0.0), glasses=0.0,
                    noise=0.002, blur=0.0, detail=1.3, background="studio", exposure=1.15)  # fmt: skip
    unit, (x, y) = scene.pixels_per_unit, scene.origin
    half = CROP_UNITS * unit / 2
    square = geometry.Square(x - half, y + CROP_DOWN * unit - half, 2 * half)
    return geometry.resample(draw_portrait(person, scene), square, side)


def crop_pixels(path: Path, side: int) -> np.ndarray:
    """Return a picture file, or the first crop of a crops folder that can be read, as uint8 [side, side, 3].

    Raises NoInputError for a path where there is none.
    """
    if path.is_dir():
        from mefem_cli.stores.crops import Crops

        crops = Crops.open(path)
        return next(each_readable(range(len(crops)), lambda row: crop_of(crops, row, side)))[1]
    if not path.is_file():
        raise NoInputError(f"{path}: no such crop; name a picture or a crops folder")
    return decoded(path.read_bytes(), side, path)


def crop_of(crops: Crops, row: int, side: int) -> np.ndarray:
    """Return a crop of a folder, uint8 [side, side, 3]. Raises NoInputError where it is gone or damaged."""
    try:
        content = crops.read_bytes(row)
    except OSError as error:
        reason = error.strerror or error
        raise NoInputError(f"{crops.describe(row)}: cannot be read ({reason}); run mefem crop again") from error
    return decoded(content, side, Path(crops.describe(row)))


def each_readable(rows: Iterable[int], read: Callable[[int], Read]) -> Iterator[tuple[int, Read]]:
    """Yield each row with what `read` makes of it, and warn of those that it raises NoInputError for.

    Raises the first of these where nothing can be read.
    """
    num_read, trouble = 0, []
    for row in rows:
        try:
            found = read(row)
        except NoInputError as error:
            trouble.append(error)
            if len(trouble) <= MOST_NAMED:
                console.warn(f"left out: {error}")
            continue
        num_read += 1
        yield row, found
    if len(trouble) > MOST_NAMED:
        console.warn(f"left out: {console.plural(len(trouble) - MOST_NAMED, 'more crop')} that cannot be read")
    if trouble and not num_read:
        raise NoInputError(f"no crop can be read; the first: {trouble[0]}")


def decoded(content: bytes, side: int, path: Path) -> np.ndarray:
    """Return the largest square in the middle of a picture, uint8 [side, side, 3]; `path` is named in the error."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise NoInputError(f"{path}: {image.width} x {image.height} px are too many for a crop")
            square = min(image.size)
            left, top = (image.width - square) // 2, (image.height - square) // 2
            box = (left, top, left + square, top + square)
            return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoInputError(f"{path}: cannot be read as a picture; name a crop") from error
