"""What all drawn parts share: colours, soft shapes, noise, light, and the canvas that they are painted on."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from mefem_cli.faces.render_person import Scene

TILE = 512  # px, side of the periodic noise tiles


def to_linear(colour: tuple) -> np.ndarray:
    """sRGB bytes -> linear light [3] in 0..1, with gamma 2 for speed."""
    return (np.asarray(colour, np.float32) / 255) ** 2


def smooth_step(low: float | np.ndarray, high: float | np.ndarray, value: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, a cubic between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def bump(x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, size_x: float, size_y: float) -> np.ndarray:
    """A bell of height 1."""
    return np.exp(-(((x - centre_x) / size_x) ** 2) - ((y - centre_y) / size_y) ** 2)


def stroke(distance: np.ndarray, half_width: float | np.ndarray, pixel: float) -> np.ndarray:
    """Coverage of an anti-aliased line by the distance to its middle."""
    return np.clip((half_width - np.abs(distance)) / pixel + 0.5, 0, 1)


def clamp(value: float, low: float, high: float) -> float:
    """`value` within bounds, as a Python float: NumPy scalars would turn whole float32 fields into float64."""
    return min(max(value, low), high)


def soft_plus(value: float) -> float:
    """A smooth max(0, value): fat under the chin appears gradually."""
    return float(np.log1p(np.exp(2.5 * value)) / 2.5)


# About a dozen kinds of 1 MiB each; making one takes 40 ms.
@lru_cache(maxsize=64)
def noise_tile(radius: float, stretch: float = 1.0) -> np.ndarray:
    """Periodic noise [TILE, TILE], mean 0 and standard deviation 1, smooth over `radius` px (`stretch` times in y)."""
    rng = np.random.default_rng([20, int(radius * 16), int(stretch * 16)])
    frequency = np.fft.fftfreq(TILE)
    envelope = np.exp(-2 * (np.pi * radius) ** 2 * (frequency[None] ** 2 + (stretch * frequency[:, None]) ** 2))
    tile = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TILE, TILE))) * envelope).real
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def noise_window(shape: tuple, rng: np.random.Generator, radius: float, stretch: float = 1.0) -> np.ndarray:
    """A window of `shape` (at most TILE) at a random place of a noise tile."""
    top, left = (int(rng.integers(0, TILE - side + 1)) for side in shape)
    return noise_tile(radius, stretch)[top : top + shape[0], left : left + shape[1]]


def smooth_large(field: np.ndarray, factor: int = 10) -> np.ndarray:
    """A wide blur by going through a small picture."""
    picture = Image.fromarray(field)
    small = picture.resize((max(2, picture.width // factor), max(2, picture.height // factor)), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC))


class Canvas:
    """The picture being painted, and the head-frame coordinates of its pixels."""

    def __init__(self, image: np.ndarray, scene: Scene):
        self.image = image  # [3, height, width], linear light
        self.pixel = 1 / scene.pixels_per_unit
        self.scene = scene
        _, height, width = image.shape
        cosine, sine = math.cos(scene.roll) * self.pixel, math.sin(scene.roll) * self.pixel
        column = (np.arange(width, dtype=np.float32) - scene.origin[0])[None]
        row = (np.arange(height, dtype=np.float32) - scene.origin[1])[:, None]
        self.x = column * cosine + row * sine
        self.y = row * cosine - column * sine
        self.x /= scene.stretch + scene.keystone * np.clip(self.y, -1, 1.3)

    def window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Rows and columns of the smallest picture rectangle that holds this head-frame rectangle."""
        scene = self.scene
        x, y = np.array([left, right, left, right]), np.array([top, top, bottom, bottom])
        x = x * (scene.stretch + scene.keystone * np.clip(y, -1, 1.3))
        column = (x * math.cos(scene.roll) - y * math.sin(scene.roll)) / self.pixel + scene.origin[0]
        row = (x * math.sin(scene.roll) + y * math.cos(scene.roll)) / self.pixel + scene.origin[1]
        _, height, width = self.image.shape
        rows = slice(int(np.clip(row.min(), 0, height)), int(np.clip(row.max() + 2, 0, height)))
        return rows, slice(int(np.clip(column.min(), 0, width)), int(np.clip(column.max() + 2, 0, width)))

    def paint(self, window: tuple, colour: np.ndarray, coverage: np.ndarray) -> None:
        """Lay `colour` ([3] or [3, h, w]) over the window with `coverage` [h, w] in 0..1."""
        target = self.image[:, window[0], window[1]]
        colour = np.asarray(colour, np.float32)
        if colour.ndim == 1:
            colour = colour[:, None, None]
        target += coverage * (colour - target)

    def darken(self, window: tuple, factor: np.ndarray) -> None:
        """Multiply the window by `factor` [h, w], a shadow."""
        self.image[:, window[0], window[1]] *= factor


def lit(scene: Scene, albedo: np.ndarray, normal: tuple, occlusion: np.ndarray | float, gloss: float) -> np.ndarray:
    """Skin or cloth of `albedo` [3, h, w] or [3, 1, 1] under the scene's light, as linear light [3, h, w].

    Light wraps round the edge of the shadow, most in the red, as it does through skin.
    """
    nx, ny, nz = normal
    facing = nx * scene.light[0] + ny * scene.light[1] + nz * scene.light[2]
    around = (0.86 - 0.2 * ny + 0.06 * nz) * occlusion
    result = np.empty((3, *facing.shape), np.float32)
    for channel, wrap in enumerate((0.30, 0.20, 0.16)):
        key = np.maximum(facing + wrap, 0) / (1 + wrap) * (0.35 + 0.65 * occlusion)
        result[channel] = albedo[channel] * (scene.key[channel] * key + scene.fill[channel] * around)
    if gloss:
        half = np.array(scene.light) + (0, 0, 1)
        half = (half / np.linalg.norm(half)).tolist()
        shine = np.maximum(nx * half[0] + ny * half[1] + nz * half[2], 0) ** 2
        shine = (shine * shine) ** 2
        shine = shine * shine * (gloss * occlusion)
        for channel in range(3):
            result[channel] += shine * scene.key[channel]
    return result


def normals(height: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit normals (x, y, z) of a height field [h, w] in units."""
    slope_y, slope_x = np.gradient(height, pixel)
    z = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    return -slope_x * z, -slope_y * z, z
