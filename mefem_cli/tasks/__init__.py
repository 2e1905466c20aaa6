"""Label protocols, one per file; the file name is the TASK of `mefem probe`. Any other label is a task by itself.

A task with one target is a module with `NEEDS` (the labels it can be made from: alternatives, the first that the store
has is used), `KIND` (regression or classification) and `target(labels) -> Values`.

The protocol of a data set is a module with `protocol(faces, options) -> Protocol`, and `Options` if it has some. Its
targets are asked for together (`celeba`) or one by one (`celeba.Smiling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Values:
    """A label ready to be read from features."""

    values: np.ndarray  # (N,) float64, or str objects; NaN or "": missing or rejected
    notes: tuple[str, ...] = ()  # what was rejected and why, for the user
    kind: str | None = None  # of a data set's target: regression or classification
    classes: tuple[str, ...] = ()  # the order of classes, where it is not that of their names
    published: Mapping[str, float] = field(default_factory=dict)  # metric -> what others published, shown as such
    by: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) subgroups that the protocol scores apart
    mean_over: str | None = None  # a key of `by`: the protocol also averages over its subgroups


@dataclass(frozen=True)
class Faces:
    """What is known of the faces of a store without their features."""

    labels: Mapping[str, np.ndarray]  # name -> (N,) float64 or str objects
    sources: np.ndarray  # (N,) str: paths of the photos; "" where unknown


@dataclass(frozen=True)
class Protocol:
    """The targets of a data set, and its own split."""

    targets: Mapping[str, Values]
    split: np.ndarray | None = None  # (N,) str: train, val, test, or a fold's number; "": in none
    people: np.ndarray | None = None  # (N,): who is who, where the data set says it
    has_mean: bool = False  # the score is the mean over all targets
    notes: tuple[str, ...] = ()


def numbers(values: np.ndarray) -> np.ndarray | None:
    """Return a label column as float64, NaN where a cell is empty; None where it holds text that is no number."""
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    try:
        return np.array([float(cell) if str(cell).strip() else np.nan for cell in values])
    except ValueError:
        return None


def reject_outside(name: str, values: np.ndarray, low: float, high: float, unit: str) -> Values:
    """Replace implausible values by NaN and say how many there were."""
    with np.errstate(invalid="ignore"):
        is_outside = (values < low) | (values > high)
    if not is_outside.any():
        return Values(values)
    example = values[is_outside][0]
    note = f"{name}: {is_outside.sum()} implausible values left out (outside {low:g}-{high:g} {unit}, e.g. {example:g})"
    return Values(np.where(is_outside, np.nan, values), (note,))
