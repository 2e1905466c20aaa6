"""Prediction intervals from out-of-fold errors: split-conformal, with the exact rank of a finite sample.

For one face per person the half width at level 1 - a is the error of rank ceil((n + 1)(1 - a)) among n. Several photos
of a person are no n independent errors: each counts 1 / (photos of the person), and 1 / (people + 1) of the weight lies
at infinity (hierarchical conformal prediction, Lee et al. 2023), which for single photos is the rank above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mefem_cli.evaluation.metrics import Predictions

LEVEL = 0.9


@dataclass(frozen=True)
class Conformal:
    """Intervals (sets of classes) that should hold the truth of a new person at `level`.

    `coverage` and `width` are measured: each fold's intervals are made from the errors in the other folds. That is
    cross-conformal: the errors are of several fits, so the guarantee of a single split (at least `level`) loosens to
    1 - 2 (1 - level) in theory, while in practice coverage is about `level`.
    """

    level: float
    half_width: float  # from all errors, for a new face: the prediction +- this; of classes, the largest 1 - p allowed
    coverage: float  # share of people (photos of one averaged) whose truth was held
    width: float  # mean width of the intervals; of classes, mean number of classes in the set


def errors(predictions: Predictions) -> np.ndarray:
    """Return the non-conformity of each row, (N,): the absolute error, or 1 - p of the true class."""
    if predictions.classes:
        return 1 - predictions.output[np.arange(len(predictions)), predictions.target]
    return np.abs(predictions.target - predictions.output)


def quantile(scores: np.ndarray, group: np.ndarray, level: float = LEVEL) -> float:
    """Return the bound that a new person's score stays under at `level`; infinite where there are too few people.

    `scores` (N,), `group` (N,): the rows of one person share one number.

    >>> quantile(np.arange(1.0, 20), np.arange(19))  # rank ceil(20 * .9) = 18 of 19
    18.0
    """
    _, index, count = np.unique(group, return_inverse=True, return_counts=True)
    num_groups = len(count)
    order = np.argsort(scores, kind="stable")
    weight = np.cumsum((1 / count[index])[order])  # in people
    reached = np.flatnonzero(weight >= (num_groups + 1) * level - 1e-9)
    return float(scores[order[reached[0]]]) if len(reached) else float("inf")


def cross(predictions: Predictions, level: float = LEVEL) -> Conformal:
    """Return intervals and their measured coverage; a single fold is cut into two halves of people."""
    scores = errors(predictions)
    part = predictions.fold
    if len(np.unique(part)) == 1:
        part = np.random.default_rng(0).permutation(int(predictions.group.max()) + 1)[predictions.group] % 2
    covered, width = np.zeros(len(scores)), np.zeros(len(scores))
    for number in np.unique(part):
        test = part == number
        bound = quantile(scores[~test], predictions.group[~test], level)
        covered[test] = scores[test] <= bound
        width[test] = (1 - predictions.output[test] <= bound).sum(axis=1) if predictions.classes else 2 * bound
    weight = 1 / np.bincount(predictions.group)[predictions.group]
    mean = [float(np.average(values, weights=weight)) for values in (covered, width)]
    return Conformal(level, quantile(scores, predictions.group, level), *mean)
