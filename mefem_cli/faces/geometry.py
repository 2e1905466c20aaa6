"""The square around a face, and the pixels in it: pure float geometry in pixels of the EXIF-oriented image.

A coordinate names a point, not a pixel: x = 0 is the left edge of the first column, x = width the right edge of the
last one. Boxes are (x, y, width, height), as in the paper's crop rule: the square with side
`scale * max(box width, box height)`, centred on the box. A square may be turned about its centre by an angle in
radians: as y points down, a positive angle turns it clockwise, as seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

Box = tuple[float, float, float, float]  # x, y, width, height, px
Point = tuple[float, float]
Pad = Literal["reflect", "edge"]

# Antialiased bicubic, the filter with which most pretrained backbones were trained (timm's default). Its support is
# widened by the reduction, so that every source pixel counts. Turned squares leave it to Pillow.
FILTER = Image.Resampling.BICUBIC
FILTER_SUPPORT = 2  # px of the result on each side
BLOCK = 8  # px of the result that are filtered at once: the more, the more weights are zeros; the fewer, the more calls
FINEST = 3  # px per px of the crop from which a square is turned; more would cost time and show nothing
MAX_CUT = 150_000_000  # px that one crop may need: a box in a table may ask to invent any number of them


@dataclass(frozen=True)
class Square:
    """A square in the image: its top left corner and its side, in px, not rounded. A turned one keeps its centre."""

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


def centre(box: Box) -> Point:
    """Return the middle of a box."""
    x, y, width, height = box
    return x + width / 2, y + height / 2


def eye_angle(keypoints: np.ndarray) -> float:
    """Return the angle in radians, -pi ... pi, to turn a square by so that the eyes lie level in its crop.

    `keypoints` [>= 2, 2] are BlazeFace's: the person's right eye, which an upright face shows on the left, then the
    left eye. Positive: the left eye lies lower, the head leans clockwise as seen.

    >>> round(math.degrees(eye_angle(np.array([[100, 100], [200, 200]]))))
    45
    """
    (right_x, right_y), (left_x, left_y) = np.asarray(keypoints, dtype=np.float64)[:2]
    return math.atan2(left_y - right_y, left_x - right_x)


def corners(square: Square, angle: float = 0.0) -> list[Point]:
    """Return the corners of a square: as its crop shows them, top left, top right, bottom right, bottom left."""
    if not angle:
        right, bottom = square.x + square.side, square.y + square.side
        return [(square.x, square.y), (right, square.y), (right, bottom), (square.x, bottom)]
    half = square.side / 2
    x, y = square.x + half, square.y + half
    across, down = half * math.cos(angle), half * math.sin(angle)
    return [
        (x - across + down, y - down - across),
        (x + across + down, y + down - across),
        (x + across - down, y + down + across),
        (x - across - down, y - down + across),
    ]


def bounds(square: Square, angle: float = 0.0) -> tuple[float, float, float, float]:
    """Return how far a square reaches: left, top, right, bottom."""
    x, y = zip(*corners(square, angle), strict=True)
    return min(x), min(y), max(x), max(y)


def is_inside(square: Square, width: int, height: int, angle: float = 0.0) -> bool:
    """Return whether the whole square lies in the image; touching its edge is inside."""
    left, top, right, bottom = bounds(square, angle)
    return left >= 0 and top >= 0 and right <= width and bottom <= height


def outside_fraction(square: Square, width: int, height: int, angle: float = 0.0) -> float:
    """Return the share of the square's area that lies outside the image."""
    if is_inside(square, width, height, angle):
        return 0.0
    shape = corners(square, angle)
    for axis, limit, sign in ((0, 0, 1), (1, 0, 1), (0, width, -1), (1, height, -1)):
        shape = _clip(shape, axis, limit, sign)
    doubled = sum(x * below - right * y for (x, y), (right, below) in zip(shape, shape[1:] + shape[:1], strict=True))
    return min(1.0, max(0.0, 1.0 - abs(doubled) / 2 / square.side**2))


def _clip(shape: list[Point], axis: int, limit: float, sign: int) -> list[Point]:
    """Return the part of a convex polygon with `sign * (coordinate - limit) >= 0` (Sutherland and Hodgman, 1974)."""
    kept: list[Point] = []
    for one, other in zip(shape, shape[1:] + shape[:1], strict=True):
        depth, other_depth = sign * (one[axis] - limit), sign * (other[axis] - limit)
        if depth >= 0:
            kept.append(one)
        if depth * other_depth < 0:
            share = depth / (depth - other_depth)
            kept.append((one[0] + share * (other[0] - one[0]), one[1] + share * (other[1] - one[1])))
    return kept


