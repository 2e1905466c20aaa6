"""From a task's name to targets: which rows have one, and whether it is a number or a class.

A task in `tasks/` says its kind. Any other label is a class if it is text, or if it is a number with at most ten
distinct values, all whole (0/1, grades); otherwise it is a number. `kind` overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mefem_cli import parts
from mefem_cli.errors import NoInputError, UsageError, did_you_mean
from mefem_cli.tasks import Values, numbers

KINDS = ("regression", "classification")
MAX_NUMERIC_CLASSES = 10
MISSING_TEXTS = frozenset({"", "na", "n/a", "nan", "none", "null"})  # as pandas reads them, upper case or lower


@dataclass(frozen=True)
class Target:
    """The usable part of a label."""

    task: str
    rows: np.ndarray  # (n,) int: rows of the store with a usable value
    values: np.ndarray  # (n,) float64, or int64 index into `classes`
    classes: tuple[str, ...] = ()  # empty: regression
    notes: tuple[str, ...] = ()  # what was left out, for the user

    @property
    def kind(self) -> str:
        """`regression` or `classification`."""
        return "classification" if self.classes else "regression"


def load_target(labels: Mapping[str, np.ndarray], task: str, kind: str | None = None) -> Target:
    """Return the target of a task from the labels of a store (name -> (N,) float64 or str objects).

    Raises NoInputError where the label is absent, or nothing in it is usable; UsageError where text is asked to be a
    number.
    """
    if task in parts.names("tasks"):
        module = parts.load("tasks", task)
        made = module.target(_needed(labels, task, module.NEEDS))
        return _target(task, made, kind or module.KIND)
    return _target(task, Values(find(labels, task)), kind)


def find(labels: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return a label column. Raises NoInputError with the names that exist."""
    if name not in labels:
        raise NoInputError(f'there is no label "{name}"{known_names(name, labels)}')
    return labels[name]


def known_names(name: str, known: Iterable[str]) -> str:
    """Return the nearest name and all that exist, for an error."""
    known = sorted(known)
    if not known:
        return "; the store has no labels: give a table to `mefem crop --labels TABLE`"
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; there is") else f"{hint}; there is {', '.join(known)}"


def _needed(
    labels: Mapping[str, np.ndarray], task: str, alternatives: tuple[tuple[str, ...], ...]
) -> dict[str, np.ndarray]:
    for names in alternatives:
        if all(name in labels for name in names):
            return {name: as_numbers(name, labels[name]) for name in names}
    wanted = ", nor ".join(" with ".join(names) for names in alternatives)
    raise NoInputError(f"task {task}: there is no label {wanted}{known_names(alternatives[0][0], labels)}")


def as_numbers(name: str, values: np.ndarray) -> np.ndarray:
    """Return a column as float64. Raises UsageError naming the first cell that is no number."""
    converted = numbers(without_missing_texts(values))
    if converted is not None:
        return converted
    for row, cell in enumerate(values):
        if numbers(without_missing_texts(values[row : row + 1])) is None:
            raise UsageError(f"label {name}: {str(cell)[:40]!r} is no number; mend it or type --kind classification")
    raise AssertionError("some cell is no number")


def without_missing_texts(values: np.ndarray) -> np.ndarray:
    """Return text with "NA", "null" and the like emptied; numbers as they are."""
    if values.dtype.kind in "biuf":
        return values
    texts = [str(cell).strip() for cell in values]
    return np.array(["" if text.lower() in MISSING_TEXTS else text for text in texts], dtype=object)


def _target(task: str, made: Values, kind: str | None) -> Target:
    values = without_missing_texts(made.values)
    as_float = numbers(values)
    if kind is None:
        kind = "regression" if as_float is not None and not looks_like_classes(as_float) else "classification"
    if kind == "regression":
        values = as_float if as_float is not None else as_numbers(task, values)
    elif as_float is not None:  # "1" and "1.0" are one class
        values = as_float
    usable = np.isfinite(values) if values.dtype.kind == "f" else values != ""
    rows = np.flatnonzero(usable)
    _refuse_useless(task, values[rows], made)
    num_missing = len(values) - len(rows)
    notes = made.notes
    if num_missing:
        notes += (f"{task}: {num_missing} of {len(values)} faces have no usable label and are left out",)
    if kind == "regression":
        return Target(task, rows, values[rows].astype(np.float64), notes=notes)
    distinct, index = np.unique(values[rows], return_inverse=True)
    classes = tuple(f"{one:g}" if isinstance(one, float) else str(one) for one in distinct)
    return Target(task, rows, index.astype(np.int64), classes, notes)


def looks_like_classes(values: np.ndarray) -> bool:
    """Return whether numbers are few and whole, as 0/1 or grades are."""
    distinct = np.unique(values[np.isfinite(values)])
    return len(distinct) <= MAX_NUMERIC_CLASSES and bool((distinct == np.round(distinct)).all())


def _refuse_useless(task: str, values: np.ndarray, made: Values) -> None:
    if not len(values):
        reason = "; ".join(made.notes) or "every cell is empty"
        raise NoInputError(f"task {task}: no face has a usable label ({reason})")
    if len(np.unique(values)) == 1:
        value = f"{values[0]:g}" if isinstance(values[0], float) else f"{values[0]!s:.40}"
        raise NoInputError(f"task {task}: the label is {value} for all {len(values)} faces; it must vary")
