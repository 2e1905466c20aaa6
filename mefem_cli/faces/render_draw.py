"""Draws one portrait of an imaginary person: forms as height fields, lit, textured and seen through a camera.

Everything is drawn in the head frame: the origin lies between the eyes, x points to the picture's right, y down, and
one unit is the distance from the eye line to the chin of an average adult (about 115 mm). Colours are linear light
(gamma 2, so that encoding is a square root), images are planar float32 [3, height, width] until the camera.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Skin of the ten tones, sRGB, light to dark: ordered like the Monk scale, but as skin looks in photos, not as swatches.
SKIN_TONES = (
    (243, 216, 200),
    (238, 206, 186),
    (231, 194, 168),
    (219, 179, 147),
    (202, 158, 124),
    (178, 132, 99),
    (150, 106, 77),
    (122, 84, 61),
    (95, 65, 48),
    (72, 50, 39),
)
GREY_HAIR = (0.62, 0.61, 0.59)
OUTLINE_CENTRE_Y = 0.12  # the face outline is a radius over the angle about this point of the midline
HEAD_DEPTH = 0.62
TILE = 512  # px, side of the periodic noise tiles


@dataclass(frozen=True)
class Person:
    """One imaginary person: labels, and what their face is drawn from.

    `height_cm` and `weight_kg` give `bmi` (kg/m2); `age` is in years, `skin_tone` runs from 1 (light) to 10 (dark).
    All other numbers are drawing parameters in standard units: 0 is average, 1 is one standard deviation, except
    those marked [0, 1]. The first block follows body fat, the others do not.
    """

    subject: str
    age: float
    sex: str
    skin_tone: int
    height_cm: float
    weight_kg: float

    cheek_fullness: float
    lower_face_width: float
    jaw_softness: float
    double_chin: float
    submental_fullness: float
    neck_girth: float
    eye_puffiness: float

    bone_width: float
    face_length: float
    jaw_width: float
    chin_width: float
    chin_length: float
    cheekbones: float
    neck_frame: float
    masculinity: float  # [0, 1] roughly: brow ridge, jaw and neck of the male pattern
    brow_height: float
    brow_thickness: float
    eye_size: float
    eye_spacing: float
    eye_tilt: float
    nose_width: float
    nose_length: float
    mouth_width: float
    lip_fullness: float

    wrinkle_depth: float  # [0, 1]
    sagging: float  # [0, 1]
    hair_greyness: float  # [0, 1]
    hair_recession: float  # [0, 1]
    redness: float
    freckles: float  # [0, 1]

    @property
    def bmi(self) -> float:
        """Body mass index, kg/m2."""
        return self.weight_kg / (self.height_cm / 100) ** 2


@dataclass(frozen=True)
class Scene:
    """What changes from photo to photo: pose, light, expression, hair, clothing, background and camera."""

    size: tuple[int, int]  # width, height, px
    pixels_per_unit: float
    origin: tuple[float, float]  # of the head frame, px
    yaw: float  # radians, like pitch and roll
    pitch: float
    roll: float
    stretch: float  # width over height of the head, as lens and distance change it
    keystone: float  # how much wider the picture gets per unit downwards: a camera below or above the face
    shoulder_drop: float  # units
    light: tuple[float, float, float]  # towards the key light; y is negative above the head, z points to the camera
    key: tuple[float, float, float]  # linear RGB strength of the key light
    fill: tuple[float, float, float]  # of the light from everywhere
    smile: float
    mouth_open: float
    brow_raise: float
    eye_open: float
    gaze: tuple[float, float]
    eye_colour: tuple[float, float, float]
    hair_style: str
    hair_colour: tuple[float, float, float]
    hair_volume: float
    hair_length: float
    hair_part: float
    hair_cover: float
    beard_length: float
    beard_density: float
    makeup: float
    glasses: float  # 0: none, else the frame's roundness
    neckline: str
    cloth: tuple[float, float, float]
    second_cloth: tuple[float, float, float]
    background: str
    exposure: float
    contrast: float
    white_balance: tuple[float, float, float]
    saturation: float
    blur: float  # px, used at full detail
    noise: float  # of 1
    vignette: float
    detail: float  # the picture is sampled at this share of its size, as after heavy compression
    texture_seed: int


# ---- small tools ----------------------------------------------------------------------------------------------------


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


# ---- the outline of the face ----------------------------------------------------------------------------------------


def outline(person: Person) -> np.ndarray:
    """Distance of the face's edge from its centre, over 1,024 equal angles from the x axis towards the chin.

    Bones set the upper face; fat widens the lower half and rounds the corner of the jaw.
    """
    wide = 1.05 * (1 + 0.04 * person.bone_width)
    long = 1 + 0.035 * person.face_length
    jaw = 0.033 * person.jaw_width + 0.035 * (person.masculinity - 0.5)
    chin = 0.024 * person.chin_width + 0.02 * (person.masculinity - 0.5)
    fat = 0.023 * person.lower_face_width
    cheek = 0.022 * person.cheek_fullness
    soft = 0.018 * person.jaw_softness
    sag = 0.03 * person.sagging
    bottom = long + 0.02 * person.chin_length
    points = np.array(
        [
            (0.0, bottom),
            (0.15 + chin + 0.5 * fat + 0.5 * soft, bottom - 0.035),
            (0.31 + 0.6 * jaw + 0.5 * chin + 1.1 * fat + soft + 0.6 * sag, 0.83 * long),
            (0.445 + jaw + 1.15 * fat + 0.5 * soft + sag, 0.60 * long),
            ((0.505 + 0.4 * jaw) * wide + 0.8 * fat + 0.9 * cheek, 0.36 * long),
            ((0.555 + 0.008 * person.cheekbones) * wide + 0.3 * fat + 0.5 * cheek, 0.10),
            (0.565 * wide, -0.18),
            (0.545 * wide, -0.45),
            (0.43 * wide, -0.74),
            (0.22 * wide, -0.92),
            (0.0, -0.97),
        ]
    )
    angle = np.arctan2(points[:, 1] - OUTLINE_CENTRE_Y, points[:, 0])
    radius = np.hypot(points[:, 1] - OUTLINE_CENTRE_Y, points[:, 0])
    full_angle = np.concatenate([angle, np.pi - angle[1:-1]])
    order = np.argsort(full_angle % (2 * np.pi))
    grid = np.arange(1024) * (2 * np.pi / 1024)
    table = np.interp(grid, (full_angle % (2 * np.pi))[order], np.r_[radius, radius[1:-1]][order], period=2 * np.pi)
    # A Gaussian over about five degrees rounds the corners of the polygon.
    smooth = np.exp(-2 * (np.pi * 15 * np.fft.rfftfreq(1024)) ** 2)
    return np.fft.irfft(np.fft.rfft(table) * smooth, 1024).astype(np.float32)


@dataclass
class HeadView:
    """Where a rectangle of pixels falls on the head: outline distances and face coordinates, all [h, w]."""

    window: tuple
    x: np.ndarray  # head frame, after the jaw has followed the turn
    y: np.ndarray
    angle_index: np.ndarray  # into the outline table
    rho: np.ndarray  # distance from the outline's centre
    edge: np.ndarray  # the outline's distance from its centre at this angle
    u: np.ndarray  # face coordinates: the head frame of the same face seen from straight ahead
    v: np.ndarray
    dome: np.ndarray  # height of the plain head


def crop_view(head: HeadView, window: tuple) -> HeadView:
    """The part of a view within a canvas window that lies inside its own."""
    rows, columns = (
        slice(new.start - old.start, new.stop - old.start) for new, old in zip(window, head.window, strict=True)
    )
    return HeadView(window, *(getattr(head, field.name)[rows, columns] for field in fields(head)[1:]))


def view_head(canvas: Canvas, table: np.ndarray) -> HeadView:
    """Find for every pixel about the head which point of the unturned face is seen there.

    The plain head is a dome over the outline; turning by yaw and pitch moves its points by parallax.
    """
    scene = canvas.scene
    window = canvas.window(-1.15, 1.15, -1.4, 1.45)
    x, y = canvas.x[window], canvas.y[window]
    turn, nod = math.sin(scene.yaw), math.sin(scene.pitch)
    # The chin lies far in front of the axis of the turn, so the lower outline swings with it.
    x = x - turn * 0.27 * smooth_step(0.25, 1.05, y)
    below = np.maximum(y, 0)
    y = y - nod * 0.30 * below
    offset_y = y - OUTLINE_CENTRE_Y
    rho = np.hypot(x, offset_y)
    angle_index = (np.arctan2(offset_y, x) * (1024 / (2 * np.pi))).astype(np.int32) & 1023
    edge = table[angle_index]
    inside = np.minimum(rho / edge, 1)
    squared = inside * inside
    dome = HEAD_DEPTH * np.sqrt(np.maximum(1 - squared * (0.5 + 0.5 * squared * inside), 0) + 1e-4)
    u = (x - 0.72 * dome * turn) / math.cos(scene.yaw) + turn * 0.06
    v = y - (dome - 0.25) * nod * 0.8
    return HeadView(window, x, y, angle_index, rho, edge, u, v, dome)


# ---- neck, second chin and clothes ----------------------------------------------------------------------------------


def skin_colour(person: Person) -> np.ndarray:
    """Albedo [3] of the person's skin; a tone's people differ a little in warmth and depth."""
    base = to_linear(SKIN_TONES[person.skin_tone - 1])
    warmth = np.array([0.02, -0.02, -0.03], np.float32) * person.redness
    return base * (1 + warmth)


def draw_body(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """Neck, shoulders and clothing, with the head's shadow on the neck."""
    scene = canvas.scene
    reach = 330 * canvas.pixel  # the shoulders end outside the picture
    window = canvas.window(-reach, reach, 0.4, 1.4 * reach)
    x, y = canvas.x[window] - 0.10 * math.sin(scene.yaw), canvas.y[window]
    if not x.size:
        return
    half = 0.405 + 0.06 * (person.masculinity - 0.5) + 0.032 * person.neck_frame + 0.027 * person.neck_girth
    slope = 0.55 + 0.05 * person.neck_girth
    flare = half + 0.5 * np.maximum(y - 1.08, 0) ** 1.5 * slope + 0.06 * smooth_step(0.9, 0.5, y)
    across = np.clip(np.abs(x) / flare, 0, 1)
    throat = 0.02 * bump(x, y, 0, 1.3, 0.10, 0.5) - 0.012 * bump(np.abs(x), y, 0.19, 1.35, 0.045, 0.35)
    height = 0.42 * np.sqrt(1 - across**2 + 0.004) + throat * max(0.0, 1 - 0.35 * max(0.0, person.neck_girth))
    crease = soft_plus(person.neck_girth - 0.8) * 0.012 + 0.006 * person.wrinkle_depth
    for level in (1.14, 1.25):
        height -= crease * np.exp(-(((y - level - 0.25 * x**2) / 0.02) ** 2))
    albedo = (skin_colour(person) * 0.93)[:, None, None] * (1 + 0.03 * noise_window(x.shape, rng, 9))
    shaded = lit(scene, albedo, normals(height, canvas.pixel), 1.0, 0.05)
    neck = np.zeros(canvas.x.shape, np.float32)
    neck[window] = np.clip((flare - np.abs(x)) / canvas.pixel + 0.5, 0, 1)
    canvas.paint(window, shaded, neck[window])
    shade_neck(canvas, person, head, neck[head.window])
    draw_clothes(canvas, window, x, y, half, neck[window], rng)