def resample(pixels: np.ndarray, square: Square, size: int, pad: Pad = "edge", angle: float = 0.0) -> np.ndarray:
    """Return the content of the square, turned by `angle`, at `size` x `size` px, antialiased.

    `pixels` is uint8 [H, W, 3], and so is the result. The square keeps its fractions of a pixel. Where it leaves the
    image, the image goes on as `pad` says: mirrored, or with its edge repeated.
    """
    return resize(*cut(pixels, square, size, pad, angle), size, angle)


def cut(
    pixels: np.ndarray, square: Square, size: int, pad: Pad = "edge", angle: float = 0.0
) -> tuple[np.ndarray, Square]:
    """Return all pixels [h, w, ...] that the square's crop depends on, and the square's place among them.

    Raises MemoryError where they are more than a crop may need.
    """
    height, width = pixels.shape[:2]
    # A little more than the square, so that the filter sees the neighbours that it would see in the whole image;
    # a turned square is filtered twice.
    margin = (FILTER_SUPPORT + bool(angle)) * max(1.0, square.side / size) + 1
    ends = bounds(Square(square.x - margin, square.y - margin, square.side + 2 * margin), angle)
    left, top = (math.floor(end) for end in ends[:2])
    right, bottom = (math.ceil(end) for end in ends[2:])
    if (right - left) * (bottom - top) > MAX_CUT:
        raise MemoryError(f"a square of {square.side:.0f} px")
    inside = is_inside(square, width, height, angle)
    if inside and not angle:  # nothing to invent: the filter ends at the image, as Pillow's does
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        region = pixels[top:bottom, left:right]
    else:
        region = _continued(pixels, (left, top, right, bottom), "edge" if inside else pad)
    return region, Square(square.x - left, square.y - top, square.side)


def resize(region: np.ndarray, square: Square, size: int, angle: float = 0.0) -> np.ndarray:
    """Return the square's content of what `cut` returned, uint8 [size, size, 3].

    Unturned it is Pillow's antialiased bicubic, calculated as matrix products in a third of its time, and rounded and
    clipped once instead of after each direction: within 0.50002 levels of the exact value on 44 face photos, where
    Pillow is up to 4 levels off. How float32 sums are rounded depends on numpy's BLAS and on the processor: crops of
    two machines may differ by 1 level in about one value of a million, and `crop_sha256` then, too.
    """
    if angle:
        return _resize_turned(Image.fromarray(np.ascontiguousarray(region)), square, size, angle)
    height, width = region.shape[:2]
    lines = np.empty((width * 3, size), np.float32)
    _filter(region.reshape(height, width * 3), square.y, square.side, lines)
    crop = np.empty((size, 3 * size), np.float32)  # [column, channel and row]
    _filter(lines.reshape(width, 3 * size), square.x, square.side, crop.T)
    np.rint(crop, out=crop)
    np.clip(crop, 0, 255, out=crop)
    return np.ascontiguousarray(crop.astype(np.uint8).reshape(size, 3, size).transpose(2, 0, 1))


def _filter(pixels: np.ndarray, start: float, side: float, out: np.ndarray) -> None:
    """Reduce (or enlarge) rows `start` to `start + side` of pixels [n, m] to the columns of `out` [m, size]."""
    size = out.shape[1]
    firsts, weights = _weights(len(pixels), start, side, size)
    for block, first in enumerate(firsts.tolist()):
        columns = out[:, block * BLOCK : (block + 1) * BLOCK]
        rows = pixels[first : first + weights.shape[2]].astype(np.float32, copy=False)
        np.matmul(rows.T, weights[block, : columns.shape[1]].T, out=columns)


