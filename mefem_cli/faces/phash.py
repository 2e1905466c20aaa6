"""The perceptual hash of a crop: 64 bits that change little when the picture is resized, recompressed or brightened.

The definition is the usual one (N. Krawetz, "Looks Like It", 2011), as the imagehash library computes it: luma
(ITU-R 601), reduced to 32 x 32 px with Lanczos, 2-D DCT-II, the 8 x 8 lowest frequencies including the mean, one bit
each: above their median or not. Bits are in row-major order, the first one is the highest.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE, FREQUENCIES = 32, 8
# Row k: 2 cos(pi k (2 n + 1) / 64), the DCT-II as imagehash has it. The orthonormal one would weigh row and column 0
# less, and move the median.
COSINES = 2 * np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
DIGITS = 6  # coefficients are rounded, so that what is zero in theory does not depend on how a machine adds


def phash(pixels: np.ndarray) -> str:
    """Return the hash of uint8 [H, W, 3] as 16 hex digits.

    >>> phash(np.full((224, 224, 3), 128, np.uint8))
    '8000000000000000'
    """
    gray = Image.fromarray(np.ascontiguousarray(pixels)).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    spectrum = (COSINES @ np.asarray(gray, dtype=np.float64) @ COSINES.T).round(DIGITS)
    return np.packbits(spectrum > np.median(spectrum)).tobytes().hex()


def distance(first: str, second: str) -> int:
    """Return in how many of 64 bits two hashes differ; up to about 8 of them is the same picture, seen differently.

    >>> distance("8000000000000000", "8000000000000003")
    2
    """
    return (int(first, 16) ^ int(second, 16)).bit_count()
