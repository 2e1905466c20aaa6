"""What age and sex alone tell: a baseline that a face must beat, as body mass index is partly age."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mefem_cli.evaluation import labels
from mefem_cli.evaluation.problem import Problem
from mefem_cli.tasks import numbers

AGES = ("age", "age_years", "age_est")  # labels that hold years
SEXES = ("sex", "gender", "sex_est")
NAME = "age+sex"


def age_and_sex(columns: Mapping[str, np.ndarray], problem: Problem) -> np.ndarray | None:
    """Return years and sex of a problem's rows as features [n, F]; None where a label is absent or is the target.

    Missing years are the median with a mark, a missing sex is a class of its own. Values of classes become 0 and 1.
    """
    age = next((name for name in AGES if name in columns), None)
    sex = next((name for name in SEXES if name in columns), None)
    if age is None or sex is None or problem.task.split(".")[-1] in (*AGES, *SEXES):
        return None
    years = numbers(labels.without_missing_texts(columns[age])[problem.rows])
    if years is None or not np.isfinite(years).any():
        return None
    is_missing = ~np.isfinite(years)
    years = np.where(is_missing, np.median(years[~is_missing]), years)
    texts = labels.without_missing_texts(columns[sex])[problem.rows].astype(str)
    classes = np.unique(texts, return_inverse=True)[1]
    return np.concatenate([years[:, None], is_missing[:, None], np.eye(int(classes.max()) + 1)[classes]], axis=1)