def _weights(length: int, start: float, side: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how `length` pixels make `size` px of `start` to `start + side`: first pixels [blocks], weights.

    The weights are float32 [blocks, BLOCK, K]: those of px `i` of a block for K pixels from the first one on; beyond
    `size` they mean nothing. As Pillow has them: the kernel of Keys (1981) with a = -1/2, at the pixels whose centres
    lie within its support, their sum brought to 1 where it ends at the edge.
    """
    reduction = max(1.0, side / size)
    reach = FILTER_SUPPORT * reduction
    middles = np.minimum(np.arange(-(-size // BLOCK) * BLOCK), size - 1).reshape(-1, BLOCK, 1)
    middles = start + (middles + 0.5) * (side / size)
    first, stop = (np.clip(np.floor(middles + end + 0.5), 0, length) for end in (-reach, reach))
    num_pixels = int((stop[:, -1] - first[:, 0]).max())
    firsts = np.minimum(first[:, 0, 0].astype(int), length - num_pixels)
    indices = firsts[:, None, None] + np.arange(num_pixels)
    t = np.abs((indices + 0.5 - middles) / reduction)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
    weights = np.where(t < 1, near, far) * ((indices >= first) & (indices < stop))
    return firsts, (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _resize_turned(image: Image.Image, square: Square, size: int, angle: float) -> np.ndarray:
    """Interpolate a turned grid that is at least as fine as the image, then reduce it as an unturned crop is reduced.

    The grid has a whole number of points per pixel of the crop, so that a crop that needs no reduction is filtered
    once, and a ring around the square for the filter of the last step. A large image is reduced first (46 dB and more
    between a face turned by nothing and one that is not turned).
    """
    scale = FINEST * size / square.side
    if scale < 1:
        width, height = int(image.width * scale), int(image.height * scale)
        image = image.resize((width, height), FILTER, box=(0, 0, width / scale, height / scale))
        square = Square(square.x * scale, square.y * scale, FINEST * size)
    fineness = max(1, math.ceil(square.side / size))
    ring = FILTER_SUPPORT * fineness
    num_points = size * fineness + 2 * ring
    step = square.side / (size * fineness)  # px of the image from point to point, at most 1
    across, down = step * math.cos(angle), step * math.sin(angle)
    middle = square.side / 2
    x = square.x + middle - num_points / 2 * (across - down)
    y = square.y + middle - num_points / 2 * (down + across)
    grid = (across, -down, x, down, across, y)
    turned = _interpolate(image, num_points, grid)
    end = num_points - ring
    return np.asarray(turned.resize((size, size), FILTER, box=(ring, ring, end, end)))


def _interpolate(image: Image.Image, num_points: int, grid: tuple[float, ...]) -> Image.Image:
    """Sample an image at the points of an affine grid, `num_points` x `num_points`.

    Where Pillow's `resize` has the cubic kernel with a = -1/2 (Keys, 1981), its `transform` has the one with a = -1,
    which sharpens. Kernels are linear in a, and the triangle is close to the one with a = 0: their mean passes every
    frequency up to 0.35 per px of the image within 3 % of the kernel with a = -1/2. Both cut fractions of a level off,
    so one of them is taken of the negative, where that adds half a level instead of taking it.
    """
    size, affine = (num_points, num_points), Image.Transform.AFFINE
    cubic = image.transform(size, affine, grid, Image.Resampling.BICUBIC)
    linear = ImageChops.invert(image).transform(size, affine, grid, Image.Resampling.BILINEAR)
    return Image.blend(cubic, ImageChops.invert(linear), 0.5)


def _continued(pixels: np.ndarray, ends: tuple[int, int, int, int], pad: Pad) -> np.ndarray:
    """Return the pixels from left, top to right, bottom, where the image goes on beyond its ends as `pad` says."""
    left, top, right, bottom = ends
    height, width = pixels.shape[:2]
    columns = _stand_ins(width, left, right, pad)
    first, last = (min(max(end, 0), width) for end in (left, right))
    rows = _stand_ins(height, top, bottom, pad)
    before, after = columns[: max(0, -left)], columns[max(0, width - left) :]
    return np.concatenate([pixels[:, before][rows], pixels[:, first:last][rows], pixels[:, after][rows]], axis=1)


def _stand_ins(length: int, start: int, stop: int, pad: Pad) -> np.ndarray:
    """Return the indices in [0, length) that stand for start ... stop - 1, where the image ends before them."""
    indices = np.arange(start, stop)
    if pad == "edge" or length == 1:
        return np.clip(indices, 0, length - 1)
    period = 2 * (length - 1)  # 0 1 2 3 2 1 | 0 1 ...: the edge itself is not repeated
    return (length - 1) - np.abs(indices % period - (length - 1))


def in_crop(points: np.ndarray, square: Square, size: int, angle: float = 0.0) -> np.ndarray:
    """Map points [..., 2] from image to crop coordinates, px; the crop spans 0 ... `size`."""
    corner, scale = np.array(corners(square, angle)[0]), size / square.side
    across, down = math.cos(angle), math.sin(angle)
    return (np.asarray(points, dtype=np.float64) - corner) @ np.array([[across, -down], [down, across]]) * scale


def intersection_over_union(first: Box, second: Box) -> float:
    """Return the overlap of two boxes, 0 ... 1."""
    across = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    down = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = max(0.0, across) * max(0.0, down)
    union = first[2] * first[3] + second[2] * second[3] - shared
    return shared / union if union > 0 else 0.0
