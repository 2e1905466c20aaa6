"""The square around a face, and the pixels in it: pure float geometry in pixels of the EXIF-oriented image.

A coordinate names a point, not a pixel: x = 0 is the left edge of the first column, x = width the right edge of the
last one. Boxes are (x, y, width, height), as in the paper's crop rule: the square with side
`scale * max(box width, box height)`, centred on the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # x, y, width, height, px

# Antialiased bicubic, the filter with which most pretrained backbones were trained (timm's default). Pillow widens its
# support by the reduction, so that every source pixel counts; `reducing_gap` stays off, as it only approximates.
FILTER = Image.Resampling.BICUBIC
FILTER_SUPPORT = 2.0  # px of the result on each side


@dataclass(frozen=True)
class Square:
    """A square in the image: its top left corner and its side, in px, not rounded."""

    x: float
    y: float
    side: float


def square_around(box: Box, scale: float = 2.0) -> Square:
    """Return the square of the paper's rule: side `scale * max(width, height)`, centred on the box.

    >>> square_around((100, 100, 50, 40))
    Square(x=75.0, y=70.0, side=100.0)
    """
    x, y, width, height = box
    side = scale * max(width, height)
    return Square(x + width / 2 - side / 2, y + height / 2 - side / 2, side)


def centred_square(width: int, height: int) -> Square:
    """Return the largest square in the middle of an image, for pictures that are cropped already."""
    side = min(width, height)
    return Square((width - side) / 2, (height - side) / 2, side)


def is_inside(square: Square, width: int, height: int) -> bool:
    """Return whether the whole square lies in the image; touching its edge is inside."""
    return square.x >= 0 and square.y >= 0 and square.x + square.side <= width and square.y + square.side <= height


def outside_fraction(square: Square, width: int, height: int) -> float:
    """Return the share of the square's area that lies outside the image."""
    across = max(0.0, min(square.x + square.side, width) - max(square.x, 0.0))
    down = max(0.0, min(square.y + square.side, height) - max(square.y, 0.0))
    return 1.0 - across * down / square.side**2


def resample(pixels: np.ndarray, square: Square, size: int, pad: Literal["reflect", "edge"] = "edge") -> np.ndarray:
    """Return the square's content at `size` x `size` px, antialiased.

    `pixels` is uint8 [H, W, 3], and so is the result. The square keeps its fractions of a pixel. Where it leaves the
    image, the image goes on as `pad` says: mirrored, or with its edge repeated.
    """
    height, width = pixels.shape[:2]
    # A little more than the square, so that the filter sees the neighbours that it would see in the whole image.
    margin = math.ceil(FILTER_SUPPORT * max(1.0, square.side / size)) + 1
    left, top = math.floor(square.x) - margin, math.floor(square.y) - margin
    right, bottom = math.ceil(square.x + square.side) + margin, math.ceil(square.y + square.side) + margin
    if is_inside(square, width, height):  # nothing to invent: the filter ends at the image, as Pillow's does
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        region = pixels[top:bottom, left:right]
    else:
        rows = _continued(height, top, bottom, pad)
        columns = _continued(width, left, right, pad)
        region = pixels[rows[:, None], columns]
    x, y = square.x - left, square.y - top
    box = (x, y, min(x + square.side, region.shape[1]), min(y + square.side, region.shape[0]))
    image = Image.fromarray(np.ascontiguousarray(region))
    return np.asarray(image.resize((size, size), FILTER, box=box))


def _continued(length: int, start: int, stop: int, pad: Literal["reflect", "edge"]) -> np.ndarray:
    """Return the indices in [0, length) that stand for start ... stop - 1, where the image ends before them."""
    indices = np.arange(start, stop)
    if pad == "edge" or length == 1:
        return np.clip(indices, 0, length - 1)
    period = 2 * (length - 1)  # 0 1 2 3 2 1 | 0 1 ...: the edge itself is not repeated
    return (length - 1) - np.abs(indices % period - (length - 1))


def in_crop(points: np.ndarray, square: Square, size: int) -> np.ndarray:
    """Map points [..., 2] from image to crop coordinates, px; the crop spans 0 ... `size`."""
    return (np.asarray(points, dtype=np.float64) - (square.x, square.y)) * (size / square.side)


def intersection_over_union(first: Box, second: Box) -> float:
    """Return the overlap of two boxes, 0 ... 1."""
    across = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    down = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = max(0.0, across) * max(0.0, down)
    union = first[2] * first[3] + second[2] * second[3] - shared
    return shared / union if union > 0 else 0.0