def shade_neck(canvas: Canvas, person: Person, head: HeadView, neck: np.ndarray) -> None:
    """The soft shadow that the head throws on the neck; a full throat leaves less room for it."""
    light = canvas.scene.light
    below = (head.rho - head.edge) / (0.17 + 0.10 * max(0.0, -light[1]))
    falloff = np.exp(-(np.maximum(below, 0) ** 1.3)) * smooth_step(0.35, 0.7, head.y)
    depth = (0.36 + 0.35 * max(0.0, -light[1])) * (1 - 0.10 * clamp(person.submental_fullness, -1, 3))
    canvas.darken(head.window, 1 - neck * falloff * np.clip(depth + 0.25 * light[0] * -head.x, 0.1, 0.75))


def draw_clothes(
    canvas: Canvas, window: tuple, x: np.ndarray, y: np.ndarray, half: float, neck: np.ndarray, rng: np.random.Generator
) -> None:
    """Shoulders in a high, round, V-shaped, collared or wide neckline.

    `half` is half the width of the throat (units), `neck` [h, w] where its skin shows.
    """
    scene = canvas.scene
    side = np.abs(x)
    top = 1.21 + scene.shoulder_drop + 0.30 * np.maximum(side - half - 0.05, 0) ** 0.9 + 0.03 * side**3
    cover = np.clip((y - top) / canvas.pixel + 0.5, 0, 1)
    wide, deep = {
        "high": (0.02, 0.02),
        "crew": (0.12, 0.26),
        "vee": (0.13, 0.75),
        "collar": (0.04, 0.5),
        "wide": (0.34, 0.38),
    }[scene.neckline]
    reach = np.clip(side / (half + wide), 0, 1)
    depth = deep * ((1 - reach) if scene.neckline in ("vee", "collar") else np.sqrt(1 - reach**2))
    rim = y - (1.19 + scene.shoulder_drop + depth)
    cover *= np.clip(rim / canvas.pixel + 0.5, 0, 1)
    folds = 0.05 * noise_window(x.shape, rng, 16, 2.0) - 0.16 * side * side
    colour = np.broadcast_to(np.asarray(scene.cloth, np.float32)[:, None, None], (3, *x.shape))
    if scene.neckline == "collar":
        lapel = smooth_step(0, 2 * canvas.pixel, 0.17 - np.abs(rim - 0.10)) * smooth_step(0.6, 0.5, side)
        colour = colour + lapel * (np.asarray(scene.second_cloth, np.float32)[:, None, None] - colour)
    elif rng.random() < 0.3:
        stripes = smooth_step(0.35, 0.65, 0.5 + 0.5 * np.sin(y * rng.uniform(20, 60) + 0.6 * x))
        colour = colour + 0.6 * stripes * (np.asarray(scene.second_cloth, np.float32)[:, None, None] - colour)
    hem = 1 - 0.35 * np.exp(-((rim / 0.035) ** 2))
    weave = 1 + 0.025 * noise_window(x.shape, rng, 0.6)
    canvas.darken(window, 1 - 0.35 * neck * np.exp(-((np.minimum(rim, 0) / 0.06) ** 2)))
    canvas.paint(window, lit(scene, colour * (hem * weave), normals(folds, canvas.pixel), 1.0, 0.0), cover)


