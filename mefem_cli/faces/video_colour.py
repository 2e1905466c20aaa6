"""A decoded picture of a video -> uint8 [H, W, 3], sRGB, its pixels square and the right way up.

- The matrix and range that the stream names are honoured; a stream that names none is BT.709 from 720 lines on, else
  BT.601, limited range, as players take it. BT.709 and BT.601 light counts as sRGB, as browsers show it.
- BT.2020 and P3 colours become sRGB. Of HDR (PQ, HLG), what is darker than 3/4 of the reference white of 203 nits
  (ITU-R BT.2408) keeps its light, and highlights roll off. Interlaced frames stay as they are.
- Pixels are square: anamorphic video is stretched along its coarser direction, so nothing stored is thrown away.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

# Numbers of ITU-T H.273, which FFmpeg uses
BT709, BT601, UNSPECIFIED, BT2020 = 1, 5, 2, 9
PQ, HLG, P3 = 16, 18, 12
LIMITED_RANGE, FULL_RANGE = 1, 2
SWS_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # matrix -> libswscale's number for it
POINT = 0x10  # libswscale's flags
BICUBIC_EXACT = 0x4 | 0x2000 | 0x40000 | 0x80000  # full chroma, accurate rounding, the same on every processor

TO_SRGB = {  # linear light of primaries -> of sRGB; all have white D65
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
HLG_LUMINANCE = (0.2627, 0.6780, 0.0593)  # of BT.2020 light
REFERENCE_WHITE = 203.0  # nits
HLG_PEAK = 1000.0  # nits of the display that HLG is rendered for
KNEE = 0.75  # of reference white: what is darker keeps its light


def upright_srgb(picture: av.VideoFrame, codec: Any, width: int, height: int) -> np.ndarray:
    """Return a picture as uint8 sRGB, stretched to [height, width, 3] and then turned as its display matrix says."""
    return np.ascontiguousarray(_upright(_to_srgb(picture, codec, width, height), _display_matrix(picture)))


def square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Return the size of a picture with square pixels whose stored ones have a width of `aspect` times their height."""
    if not aspect or aspect < 0:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _display_matrix(picture: av.VideoFrame) -> np.ndarray | None:
    """Return how a picture is to be turned: [3, 3], rows times (x, y, 1), with y downwards; None if not at all."""
    tiny = picture.reformat(2, 2, "gray", interpolation=POINT)  # PyAV's side data and frame hold each other alive
    data: Any = tiny.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(data, np.int32).reshape(3, 3)


def _upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Return a view of pixels [H, W, 3] turned and mirrored by a display matrix, to the nearest right angle."""
    if matrix is None:
        return pixels
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # columns become rows
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _to_srgb(picture: av.VideoFrame, codec: Any, width: int, height: int) -> np.ndarray:
    """Return a picture as uint8 [height, width, 3], sRGB."""
    transfer, primaries = codec.color_trc, codec.color_primaries
    is_hdr = transfer in (PQ, HLG)
    if is_hdr and primaries not in TO_SRGB:
        primaries = BT2020
    is_wide = primaries in TO_SRGB
    colours, white = {}, 0xFFFF
    if not picture.format.is_rgb:
        matrix = picture.colorspace
        if matrix == UNSPECIFIED:
            matrix = BT2020 if is_hdr else BT709 if picture.height >= 720 else BT601
        is_full = picture.color_range == FULL_RANGE or picture.format.name.startswith("yuvj")
        white = white if is_full else 0xFF00  # what libswscale makes of limited range in 16 bits
        colours["src_colorspace"], colours["dst_colorspace"] = SWS_MATRICES.get(matrix, BT601), BT601
        colours["src_color_range"] = FULL_RANGE if is_full else LIMITED_RANGE
        colours["dst_color_range"] = FULL_RANGE
    layout = "rgb48le" if is_wide else "rgb24"
    rgb = picture.reformat(width, height, layout, interpolation=BICUBIC_EXACT, **colours).to_ndarray()
    return _narrow(rgb, white, transfer, primaries) if is_wide else rgb


def _narrow(rgb: np.ndarray, white: int, transfer: int, primaries: int) -> np.ndarray:
    """Return uint16 [H, W, 3] of wider primaries as sRGB, uint8 [H, W, 3]; few rows at a time, for memory's sake."""
    to_light, to_srgb = _light(transfer, white), np.array(TO_SRGB[primaries], np.float32)
    narrow = np.empty(rgb.shape, np.uint8)
    for top in range(0, len(rgb), 64):
        light = to_light[rgb[top : top + 64]]
        if transfer == HLG:
            light = _hlg_to_display(light)
        light = np.maximum(light @ to_srgb.T, 0)
        if transfer in (PQ, HLG):
            light = _roll_off(light)
        narrow[top : top + 64] = np.round(255 * _srgb_signal(np.minimum(light, 1)))
    return narrow


@lru_cache(maxsize=4)
def _light(transfer: int, white: int) -> np.ndarray:
    """Return the light of each 16-bit signal, float32 [65536], 1 is reference white; for HLG the light of the scene."""
    signal = np.minimum(np.arange(1 << 16) / white, 1)
    if transfer == PQ:  # SMPTE ST 2084
        power = signal ** (32 / 2523)
        light = (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
        light *= 10_000 / REFERENCE_WHITE
    elif transfer == HLG:  # ITU-R BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _hlg_to_display(light: np.ndarray) -> np.ndarray:
    """Apply HLG's system gamma of 1.2 to light of the scene; 1 is then reference white (ITU-R BT.2100, table 5)."""
    luminance = light @ np.array(HLG_LUMINANCE, np.float32)
    return light * (HLG_PEAK / REFERENCE_WHITE) * luminance[..., None] ** np.float32(0.2)


def _roll_off(light: np.ndarray) -> np.ndarray:
    """Bring light of any strength below 1, keeping hues: the strongest channel above the knee approaches 1 slowly."""
    strongest = light.max(axis=-1, keepdims=True)
    above = np.maximum(strongest - KNEE, 0)
    rolled = KNEE + (1 - KNEE) * above / (above + 1 - KNEE)
    return light * np.where(above > 0, rolled / np.maximum(strongest, KNEE), 1)


def _srgb_signal(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
