"""What came of a probe: scores, their subgroups, means over several, and differences between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mefem_cli.errors import NoInputError
from mefem_cli.evaluation import bootstrap, calibration, conformal, labels, metrics
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.conformal import Conformal
from mefem_cli.evaluation.metrics import Predictions

MIN_SUBGROUP = 20  # subgroups of fewer people are not shown: too few to say anything, too few to hide in


@dataclass(frozen=True)
class Score:
    """What one head reads from one kind of features of one store."""

    task: str
    head: str
    features: str
    store: str
    model: str
    predictions: Predictions  # of the first seed
    baseline_predictions: Predictions  # the mean, or the class shares, of each training fold
    metrics: dict[str, Interval]
    chosen: tuple[dict[str, Any], ...] = ()  # for each fold, what was chosen inside it
    attention: np.ndarray | None = None  # (n, T): what the head looked at, of heads that look at tokens
    repeats: tuple[Predictions, ...] = ()  # of the other seeds, on the same rows
    fraction: float = 1.0  # of the training people
    num_train: float = float("nan")  # people learned from, mean over folds
    p_values: dict[str, float] = field(default_factory=dict)  # metric -> of the permutation test
    num_permutations: int = 0
    published: Mapping[str, float] = field(default_factory=dict)  # metric -> of others, on other data and splits
    by: Mapping[str, np.ndarray] = field(default_factory=dict)  # subgroups that the task scores apart, (N,)
    mean_over: str | None = None
    fold_names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`regression` or `classification`."""
        return "classification" if self.predictions.classes else "regression"

    @property
    def seeds(self) -> tuple[Predictions, ...]:
        """The predictions of all seeds, on the same rows."""
        return (self.predictions, *self.repeats)

    @property
    def baseline(self) -> dict[str, float]:
        """Each metric of the baseline; a constant has no correlation."""
        return baseline_metrics(self.baseline_predictions)

    @cached_property
    def calibration(self) -> dict[str, float]:
        """Slope and intercept of observed on predicted, or the expected calibration error; of the first seed."""
        return calibration.calibration(self.predictions)

    @cached_property
    def conformal(self) -> Conformal:
        """90 % prediction intervals from the out-of-fold errors, and how often they held; of the first seed."""
        return conformal.cross(self.predictions)


@dataclass(frozen=True)
class Subgroup:
    """A score among the faces with one value of a label."""

    score: Score
    by: str
    value: str
    predictions: Predictions
    metrics: dict[str, Interval]
    baseline: dict[str, float]


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over several targets of a task, or over the subgroups of one."""

    task: str
    over: str  # targets, or the label whose values are the subgroups
    scores: tuple[Score, ...]
    count: int  # what the mean is over
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class Difference:
    """First minus second, on the faces that both predict."""

    first: Score
    second: Score
    num_rows: int
    num_groups: int
    metrics: dict[str, Interval]

    def verdict(self, metric: str) -> str:
        """`better` or `worse` (the first) where the interval excludes 0, else `unclear`."""
        difference = self.metrics[metric]
        if not difference.excludes_zero:
            return "unclear"
        return "better" if (difference.value > 0) != (metric in metrics.LOWER_IS_BETTER) else "worse"


def baseline_metrics(predictions: Predictions) -> dict[str, float]:
    """Return each metric of baseline predictions; a constant has no correlation."""
    values = metrics.compute(predictions, np.ones((1, len(predictions))))
    return {name: float(value[0]) for name, value in values.items() if name != "pearson_r"}


def subgroups(
    score: Score, by: str, values: np.ndarray, bootstraps: int = 2000, seed: int = 0
) -> tuple[list[Subgroup], int]:
    """Return the score among the faces with each value of a label, and how many small groups were left out.

    `values` (n,) belong to `score.predictions.ids`. A number with many values is cut into quarters.
    """
    shown, num_hidden = [], 0
    for value, rows in _cut(labels.without_missing_texts(values)):
        parts = [one.subset(rows) for one in score.seeds]
        if len(np.unique(parts[0].group)) < MIN_SUBGROUP:
            num_hidden += 1
            continue
        baseline = baseline_metrics(score.baseline_predictions.subset(rows))
        found = bootstrap.repeated_intervals(parts, bootstraps, [seed, 2])
        shown.append(Subgroup(score, by, value, parts[0], found, baseline))
    return shown, num_hidden


def _cut(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return (name, mask) of each value, or of each quarter of a number; missing values belong to none."""
    if values.dtype.kind not in "biuf":
        return [(str(value), values == value) for value in np.unique(values) if value != ""]
    known = values[np.isfinite(values)]
    if labels.looks_like_classes(values):
        return [(f"{value:g}", values == value) for value in np.unique(known)]
    edges = np.unique(np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    pairs = zip(edges[:-1], edges[1:], strict=True)
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairs]
    return [(name, (bins == index) & np.isfinite(values)) for index, name in enumerate(names)]


def mean_over_subgroups(score: Score, by: str, bootstraps: int, seed: int) -> Mean | None:
    """Return the mean of each metric over the subgroups of one of the task's own columns; None where there are none."""
    masks = [mask for _, mask in _cut(score.by[by])]
    rows = [np.flatnonzero(mask) for mask in masks]
    rows = [one for one in rows if len(np.unique(score.predictions.group[one])) >= MIN_SUBGROUP]
    if not rows:
        return None
    parts = [score.predictions.subset(one) for one in rows]
    found = bootstrap.mean_intervals(parts, bootstraps, [seed, 2], rows, score.predictions.group)
    return Mean(score.task, by, (score,), len(rows), found)


def mean_over_targets(task: str, scores: list[Score], bootstraps: int, seed: int) -> Mean | None:
    """Return the mean of each metric over a task's targets; None where they are not of the same faces."""
    first = scores[0].predictions
    if any(not np.array_equal(one.predictions.ids, first.ids) for one in scores):
        return None
    found = bootstrap.mean_intervals([one.predictions for one in scores], bootstraps, [seed, 2])
    return Mean(task, "targets", tuple(scores), len(scores), found)


def compare(first: Score, second: Score, bootstraps: int = 2000, seed: int = 0) -> Difference:
    """Return first minus second with paired 95 % intervals, on the faces that both predict.

    Raises NoInputError where they share no face or disagree on a label.
    """
    pairs = [_aligned(first, second, *pair) for pair in zip(first.seeds, second.seeds, strict=False)]
    found = bootstrap.repeated_intervals(
        [one for one, _ in pairs], bootstraps, [seed, 2], others=[other for _, other in pairs]
    )
    one = pairs[0][0]
    return Difference(first, second, len(one), int(one.group.max()) + 1, found)


def _aligned(first: Score, second: Score, one: Predictions, other: Predictions) -> tuple[Predictions, Predictions]:
    shared, in_first, in_second = np.intersect1d(one.ids, other.ids, return_indices=True)
    if not len(shared):
        raise NoInputError(f"{first.store} and {second.store} share no faces; embed the same crops into both")
    one, other = one.subset(in_first), other.subset(in_second)
    if one.classes != other.classes or not np.allclose(one.target, other.target):
        raise NoInputError(f"{first.store} and {second.store} disagree on {first.task} of the same faces; embed again")
    return one, replace(other, ids=one.ids, target=one.target, group=one.group)
