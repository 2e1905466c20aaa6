"""k nearest neighbours by cosine distance on standardised features, k chosen inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mefem_cli.errors import UsageError
from mefem_cli.probes import Fitted, Fold, mean_log_loss, standardise

FEATURES = ("cls", "mean", "cls+mean")
BLOCK_ROWS = 1024  # test rows whose distances to all training rows are held at once


@dataclass(frozen=True)
class Options:
    """k nearest neighbours."""

    neighbors: str = "1,2,5,10,20,50,100"  # numbers of neighbours to choose among, inside the training folds

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise UsageError(f"--neighbors {self.neighbors}: wanted whole numbers from 1, such as 5,10,20")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of neighbours, ascending."""
        words = [word.strip() for word in self.neighbors.split(",")]
        return tuple(sorted({int(word) for word in words})) if all(word.isdecimal() for word in words) else ()


def fit_predict(fold: Fold, options: Options) -> Fitted:
    """Choose k on the inner folds by squared error or log loss; predict the test fold from all training rows."""
    features, target = fold.train_features, fold.target
    smallest = min(int((fold.inner != held_out).sum()) for held_out in fold.held_out)
    counts = [count for count in options.counts if count <= smallest] or [smallest]
    losses = np.zeros(len(counts))
    for held_out in fold.held_out:
        train, valid = fold.inner != held_out, fold.inner == held_out
        path = knn_path(features[train], target[train], features[valid], counts, fold.num_classes)
        losses += [_loss(output, target[valid]) * valid.sum() for output in path]
    count = counts[int(np.argmin(losses))]
    output = knn_path(features, target, fold.test_features, [count], fold.num_classes)[0]
    return Fitted(output, {"neighbors": count})


def knn_path(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, counts: Sequence[int], num_classes: int
) -> list[np.ndarray]:
    """Return for each number of neighbours (ascending) their mean target (m,), or their class shares [m, C]."""
    train, test = standardise(train_x, test_x)
    train, test = _unit(train), _unit(test)
    values = np.eye(num_classes)[train_y] if num_classes else train_y[:, None]  # [n, C or 1]
    path = [np.empty((len(test), values.shape[1])) for _ in counts]
    for begin in range(0, len(test), BLOCK_ROWS):
        similarity = test[begin : begin + BLOCK_ROWS] @ train.T  # [b, n]
        nearest = np.argpartition(-similarity, counts[-1] - 1, axis=1)[:, : counts[-1]]
        order = np.argsort(-np.take_along_axis(similarity, nearest, axis=1), axis=1, kind="stable")
        sums = values[np.take_along_axis(nearest, order, axis=1)].cumsum(axis=1)  # [b, k, C or 1]
        for output, count in zip(path, counts, strict=True):
            output[begin : begin + BLOCK_ROWS] = sums[:, count - 1] / count
    return path if num_classes else [output[:, 0] for output in path]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _loss(output: np.ndarray, target: np.ndarray) -> float:
    return mean_log_loss(output, target) if output.ndim == 2 else float(((output - target) ** 2).mean())
