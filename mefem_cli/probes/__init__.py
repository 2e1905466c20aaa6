"""Heads that read a label from frozen features, one per file; the file name is the choice in `--head`.

A head is a module with `FEATURES` (the features it takes, its default first), `Options`, and
`fit_predict(fold, options) -> Fitted`. It sees the rows of the training fold with their targets, and of the test fold
the features only; whatever it chooses, it chooses on `fold.inner`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fold:
    """One fold of a task, as a head sees it."""

    features: np.ndarray  # [N, D], or [N, T, D] where the head takes tokens; float16 or float32
    train: np.ndarray  # (n,) int: rows of `features` to learn from
    test: np.ndarray  # (m,) int: rows to predict
    target: np.ndarray  # (n,) float64, or int64 class index; of the training rows only
    inner: np.ndarray  # (n,) int: grouped, stratified folds of the training rows, to choose options on
    num_classes: int = 0  # 0: regression
    seed: int = 0
    device: str = "auto"  # for heads trained by gradient

    @property
    def train_features(self) -> np.ndarray:
        """Features to learn from, float64 [n, D]: for heads that solve equations."""
        return self.features[self.train].astype(np.float64)

    @property
    def test_features(self) -> np.ndarray:
        """Features to predict from, float64 [m, D]."""
        return self.features[self.test].astype(np.float64)


@dataclass(frozen=True)
class Fitted:
    """What a head returns for a fold."""

    output: np.ndarray  # (m,) float64, or class probabilities [m, C]
    chosen: dict[str, Any] = field(default_factory=dict)  # what was chosen inside the training fold


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return features with mean 0 and standard deviation 1 over the training rows [n, D]; a constant becomes 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    is_constant = deviation <= 1e-9 * np.maximum(np.abs(mean), 1e-300)
    scale = np.where(is_constant, 0, 1 / np.where(is_constant, 1, deviation))
    return tuple((one - mean) * scale for one in (train, *others))


def mean_log_loss(probabilities: np.ndarray, target: np.ndarray) -> float:
    """Return the mean negative log probability of the true class; probabilities [m, C] are kept off 0."""
    return float(-np.log(np.clip(probabilities[np.arange(len(target)), target], 1e-9, None)).mean())
