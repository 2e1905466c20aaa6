"""The face: its relief, wrinkles, skin, nose, mouth, eyes and brows."""

import math

import numpy as np

from mefem_cli.faces.render_canvas import (
    Canvas,
    bump,
    clamp,
    lit,
    noise_window,
    normals,
    smooth_large,
    smooth_step,
    stroke,
)
from mefem_cli.faces.render_hair import shade_beard_area
from mefem_cli.faces.render_head import HeadView, crop_view, part_of, skin_colour
from mefem_cli.faces.render_person import Person, Scene


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
