"""FairFace: nine age classes (accuracy for White and non-White apart), sex and race.

The labels are the columns file, age, gender, race of `fairface_label_train.csv` and `fairface_label_val.csv`, joined by
the end of the photos' paths (`train/1.jpg`), or labels `age`, `gender`, `race` of the store. `fairface.sex` is also
scored within each age class (FairFace's classes are ten years wide, but for the first two) and averaged over them. The
split is the folder, train or val; val is what is predicted. Karkkainen and Joo 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mefem_cli.errors import NoInputError
from mefem_cli.tasks import Faces, Protocol, Values, _files

FILES = ("fairface_label_train.csv", "fairface_label_val.csv")
COLUMNS = ("age", "gender", "race")
AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")


@dataclass(frozen=True)
class Options:
    """The files of a data set."""

    annotations: str | None = None  # folder with fairface_label_train.csv and fairface_label_val.csv; default: near the
    # photos, or the store's own labels age, gender, race


def protocol(faces: Faces, options: Options) -> Protocol:
    """Return age, sex and race on FairFace's own split."""
    texts = _of_store(faces.labels) if not options.annotations else None
    texts = texts or _of_files(faces, options)
    age, sex, race = (np.array([cell.strip() for cell in texts[name]], dtype=object) for name in COLUMNS)
    is_known = np.isin(age, AGES)
    notes: tuple[str, ...] = ()
    if (num_odd := int(((age != "") & ~is_known).sum())) > 0:
        notes = (f"fairface: {num_odd} faces have an age that is none of the nine classes and are left out of age",)
    age = np.where(is_known, age, "")
    white = np.array(["White" if one.lower() == "white" else "non-White" if one else "" for one in race], dtype=object)
    targets = {
        "age": Values(age, kind="classification", classes=AGES, by={"race (two)": white}),
        "sex": Values(sex, kind="classification", by={"age class": age}, mean_over="age class"),
        "race": Values(race, kind="classification"),
    }
    folders = [name.split("/")[0] for name in _files.last_parts(faces.sources, 2)]
    split = np.array([folder if folder in ("train", "val", "test") else "" for folder in folders], dtype=object)
    has_split = len(set(split) - {""}) > 1
    return Protocol(targets, split if has_split else None, notes=notes)


def _of_store(labels: Mapping[str, np.ndarray]) -> dict[str, list[str]] | None:
    if not all(name in labels and labels[name].dtype.kind not in "biuf" for name in COLUMNS):
        return None
    return {name: [str(cell) for cell in labels[name]] for name in COLUMNS}


def _of_files(faces: Faces, options: Options) -> dict[str, list[str]]:
    rows: dict[str, tuple[str, ...]] = {}
    for path in _files.find("fairface", FILES, options.annotations, faces.sources):
        rows |= _read(path)
    found = [rows.get(name, ("", "", "")) for name in _files.last_parts(faces.sources, 2)]
    if not any(any(cells) for cells in found):
        raise NoInputError("task fairface: its files name none of the photos; wanted paths that end like train/1.jpg")
    return {name: [cells[column] for cells in found] for column, name in enumerate(COLUMNS)}


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    """Return file -> (age, gender, race) of one CSV."""
    from mefem_cli.stores.tables import as_texts, open_table

    table = open_table(path)
    if missing := [name for name in ("file", *COLUMNS) if name not in table.names]:
        raise NoInputError(f'{path} has no column "{missing[0]}"; wanted FairFace\'s file, age, gender, race')
    rows: dict[str, tuple[str, ...]] = {}
    for batch in table.as_written(("file", *COLUMNS)):
        file, *cells = (as_texts(column).to_pylist() for column in batch.columns)
        rows |= {name.lower(): tuple(cell or "" for cell in row) for name, *row in zip(file, *cells, strict=True)}
    return rows
