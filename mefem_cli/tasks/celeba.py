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
STATES = {"1": "yes", "-1": "no", "0": "no"}  # some copies write 0


@dataclass(frozen=True)
class Options:
    """The files of a data set (celeba, fairface)."""

    annotations: str | None = None  # folder with the data set's own files (celeba: list_attr_celeba.txt and
    # list_eval_partition.txt; fairface: fairface_label_train.csv and fairface_label_val.csv); default: near the photos


def protocol(faces: Faces, options: Options) -> Protocol:
    """Return the 40 attributes and the official partition of the faces that are named in the files."""
    attributes, partition = _files.find("celeba", (ATTRIBUTES, PARTITION), options.annotations, faces.sources)
    names, states = _read_attributes(attributes)
    part_of = {words[0]: PARTS.get(words[-1], "") for words in _files.read_words(partition) if len(words) >= 2}
    stems = _files.stems(_files.last_parts(faces.sources))
    row_of = {stem: row for row, stem in enumerate(_files.stems([name.lower() for name in states]))}
    table = np.array([*states.values(), [""] * len(names)], dtype=object)
    rows = [row_of.get(stem, len(states)) for stem in stems]  # the last row: in no file
    part_of = dict(zip(_files.stems([name.lower() for name in part_of]), part_of.values(), strict=True))
    split = np.array([part_of.get(stem, "") for stem in stems], dtype=object)
    num_unknown = sum(row == len(states) for row in rows)
    if num_unknown == len(rows):
        raise NoInputError(f"task celeba: {attributes} names none of the photos; wanted names such as 000001.jpg")
    notes = (f"celeba: {num_unknown} faces are not in {ATTRIBUTES} and are left out",) if num_unknown else ()
    targets = {
        name: Values(table[rows, column], kind="classification", classes=("no", "yes"))
        for column, name in enumerate(names)
    }
    return Protocol(targets, split, has_mean=True, notes=notes)


def _read_attributes(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the attributes' names, and for each photo its states. Raises NoInputError for a damaged file."""
    lines = _files.read_words(path)
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():
        lines = lines[1:]
    if not lines:
        raise NoInputError(f"{path} is empty; wanted CelebA's {ATTRIBUTES}")
    names, states = lines[0], {}
    for words in lines[1:]:
        if len(words) != len(names) + 1 or any(word not in STATES for word in words[1:]):
            shown = " ".join(words)[:60]
            raise NoInputError(
                f'{path}: the line "{shown}" is not a name and {len(names)} times 1 or -1; fetch it anew'
            )
        states[words[0]] = [STATES[word] for word in words[1:]]
    return names, states
