"""Hair behind and before the face, the shadow of a beard, and glasses."""

import math

import numpy as np

from mefem_cli.faces.render_canvas import TILE, Canvas, bump, noise_tile, noise_window, normals, smooth_step, stroke
from mefem_cli.faces.render_head import OUTLINE_CENTRE_Y, HeadView, part_of
from mefem_cli.faces.render_person import Person, Scene


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