def draw_second_chin(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """The roll of skin between jaw and throat: absent in thin people, a second outline in heavy ones."""
    scene = canvas.scene
    fullness = 0.75 * person.double_chin + 0.25 * person.submental_fullness + 0.6 * person.sagging
    depth = 0.095 * soft_plus(fullness - 0.35) + 0.25 * max(0.0, scene.pitch) * soft_plus(fullness)
    straight_down = np.cos(np.arange(1024) * (2 * np.pi / 1024) - np.pi / 2)
    drop = (depth * np.maximum(straight_down, 0) ** 5).astype(np.float32)[head.angle_index]
    rows = slice(int(head.y.shape[0] * 0.55), None)
    window = (slice(head.window[0].start + rows.start, head.window[0].stop), head.window[1])
    rho, edge, y, drop = head.rho[rows], head.edge[rows] + drop[rows], head.y[rows], drop[rows]
    inside = np.minimum(rho / edge, 1)
    height = 0.55 * np.sqrt(np.maximum(1 - inside**3, 0) + 0.01)
    albedo = (skin_colour(person) * 0.96)[:, None, None] * (1 + 0.025 * noise_window(y.shape, rng, 5))
    fold = np.exp(-(((rho - head.edge[rows]) / 0.05) ** 2)) * (0.32 + 0.09 * clamp(person.double_chin, -1, 2.5))
    shaded = lit(scene, albedo, normals(height, canvas.pixel), 0.93 - fold, 0.03)
    edge_width = canvas.pixel * (1 + 3 * clamp(person.jaw_softness, 0, 3))
    coverage = np.clip((edge - rho) / edge_width + 0.5, 0, 1) * smooth_step(0.45, 0.7, y) * smooth_step(0, 0.02, drop)
    canvas.paint(window, shaded, coverage)


def draw_ears(canvas: Canvas, person: Person, head: HeadView) -> None:
    """Two ears behind the face; the far one hides as the head turns."""
    scene = canvas.scene
    albedo = skin_colour(person) * np.array([0.95, 0.80, 0.78], np.float32)
    if scene.hair_style in ("long", "wavy", "curly"):
        return
    for side in (-1, 1):
        wide = 0.585 * (1 + 0.035 * person.bone_width)
        centre_x = side * wide * math.cos(scene.yaw) - 0.16 * math.sin(scene.yaw)
        centre_y = 0.10 - 0.25 * math.sin(scene.pitch)
        window = canvas.window(centre_x - 0.16, centre_x + 0.16, centre_y - 0.3, centre_y + 0.3)
        x, y = canvas.x[window] - centre_x, canvas.y[window] - centre_y
        x = x - side * (0.045 - 0.12 * y)
        radius = np.hypot(x / (0.085 - 0.06 * np.maximum(y, 0)), y / 0.205)
        height = 0.03 * np.sqrt(np.maximum(1 - radius**2, 0) + 0.02)
        height -= 0.035 * bump(x, y, -side * 0.01, -0.01, 0.035, 0.10)
        hollow = 1 - 0.5 * bump(x, y, -side * 0.015, 0.0, 0.03, 0.085)
        shaded = lit(scene, albedo[:, None, None], normals(height, canvas.pixel), hollow, 0.03)
        canvas.paint(window, shaded, np.clip((1 - radius) * 0.085 / canvas.pixel + 0.5, 0, 1))


# ---- the face -------------------------------------------------------------------------------------------------------


def face_height(person: Person, scene: Scene, head: HeadView) -> np.ndarray:
    """Height field [h, w] of the face: skull, soft tissue, nose, lips, folds."""
    u, v = head.u, head.v
    side = np.abs(u)
    male, thin = person.masculinity, max(0.0, -person.cheek_fullness)
    nose_u = u - 0.10 * math.sin(scene.yaw)
    nose_v = v / (1 + 0.05 * person.nose_length)
    wide = 0.92 + 0.10 * person.nose_width + 0.10 * male
    eye_u = 0.272 + 0.01 * person.eye_spacing
    smile = max(0.0, scene.smile)
    height = head.dome.copy()
    height += (0.008 + 0.026 * male) * bump(side, v, 0.22, -0.17, 0.22, 0.07)
    height -= 0.055 * bump(side, v, eye_u - 0.02, -0.02, 0.15, 0.10)
    height += 0.030 * bump(side, v, eye_u, 0.0, 0.09, 0.06)
    height -= 0.03 * bump(u, v, 0, -0.03, 0.09, 0.08)
    bridge = smooth_step(-0.14, 0.34, nose_v) * smooth_step(0.50, 0.32, nose_v)
    height += (
        (0.04 + 0.09 * bridge) * np.exp(-((nose_u / (0.068 * wide + 0.022 * bridge)) ** 2)) * smooth_step(-0.2, 0, v)
    )
    height += 0.085 * bump(nose_u, nose_v, 0, 0.345, 0.072 * wide, 0.065)
    height += 0.052 * bump(np.abs(nose_u), nose_v, 0.088 * wide, 0.37, 0.042, 0.045)
    height += (0.045 + 0.012 * person.cheekbones) * bump(side, v, 0.38, 0.14, 0.14, 0.11)
    height += (0.040 * max(-1.0, person.cheek_fullness)) * bump(side, v, 0.33, 0.44, 0.16, 0.20)
    height -= 0.028 * thin * bump(side, v, 0.36, 0.46, 0.09, 0.15)
    height += 0.045 * smile * bump(side, v, 0.30, 0.28, 0.12, 0.11)
    height += 0.03 * person.sagging * bump(side, v, 0.30, 0.78, 0.10, 0.10)
    height += 0.030 * bump(u, v, 0, 0.62, 0.22, 0.13)
    height += 0.05 * bump(u, v, 0, 0.90, 0.13 + 0.02 * person.chin_width, 0.09)
    height -= 0.028 * bump(u, v, 0, 0.77, 0.14, 0.035)
    height -= 0.010 * bump(u, v, 0, 0.50, 0.018, 0.05)
    # The fold from the nose to the corner of the mouth: deeper with age, fat and smiles.
    fold_u = 0.125 * wide + 0.40 * (v - 0.35) + 0.02 * smile
    fold = 0.010 + 0.016 * person.wrinkle_depth + 0.014 * smile + 0.004 * max(0.0, person.cheek_fullness)
    window = smooth_step(0.30, 0.40, v) * smooth_step(0.74, 0.60, v)
    across = (side - fold_u) / 0.028
    height -= fold * window * np.exp(-across * across)
    height += 0.9 * fold * window * np.exp(-(((side - fold_u - 0.06) / 0.05) ** 2))
    # Bags under the eyes.
    bag = 0.006 * max(0.0, person.eye_puffiness) + 0.010 * person.wrinkle_depth
    height += bag * bump(side, v, eye_u - 0.01, 0.105, 0.10, 0.03) - bag * bump(
        side, v, eye_u - 0.02, 0.15, 0.10, 0.016
    )
    return height


def wrinkle_height(person: Person, scene: Scene, head: HeadView, rng: np.random.Generator) -> np.ndarray:
    """Forehead lines, frown lines, crow's feet and lines beside the mouth, as a (negative) height field."""
    u, v = head.u, head.v
    side = np.abs(u)
    depth = 0.0105 * max(0.0, person.wrinkle_depth - 0.12)
    if depth == 0:
        return np.zeros_like(u)
    phase = rng.uniform(0, 6)
    arch = v + 0.05 * np.cos(u * 5.5 + 0.3 * math.sin(phase)) + 0.008 * np.sin(u * 17 + phase)
    brows = smooth_step(-0.27, -0.36, v) * smooth_step(-0.66, -0.54, v) * smooth_step(0.46, 0.25, side)
    ripple = np.maximum(np.cos(arch * (2 * np.pi / 0.088)), 0)
    ripple *= ripple
    lines = ripple * ripple * ripple * brows * (0.7 + 0.6 * max(0.0, scene.brow_raise))
    lines += 0.8 * bump(side, v, 0.05, -0.13, 0.012, 0.06)
    from_corner_u, from_corner_v = side - 0.40, v - 0.0
    fan = np.arctan2(from_corner_v, np.maximum(from_corner_u, 0.01))
    rays = np.maximum(np.cos(fan * 11 + phase), 0)
    rays *= rays
    feet = rays * rays * bump(side, v, 0.47, 0.02, 0.055, 0.10)
    lines += feet * (0.6 + 0.6 * max(0.0, scene.smile))
    marionette = np.exp(-(((side - 0.235 - 0.12 * (v - 0.7)) / 0.016) ** 2)) * smooth_step(0.64, 0.7, v)
    lines += 1.2 * marionette * smooth_step(0.88, 0.76, v)
    return -depth * lines


def face_albedo(person: Person, scene: Scene, head: HeadView, rng: np.random.Generator) -> np.ndarray:
    """Skin colour [3, h, w]: blotches, blush, pores, dark circles, freckles, shaven shadow."""
    u, v = head.u, head.v
    side = np.abs(u)
    shape = u.shape
    light_skin = 1 - (person.skin_tone - 1) / 12
    red = 0.5 * bump(side, v, 0.34, 0.28, 0.16, 0.13) + 0.5 * bump(u, v, 0, 0.36, 0.10, 0.09)
    red += 0.25 * bump(u, v, 0, 0.92, 0.14, 0.09) - 0.2 * bump(side, v, 0.27, -0.06, 0.15, 0.08)
    red = red * (0.5 + 0.25 * person.redness + 0.3 * scene.makeup) + 0.10 * noise_window(shape, rng, 11)
    red *= 0.55 + 0.45 * light_skin
    circles = bump(side, v, 0.255, 0.105, 0.11, 0.045) * (0.10 + 0.16 * person.wrinkle_depth)
    grain = 0.025 * noise_window(shape, rng, 6) + 0.014 * noise_window(shape, rng, 0.8)
    spots = np.maximum(noise_window(shape, rng, 1.1) - 1.7, 0) * bump(side, v, 0.22, 0.22, 0.3, 0.25)
    dark = 1 + grain - circles - spots * 0.5 * person.freckles
    dark -= np.maximum(noise_window(shape, rng, 2.6) - 2.3, 0) * 0.5 * person.wrinkle_depth
    base = skin_colour(person)
    albedo = np.empty((3, *shape), np.float32)
    for channel, strength in enumerate((0.10, -0.28, -0.26)):
        albedo[channel] = base[channel] * dark * (1 + strength * red)
    return albedo


def nose_shadow(scene: Scene, head: HeadView, person: Person) -> np.ndarray:
    """What the nose keeps from the light: a factor [h, w]."""
    u, v = head.u, head.v
    nose_u = u - 0.10 * math.sin(scene.yaw)
    nose_v = v / (1 + 0.05 * person.nose_length)
    away = -math.copysign(1, scene.light[0])
    sideways = abs(scene.light[0])
    shadow = 0.55 * sideways * bump(nose_u, nose_v, away * 0.115, 0.30, 0.055, 0.13)
    shadow += 0.35 * max(0.0, -scene.light[1] + 0.2) * bump(nose_u, nose_v, away * 0.06 * sideways, 0.45, 0.10, 0.035)
    shadow += 0.36 * sideways * bump(u, v, away * 0.10, -0.03, 0.05, 0.08)
    return 1 - np.minimum(shadow, 0.6)


def draw_face(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """Lit skin within the outline, then the features on it."""
    scene = canvas.scene
    head = crop_view(head, canvas.window(-0.92, 0.92, -1.06, 1.32))
    height = face_height(person, scene, head) + wrinkle_height(person, scene, head, rng)
    height += 0.0006 * noise_window(height.shape, rng, 0.9)
    form = normals(height, canvas.pixel)
    hollow = np.clip(1 + 5.5 * np.minimum(height - smooth_large(height, 9), 0.004), 0.45, 1)
    albedo = face_albedo(person, scene, head, rng)
    shade_beard_area(albedo, scene, head, rng)
    shaded = lit(scene, albedo, form, hollow, 0.10 + 0.02 * max(0.0, person.redness))
    shaded *= nose_shadow(scene, head, person)
    # The jaw line of a heavy face melts into the throat.
    below = smooth_step(0.5, 0.85, head.y)
    edge_width = canvas.pixel * (1.2 + below * (1.5 + 3.5 * clamp(person.jaw_softness, -0.3, 3)))
    canvas.paint(head.window, shaded, np.clip((head.edge - head.rho) / edge_width + 0.5, 0, 1))
    draw_nostrils(canvas, person, head)
    draw_mouth(canvas, person, head, rng)
    for side in (-1, 1):
        draw_eye(canvas, person, head, side)
        draw_brow(canvas, person, head, side, rng)


def part_of(head: HeadView, canvas: Canvas, left: float, right: float, top: float, bottom: float) -> tuple:
    """The canvas window, u and v of the pixels about a rectangle of the face."""
    scene = canvas.scene
    move_x, move_y = 0.72 * 0.55 * math.sin(scene.yaw), 0.30 * math.sin(scene.pitch)
    window = canvas.window(left + move_x - 0.08, right + move_x + 0.08, top + move_y - 0.1, bottom + move_y + 0.1)
    part = crop_view(head, window)
    return window, part.u, part.v


def draw_nostrils(canvas: Canvas, person: Person, head: HeadView) -> None:
    """Two dark openings, seen more from below."""
    wide = 1 + 0.10 * person.nose_width
    base = 0.402 * (1 + 0.05 * person.nose_length)
    window, u, v = part_of(head, canvas, -0.2, 0.2, 0.25, 0.5)
    nose_u = u - 0.10 * math.sin(canvas.scene.yaw)
    opening = bump(np.abs(nose_u), v - 0.25 * np.abs(nose_u), 0.050 * wide, base - 0.012, 0.030 * wide, 0.0155)
    crease = bump(np.abs(nose_u), v, 0.128 * wide, base - 0.035, 0.014, 0.040)
    under = bump(nose_u, v, 0, base + 0.012, 0.07 * wide, 0.016)
    canvas.darken(window, 1 - np.minimum(0.82 * opening + 0.30 * crease + 0.22 * under, 0.85))


def draw_mouth(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """Lips, the line between them, and teeth when they part."""
    scene = canvas.scene
    pixel = canvas.pixel
    window, u, v = part_of(head, canvas, -0.36, 0.36, 0.45, 0.85)
    half = 0.205 + 0.012 * person.mouth_width + 0.035 * scene.smile
    s = np.clip(u / half, -1, 1)
    bow = 1 - s * s
    middle = 0.625 - 0.045 * scene.smile * (s * s) + 0.012 * scene.smile
    gap = 0.030 * scene.mouth_open * np.sqrt(bow)
    full = clamp(
        1.1 - 0.2 * person.masculinity + 0.20 * person.lip_fullness - 0.25 * person.wrinkle_depth - 0.12 * scene.smile,
        0.35,
        1.8,
    )
    upper_line = middle - gap - 0.006 * np.exp(-((s / 0.25) ** 2))
    lower_line = middle + 1.4 * gap
    upper_edge = upper_line - full * 0.056 * bow**0.8 * (1 - 0.22 * np.exp(-((s / 0.16) ** 2)))
    lower_edge = lower_line + full * 0.074 * bow**0.75
    soft = 1.8 * pixel
    inside = np.clip((half - np.abs(u)) / pixel, 0, 1)
    upper = smooth_step(0, soft, v - upper_edge) * smooth_step(soft, 0, v - upper_line) * inside
    lower = smooth_step(0, soft, v - lower_line) * smooth_step(soft, 0, v - lower_edge) * inside
    target = canvas.image[:, window[0], window[1]]
    paint_strength = 0.75 + 0.25 * scene.makeup
    tint = np.array([0.96 - 0.10 * scene.makeup, 0.54 - 0.22 * scene.makeup, 0.57 - 0.18 * scene.makeup], np.float32)
    down = np.clip((v - lower_line) / np.maximum(lower_edge - lower_line, 0.01), 0, 1)
    shine = 0.10 * np.exp(-(((down - 0.42) / 0.2) ** 2)) * np.exp(-((s / 0.45) ** 2)) * lower * (0.4 + scene.makeup)
    rise = np.clip((upper_line - v) / np.maximum(upper_line - upper_edge, 0.01), 0, 1)
    lip_form = upper * (0.80 + 0.12 * rise) + lower * (0.98 + 0.14 * np.sin(np.pi * down) - 0.18 * down)
    lip_form *= 1 + 0.05 * noise_window(u.shape, rng, 0.7, 2.5)
    lips = upper + lower
    for channel in range(3):
        colour = target[channel] * tint[channel] * lip_form + shine * scene.key[channel]
        target[channel] += paint_strength * lips * (colour / np.maximum(lips, 1e-3) - target[channel])
    canvas.darken(window, 1 - 0.28 * np.exp(-(((v - lower_edge - 0.025) / 0.022) ** 2)) * bow * inside)
    if scene.mouth_open > 0.05:
        draw_teeth(canvas, window, u, v, upper_line, lower_line, inside)
    line = stroke(v - upper_line, 0.006 + 0.004 * bow, 2 * pixel) * inside
    corner = bump(np.abs(u), v, half, 0.625 - 0.033 * scene.smile, 0.022, 0.018)
    canvas.darken(window, (1 - 0.62 * line) * (1 - 0.35 * corner))


def draw_teeth(
    canvas: Canvas,
    window: tuple,
    u: np.ndarray,
    v: np.ndarray,
    upper_line: np.ndarray,
    lower_line: np.ndarray,
    inside: np.ndarray,
) -> None:
    """The open mouth: dark inside, upper teeth in shadow towards the corners."""
    scene, pixel = canvas.scene, canvas.pixel
    opening = smooth_step(-pixel, pixel, v - upper_line) * smooth_step(pixel, -pixel, v - lower_line) * inside
    light = np.asarray(scene.key) * 0.5 + np.asarray(scene.fill) * 0.6
    canvas.paint(window, np.array([0.10, 0.025, 0.02]) * light, opening)
    bottom = upper_line + 0.055 - 0.25 * u * u
    teeth = opening * smooth_step(pixel, -pixel, v - bottom)
    seams = 1 - 0.16 * np.exp(-(((np.abs(u) % 0.047) - 0.0235) ** 2) / 0.005**2 * 0.5)
    tone = (0.80 - 2.6 * u * u) * seams
    colour = np.array([0.84, 0.77, 0.64], np.float32)[:, None, None] * light[:, None, None].astype(np.float32)
    canvas.paint(window, colour * np.clip(tone, 0.15, 1), 0.92 * teeth)


def draw_eye(canvas: Canvas, person: Person, head: HeadView, side: int) -> None:
    """One eye: eyeball with iris, pupil and catchlight between two lids with lashes and a crease."""
    scene, pixel = canvas.scene, canvas.pixel
    centre = side * (0.272 + 0.010 * person.eye_spacing)
    window, u, v = part_of(head, canvas, centre - 0.2, centre + 0.2, -0.16, 0.14)
    half = 0.134 * (1 + 0.03 * person.eye_size)
    narrow = 1 - 0.06 * clamp(person.eye_puffiness, -1.5, 3) - 0.12 * person.sagging - 0.16 * max(0.0, scene.smile)
    opened = clamp(scene.eye_open * narrow * (1 + 0.05 * person.eye_size), 0.0, 1.35)
    s_raw = (u - centre) / half * side  # -1 at the inner corner, 1 at the outer
    s = np.clip(s_raw, -1, 1)
    t = v + (0.010 + 0.008 * person.eye_tilt) * s - 0.004
    arc = 1 - s * s
    upper = -0.058 * opened * arc**0.72 * (1 + 0.16 * -s)
    lower = 0.036 * (0.45 + 0.55 * opened) * arc**0.85 * (1 + 0.18 * s)
    soft = 1.2 * pixel
    opening = smooth_step(-soft, soft, t - upper) * smooth_step(-soft, soft, lower - t) * (np.abs(s_raw) < 1)
    light = np.asarray(scene.key, np.float32) * 0.55 + np.asarray(scene.fill, np.float32) * 0.75
    iris_u, iris_v = centre + 0.03 * scene.gaze[0], -0.008 + 0.015 * scene.gaze[1]
    radius = np.hypot(u - iris_u, t - iris_v)
    lid_shadow = 1 - 0.50 * np.exp(-(np.maximum(t - upper, 0) / 0.020))
    ball = (0.80 - 0.30 * s * s) * lid_shadow
    pink = np.array([1, 0.90, 0.87], np.float32)
    eye = (ball * 0.86)[None] * pink[:, None, None]
    iris_radius = 0.057
    iris = np.clip((iris_radius - radius) / (1.5 * pixel) + 0.5, 0, 1)
    spokes = 0.85 + 0.15 * np.sin(np.arctan2(t - iris_v, u - iris_u) * 23)
    ring = (0.60 + 0.55 * smooth_step(iris_radius, 0.028, radius)) * spokes * (0.65 + 0.35 * lid_shadow)
    eye += iris * (np.asarray(scene.eye_colour, np.float32)[:, None, None] * ring - eye)
    eye *= 1 - 0.96 * np.clip((0.0225 - radius) / (1.5 * pixel) + 0.5, 0, 1)
    spark_u, spark_v = iris_u + 0.022 * scene.light[0], iris_v + 0.024 * min(scene.light[1], -0.4)
    spark = np.clip((0.0115 - np.hypot(u - spark_u, t - spark_v)) / (1.5 * pixel) + 0.5, 0, 1)
    eye = eye * light[:, None, None] + 0.8 * spark * np.asarray(scene.key, np.float32)[:, None, None]
    draw_lids(canvas, person, window, s_raw, t, upper, lower, opened)
    canvas.paint(window, eye, opening)
    lash = np.abs(s_raw) < 1.06
    strength = 0.62 + 0.28 * scene.makeup + 0.06 * (1 - person.masculinity)
    thick = (0.007 + 0.009 * scene.makeup + 0.004 * (1 - person.masculinity)) * (0.55 + 0.45 * smooth_step(-1, 0.6, s))
    line = stroke(t - upper + 0.25 * thick, thick, 1.5 * pixel) * lash
    low = stroke(t - lower, 0.004, 1.5 * pixel) * lash * smooth_step(-0.8, 0.5, s)
    canvas.darken(window, (1 - strength * line) * (1 - (0.22 + 0.25 * scene.makeup) * low))


def draw_lids(canvas: Canvas, person: Person, window, s, t, upper, lower, opened) -> None:
    """Skin about the eye: the crease above the upper lid and the soft edge of the lower one."""
    scene, pixel = canvas.scene, canvas.pixel
    within = smooth_step(1.25, 0.85, np.abs(s))
    lift = 0.030 + 0.010 * (1.2 - opened) - 0.004 * clamp(person.eye_puffiness, -1, 2)
    crease = stroke(t - upper + lift + 0.006 * s, 0.0055, 2.5 * pixel) * within
    lid = smooth_step(0, -0.02, t - upper) * smooth_step(-lift - 0.01, -lift + 0.01, t - upper) * within
    under = np.exp(-(((t - lower - 0.022) / 0.012) ** 2)) * within
    inner = np.exp(-(((s + 1.08) / 0.28) ** 2) - ((t - 0.005) / 0.035) ** 2)
    shade = (1 - 0.36 * crease) * (1 - (0.06 + 0.55 * scene.makeup * (1 - person.masculinity)) * lid)
    canvas.darken(window, shade * (1 - (0.08 + 0.10 * person.wrinkle_depth) * under) * (1 - 0.28 * inner))


def draw_brow(canvas: Canvas, person: Person, head: HeadView, side: int, rng: np.random.Generator) -> None:
    """One eyebrow of short hairs that lean outwards."""
    scene = canvas.scene
    centre = side * (0.285 + 0.010 * person.eye_spacing)
    window, u, v = part_of(head, canvas, centre - 0.24, centre + 0.24, -0.36, -0.04)
    s = (u - centre) * side / 0.185
    level = -0.185 - 0.010 * person.brow_height + 0.018 * person.masculinity - 0.035 * scene.brow_raise
    arch = level - 0.030 * (1 - 0.4 * person.masculinity) * (1 - (s - 0.25) ** 2) + 0.012 * s
    thick = 0.024 + 0.0045 * person.brow_thickness + 0.012 * person.masculinity
    thick = thick * np.clip(1.02 - 0.55 * np.maximum(s, -0.3) ** 2 - 0.30 * np.maximum(s, 0), 0.1, 1.1)
    hairs = noise_window(u.shape, rng, 0.75, 2.2)
    distance = np.abs(v - arch) - thick * (0.96 + 0.10 * hairs)
    cover = smooth_step(1.6 * canvas.pixel, -1.9 * canvas.pixel, distance) * smooth_step(1.08, 0.9, np.abs(s))
    colour = 0.65 * np.asarray(scene.hair_colour) * (np.asarray(scene.key) * 0.5 + np.asarray(scene.fill) * 0.6)
    cover = cover * np.clip(0.76 + 0.12 * hairs, 0, 0.95) * (0.80 - 0.20 * (person.hair_greyness > 0.6))
    canvas.paint(window, colour, cover)


# ---- hair, beard, glasses -------------------------------------------------------------------------------------------


def shade_beard_area(albedo: np.ndarray, scene: Scene, head: HeadView, rng: np.random.Generator) -> None:
    """Darken the shaved or bearded skin in place; longer beards also cover it with hairs."""
    if scene.beard_density <= 0:
        return
    u, v = head.u, head.v
    side = np.abs(u)
    jaw = smooth_step(0.40, 0.62, v - 0.25 * np.maximum(0.45 - side, 0) + 0.35 * np.maximum(side - 0.42, 0))
    moustache = 1.4 * bump(u, v, 0, 0.52, 0.25, 0.05) + bump(side, v, 0.27, 0.64, 0.05, 0.12)
    area = np.clip(np.maximum(jaw, moustache), 0, 1)
    area *= 1 - 0.9 * bump(u, v, 0, 0.635, 0.20, 0.055)
    hairs = noise_window(u.shape, rng, 0.7, 1.8)
    cover = np.clip(area * (scene.beard_density * (1 + 0.16 * hairs)), 0, 0.96)
    cover = np.where(scene.beard_length > 0.3, np.clip(cover * (1 + 0.5 * scene.beard_length), 0, 0.97), cover)
    tone = 0.9 + 0.25 * np.clip(hairs, -1.5, 1.5) * min(1.0, 0.4 + scene.beard_length)
    for channel in range(3):
        albedo[channel] += cover * (scene.hair_colour[channel] * tone - albedo[channel])


def hair_colour_field(
    scene: Scene, along: np.ndarray, across: np.ndarray, form: tuple, curly: float, rng
) -> np.ndarray:
    """Lit hair [3, h, w] from strand coordinates: `across` counts strands, `along` runs down them (units)."""
    strands = noise_tile(1.4)
    shift = int(rng.integers(0, TILE))
    wave = (0.03 + 0.05 * curly) * np.sin(along * 9 + shift)
    column = ((across + wave) * 150 + shift).astype(np.int32) & (TILE - 1)
    row = (along * (14 + 90 * curly) + shift).astype(np.int32) & (TILE - 1)
    texture = strands[row, column]
    nx, ny, nz = form
    facing = np.maximum(nx * scene.light[0] + ny * scene.light[1] + nz * scene.light[2] + 0.35, 0) / 1.35
    band = np.exp(-(((ny + 0.62 - 0.10 * texture) / 0.20) ** 2)) * (0.16 - 0.10 * curly)
    tone = np.clip(0.82 + 0.30 * texture, 0.2, 1.7)
    result = np.empty((3, *facing.shape), np.float32)
    for channel in range(3):
        light = scene.key[channel] * facing + scene.fill[channel] * (0.75 - 0.15 * ny)
        shine = band * tone * scene.key[channel] * (0.35 + scene.hair_colour[channel])
        result[channel] = scene.hair_colour[channel] * tone * light + 0.5 * shine
    return result


def draw_back_hair(canvas: Canvas, rng: np.random.Generator) -> None:
    """Long hair behind neck and shoulders."""
    scene = canvas.scene
    if scene.hair_style not in ("long", "wavy"):
        return
    bottom = scene.hair_length
    window = canvas.window(-1.2, 1.2, -0.9, bottom + 0.2)
    x, y = canvas.x[window], canvas.y[window]
    wavy = float(scene.hair_style == "wavy")
    half = 0.70 + 0.10 * scene.hair_volume + 0.10 * smooth_step(0, 1.2, y) + 0.035 * wavy * np.sin(y * 11)
    half = half * np.sqrt(np.clip(1 - np.minimum(y + 0.1, 0) ** 2 / 1.05, 0.02, 1))
    ragged = 0.05 * noise_window(x.shape, rng, 2.5, 4.0)
    cover = np.clip((half + 0.4 * ragged - np.abs(x)) / (2 * canvas.pixel) + 0.5, 0, 1)
    cover *= smooth_step(bottom + 0.08, bottom - 0.08, y + ragged - 0.15 * np.abs(x))
    across = np.clip(x / half, -0.98, 0.98)
    form = (across * 0.8, np.full_like(x, -0.1), np.sqrt(1 - 0.64 * across**2))
    colour = hair_colour_field(scene, y, x + 0.05 * np.sin(3 * y), form, 0.35 * wavy, rng)
    colour *= 0.55 + 0.45 * np.abs(across)  # the neck's surroundings lie in shadow
    canvas.paint(window, colour, cover)


def hair_reach(person: Person, scene: Scene) -> tuple[float, float]:
    """How far hair stands off the skull at the top and at the sides (units)."""
    top, sides = {
        "bald": (0.0, 0.0),
        "buzz": (0.025, 0.012),
        "short": (0.10, 0.04),
        "fringe": (0.12, 0.07),
        "tied": (0.06, 0.02),
        "long": (0.11, 0.10),
        "wavy": (0.15, 0.14),
        "curly": (0.24, 0.20),
    }[scene.hair_style]
    return top * (0.75 + 0.5 * scene.hair_volume), sides * (0.75 + 0.5 * scene.hair_volume)


def hairline(person: Person, scene: Scene, u: np.ndarray) -> np.ndarray:
    """Height v at which the hair begins, with receding temples, a fringe or the sweep of a parting."""
    side = np.abs(u)
    line = -0.62 + 2.2 * np.maximum(side - 0.20, 0) ** 1.8
    line -= 0.30 * person.hair_recession * (0.5 + np.exp(-(((side - 0.30) / 0.13) ** 2)))
    if scene.hair_style == "fringe":
        return np.maximum(line, -0.30 - 0.10 * scene.hair_part * u + 0.10 * side)
    if scene.hair_style in ("short", "long", "wavy"):
        sweep = (u - 0.35 * scene.hair_part) * math.copysign(1, scene.hair_part)
        line += 0.10 * np.maximum(-sweep, 0) - 0.05 * np.exp(-((sweep / 0.10) ** 2))
    return line


def draw_front_hair(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """The cap of hair from the hairline up, with fringe, parting, receding temples and side curtains."""
    scene = canvas.scene
    if scene.hair_style == "bald":
        return
    top, sides = hair_reach(person, scene)
    u, v, x, y = head.u, head.v, head.x, head.y
    upward = np.clip(-(y - OUTLINE_CENTRE_Y) / np.maximum(head.rho, 0.1), 0, 1)
    reach = head.edge + sides + (top - sides) * upward**1.5
    curly = float(scene.hair_style == "curly") + 0.35 * float(scene.hair_style == "wavy")
    ragged = noise_window(u.shape, rng, 2.2 + 2 * curly) * (0.008 + 0.03 * curly)
    outside = np.clip((reach + ragged - head.rho) / (1.8 * canvas.pixel) + 0.5, 0, 1)
    side = np.abs(u)
    line = hairline(person, scene, u)
    strands = noise_window(u.shape, rng, 1.0, 3.0)
    depth = line + 0.020 * strands - v
    front = smooth_step(-0.025, 0.05, depth)
    if scene.hair_style in ("long", "wavy", "curly", "fringe"):
        end = scene.hair_length if scene.hair_style in ("long", "wavy") else 0.05 + 0.45 * scene.hair_cover
        inner = 0.63 - 0.13 * scene.hair_cover + 0.06 * np.clip(y, 0, 1) - 0.4 * np.clip(-0.1 - y, 0, 0.6)
        inner = inner + 0.03 * np.sin(y * 7 + scene.hair_part) * (curly > 0)
        curtain = smooth_step(-0.012, 0.012, side + 0.010 * strands - inner)
        front = np.maximum(front, curtain * smooth_step(end + 0.05, end - 0.08, y))
    else:  # sideburns end beside the ear
        burns = smooth_step(-0.02, 0.02, side - 0.535) * smooth_step(0.12, 0.0, v)
        front = np.maximum(front, burns)
        outside = outside * smooth_step(0.16, 0.06, y)
    cover = outside * front
    if scene.hair_style == "buzz":
        cover = cover * 0.80
    inside = np.minimum(head.rho / reach, 1)
    shell = np.sqrt(np.maximum(1 - inside**2.6, 0) + 0.05) * 0.6
    if curly:
        shell = shell + 0.012 * curly * noise_window(u.shape, rng, 3.0)
    part_x = 0.35 * scene.hair_part
    across = np.arctan2(x - part_x * 0.6, np.maximum(y + 1.25, 0.05)) * 1.1
    colour = hair_colour_field(scene, head.rho, across, normals(shell, canvas.pixel), curly, rng)
    shadow = smooth_step(-0.12, 0.0, depth) * (1 - cover) * outside
    canvas.darken(head.window, 1 - 0.32 * shadow * (head.rho < head.edge))
    canvas.paint(head.window, colour, cover)


def draw_glasses(canvas: Canvas, person: Person, head: HeadView, rng: np.random.Generator) -> None:
    """Rims, a bridge, temples and a faint reflection."""
    scene = canvas.scene
    if scene.glasses <= 0:
        return
    window, u, v = part_of(head, canvas, -0.62, 0.62, -0.3, 0.3)
    u = u - 0.03 * math.sin(scene.yaw)
    side = np.abs(u)
    centre = 0.285 + 0.010 * person.eye_spacing
    power = 2 + 4 * (1 - scene.glasses)
    wide, tall = rng.uniform(0.19, 0.225), rng.uniform(0.135, 0.18)
    inside = (np.abs((side - centre) / wide) ** power + np.abs((v - 0.02) / tall) ** power) ** (1 / power)
    distance = (inside - 1) * 0.5 * (wide + tall)
    thin = rng.uniform(0.009, 0.022)
    rim = stroke(distance, thin, canvas.pixel)
    bridge = stroke(v + 0.03 + 0.3 * u * u, thin, canvas.pixel) * (side < centre - wide + 0.01)
    temple = (
        stroke(v + 0.04, thin, canvas.pixel) * smooth_step(centre + wide - 0.01, centre + wide, side) * (side < 0.56)
    )
    frame = np.maximum(np.maximum(rim, bridge), temple)
    canvas.darken(window, 1 - 0.20 * np.exp(-(((distance - 0.02) / 0.03) ** 2)) * (1 - frame))
    glare = (
        0.07
        * smooth_step(0.02, -0.02, distance)
        * smooth_step(0.10, -0.16, v + 0.3 * u * math.copysign(1, scene.light[0]))
    )
    canvas.image[:, window[0], window[1]] += glare * np.asarray(scene.key, np.float32)[:, None, None]
    colour = np.asarray(
        [(0.01, 0.01, 0.012), (0.08, 0.03, 0.012), (0.30, 0.24, 0.12), (0.20, 0.02, 0.03)][rng.integers(4)]
    )
    canvas.paint(window, colour * (0.5 + 0.6 * np.asarray(scene.fill)), 0.94 * frame)


# ---- background and camera ------------------------------------------------------------------------------------------


def draw_background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A studio wall, a room, a street or a garden, out of focus: linear light [3, height, width]."""
    small = Image.new("RGB", (72, 72))
    {"studio": paint_studio, "room": paint_room, "street": paint_street, "garden": paint_garden}[scene.background](
        small, rng
    )
    if scene.background != "studio":
        small = small.filter(ImageFilter.GaussianBlur(rng.uniform(1.4, 3.2)))
    pixels = np.asarray(small.resize(scene.size, Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    image = pixels * pixels
    image *= 1 + 0.008 * noise_window(image.shape[1:], rng, 1.5)
    return np.ascontiguousarray(image * np.float32(rng.uniform(0.7, 1.15)))


def random_colour(rng: np.random.Generator, low: float = 30, high: float = 225, grey: float = 0.5) -> tuple:
    """A random colour, `grey` of the way to its own brightness."""
    colour = rng.uniform(low, high, 3)
    return tuple(int(c) for c in colour + np.sqrt(grey) * (colour.mean() - colour))


def paint_studio(picture: Image.Image, rng: np.random.Generator) -> None:
    """A plain wall with a fall of light."""
    y, x = np.mgrid[0:72, 0:72] / 71
    tilt, spot = rng.uniform(-0.35, 0.35, 2), rng.uniform(0.2, 0.8, 2)
    tone = 0.85 + tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5)
    tone += rng.uniform(0, 0.35) * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 0.15)
    tone = tone + 0.03 * noise_tile(5)[:72, :72]
    colour = np.array(random_colour(rng, 40, 235, 0.6))
    picture.paste(Image.fromarray(np.clip(tone[..., None] * colour, 0, 255).astype(np.uint8)))


def paint_room(picture: Image.Image, rng: np.random.Generator) -> None:
    """A wall with a window or door, pictures, shelves and furniture."""
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 72, 72), fill=random_colour(rng, 90, 230, 0.7))
    draw.rectangle((0, int(rng.integers(50, 72)), 72, 72), fill=random_colour(rng, 40, 150, 0.6))
    if rng.random() < 0.5:
        left, top = int(rng.integers(-10, 60)), int(rng.integers(-12, 16))
        pane = random_colour(rng, 165, 240, 0.8)
        for column in range(2):
            x = left + column * 13
            draw.rectangle((x, top, x + 11, top + 36), fill=pane, outline=random_colour(rng, 150, 245, 0.9))
    if rng.random() < 0.5:
        left = int(rng.integers(-10, 50))
        for shelf in range(4):
            draw.line(
                (left, 12 + 15 * shelf, left + 34, 12 + 15 * shelf), fill=random_colour(rng, 40, 110, 0.5), width=2
            )
            x = left
            while x < left + 32:
                wide, tall = int(rng.integers(2, 5)), int(rng.integers(6, 12))
                draw.rectangle(
                    (x, 11 + 15 * shelf - tall, x + wide, 11 + 15 * shelf), fill=random_colour(rng, 20, 220, 0.3)
                )
                x += wide + int(rng.integers(0, 3))
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.integers(0, 60, 2).tolist()
        wide, tall = rng.integers(5, 22, 2).tolist()
        draw.rectangle((x, y, x + wide, y + tall), fill=random_colour(rng, 25, 230, 0.4))


def paint_street(picture: Image.Image, rng: np.random.Generator) -> None:
    """Sky, house fronts with windows, and the road."""
    draw = ImageDraw.Draw(picture)
    sky = rng.uniform(150, 250)
    draw.rectangle((0, 0, 72, 72), fill=(int(sky * 0.88), int(sky * 0.95), int(min(sky * 1.05, 255))))
    x = int(rng.integers(-12, 0))
    while x < 72:
        wide, top = int(rng.integers(12, 30)), int(rng.integers(-5, 40))
        wall = np.array(random_colour(rng, 60, 200, 0.65))
        draw.rectangle((x, top, x + wide, 72), fill=tuple(int(c) for c in wall))
        for row in range(top + 4, 62, 8):
            for column in range(x + 3, x + wide - 3, 6):
                draw.rectangle(
                    (column, row, column + 2, row + 4), fill=tuple(int(c * rng.uniform(0.35, 0.9)) for c in wall)
                )
        x += wide
    draw.rectangle((0, int(rng.integers(56, 70)), 72, 72), fill=random_colour(rng, 60, 140, 0.9))


def paint_garden(picture: Image.Image, rng: np.random.Generator) -> None:
    """Leaves and discs of light."""
    draw = ImageDraw.Draw(picture)
    base = np.array([rng.uniform(60, 120), rng.uniform(85, 135), rng.uniform(50, 90)])
    draw.rectangle((0, 0, 72, 72), fill=tuple(int(c) for c in base))
    for _ in range(int(rng.integers(50, 110))):
        x, y = rng.uniform(-6, 76, 2)
        radius = rng.uniform(1, 8)
        colour = base * rng.uniform(0.45, 1.5) * (rng.uniform(0.85, 1.2), 1.0, rng.uniform(0.8, 1.2))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(min(c, 250)) for c in colour))


@lru_cache(maxsize=8)
def lens_falloff(width: int, height: int) -> np.ndarray:
    """Squared distance from the middle of the picture, 1 in the corners: [height, width]."""
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    return (x[None] ** 2 + y[:, None] ** 2) / 2


def photograph(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What the camera makes of linear light [3, height, width]: uint8 [height, width, 3]."""
    width, height = scene.size
    grey = image.mean(0)
    falloff = 1 - scene.vignette * lens_falloff(width, height)
    output = np.empty((height, width, 3), np.uint8)
    noise = scene.noise * np.float32(255) * noise_window((height, width), rng, 0.55)
    for channel in range(3):
        light = grey + scene.saturation * (image[channel] - grey)
        light *= falloff * (scene.exposure * scene.white_balance[channel])
        tone = np.sqrt(np.clip(light, 0, 1.6))
        tone = tone * 1.06 - 0.10 * tone**4  # highlights roll off as on film
        tone += (scene.contrast - 1) * (tone - 0.5)
        output[..., channel] = np.clip(tone * 255 + noise, 0, 255)
    picture = Image.fromarray(output)
    if scene.detail < 0.95:
        small = (round(width * scene.detail), round(height * scene.detail))
        picture = picture.resize(small, Image.Resampling.BILINEAR).resize(scene.size, Image.Resampling.BICUBIC)
    elif scene.blur > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.blur))
    return np.asarray(picture)


def draw_portrait(person: Person, scene: Scene) -> np.ndarray:
    """One photo of `person` in `scene`: uint8 [height, width, 3], RGB."""
    rng = np.random.default_rng(scene.texture_seed)
    canvas = Canvas(draw_background(scene, rng), scene)
    head = view_head(canvas, outline(person))
    draw_back_hair(canvas, rng)
    draw_body(canvas, person, head, rng)
    draw_second_chin(canvas, person, head, rng)
    draw_ears(canvas, person, head)
    draw_face(canvas, person, head, rng)
    draw_front_hair(canvas, person, head, rng)
    draw_glasses(canvas, person, head, rng)
    return photograph(canvas.image, scene, rng)
