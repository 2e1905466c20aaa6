"""Age in years."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mefem_cli.tasks import Values, reject_outside

KIND = "regression"
NEEDS = (("age",),)
PLAUSIBLE_YEARS = (0.0, 120.0)


def target(labels: Mapping[str, np.ndarray]) -> Values:
    """Return the `age` label, years outside 0-120 rejected."""
    return reject_outside("age", labels["age"], *PLAUSIBLE_YEARS, "years")
