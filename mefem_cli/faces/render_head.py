"""The head as a form seen from the camera, with neck, second chin, clothes and ears.

Forms are drawn in the head frame: the origin lies between the eyes, x points to the picture's right, y down, and one
unit is the distance from the eye line to the chin of an average adult (about 115 mm).
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from mefem_cli.faces.render_canvas import (
    Canvas,
    bump,
    clamp,
    lit,
    noise_window,
    normals,
    smooth_step,
    soft_plus,
    to_linear,
)
from mefem_cli.faces.render_person import Person

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
OUTLINE_CENTRE_Y = 0.12  # the face outline is a radius over the angle about this point of the midline
HEAD_DEPTH = 0.62


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


def part_of(head: HeadView, canvas: Canvas, left: float, right: float, top: float, bottom: float) -> tuple:
    """The canvas window, u and v of the pixels about a rectangle of the face."""
    scene = canvas.scene
    move_x, move_y = 0.72 * 0.55 * math.sin(scene.yaw), 0.30 * math.sin(scene.pitch)
    window = canvas.window(left + move_x - 0.08, right + move_x + 0.08, top + move_y - 0.1, bottom + move_y + 0.1)
    part = crop_view(head, window)
    return window, part.u, part.v


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
