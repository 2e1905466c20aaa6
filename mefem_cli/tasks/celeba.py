"""CelebA: 40 attributes on the official partition, and their mean accuracy.

Reads the data set's own files, `list_attr_celeba.txt` (a count, the names, then a name and 40 times 1 or -1 in each
line) and `list_eval_partition.txt` (a name and 0 train, 1 val or 2 test), and joins them by the photos' names. Liu et
al. 2015, "Deep learning face attributes in the wild".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mefem_cli.errors import NoInputError
from mefem_cli.tasks import Faces, Protocol, Values, _files

ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
PARTS = {"0": "train", "1": "val", "2": "test"}
NO, YES, UNKNOWN = range(3)
STATES = {"1": YES, "-1": NO, "0": NO}  # some copies write 0
NAMES = np.array(["no", "yes", ""], dtype=object)


@dataclass(frozen=True)
class Options:
    """The files of a data set (celeba, fairface)."""

    annotations: str | None = None  # folder with the data set's own files (celeba: list_attr_celeba.txt and
    # list_eval_partition.txt; fairface: fairface_label_train.csv and fairface_label_val.csv); default: near the photos


def protocol(faces: Faces, options: Options) -> Protocol:
    """Return the 40 attributes and the official partition of the faces that are named in the files."""
    attributes, partition = _files.find("celeba", (ATTRIBUTES, PARTITION), options.annotations, faces.sources)
    names, row_of, states = _read_attributes(attributes)
    part_of = {words[0].lower(): PARTS.get(words[-1], "") for words in map(str.split, _files.read_lines(partition))}
    part_of = dict(zip(_files.stems(list(part_of)), part_of.values(), strict=True))
    stems = _files.stems(_files.last_parts(faces.sources))
    rows = np.array([row_of.get(stem, len(row_of)) for stem in stems], int)  # the last row: in no file
    split = np.array([part_of.get(stem, "") for stem in stems], dtype=object)
    num_unknown = int((rows == len(row_of)).sum())
    if num_unknown == len(rows):
        raise NoInputError(f"task celeba: {attributes} names none of the photos; wanted names such as 000001.jpg")
    notes = (f"celeba: {num_unknown} faces are not in {ATTRIBUTES} and are left out",) if num_unknown else ()
    targets = {
        name: Values(NAMES[states[rows, column]], kind="classification", classes=("no", "yes"))
        for column, name in enumerate(names)
    }
    return Protocol(targets, split, has_mean=True, notes=notes)


def _read_attributes(path: Path) -> tuple[list[str], dict[str, int], np.ndarray]:
    """Return the attributes' names, the row of each photo by its name without suffix, and the states [N + 1, 40] int8.

    The last row is of a photo that is not in the file. Raises NoInputError for a damaged file.
    """
    lines = _files.read_lines(path)
    if lines and lines[0].strip().isdecimal():
        lines = lines[1:]
    if not lines:
        raise NoInputError(f"{path} is empty; wanted CelebA's {ATTRIBUTES}")
    names, photos = lines[0].split(), []
    states = np.full((len(lines), len(names)), UNKNOWN, np.int8)
    for row, line in enumerate(lines[1:]):
        photo, *words = line.split()
        known = [STATES[word] for word in words if word in STATES]
        if len(words) != len(names) or len(known) != len(names):
            shown = " ".join(line.split())[:60]
            raise NoInputError(
                f'{path}: the line "{shown}" is not a name and {len(names)} times 1 or -1; fetch it anew'
            )
        photos.append(photo.lower())
        states[row] = known
    return names, {stem: row for row, stem in enumerate(_files.stems(photos))}, states
