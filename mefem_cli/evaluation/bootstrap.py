"""95 % intervals by resampling groups of rows with the fitted models fixed.

They say how much a score would vary with other people, not with another training run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mefem_cli.evaluation import metrics
from mefem_cli.evaluation.metrics import Predictions

COVERAGE_PERCENT = 95.0
MAX_CHUNK_VALUES = 1 << 22  # weights held at once: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def draw_weights(group: np.ndarray, replicates: int, seed: int | list[int]) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn in each replicate, in runs of b replicates: [b, N] float64.

    `group` (N,) int: as many groups as there are, drawn with replacement, each with all of its rows.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(group.max()) + 1
    run = max(1, MAX_CHUNK_VALUES // len(group))
    for begin in range(0, replicates, run):
        count = min(run, replicates - begin)
        drawn = rng.integers(num_groups, size=(count, num_groups)) + num_groups * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * num_groups).reshape(count, num_groups)
        yield counts[:, group].astype(np.float64)


def intervals(predictions: Predictions, replicates: int, seed: int | list[int]) -> dict[str, Interval]:
    """Return each metric of a set of predictions with its interval."""
    values = metrics.compute(predictions, np.ones((1, len(predictions))))
    drawn = _replicated([predictions], replicates, seed)[0]
    return {name: _interval(float(value[0]), drawn[name]) for name, value in values.items()}


def paired_difference(
    first: Predictions, second: Predictions, replicates: int = 2000, seed: int | list[int] = 0
) -> dict[str, Interval]:
    """Return first minus second for each metric: paired, each replicate draws the same groups for both.

    Both hold the same rows in the same order (`evaluate.compare` aligns them by id).
    """
    assert np.array_equal(first.ids, second.ids), "paired predictions hold the same rows"
    assert np.array_equal(first.group, second.group), "paired predictions are resampled by the same groups"
    ones = np.ones((1, len(first)))
    value_first, value_second = metrics.compute(first, ones), metrics.compute(second, ones)
    drawn_first, drawn_second = _replicated([first, second], replicates, seed)
    return {
        name: _interval(float((value_first[name] - value_second[name])[0]), drawn_first[name] - drawn_second[name])
        for name in value_first
    }


def _replicated(several: list[Predictions], replicates: int, seed: int | list[int]) -> list[dict[str, np.ndarray]]:
    """Return each metric in each replicate, [replicates], for several predictions under the same draws."""
    runs: list[list[dict[str, np.ndarray]]] = [[] for _ in several]
    for weights in draw_weights(several[0].group, replicates, seed):
        for predictions, parts in zip(several, runs, strict=True):
            parts.append(metrics.compute(predictions, weights))
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in runs]


def _interval(value: float, drawn: np.ndarray) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"))
    tail = (100 - COVERAGE_PERCENT) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
