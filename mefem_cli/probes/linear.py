"""Ridge regression or multinomial logistic regression on standardised features, the penalty chosen inside."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mefem_cli.probes import Fitted, Fold, mean_log_loss, standardise

FEATURES = ("cls", "mean", "cls+mean")
PENALTIES = tuple(10.0 ** (half / 2) for half in range(-4, 13))  # of ridge: 0.01 to 1e6; features are standardised
STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-10, 3))  # of logistic: 1 / penalty, 1e-5 to 10
LOGISTIC_INNER_FOLDS = 3  # of the inner folds, how many a logistic penalty is tried on: each try is a slow fit


@dataclass(frozen=True)
class Options:
    """Nothing to set: the penalty is chosen inside the training folds."""


def fit_predict(fold: Fold, options: Options) -> Fitted:
    """Choose the penalty on the inner folds, refit on the whole training fold, predict the test fold."""
    return _logistic(fold) if fold.num_classes else _ridge(fold)


def _ridge(fold: Fold) -> Fitted:
    features, target = fold.train_features, fold.target
    errors = np.zeros(len(PENALTIES))
    for held_out in np.unique(fold.inner):
        train, valid = fold.inner != held_out, fold.inner == held_out
        predictions = ridge_path(features[train], target[train], features[valid], PENALTIES)  # [P, v]
        errors += ((predictions - target[valid]) ** 2).sum(axis=1)
    penalty = PENALTIES[int(np.argmin(errors))]
    output = ridge_path(features, target, fold.test_features, [penalty])[0]
    return Fitted(output, {"penalty": penalty})


def ridge_path(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Return ridge predictions for every penalty, [P, m], from one eigendecomposition.

    Minimises |y - b - Xw|^2 + penalty |w|^2 on standardised X, as scikit-learn's Ridge does. With X = U S V', the
    predictions are test V (S^2 + penalty)^-1 V' X' y; V and S^2 come from the D x D matrix X'X, or where there are
    fewer rows than features (n < D) from the n x n matrix XX', as test X' U (S^2 + penalty)^-1 U' y.
    """
    train, test = standardise(train_x, test_x)
    offset = train_y.mean()
    centred = train_y - offset
    if len(train) < train.shape[1]:
        basis, coordinates, projected = train @ train.T, test @ train.T, centred
    else:
        basis, coordinates, projected = train.T @ train, test, train.T @ centred
    squares, vectors = np.linalg.eigh(basis)
    shrunk = (vectors.T @ projected)[:, None] / (np.maximum(squares, 0)[:, None] + np.asarray(penalties))  # [r, P]
    return ((coordinates @ vectors) @ shrunk).T + offset


def _logistic(fold: Fold) -> Fitted:
    features, target = fold.train_features, fold.target
    losses = np.zeros(len(STRENGTHS))
    for held_out in np.unique(fold.inner)[:LOGISTIC_INNER_FOLDS]:
        train, valid = fold.inner != held_out, fold.inner == held_out
        path = logistic_path(features[train], target[train], features[valid], STRENGTHS, fold.num_classes)
        losses += [mean_log_loss(probabilities, target[valid]) * valid.sum() for probabilities in path]
    strength = STRENGTHS[int(np.argmin(losses))]
    output = logistic_path(features, target, fold.test_features, [strength], fold.num_classes)[0]
    return Fitted(output, {"penalty": 1 / strength})


def logistic_path(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, strengths: Sequence[float], num_classes: int
) -> list[np.ndarray]:
    """Return class probabilities [m, C] for each inverse penalty, each fit starting from the one before it.

    A class that the training rows lack has probability 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn brings it

    present = np.unique(train_y)
    if len(present) == 1:
        return [np.eye(num_classes)[np.full(len(test_x), present[0])] for _ in strengths]
    train, test = standardise(train_x, test_x)
    model = LogisticRegression(max_iter=300, warm_start=True)
    path = []
    for strength in strengths:
        model.set_params(C=strength)
        # The matrices are small: more BLAS threads than one only wait for each other, for long on a busy machine.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the optimum may be infinitely far
            model.fit(train, train_y)
        probabilities = np.zeros((len(test), num_classes))
        probabilities[:, present] = model.predict_proba(test)
        path.append(probabilities)
    return path
