"""UTKFace: age, sex and race from the photos' names, `[age]_[gender]_[race]_[date and time].jpg`.

Names that are not made like this (some lack the race) are counted and left out. Zhang et al. 2017.
"""

from __future__ import annotations

import re

import numpy as np

from mefem_cli.errors import NoInputError
from mefem_cli.tasks import Faces, Protocol, Values, _files

NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_\d{8,}(?:\D|$)", re.ASCII)
SEXES = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")
PLAUSIBLE_YEARS = (0, 120)


def protocol(faces: Faces, options: None = None) -> Protocol:
    """Return age in years, sex and race as the file names have them."""
    names = _files.last_parts(faces.sources)
    matches = [NAME.match(name) for name in names]
    matches = [match if match and int(match[1]) <= PLAUSIBLE_YEARS[1] else None for match in matches]
    malformed = [name for name, match in zip(names, matches, strict=True) if match is None]
    if len(malformed) == len(names):
        example = f', such as "{malformed[0]:.60}"' if malformed and malformed[0] else ""
        raise NoInputError(f"task utkface: no photo is named age_gender_race_date{example}; name a label instead")
    notes = (f'utkface: {len(malformed)} malformed names left out (e.g. "{malformed[0]:.60}")',) if malformed else ()
    return Protocol(
        {
            "age": Values(np.array([float(match[1]) if match else np.nan for match in matches]), kind="regression"),
            "sex": _classes([SEXES[int(match[2])] if match else "" for match in matches]),
            "race": _classes([RACES[int(match[3])] if match else "" for match in matches]),
        },
        notes=notes,
    )


def _classes(texts: list[str]) -> Values:
    return Values(np.array(texts, dtype=object), kind="classification")
