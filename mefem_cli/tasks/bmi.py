"""Body mass index in kg/m2: the `bmi` label, else weight_kg / (height_cm / 100)^2.

Implausible values are rejected by rule and counted. The bounds hold every adult and child on record but for a handful;
they are there to catch a wrong unit, not to trim the distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mefem_cli.tasks import Values, reject_outside

KIND = "regression"
NEEDS = (("bmi",), ("weight_kg", "height_cm"))
PLAUSIBLE_BMI = (8.0, 110.0)
PLAUSIBLE_KG = (2.0, 400.0)
PLAUSIBLE_CM = (45.0, 260.0)
# Heights between the first two are in that unit, whatever the others are; times the last: cm.
WRONG_UNITS = ((0.45, 2.6, "metres", 100), (3.0, 8.5, "feet", 30.48), (450.0, 2600.0, "millimetres", 0.1))
INCHES = 90.0  # or a median of centimetres below it: children under three
POUNDS = 46.0  # kg/m2: no population's median


def target(labels: Mapping[str, np.ndarray]) -> Values:
    """Return body mass index, implausible values rejected."""
    if "bmi" in labels:
        return reject_outside("bmi", labels["bmi"], *PLAUSIBLE_BMI, "kg/m2")
    weight = reject_outside("weight_kg", labels["weight_kg"], *PLAUSIBLE_KG, "kg")
    height = reject_outside("height_cm", labels["height_cm"], *PLAUSIBLE_CM, "cm")
    index = reject_outside("bmi", weight.values / (height.values / 100) ** 2, *PLAUSIBLE_BMI, "kg/m2")
    hints = _unit_hints(labels["height_cm"], height.values, index.values)
    return Values(index.values, hints + weight.notes + height.notes + index.notes)


def _unit_hints(given: np.ndarray, plausible: np.ndarray, index: np.ndarray) -> tuple[str, ...]:
    """Return what the heights as given, those that are plausible, and the body mass indices say about units."""
    hints = []
    num_known = int(np.isfinite(given).sum())
    for low, high, unit, factor in WRONG_UNITS:
        found = given[(given >= low) & (given <= high)]
        if len(found):
            count = "all" if len(found) == num_known else f"{len(found)} of {num_known}"
            like = f"{count} values look like {unit} (e.g. {found[0]:.3g})"
            hints.append(f"height_cm: {like}; multiply them by {factor:g}")
    if (median := _median(plausible)) < INCHES:
        hints.append(f"height_cm looks like inches (median {median:.3g}); multiply it by 2.54")
    elif (median := _median(index)) > POUNDS:
        hints.append(f"weight_kg looks like pounds (median body mass index {median:.3g}); multiply it by 0.4536")
    return tuple(hints)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan
