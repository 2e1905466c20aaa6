"""Data for the recipes where there is none of your own: photos, clips and tables of people who do not exist.

Run: python examples/imaginary_clinic.py OUT [--people 300] [--clips]

OUT/photos/      two drawn photos of each person, a few broken on purpose
OUT/labels.csv   path, subject, age, sex, skin tone, height, weight, BMI of each photo
OUT/clinic.csv   the same as a clinic would export it: semicolons, decimal commas, a byte order mark, one row a photo
OUT/clips/       with --clips: a clip of 2 s of each person (needs PyAV: pip install "mefem-cli[video]")
OUT/markers.csv  with --clips: blood pressure, made up from age and BMI with noise: it has no meaning for real people
OUT/folds.csv    with --clips: five patient-disjoint folds
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from mefem_cli.faces.render import draw_person, photo_path, render_folder, render_photo

PHOTOS_EACH, SEED = 2, 0
FRAMES_PER_SECOND, FRAMES, SHIFT = 5, 10, 6  # of a clip; SHIFT: px that the head moves


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--clips", action="store_true")
    given = parser.parse_args()
    people = [draw_person(SEED, index) for index in range(given.people)]
    if not (given.out / "labels.csv").exists():  # it is written last
        render_folder(given.out, given.people, PHOTOS_EACH, SEED, num_workers=2)
    write_clinic_table(given.out / "clinic.csv", people)
    if given.clips:
        write_clips(given.out, people)


def write_clinic_table(path: Path, people: list) -> None:
    """Write what a clinic's database exports: its own column names, heights and weights instead of BMI."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["photo", "patient", "sex", "age", "height_cm", "weight_kg"])
        for index, person in enumerate(people):
            numbers = [f"{one:.1f}".replace(".", ",") for one in (person.age, person.height_cm, person.weight_kg)]
            for photo in range(PHOTOS_EACH):
                name = photo_path(person, photo, index, PHOTOS_EACH)
                writer.writerow([name, person.subject, person.sex, *numbers])


def write_clips(out: Path, people: list) -> None:
    """Write clips, their markers and folds."""
    rng = np.random.default_rng(SEED)
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, person in enumerate(people):
        path = folder / f"{person.subject}.mp4"
        if not path.exists():
            write_clip(path, render_photo(person, seed=SEED), rng)
        systolic = 90 + 0.4 * person.age + 0.6 * (person.bmi - 22) + rng.normal(0, 8)
        diastolic = 60 + 0.15 * person.age + 0.5 * (person.bmi - 22) + rng.normal(0, 6)
        rows.append((path.name, person.subject, round(systolic, 1), round(diastolic, 1), 1 + index % 5))
    with (out / "markers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "patient_id", "upper_ap", "lower_ap"), *(row[:4] for row in rows)])
    with (out / "folds.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("patient_id", "fold"), *((row[1], row[4]) for row in rows)])


def write_clip(path: Path, picture: np.ndarray, rng: np.random.Generator) -> None:
    """Write a clip of one picture (uint8 [H, W, 3]) whose frame drifts by a few pixels."""
    import av

    height, width = ((side - SHIFT) // 2 * 2 for side in picture.shape[:2])
    temporary = path.with_name(f".{path.name}")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.bit_rate, stream.pix_fmt = width, height, 4_000_000, "yuv420p"
        for _ in range(FRAMES):
            top, left = rng.integers(0, SHIFT, size=2)
            crop = np.ascontiguousarray(picture[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)


if __name__ == "__main__":
    main()
