"""Do predictions mean what they say? Of a number, observed on predicted; of classes, confidence beside accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mefem_cli.evaluation.metrics import Predictions

NUM_BINS = 15


@dataclass(frozen=True)
class Bin:
    """Faces predicted with about one confidence."""

    confidence: float  # mean probability of the predicted class
    accuracy: float
    count: int


def calibration(predictions: Predictions) -> dict[str, float]:
    """Return `slope` and `intercept` of observed on predicted (ideal 1 and 0), or `ece`; NaN where undefined."""
    return {"ece": expected_calibration_error(predictions)} if predictions.classes else line(predictions)


def line(predictions: Predictions) -> dict[str, float]:
    """Return slope and intercept of the least-squares line of observed on predicted values.

    A slope under 1: predictions are spread too wide; above 1: too timid. Over all folds together.
    """
    predicted, observed = predictions.output, predictions.target
    centred = predicted - predicted.mean()
    spread = float(centred @ centred)
    if spread <= 1e-12 * max(float(predicted @ predicted), 1e-300):
        return {"slope": float("nan"), "intercept": float("nan")}
    slope = float(centred @ observed) / spread
    return {"slope": slope, "intercept": float(observed.mean() - slope * predicted.mean())}


def reliability(predictions: Predictions, num_bins: int = NUM_BINS) -> list[Bin]:
    """Return accuracy and mean confidence of the predicted class in bins of equal width; empty bins are left out."""
    confidence = predictions.output.max(axis=1)
    is_right = predictions.prediction == predictions.target
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    return [
        Bin(float(confidence[rows].mean()), float(is_right[rows].mean()), int(rows.sum()))
        for rows in (index == number for number in np.unique(index))
    ]


def expected_calibration_error(predictions: Predictions, num_bins: int = NUM_BINS) -> float:
    """Return the mean distance of accuracy and confidence over bins, weighted by their faces (Guo et al. 2017)."""
    bins = reliability(predictions, num_bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / len(predictions)
