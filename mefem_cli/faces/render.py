"""Photo-like portraits of imaginary people of known BMI, age, sex and skin tone, for `mefem demo` and the tests.

A person is a pure function of (seed, index); a photo of (person, seed, photo). Body mass index shows only as it does
in faces: full cheeks, a soft and wide jaw, a second chin, a thick neck, slightly narrowed eyes, each with its own
deviation. Bones, age, pose, light, hair, background and camera vary independently of it.
"""

import csv
import io
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mefem_cli.faces.render_canvas import to_linear
from mefem_cli.faces.render_draw import draw_portrait
from mefem_cli.faces.render_person import Person, Scene
from mefem_cli.faces.render_scene import draw_background, photograph
from mefem_cli.stores import product

LABEL_COLUMNS = ("path", "subject", "age", "sex", "skin_tone", "height_cm", "weight_kg", "bmi")
DEFECTS = ("border", "small", "noface", "truncated")
BAD_SHARE = 0.03
PHOTOS_PER_FOLDER = 200
JPEG_QUALITY = 92

# What body fat does to a face: parameter -> (change per unit of fatness, deviation of its own). One unit of fatness
# is 5.5 kg/m2 of BMI; the deviations keep any single parameter from giving the BMI away.
FAT_SIGNS = {
    "cheek_fullness": (1.0, 0.40),
    "lower_face_width": (1.0, 0.40),
    "jaw_softness": (0.9, 0.45),
    "double_chin": (1.0, 0.40),
    "submental_fullness": (1.0, 0.45),
    "neck_girth": (1.0, 0.40),
    "eye_puffiness": (0.6, 0.60),
}
BONES = (
    "bone_width",
    "face_length",
    "jaw_width",
    "chin_width",
    "chin_length",
    "cheekbones",
    "neck_frame",
    "brow_height",
    "brow_thickness",
    "eye_size",
    "eye_spacing",
    "eye_tilt",
    "nose_width",
    "nose_length",
    "mouth_width",
    "lip_fullness",
    "redness",
)
LABELS = ("subject", "age", "sex", "skin_tone", "height_cm", "weight_kg")

HAIR_COLOURS = {
    "black": (28, 24, 22),
    "dark": (52, 38, 30),
    "brown": (86, 60, 42),
    "light": (128, 94, 62),
    "blond": (186, 152, 104),
    "red": (132, 66, 38),
}
GREY_HAIR = (0.62, 0.61, 0.59)  # linear light
EYE_COLOURS = {
    "dark": (62, 40, 26),
    "brown": (98, 64, 38),
    "hazel": (116, 96, 58),
    "blue": (96, 126, 150),
    "grey": (118, 128, 128),
}


def fatness(bmi: float) -> float:
    """BMI (kg/m2) on the scale of the drawing parameters: 0 at 26, one unit per 5.5 kg/m2."""
    return (bmi - 26) / 5.5


def draw_person(seed: int, index: int) -> Person:
    """The person number `index` of the population `seed`.

    BMI is right-skewed about 26 kg/m2 within 16..45, rises slightly to the age of 60 and is a little higher in men;
    the face parameters follow it with deviations of their own (`FAT_SIGNS`), the bones do not.
    """
    rng = np.random.default_rng([seed, index, 1])
    age = float(np.round(18 + 62 * rng.beta(1.15, 1.35), 1))
    sex = "male" if rng.random() < 0.5 else "female"
    tone = int(rng.integers(1, 11))
    male = sex == "male"
    centre = np.log(25.0) + 0.0022 * (min(age, 60) - 45) + 0.012 * (1 if male else -1)
    bmi = float(np.clip(np.exp(rng.normal(centre, 0.205)), 16.2, 44.8))
    height = float(np.round(rng.normal(176 if male else 163, 6.8), 1))
    weight = float(np.round(bmi * (height / 100) ** 2, 1))
    fat = fatness(weight / (height / 100) ** 2) + rng.normal(0, 0.10)
    signs = {name: slope * fat + rng.normal(0, deviation) for name, (slope, deviation) in FAT_SIGNS.items()}
    bones = {name: float(np.clip(rng.normal(), -2.4, 2.4)) for name in BONES}
    bones["nose_width"] += 0.18 * (tone - 5)
    bones["lip_fullness"] += 0.14 * (tone - 5)
    old = np.clip((age - 22) / 55, 0, 1)
    return Person(
        subject=f"p{index:04d}",
        age=age,
        sex=sex,
        skin_tone=tone,
        height_cm=height,
        weight_kg=weight,
        masculinity=float(rng.normal(0.9 if male else 0.1, 0.16)),
        wrinkle_depth=float(np.clip(old**1.4 + rng.normal(0, 0.10), 0, 1)),
        sagging=float(np.clip(old**1.8 + rng.normal(0, 0.10), 0, 1)),
        hair_greyness=float(np.clip((age - rng.normal(52, 8)) / 22, 0, 1)),
        hair_recession=float(np.clip((old * rng.normal(0.9, 0.5)) if male else 0.1 * rng.random(), 0, 1)),
        freckles=float(np.clip(rng.normal(-0.2, 0.6), 0, 1) * (tone < 5)),
        **{name: float(value) for name, value in (signs | bones).items()},
    )


