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
# A median height below the first is in that unit (a median of 90 cm: children under three); times the last: cm.
WRONG_UNITS = ((2.8, "metres", 100), (9.0, "feet", 30.48), (90.0, "inches", 2.54))


def target(labels: Mapping[str, np.ndarray]) -> Values:
    """Return body mass index, implausible values rejected."""
    if "bmi" in labels:
        return reject_outside("bmi", labels["bmi"], *PLAUSIBLE_BMI, "kg/m2")
    weight = reject_outside("weight_kg", labels["weight_kg"], *PLAUSIBLE_KG, "kg")
    height = reject_outside("height_cm", labels["height_cm"], *PLAUSIBLE_CM, "cm")
    index = reject_outside("bmi", weight.values / (height.values / 100) ** 2, *PLAUSIBLE_BMI, "kg/m2")
    return Values(index.values, _unit_hint(labels["height_cm"]) + weight.notes + height.notes + index.notes)


def _unit_hint(height: np.ndarray) -> tuple[str, ...]:
    known = height[np.isfinite(height)]
    median = float(np.median(known)) if len(known) else np.nan
    for below, unit, factor in WRONG_UNITS:
        if median < below:
            return (f"height_cm looks like {unit} (median {median:.3g}); multiply it by {factor:g}",)
    return ()
