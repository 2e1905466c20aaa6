"""What lies behind a person, and the camera: exposure, lens, noise and sharpness."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mefem_cli.faces.render_canvas import noise_tile, noise_window
from mefem_cli.faces.render_person import Scene


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