def with_bmi(person: Person, bmi: float) -> Person:
    """The same person, bones and deviations at another BMI (kg/m2): only weight and the signs of fat move."""
    change = fatness(bmi) - fatness(person.bmi)
    moved = {name: getattr(person, name) + slope * change for name, (slope, _) in FAT_SIGNS.items()}
    return replace(person, weight_kg=bmi * (person.height_cm / 100) ** 2, **moved)


def drawing_parameters(person: Person) -> dict[str, float]:
    """Everything that the face is drawn from, by name, in standard units; no labels among them."""
    return {field.name: float(getattr(person, field.name)) for field in fields(person) if field.name not in LABELS}


# ---- scenes ---------------------------------------------------------------------------------------------------------


def scene_rng(person: Person, seed: int, *more: int) -> np.random.Generator:
    """A generator for this subject and seed; the name's bytes stand in for the index, so that any name works."""
    return np.random.default_rng([seed, 2, *more, *person.subject.encode()])


def pick(rng: np.random.Generator, odds: dict[str, float]) -> str:
    """One key, with probability proportional to its value."""
    weights = np.array(list(odds.values()))
    return list(odds)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def habits(person: Person, seed: int) -> dict:
    """What a person keeps from photo to photo: hair colour, eye colour, usual hair, beard, make-up and glasses."""
    rng = scene_rng(person, seed)
    tone, male = person.skin_tone, person.sex == "male"
    light = max(0.0, (6 - tone) / 5)
    hair = pick(
        rng,
        {"black": 0.3 + 0.3 * tone, "dark": 1, "brown": light * 2, "light": light, "blond": light, "red": light / 3},
    )
    eyes = pick(rng, {"dark": 0.3 + 0.3 * tone, "brown": 1, "hazel": light, "blue": 1.5 * light, "grey": light})
    colour = to_linear(HAIR_COLOURS[hair]) * rng.uniform(0.8, 1.25)
    colour = colour + person.hair_greyness * (np.array(GREY_HAIR) * rng.uniform(0.75, 1.1) - colour)
    if male:
        styles = {"short": 5, "buzz": 1.5, "bald": 0.3 + 2.5 * person.hair_recession, "fringe": 0.8, "long": 0.4}
    else:
        styles = {"long": 3, "wavy": 2.5, "tied": 2, "fringe": 1.5, "short": 0.6 + person.wrinkle_depth}
    styles["curly"] = 0.3 + 0.12 * tone
    return {
        "hair_colour": colour,
        "eye_colour": to_linear(EYE_COLOURS[eyes]) * rng.uniform(0.8, 1.2),
        "hair_styles": (pick(rng, styles), pick(rng, styles)),
        "beard": max(0.0, rng.uniform(-0.6, 1.0)) if male else 0.0,
        "makeup": 0.0 if male else max(0.0, rng.uniform(-0.4, 1.0)),
        "glasses": rng.random() < 0.15 + 0.25 * person.wrinkle_depth,
    }


def draw_light(rng: np.random.Generator) -> dict:
    """Direction, colour and strength of the light, from a flat sky to a lamp at the side."""
    across, up = rng.uniform(-0.85, 0.85), rng.uniform(-0.75, 0.05)
    light = np.array([across, up, rng.uniform(0.5, 1.0)])
    light /= np.linalg.norm(light)
    hardness = rng.uniform(0.4, 0.9)
    warmth, fill_warmth = rng.normal(0, 0.10), rng.normal(0, 0.08)
    tint, fill_tint = np.array([1 + warmth, 1, 1 - warmth]), np.array([1 + fill_warmth, 1, 1 - fill_warmth])
    return {
        "light": tuple(light.tolist()),
        "key": tuple((tint * hardness * 1.05).tolist()),
        "fill": tuple((fill_tint * (1.0 - hardness) * 0.95 + 0.08).tolist()),
    }


def draw_placement(rng: np.random.Generator) -> dict:
    """Size of the picture, pose, and a head that leaves room for the crop, 2 boxes of about 1.3 units a side."""
    width, height = (int(side) for side in rng.integers(364, 421, 2))
    scale = rng.uniform(95, 120)
    room = 1.56 * scale  # half a crop, px, with a margin
    slack_x, slack_y = max(width / 2 - room, 0), max(height / 2 - room, 0)
    return {
        "size": (width, height),
        "pixels_per_unit": scale,
        "origin": (
            width / 2 + rng.uniform(-1, 1) * slack_x,
            height / 2 + rng.uniform(-1, 1) * slack_y - 0.33 * scale,
        ),
        "yaw": float(np.clip(rng.normal(0, 0.23), -0.48, 0.48)),
        "pitch": float(np.clip(rng.normal(0, 0.12), -0.26, 0.26)),
        "roll": float(np.clip(rng.normal(0, 0.10), -0.24, 0.24)),
        "stretch": float(rng.uniform(0.93, 1.07)),
        "keystone": float(np.clip(rng.normal(0, 0.065), -0.14, 0.14)),
        "shoulder_drop": float(np.clip(rng.normal(0, 0.09), -0.16, 0.2)),
    }


def draw_expression(rng: np.random.Generator) -> dict:
    """Smile, parted lips, brows, lids and gaze."""
    smile = float(np.clip(rng.normal(0.35, 0.45), -0.3, 1))
    return {
        "smile": smile,
        "mouth_open": float(np.clip(rng.normal(-0.3 + 0.9 * max(smile, 0), 0.5), 0, 1.3)),
        "brow_raise": float(np.clip(rng.normal(0, 0.4), -0.8, 1)),
        "eye_open": 0.08 if rng.random() < 0.02 else float(np.clip(rng.normal(1.0, 0.13), 0.5, 1.3)),
        "gaze": tuple(np.clip(rng.normal(0, 0.45, 2), -1, 1).tolist()),
    }


def draw_scene(person: Person, photo: int, seed: int) -> Scene:
    """The circumstances of one photo: a pure function of (seed, subject, photo)."""
    habit = habits(person, seed)
    rng = scene_rng(person, seed, photo + 1)
    style = habit["hair_styles"][int(rng.random() < 0.3)]
    beard = float(np.clip(habit["beard"] + rng.normal(0, 0.15), 0, 1)) if habit["beard"] > 0 else 0.0
    tint = rng.normal(0, 0.05, 3)
    return Scene(
        **draw_placement(rng),
        **draw_light(rng),
        **draw_expression(rng),
        eye_colour=tuple(habit["eye_colour"].tolist()),
        hair_style=style,
        hair_colour=tuple(habit["hair_colour"].tolist()),
        hair_volume=float(rng.uniform(0, 1)),
        hair_length=float(rng.uniform(0.7, 2.0)),
        hair_part=float(rng.choice([-1, 1]) * rng.uniform(0.2, 1)),
        hair_cover=float(rng.uniform(0, 1)),
        beard_length=beard,
        beard_density=0.14 + 0.75 * beard if person.sex == "male" else 0.0,
        makeup=float(habit["makeup"] * rng.uniform(0.3, 1)),
        glasses=float(rng.uniform(0.2, 1)) if habit["glasses"] and rng.random() < 0.75 else 0.0,
        neckline=pick(rng, {"high": 1, "crew": 4, "vee": 2, "collar": 2, "wide": 0.2 if person.sex == "male" else 2}),
        cloth=tuple(to_linear(tuple(rng.uniform(15, 235) + rng.normal(0, 22, 3))).clip(0.004, 0.85).tolist()),
        second_cloth=tuple(to_linear(tuple(rng.uniform(15, 235) + rng.normal(0, 25, 3))).clip(0.004, 0.85).tolist()),
        background=pick(rng, {"studio": 3, "room": 3, "street": 2, "garden": 2}),
        exposure=float(np.exp(rng.normal(-0.02 + 0.045 * (person.skin_tone - 5), 0.20))),
        contrast=float(rng.uniform(0.85, 1.18)),
        white_balance=tuple(np.exp(tint - tint.mean()).tolist()),
        saturation=float(rng.uniform(0.9, 1.25)),
        blur=float(max(0.0, rng.uniform(-0.3, 1.1))),
        noise=float(rng.uniform(0.002, 0.014)),
        vignette=float(rng.uniform(0, 0.4)),
        detail=float(rng.uniform(0.55, 1.3)),
        texture_seed=int(rng.integers(0, 2**62)),
    )


