"""Metrics of out-of-fold predictions, for many weightings of the rows at once.

A bootstrap replicate is a weighting (how often each row was drawn), so each metric takes `weights` [B, N] and returns
[B]; the point estimate is the weighting with ones. Pooled over folds, except AUROC: scores of different fitted models
do not share a scale, so it is computed in each fold and averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LOWER_IS_BETTER = frozenset({"mae", "rmse"})
REGRESSION = ("r2", "mae", "rmse", "pearson_r")
CLASSIFICATION = ("accuracy", "balanced_accuracy", "f1", "auroc")
RANGES = {  # what a metric can be
    **dict.fromkeys(CLASSIFICATION, (0.0, 1.0)),
    **dict.fromkeys(LOWER_IS_BETTER, (0.0, math.inf)),
    "r2": (-math.inf, 1.0),
    "pearson_r": (-1.0, 1.0),
}


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions of one head: every row was predicted by a model that never saw its group."""

    ids: np.ndarray  # (N,) str
    target: np.ndarray  # (N,) float64, or int64 index into `classes`
    output: np.ndarray  # (N,) float64, or class probabilities [N, C]
    fold: np.ndarray  # (N,) int
    group: np.ndarray  # (N,) int: rows of one group are resampled together
    classes: tuple[str, ...] = ()  # empty: regression

    @property
    def prediction(self) -> np.ndarray:
        """The predicted value or class index, (N,)."""
        return self.output.argmax(axis=1) if self.classes else self.output

    def __len__(self) -> int:
        return len(self.target)

    def subset(self, rows: np.ndarray) -> Predictions:
        """Return the rows given by a mask or by indices; groups are numbered anew."""
        group = np.unique(self.group[rows], return_inverse=True)[1]
        return Predictions(self.ids[rows], self.target[rows], self.output[rows], self.fold[rows], group, self.classes)

    def averaged(self, number: np.ndarray) -> Predictions:
        """Return one row for all rows of one number (N,), fold and class: their mean target and output.

        The id and the group are those of the first row of them.
        """
        keys = [number, self.fold, *([self.target] if self.classes else [])]
        _, first, index = np.unique(np.stack(keys), axis=1, return_index=True, return_inverse=True)
        index = index.ravel()
        order = np.argsort(np.argsort(first))  # in the order of their first rows
        index, first = order[index], np.sort(first)
        count = np.bincount(index)
        output = np.zeros((len(first), *self.output.shape[1:]))
        np.add.at(output, index, self.output)
        output /= count.reshape(-1, *[1] * (output.ndim - 1))
        target = self.target[first] if self.classes else np.bincount(index, self.target) / count
        return Predictions(self.ids[first], target, output, self.fold[first], self.group[first], self.classes)


def compute(predictions: Predictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric for each weighting: name -> [B] from `weights` [B, N]; NaN where it is undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if predictions.classes:
            return _classification(predictions, weights)
        return _regression(predictions.target, predictions.output, weights)


def _regression(target: np.ndarray, prediction: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    centre = target.mean()  # moments about a point near the mean lose no digits
    y, p = target - centre, prediction - centre
    error = prediction - target
    moments = np.stack([np.ones_like(y), y, y * y, p, p * p, y * p, np.abs(error), error * error], axis=1)  # [N, 8]
    total, sum_y, sum_yy, sum_p, sum_pp, sum_yp, absolute, squared = (weights @ moments).T  # each [B]
    spread_y = sum_yy - sum_y**2 / total  # sum of squares about the mean of the replicate
    spread_p = sum_pp - sum_p**2 / total
    tiny = 1e-12 * np.maximum(sum_yy, sum_pp)  # a constant has no spread but for rounding
    return {
        "r2": np.where(spread_y > tiny, 1 - squared / spread_y, np.nan),
        "mae": absolute / total,
        "rmse": np.sqrt(squared / total),
        "pearson_r": np.where(
            np.minimum(spread_y, spread_p) > tiny,
            (sum_yp - sum_y * sum_p / total) / np.sqrt(np.maximum(spread_y * spread_p, 0)),
            np.nan,
        ),
    }


def _classification(predictions: Predictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    num_classes = len(predictions.classes)
    cell = predictions.target * num_classes + predictions.prediction
    confusion = weights @ np.eye(num_classes**2)[cell]  # [B, C * C]
    confusion = confusion.reshape(-1, num_classes, num_classes)  # [B, true class, predicted class]
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # [B, C]
    actual, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    recall = np.where(actual > 0, hits / actual, np.nan)  # a class absent from a replicate has no recall
    f1 = np.where(actual + predicted > 0, 2 * hits / (actual + predicted), np.nan)
    return {
        "accuracy": hits.sum(axis=1) / confusion.sum(axis=(1, 2)),
        "balanced_accuracy": _mean_of_known(recall),
        "f1": _mean_of_known(f1),
        "auroc": _auroc_over_folds(predictions, weights),
    }


def _auroc_over_folds(predictions: Predictions, weights: np.ndarray) -> np.ndarray:
    """AUROC in each fold, averaged over folds; of more than two classes, the mean of one against the rest."""
    positives = [1] if len(predictions.classes) == 2 else range(len(predictions.classes))
    values = []
    for fold in np.unique(predictions.fold):
        rows = np.flatnonzero(predictions.fold == fold)
        one_fold = [
            _auroc(predictions.target[rows] == positive, predictions.output[rows, positive], weights[:, rows])
            for positive in positives
        ]
        values.append(_mean_of_known(np.stack(one_fold, axis=1)))
    return _mean_of_known(np.stack(values, axis=1))


def _auroc(is_positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted share of (positive, negative) pairs in the right order, ties half: [B] from `weights` [B, n]."""
    values, tied = np.unique(score, return_inverse=True)
    order = np.argsort(tied, kind="stable")
    starts = np.searchsorted(tied[order], np.arange(len(values)))
    positive = np.add.reduceat((weights * is_positive)[:, order], starts, axis=1)  # [B, distinct scores]
    negative = np.add.reduceat((weights * ~is_positive)[:, order], starts, axis=1)
    negatives_below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.where(pairs > 0, (positive * negatives_below).sum(axis=1) / pairs, np.nan)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where all are."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)


def per_fold(predictions: Predictions) -> dict[str, list[float]]:
    """Return each metric in each fold alone."""
    folds = [predictions.subset(predictions.fold == fold) for fold in np.unique(predictions.fold)]
    values = [compute(one, np.ones((1, len(one)))) for one in folds]
    return {name: [float(value[name][0]) for value in values] for name in values[0]}
