"""Heads that read a label from frozen features, one per file; the file name is the choice in `--head`.

A head is a module with `FEATURES` (the features it takes, its default first), `Options`, and
`fit_predict(fold, options) -> Fitted`. It sees the rows of the training fold with their targets, and of the test fold
the features only; whatever it chooses, it chooses on `fold.inner`. A head that can be kept fills `Fitted.state` and
has `predict(state, features)`, which gives the same output for other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

State = Mapping[str, np.ndarray]  # what a fitted head is made of, by name


@dataclass(frozen=True)
class Fold:
    """One fold of a task, as a head sees it."""

    features: Any  # array [N, D], or [N, T, D] where the head takes tokens; float16 or float32; tokens may be streamed
    train: np.ndarray  # (n,) int: rows of `features` to learn from
    test: np.ndarray  # (m,) int: rows to predict
    target: np.ndarray  # (n,) float64, or int64 class index; of the training rows only
    inner: (
        np.ndarray
    )  # (n,) int: grouped, stratified folds of the training rows, to choose options on; -1: never held out
    num_classes: int = 0  # 0: regression
    seed: int = 0
    device: str = "auto"  # for heads trained by gradient

    @property
    def held_out(self) -> np.ndarray:
        """The inner folds to hold out, each in turn; only one where a data set has a validation part."""
        return np.unique(self.inner[self.inner >= 0])

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
    state: State = field(default_factory=dict)  # what `predict` takes; empty where the head cannot be kept
    attention: np.ndarray | None = None  # (m, T): share of each token in what the head gathered; it looks at tokens


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return features with mean 0 and standard deviation 1 over the training rows [n, D]; a constant becomes 0."""
    mean, scale = scaling(train)
    return tuple((one - mean) * scale for one in (train, *others))


def scaling(train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and 1 / standard deviation of features [n, D], each (D,); the scale of a constant is 0."""
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    is_constant = deviation <= 1e-9 * np.maximum(np.abs(mean), 1e-300)
    return mean, np.where(is_constant, 0, 1 / np.where(is_constant, 1, deviation))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities [m, C] of logits [m, C]; a logit of minus infinity is probability 0."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def mean_log_loss(probabilities: np.ndarray, target: np.ndarray) -> float:
    """Return the mean negative log probability of the true class; probabilities [m, C] are kept off 0."""
    return float(-np.log(np.clip(probabilities[np.arange(len(target)), target], 1e-9, None)).mean())