def render_photo(person: Person, photo: int = 0, seed: int = 0) -> np.ndarray:
    """One photo of `person`: uint8 [height, width, 3], RGB, about 360 to 420 px a side.

    >>> render_photo(draw_person(seed=0, index=7), photo=1).dtype
    dtype('uint8')
    """
    return draw_portrait(person, draw_scene(person, photo, seed))


# ---- folders --------------------------------------------------------------------------------------------------------


def encode(pixels: np.ndarray) -> bytes:
    """JPEG bytes without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def render_defect(defect: str, seed: int, number: int) -> bytes:
    """JPEG bytes of a picture that the crop step must reject: a face at the border, small, missing or cut short."""
    person = draw_person(seed, 1_000_000 + number)
    scene = draw_scene(person, 0, seed)
    width, height = scene.size
    if defect == "border":  # half a face is about 0.6 units wide, so one ear and some cheek are cut off
        side = scene.pixels_per_unit * 0.5
        scene = replace(scene, origin=(side if number % 2 else width - side, scene.origin[1]), yaw=0.0)
    elif defect == "small":  # a box of about 70 px
        scene = replace(scene, pixels_per_unit=50.0, origin=(width / 2, height / 2 - 20))
    elif defect == "noface":  # a plain wall: in blurred scenes BlazeFace sees a face now and then
        scene = replace(scene, background="studio")
        rng = np.random.default_rng(scene.texture_seed)
        return encode(photograph(draw_background(scene, rng), scene, rng))
    data = encode(draw_portrait(person, scene))
    return data[: len(data) // 3] if defect == "truncated" else data


def photo_path(person: Person, photo: int, index: int, photos_per_person: int) -> str:
    """Path under `photos/`: a folder of about 200 photos, then subject and photo."""
    folder = index * photos_per_person // PHOTOS_PER_FOLDER
    return f"{folder:02d}/{person.subject}_{photo}.jpg"


def render_job(job: tuple, photos: Path, photos_per_person: int, seed: int) -> int:
    """Render all photos of one person, or one defective picture, and return how many were written."""
    kind, number = job
    if kind != "person":
        (photos / "bad" / f"{kind}_{number:03d}.jpg").write_bytes(render_defect(kind, seed, number))
        return 1
    person = draw_person(seed, number)
    for photo in range(photos_per_person):
        path = photos / photo_path(person, photo, number, photos_per_person)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(render_photo(person, photo, seed)))
    return photos_per_person


def count_defects(num_people: int, photos_per_person: int) -> int:
    """Number of pictures of each defect: about 3 % in all, at least one each from 60 people on."""
    each = BAD_SHARE * num_people * photos_per_person / len(DEFECTS)
    return max(round(each), 1 if num_people >= 60 else 0)


def run_jobs(jobs: list, work: Callable, num_workers: int) -> Iterator[int]:
    """Results of `work` over `jobs` in any order; processes are spawned, so that threads of the caller do no harm."""
    if num_workers <= 1:
        yield from map(work, jobs)
        return
    # Ctrl-C reaches all processes of a terminal; only the caller should speak of it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(num_workers, signal.signal, ignore) as pool:
        yield from pool.imap_unordered(work, jobs, chunksize=4)


def render_folder(
    out: Path,
    num_people: int,
    photos_per_person: int,
    seed: int,
    num_workers: int,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write `out/photos/` and `out/labels.csv`, and return `out`.

    About 3 % more pictures lie in `photos/bad/`, named by their defect and without a label: the crop step must reject
    them. `progress` is called with the number of photos newly done. The same arguments write the same bytes for any
    number of workers.
    """
    out = Path(out)
    photos = out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    each = count_defects(num_people, photos_per_person)
    if each:
        (photos / "bad").mkdir(exist_ok=True)
    jobs = [("person", index) for index in range(num_people)]
    jobs += [(defect, number) for defect in DEFECTS for number in range(each)]
    work = partial(render_job, photos=photos, photos_per_person=photos_per_person, seed=seed)
    for done in run_jobs(jobs, work, num_workers):
        if progress is not None:
            progress(done)
    write_labels(out / "labels.csv", num_people, photos_per_person, seed)
    return out


def write_labels(path: Path, num_people: int, photos_per_person: int, seed: int) -> None:
    """One row per ordinary photo; `path` is relative to `photos/`. It is written last, all or nothing."""
    with product.writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LABEL_COLUMNS)
        for index in range(num_people):
            person = draw_person(seed, index)
            labels = (person.subject, person.age, person.sex, person.skin_tone, person.height_cm, person.weight_kg)
            for photo in range(photos_per_person):
                row = (photo_path(person, photo, index, photos_per_person), *labels, round(person.bmi, 2))
                writer.writerow(row)
