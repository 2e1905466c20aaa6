"""`--watch COLUMN`: does the encoder come to know a label? Two quick probes per epoch on a column of the crops.

The labels never reach the encoder. Ridge (on one-hot targets for classes) and k nearest neighbours read the label from
the pooled patch features of up to 2,048 faces, in four folds: every face is predicted by a probe that has seen nobody
of its person. It is a thermometer with coarse choices on few faces; `mefem probe` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mefem_cli import console, parts
from mefem_cli.engine import seeds
from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.engine.monitors import pooled_features
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation.folds import assign_folds, strata
from mefem_cli.evaluation.labels import known_names, load_target
from mefem_cli.probes import standardise
from mefem_cli.probes.knn import knn_path

MAX_FACES, MAX_SHARE, ALWAYS = (
    2048,
    0.1,
    512,
)  # a tenth of all faces, so that it costs little of an epoch; not under 512
NUM_FOLDS, MIN_FOLDS = 4, 3  # one to test on, one to choose on, one to learn from
MIN_FACES, MIN_PEOPLE = 48, 2 * NUM_FOLDS  # with a label; fewer say nothing
PENALTIES = tuple(10.0**power for power in range(-1, 6))  # of ridge on standardised features
NEIGHBORS = 10


@dataclass(frozen=True)
class Probe:
    """A label and the faces on which it is read."""

    name: str
    rows: np.ndarray  # (n,) int, of the crops
    values: np.ndarray  # (n,) float64, or int64 class index
    fold: np.ndarray  # (n,) int; all faces of a person lie in one
    num_classes: int = 0  # 0: regression

    def where(self, chosen: np.ndarray) -> Probe:
        """Return the probe on the faces given by a mask."""
        return Probe(self.name, self.rows[chosen], self.values[chosen], self.fold[chosen], self.num_classes)


def names_to_watch(given: Sequence[str]) -> list[str]:
    """Return the labels of `--watch a,b --watch c`, each once.

    >>> names_to_watch(["age,bmi", "age"])
    ['age', 'bmi']
    """
    names = [name.strip() for one in given for name in one.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def plan_probes(names: Sequence[str], labels: Mapping[str, np.ndarray], groups: np.ndarray, seed: int) -> list[Probe]:
    """Return a probe for each label or task that has faces enough; the others are named in a warning.

    `groups` (N,) numbers each face's person. Raises UsageError for a label that does not exist.
    """
    probes = []
    for name in names:
        if name not in labels and name not in parts.names("tasks"):
            raise UsageError(f'--watch {name}: the crops have no label "{name}"{known_names(name, labels)}')
        try:
            probe = _plan(name, labels, groups, seed)
        except (NoInputError, UsageError) as error:
            console.warn(f"--watch {name}: {error}; it is not watched")
            continue
        num_people = len(np.unique(groups[probe.rows]))
        if len(probe.rows) < MIN_FACES or num_people < MIN_PEOPLE:
            console.warn(
                f"--watch {name}: {len(probe.rows)} labelled faces of {num_people} people are too few (it takes "
                f"{MIN_FACES} of {MIN_PEOPLE}); it is not watched"
            )
            continue
        probes.append(probe)
    return probes


def _plan(name: str, labels: Mapping[str, np.ndarray], groups: np.ndarray, seed: int) -> Probe:
    target = load_target(labels, name)
    limit = min(MAX_FACES, max(int(MAX_SHARE * len(groups)), ALWAYS))
    chosen = np.sort(seeds.numpy_generator(seed, seeds.MONITOR, 2).permutation(len(target.rows))[:limit])
    rows, values = target.rows[chosen], target.values[chosen]
    people = np.unique(groups[rows], return_inverse=True)[1]
    fold = assign_folds(people, strata(values, bool(target.classes), NUM_FOLDS), NUM_FOLDS, [seed, seeds.MONITOR, 3])
    return Probe(name, rows, values, fold, len(target.classes))


class Watch(Observer):
    """Scores the probes after each epoch; every process encodes its share of the faces."""

    def __init__(self, probes: Sequence[Probe]):
        self.probes = list(probes)
        self.rows = np.unique(np.concatenate([probe.rows for probe in probes])) if probes else np.zeros(0, int)

    def measure(self, trainer: Trainer, row: dict[str, Any]) -> dict[str, Any]:
        """Return `watch_<label>_ridge_r2`, `watch_<label>_knn_r2` (or accuracies) and `watch_<label>_n`."""
        if not self.probes:
            return {}
        trainer.objective.eval()
        encoder = next(iter(trainer.objective.encoders().values()))
        features = pooled_features(encoder, trainer.stream, self.rows, trainer.device)
        trainer.objective.train()
        rows, values = features["rows"].numpy(), features["mean"].double().numpy()  # ascending rows
        scores: dict[str, Any] = {}
        for planned in self.probes:
            probe = planned.where(np.isin(planned.rows, rows))  # without unreadable crops
            found = score(values[np.searchsorted(rows, probe.rows)], probe)
            scores |= {f"watch_{probe.name}_{name}": value for name, value in found.items()}
        return scores


def score(features: np.ndarray, probe: Probe) -> dict[str, float]:
    """Return the scores of out-of-fold predictions from features [n, D], float64, of the probe's faces, and their `n`.

    `ridge_r2` and `knn_r2`, 0 for the best guess that knows nothing; for classes accuracies, beside that of the most
    frequent class. None of them where features are not finite or too many crops cannot be read.
    """
    folds = np.unique(probe.fold)
    if len(features) < MIN_FACES or len(folds) < MIN_FOLDS or not np.isfinite(features).all():
        return {"n": len(features)}
    ridge, neighbors = (np.full((len(features), max(probe.num_classes, 1)), np.nan) for _ in range(2))
    for number in folds:
        test = probe.fold == number
        ridge[test] = _ridge(features, probe, test)
        count = min(NEIGHBORS, int((~test).sum()))
        path = knn_path(features[~test], probe.values[~test], features[test], [count], probe.num_classes)
        neighbors[test] = path[0].reshape(test.sum(), -1)
    truth = probe.values
    if not probe.num_classes:
        scores = {"ridge_r2": _r2(truth, ridge[:, 0]), "knn_r2": _r2(truth, neighbors[:, 0])}
    else:
        scores = {
            "ridge_accuracy": float((ridge.argmax(1) == truth).mean()),
            "knn_accuracy": float((neighbors.argmax(1) == truth).mean()),
            "majority_accuracy": float(np.bincount(truth).max() / len(truth)),
        }
    return {**{name: round(value, 4) for name, value in scores.items()}, "n": len(truth)}


def _ridge(features: np.ndarray, probe: Probe, test: np.ndarray) -> np.ndarray:
    """Predict the test fold [m, C or 1], with the penalty that does best on the fold after it."""
    target = np.eye(probe.num_classes)[probe.values] if probe.num_classes else probe.values[:, None]
    others = np.unique(probe.fold[~test])
    after = others[np.searchsorted(others, probe.fold[test][0]) % len(others)]
    inner = probe.fold == after
    path = ridge_path(features[~test & ~inner], target[~test & ~inner], features[inner], PENALTIES)
    penalty = PENALTIES[int(np.argmin(((path - target[inner]) ** 2).sum(axis=(1, 2))))]
    return ridge_path(features[~test], target[~test], features[test], [penalty])[0]


def ridge_path(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Return ridge predictions [P, m, C] of targets [n, C] for every penalty, from one eigendecomposition.

    Minimises |y - b - Xw|^2 + penalty |w|^2 on standardised X, as `probes.linear.ridge_path` does for one target.
    """
    train, test = standardise(train_x, test_x)
    offset = train_y.mean(axis=0)
    is_wide = len(train) < train.shape[1]
    gram = train @ train.T if is_wide else train.T @ train
    left = test @ train.T if is_wide else test
    right = train_y - offset if is_wide else train.T @ (train_y - offset)
    squares, vectors = np.linalg.eigh(gram)
    rotated, coordinates = left @ vectors, vectors.T @ right
    squares = np.maximum(squares, 0)[:, None]
    return np.stack([rotated @ (coordinates / (squares + penalty)) for penalty in penalties]) + offset


def _r2(truth: np.ndarray, prediction: np.ndarray) -> float:
    total = ((truth - truth.mean()) ** 2).sum()
    return float(1 - ((truth - prediction) ** 2).sum() / total) if total else float("nan")
