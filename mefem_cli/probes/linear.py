"""Ridge regression or multinomial logistic regression on standardised features, the penalty chosen inside."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits  # scikit-learn brings it

from mefem_cli.probes import Fitted, Fold, State, mean_log_loss, scaling, softmax

FEATURES = ("cls", "mean", "cls+mean")
PENALTIES = tuple(10.0 ** (half / 2) for half in range(-4, 13))  # of ridge: 0.01 to 1e6; features are standardised
STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-10, 3))  # of logistic: 1 / penalty, 1e-5 to 10
SMALL_WIDTH = 1024  # features
LOGISTIC_INNER_FOLDS = 3  # of the inner folds, how many a logistic penalty is tried on: each try is a slow fit
# Rows that a logistic penalty is chosen on at most: it weighs against the sum over rows, so the best one hardly depends
# on their number, and where they are many any penalty does. CelebA has 162,770 rows and 40 targets.
CHOICE_ROWS = 20_000
MANY_VALUES = 1 << 24  # features of logistic regression: from here single precision, on all threads


@dataclass(frozen=True)
class Options:
    """Nothing to set: the penalty is chosen inside the training folds."""


def fit_predict(fold: Fold, options: Options) -> Fitted:
    """Choose the penalty on the inner folds, refit on the whole training fold, predict the test fold."""
    if fold.num_classes:
        return _logistic(fold)
    # Small matrices: more BLAS threads than one mostly wait for each other, ten times as long on a busy machine.
    with threadpool_limits(1 if fold.features.shape[1] <= SMALL_WIDTH else None):
        return _ridge(fold)


def _ridge(fold: Fold) -> Fitted:
    features, target = fold.train_features, fold.target
    errors = np.zeros(len(PENALTIES))
    for held_out in fold.held_out:
        train, valid = fold.inner != held_out, fold.inner == held_out
        predictions = ridge_path(features[train], target[train], features[valid], PENALTIES)  # [P, v]
        errors += ((predictions - target[valid]) ** 2).sum(axis=1)
    penalty = PENALTIES[int(np.argmin(errors))]
    state = _ridge_state(features, target, [penalty])
    state["weight"] = state["weight"][:, 0]
    return Fitted(predict(state, fold.test_features), {"penalty": penalty}, state)


def predict(state: State, features: np.ndarray) -> np.ndarray:
    """Return what a fitted head reads from features [m, D]: numbers (m,), or class probabilities [m, C]."""
    read = ((features - state["mean"]) * state["scale"]) @ state["weight"] + state["bias"]
    return softmax(read) if read.ndim == 2 else read


def ridge_path(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Return ridge predictions for every penalty, [P, m], from one eigendecomposition."""
    state = _ridge_state(train_x, train_y, penalties)
    return (((test_x - state["mean"]) * state["scale"]) @ state["weight"]).T + state["bias"]


def _ridge_state(train_x: np.ndarray, train_y: np.ndarray, penalties: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the fit for every penalty, `weight` [D, P].

    Minimises |y - b - Xw|^2 + penalty |w|^2 on standardised X, as scikit-learn's Ridge does. With X = U S V', the
    weights are V (S^2 + penalty)^-1 V' X' y; V and S^2 come from the D x D matrix X'X, or where there are fewer rows
    than features (n < D) from the n x n matrix XX', as X' U (S^2 + penalty)^-1 U' y.
    """
    mean, scale = scaling(train_x)
    train = (train_x - mean) * scale
    offset = train_y.mean()
    is_wide = len(train) < train.shape[1]
    squares, vectors = np.linalg.eigh(train @ train.T if is_wide else train.T @ train)
    right = train_y - offset if is_wide else train.T @ (train_y - offset)
    shrunk = (vectors.T @ right)[:, None] / (np.maximum(squares, 0)[:, None] + np.asarray(penalties))  # [r, P]
    weight = vectors @ shrunk
    return {"mean": mean, "scale": scale, "weight": train.T @ weight if is_wide else weight, "bias": np.array(offset)}


def _logistic(fold: Fold) -> Fitted:
    is_large = len(fold.train) * fold.features.shape[1] >= MANY_VALUES
    dtype = np.float32 if is_large else np.float64

    def read(rows: np.ndarray) -> np.ndarray:
        return fold.features[fold.train[rows]].astype(dtype)

    with threadpool_limits(None if is_large else 1):  # small matrices: threads mostly wait for each other
        losses = np.zeros(len(STRENGTHS))
        for held_out in fold.held_out[:LOGISTIC_INNER_FOLDS]:
            train, valid = np.flatnonzero(fold.inner != held_out), np.flatnonzero(fold.inner == held_out)
            if len(train) > CHOICE_ROWS:
                train = np.sort(np.random.default_rng(fold.seed).choice(train, CHOICE_ROWS, replace=False))
            path = logistic_path(read(train), fold.target[train], read(valid), STRENGTHS, fold.num_classes)
            losses += [mean_log_loss(probabilities, fold.target[valid]) * len(valid) for probabilities in path]
        strength = STRENGTHS[int(np.argmin(losses))]
        (state,) = _logistic_states(read(np.arange(len(fold.train))), fold.target, [strength], fold.num_classes)
    return Fitted(predict(state, fold.test_features), {"penalty": 1 / strength}, state)


def logistic_path(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, strengths: Sequence[float], num_classes: int
) -> list[np.ndarray]:
    """Return class probabilities [m, C] for each inverse penalty, each fit starting from the one before it.

    A class that the training rows lack has probability 0.
    """
    return [predict(state, test_x) for state in _logistic_states(train_x, train_y, strengths, num_classes)]


def _logistic_states(
    train_x: np.ndarray, train_y: np.ndarray, strengths: Sequence[float], num_classes: int
) -> list[dict[str, np.ndarray]]:
    """Return the fit for each inverse penalty: `weight` [D, C], `bias` (C,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = np.unique(train_y)
    mean, scale = scaling(train_x)
    blank = np.zeros((len(mean), num_classes)), np.full(num_classes, -np.inf)
    blank[1][present] = 0
    if len(present) == 1:
        return [{"mean": mean, "scale": scale, "weight": blank[0], "bias": blank[1]} for _ in strengths]
    train = train_x - mean.astype(train_x.dtype)
    train *= scale.astype(train_x.dtype)  # in place: CelebA's features fill a quarter of a gigabyte
    model = LogisticRegression(max_iter=300, warm_start=True)
    states = []
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the optimum may be infinitely far
            model.fit(train, train_y)
        weight, bias = blank[0].copy(), blank[1].copy()
        fitted = present[1:] if len(model.coef_) == 1 else present  # of two classes only the second has weights
        weight[:, fitted], bias[fitted] = model.coef_.T, model.intercept_
        states.append({"mean": mean, "scale": scale, "weight": weight, "bias": bias})
    return states
