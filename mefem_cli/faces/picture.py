"""A picture whose pixels are decoded when they are asked for, at the resolution that is needed.

JPEG stores frequencies, so that libjpeg decodes at 1/2, 1/4 or 1/8 of the resolution in less time than at full (a
12-megapixel photo in 28, 25 and 22 ms instead of 35), and all that follows has less to do (finding faces 10, 8 and 7 ms
instead of 34). Faces are sought in such a picture; a crop is taken from it only where that cannot be told from a crop
of the full one, which would have to be decoded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mefem_cli.faces import colour, geometry
from mefem_cli.faces.geometry import Box, Pad, Square

# The longer side in px from which faces are sought at 1/factor, so in 960 px or more. BlazeFace looks at 128 and 192
# px of them and does not antialias, so that its boxes jitter: a shift of a 1024 px picture by (7, 5) px changes sides
# of boxes by 1.4 % and moves centres by 1.1 % of them (medians). Of 2048 and 4096 px pictures, the reduced ones give
# sides that differ by 0.4 ... 0.6 % and centres that differ by 0.4 ... 0.6 %; recall and overlap with the true boxes
# stay as they are. A JPEG is reduced to twice that: most of the time of decoding is for bits, not pixels, and a second
# decoding, for a crop that has too few pixels in the first one, costs more than the first one saved.
THINNED_FROM = {8: 7680, 4: 3840}  # by leaving out pixels; of 1/2 that costs as much as it saves
DECODED_FROM = {8: 15360, 4: 7680, 2: 1920}

# A crop of `size` px is taken from a reduced picture if its square has at least MARGIN * size px there. Measured on 254
# face photos and 33 scenes (JPEG quality 92, 4:2:0), each against the crop of the full picture: at least 46 dB, mean
# difference at most 0.9 levels and 0.4 in the median (1/2: 47 dB or more). Writing the crop at quality 95 costs more
# (38 ... 44 dB), and so does bicubic instead of Lanczos (43 ... 47 dB). At a margin of 2 the worst is 44.6 dB, at 1.5
# 40.5 dB. In a zone plate, which is nothing but detail up to the limit, the mean difference is 2 levels.
MARGIN = 2.25
CROP_FACTORS = (4, 2)

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
AS_STORED = (False, False, False)


@dataclass(frozen=True)
class Scale:
    """Where the pixels of a reduced picture lie in the full one.

    Its point (x, y) is the point (left + factor * x, top + factor * y) of the picture, exactly: what is left over of a
    side that the factor does not divide is no part of the reduced picture.
    """

    factor: int
    left: int
    top: int
    width: int
    height: int

    def square(self, square: Square) -> Square:
        """Return where a square of the picture lies in the reduced one."""
        x, y = (square.x - self.left) / self.factor, (square.y - self.top) / self.factor
        return Square(x, y, square.side / self.factor)

    def box_in_picture(self, box: Box) -> Box:
        """Return where a box of the reduced picture lies in the full one."""
        x, y, width, height = (value * self.factor for value in box)
        return x + self.left, y + self.top, width, height

    def points_in_picture(self, points: np.ndarray) -> np.ndarray:
        """Return where points [..., 2] of the reduced picture lie in the full one."""
        return np.asarray(points, dtype=np.float64) * self.factor + (self.left, self.top)


class Picture:
    """A picture: `width` and `height` as it is seen, `remark` what the reader should know, or nothing.

    `full()` returns the stored pixels, uint8 [h, w, 3], and `reduced(factor)`, if there is one, those at 1/factor of
    the resolution, where odd sides are rounded up, or None if they cannot be had. Both are called once, when needed.
    All that gives pixels raises what they raise: ImageRejected, if the picture is damaged.
    """

    def __init__(
        self,
        size: tuple[int, int],
        full: Callable[[], np.ndarray],
        reduced: Callable[[int], np.ndarray | None] | None = None,
        orientation: int = 1,
        colours: colour.Transform | None = None,
        remark: str = "",
    ):
        self._turn = UPRIGHT.get(orientation, AS_STORED)
        self.width, self.height = size[::-1] if self._turn[0] else size
        self.remark = remark
        self._decode_full, self._decode_reduced = full, reduced
        self._orientation, self._colours = orientation, colours
        self._upright: dict[int, np.ndarray | None] = {}  # by factor; in the colours of the file
        self._pixels: np.ndarray | None = None
        self._sought = max(CROP_FACTORS)  # the reduction in which faces were sought; before that no limit

    @classmethod
    def of(cls, pixels: np.ndarray, remark: str = "") -> Picture:
        """Return the picture that shows uint8 [H, W, 3], sRGB."""
        return cls((pixels.shape[1], pixels.shape[0]), lambda: pixels, remark=remark)

    @property
    def pixels(self) -> np.ndarray:
        """All of it: uint8 [height, width, 3], sRGB."""
        if self._pixels is None:
            self._pixels = np.ascontiguousarray(colour.to_srgb(self._full(), self._colours))
        return self._pixels

    def for_detection(self, longest_at_least: int | None = None) -> tuple[np.ndarray, Scale]:
        """Return the picture, reduced as its longer side allows, and what maps it back.

        With `longest_at_least` it is reduced as far as it keeps so many px. The pixels are uint8 [h, w, 3], sRGB. Where
        no decoder reduces, pixels are left out.
        """
        sides = DECODED_FROM if self._decode_reduced else THINNED_FROM
        if longest_at_least is not None:
            sides = {factor: factor * longest_at_least for factor in sides}
        longest = max(self.width, self.height)
        factor = next((factor for factor, side in sides.items() if longest >= side), 1)
        scale = self.scale(factor)
        if not scale.width or not scale.height:
            factor, scale = 1, self.scale(1)
        self._sought = factor
        if factor == 1:
            return self.pixels, scale
        pixels = self._reduced(factor)
        if pixels is None:
            first = factor // 2
            pixels = self._full()[scale.top + first :: factor, scale.left + first :: factor]
            pixels = pixels[: scale.height, : scale.width]
        return colour.to_srgb(np.ascontiguousarray(pixels), self._colours), scale

    def crop(self, square: Square, size: int, pad: Pad = "edge", angle: float = 0.0) -> np.ndarray:
        """Return the square, turned by `angle`, at `size` x `size` px, uint8 sRGB: as `geometry.resample` of `pixels`.

        It is taken from the smallest decoding that has the whole square at MARGIN * size px or more, but from no
        smaller one than that in which faces were sought, if they were: that one is there. Which one depends on that,
        the square, the size and the picture's sides alone.
        """
        for factor in CROP_FACTORS:
            if self._decode_reduced is None or factor > self._sought or square.side < MARGIN * size * factor:
                continue
            scale = self.scale(factor)
            if not geometry.is_inside(scale.square(square), scale.width, scale.height, angle):
                continue
            pixels = self._reduced(factor)
            if pixels is not None:
                return self._resample(pixels, scale.square(square), size, pad, angle)
        return self._resample(self._full(), square, size, pad, angle)

    def scale(self, factor: int) -> Scale:
        """Return the reduction by a factor; 1 is the picture itself."""
        width, height = self.width // factor, self.height // factor
        _, flips_rows, flips_columns = self._turn
        left = self.width - width * factor if flips_columns else 0
        top = self.height - height * factor if flips_rows else 0
        return Scale(factor, left, top, width, height)

    def _resample(self, pixels: np.ndarray, square: Square, size: int, pad: Pad, angle: float) -> np.ndarray:
        region, place = geometry.cut(pixels, square, size, pad, angle)
        return geometry.resize(colour.to_srgb(region, self._colours), place, size, angle)

    def _full(self) -> np.ndarray:
        if 1 not in self._upright:
            self._upright[1] = turn_upright(self._decode_full(), self._orientation)
        pixels = self._upright[1]
        assert pixels is not None
        return pixels

    def _reduced(self, factor: int) -> np.ndarray | None:
        if factor not in self._upright:
            pixels = self._decode_reduced(factor) if self._decode_reduced else None
            if pixels is not None:
                scale = self.scale(factor)
                width, height = (scale.height, scale.width) if self._turn[0] else (scale.width, scale.height)
                pixels = turn_upright(pixels[:height, :width], self._orientation)
            self._upright[factor] = pixels
        return self._upright[factor]


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of stored pixels [H, W, ...] as their EXIF orientation (1 to 8) wants them to be seen."""
    transpose, flip_rows, flip_columns = UPRIGHT.get(orientation, AS_STORED)
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
