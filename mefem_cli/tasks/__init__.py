"""Label protocols, one per file; the file name is the TASK of `mefem probe`. Any other label is a task by itself.

A task is a module with `NEEDS` (the labels it can be made from: alternatives, the first that the store has is used),
`KIND` (regression or classification) and `target(labels) -> Values`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Values:
    """A label ready to be read from features."""

    values: np.ndarray  # (N,) float64; NaN: missing or rejected
    notes: tuple[str, ...] = ()  # what was rejected and why, for the user


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
