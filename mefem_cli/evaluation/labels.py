"""From a task's name to targets: which rows have one, and whether it is a number or a class.

A task in `tasks/` says its kind; a data set's protocol has several targets, of which `celeba.Smiling` names one. Any
other label is a class if it is text, or if it is a number with at most ten distinct values, all whole (0/1, grades);
otherwise it is a number. `kind` overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mefem_cli import parts
from mefem_cli.errors import NoInputError, UsageError, did_you_mean
from mefem_cli.tasks import Faces, Protocol, Values, numbers

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
    made: Values = field(default_factory=lambda: Values(np.zeros(0)))  # what the task said, for all rows

    @property
    def kind(self) -> str:
        """`regression` or `classification`."""
        return "classification" if self.classes else "regression"


@dataclass(frozen=True)
class Asked:
    """The targets that one task on the command line means, and what its data set prescribes for all of them."""

    task: str
    targets: tuple[Target, ...]
    split: np.ndarray | None = None  # (N,) str, as `tasks.Protocol`
    people: np.ndarray | None = None
    has_mean: bool = False
    notes: tuple[str, ...] = ()


def load_task(faces: Faces, task: str, kind: str | None = None, options: Any = None) -> Asked:
    """Return what a task asks for: one target, or those of a data set's protocol (all, or the one behind the dot).

    `options` are the protocol's own. Raises as `load_target`, and where no target of a protocol is usable.
    """
    room, _, wanted = task.partition(".")
    if task in faces.labels or room not in parts.names("tasks") or not hasattr(parts.load("tasks", room), "protocol"):
        return Asked(task, (load_target(faces.labels, task, kind),))
    module = parts.load("tasks", room)
    made: Protocol = module.protocol(faces, options or (module.Options() if hasattr(module, "Options") else None))
    if wanted and wanted not in made.targets:
        raise UsageError(f'{room} has no target "{wanted}"{did_you_mean(wanted, made.targets)}')
    targets, refused = [], []
    for name, values in made.targets.items():
        if wanted in ("", name):
            try:
                targets.append(_target(f"{room}.{name}", values, values.kind))
            except NoInputError as error:
                refused.append(str(error))
    if not targets:
        raise NoInputError(refused[0] + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""))
    notes = (*made.notes, *(f"{one}; it is left out" for one in refused))
    return Asked(task, tuple(targets), made.split, made.people, made.has_mean and not wanted, notes)


def load_target(labels: Mapping[str, np.ndarray], task: str, kind: str | None = None) -> Target:
    """Return the target of a task from the labels of a store (name -> (N,) float64 or str objects).

    Raises NoInputError where the label is absent, or nothing in it is usable; UsageError where text is asked to be a
    number, or where the task has several targets.
    """
    if task in parts.names("tasks"):
        module = parts.load("tasks", task)
        if not hasattr(module, "target"):
            raise UsageError(f"task {task} has several targets; name a label, or one of them, such as {task}.NAME")
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
    if hint.startswith("; there is"):
        return hint
    there_is = f"there is {', '.join(known)}"
    return f"{hint} ({there_is})" if hint else f"; {there_is}"


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
    texts = {cell: str(cell).strip() for cell in set(values)}  # few, of a class, however many the faces
    kept = {cell: "" if text.lower() in MISSING_TEXTS else text for cell, text in texts.items()}
    return np.array([kept[cell] for cell in values], dtype=object)


def _target(task: str, made: Values, kind: str | None) -> Target:
    values = without_missing_texts(made.values)
    as_float = numbers(values)
    if kind is None:
        _refuse_text_among_numbers(task, values, as_float)
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
        return Target(task, rows, values[rows].astype(np.float64), notes=notes, made=made)
    distinct, index = np.unique(values[rows], return_inverse=True)
    classes = tuple(f"{one:g}" if isinstance(one, float) else str(one) for one in distinct)
    if made.classes:  # the order that the task gives, without classes that no face has
        order = sorted(range(len(classes)), key=lambda number: made.classes.index(classes[number]))
        index, classes = np.argsort(order)[index], tuple(classes[number] for number in order)
    return Target(task, rows, index.astype(np.int64), classes, notes, made)


def looks_like_classes(values: np.ndarray) -> bool:
    """Return whether numbers are few and whole, as 0/1 or grades are."""
    distinct = np.unique(values[np.isfinite(values)])
    return len(distinct) <= MAX_NUMERIC_CLASSES and bool((distinct == np.round(distinct)).all())


def _refuse_text_among_numbers(task: str, values: np.ndarray, as_float: np.ndarray | None) -> None:
    """Raise UsageError where a number for most faces holds a few words, which would make every number a class."""
    if as_float is not None:
        return
    cells = sorted({str(cell) for cell in values} - {""})
    odd = [cell for cell in cells if numbers(np.array([cell], dtype=object)) is None]
    num_numbers = len(cells) - len(odd)
    if num_numbers > max(MAX_NUMERIC_CLASSES, len(odd)):
        raise UsageError(
            f"label {task}: {odd[0][:40]!r} is no number, as {num_numbers} other values are; empty it in the labels or "
            "type --kind classification"
        )


def _refuse_useless(task: str, values: np.ndarray, made: Values) -> None:
    if not len(values):
        reason = "; ".join(made.notes) or "every cell is empty"
        raise NoInputError(f"task {task}: no face has a usable label ({reason})")
    if len(np.unique(values)) == 1:
        value = f"{values[0]:g}" if isinstance(values[0], float) else f"{values[0]!s:.40}"
        raise NoInputError(f"task {task}: the label is {value} for all {len(values)} faces; it must vary")
