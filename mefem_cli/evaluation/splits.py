"""Who is tested on where the data say it: `--split`, `--folds FILE`, `--leave-out`, `--test-store`, a task's split.

Words: train, val and test (and how they are also written). Test is predicted; val chooses penalties, rates and epochs,
then joins train for the last fit; without test, val is predicted. Whole numbers: each is a fold, predicted by a head
that learned from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mefem_cli.errors import NoInputError, UsageError, did_you_mean
from mefem_cli.evaluation import labels

if TYPE_CHECKING:
    from mefem_cli.stores.joining import Faces

WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "eval"),
}
LEARNED_FROM, LEFT_OUT = -1, -2
MAX_PARTS = 50  # folds of a file, sources left out: more are a mistake, such as an age
FOLD_COLUMNS = ("fold", "split")
KEYS = ("path", "id")  # of a file of folds; else a label of the store


@dataclass(frozen=True)
class Split:
    """Which fold predicts each row."""

    fold: np.ndarray  # (N,) int: 0 .. K - 1; LEARNED_FROM: in no test fold; LEFT_OUT: not used at all
    chooses: np.ndarray  # (N,) bool: options are chosen on these rows; none: on inner folds
    names: tuple[str, ...]  # of the folds

    def where(self, rows: np.ndarray) -> Split:
        """Return the split of some rows; folds that none of them is in vanish."""
        fold, chooses = self.fold[rows], self.chooses[rows]
        present = [number for number in range(len(self.names)) if (fold == number).any()]
        new = {number: position for position, number in enumerate(present)}
        renumbered = np.array([*(new.get(number, -1) for number in range(len(self.names))), LEFT_OUT, LEARNED_FROM])
        return Split(renumbered[fold], chooses, tuple(self.names[number] for number in present))


def parse(values: np.ndarray, what: str) -> Split:
    """Return the split that a column (N,) of words or whole numbers says. Raises UsageError naming a cell that is none.

    >>> parse(np.array(["train", "test", "", "val"], dtype=object), "--split part").fold
    array([-1,  0, -2, -1])
    >>> parse(np.array([1.0, 2, 1, np.nan]), "--split part").fold
    array([ 0,  1,  0, -2])
    """
    values = labels.without_missing_texts(values)
    as_numbers = labels.numbers(values)
    if as_numbers is not None:
        return _by_number(as_numbers, what)
    part_of = {word: part for part, words in WORDS.items() for word in words}
    known = {cell: part_of.get(str(cell).lower(), str(cell)) for cell in set(values)}
    if odd := set(known.values()) - {*WORDS, ""}:
        raise UsageError(f'{what}: "{min(odd):.40}" is none of train, val, test, nor are all cells whole numbers')
    present = set(known.values()) - {""}
    tested = "test" if "test" in present else "val"
    if not present - {tested} or tested not in present:
        raise UsageError(f"{what} holds only {' and '.join(sorted(present)) or 'empty cells'}; wanted train and test")
    part = np.array([known[cell] for cell in values], dtype=object)
    fold = np.where(part == tested, 0, np.where(part == "", LEFT_OUT, LEARNED_FROM))
    return Split(fold, (part == "val") & (tested == "test"), (tested,))


def _by_number(values: np.ndarray, what: str) -> Split:
    known = np.isfinite(values)
    distinct = np.unique(values[known])
    if (distinct != np.round(distinct)).any() or not 2 <= len(distinct) <= MAX_PARTS:
        raise UsageError(f"{what} holds {len(distinct)} numbers; wanted 2 to {MAX_PARTS} whole ones, a fold each")
    fold = np.where(known, np.searchsorted(distinct, np.where(known, values, 0)), LEFT_OUT)
    return Split(fold, np.zeros(len(values), bool), tuple(f"{one:g}" for one in distinct))


def leave_out(values: np.ndarray, name: str) -> Split:
    """Return a fold for each value of a label; faces without one are only learned from."""
    values = labels.without_missing_texts(values)
    is_number = values.dtype.kind in "biuf"
    known = np.isfinite(values) if is_number else values != ""
    distinct, index = np.unique(values[known], return_inverse=True)
    if not 2 <= len(distinct) <= MAX_PARTS:
        raise UsageError(f"--leave-out {name}: it has {len(distinct)} values; wanted a label with 2 to {MAX_PARTS}")
    fold = np.full(len(values), LEARNED_FROM)
    fold[known] = index
    names = tuple(f"{one:g}" if is_number else str(one) for one in distinct)
    return Split(fold, np.zeros(len(values), bool), names)


def read_folds(faces: Faces, path: Path) -> Split:
    """Return the split in a table with a column `fold` (or `split`) and one that says whose row it is.

    That is `path` or `id`, else the only other column that is a label of the store, such as subject. Raises
    UsageError where the columns are missing and NoInputError where no face is named.
    """
    from mefem_cli.stores import joining
    from mefem_cli.stores.tables import open_table

    names = open_table(path).names
    column = next((name for name in FOLD_COLUMNS if name in names), None)
    key = next((name for name in [*KEYS, *faces.labels] if name in names and name != column), None)
    if column is None or key is None:
        wanted = "fold" if column is None else "path, id or a label of the store such as subject"
        raise UsageError(f"--folds {path}: it has no column {wanted}; it has {', '.join(names)[:200]}")
    table = joining.read_labels(path, key)
    texts = np.array([str(cell or "") for cell in _texts(table.columns, column)] + [""], dtype=object)
    rows = joining.rows_of_faces(table, faces)
    if (rows < 0).all():
        raise NoInputError(f"--folds {path}: its column {key} names none of the faces of {faces.path}")
    return parse(texts[rows], f"--folds {path}")  # -1, the last, is empty


def _texts(columns: object, name: str) -> list[object]:
    from mefem_cli.stores.tables import as_texts

    chunks = columns.column(name).chunks  # type: ignore[attr-defined]
    return [cell for chunk in chunks for cell in as_texts(chunk).to_pylist()]


def column(faces: Faces, name: str, flag: str) -> np.ndarray:
    """Return a label, or else a manifest column. Raises UsageError with the names that exist."""
    known: Mapping[str, np.ndarray] = faces.labels if name in faces.labels else faces.meta
    if name not in known:
        raise UsageError(f'{flag} {name}: there is no label "{name}"{did_you_mean(name, faces.labels)}')
    return known[name]
