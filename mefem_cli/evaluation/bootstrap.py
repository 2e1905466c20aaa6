"""95 % intervals by resampling groups of rows with the fitted models fixed.

They say how much a score would vary with other people, not with another training run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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

    def within(self, metric: str) -> Interval:
        """Return it cut at the ends of what a metric can be: symmetric intervals of few seeds may reach beyond."""
        lowest, highest = metrics.RANGES[metric]
        return replace(self, low=max(self.low, lowest), high=min(self.high, highest))


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
    return mean_intervals([predictions], replicates, seed)


def mean_intervals(
    several: Sequence[Predictions],
    replicates: int,
    seed: int | list[int],
    rows: Sequence[np.ndarray] | None = None,
    group: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Return the mean of each metric over several predictions, with the interval for other people.

    Each replicate draws the same groups for all of them: they hold the same rows, or `rows` (of `group` (N,)) says
    which rows each of them holds.
    """
    rows = rows or [np.arange(len(one)) for one in several]
    values = _mean([metrics.compute(one, np.ones((1, len(one)))) for one in several])
    drawn = _replicated([several], rows, several[0].group if group is None else group, replicates, seed)[0]
    return {name: _interval(float(value[0]), drawn[name]) for name, value in values.items()}


def repeated_intervals(
    repeats: Sequence[Predictions], replicates: int, seed: int | list[int], others: Sequence[Predictions] = ()
) -> dict[str, Interval]:
    """Return the mean of each metric over repeats with other folds and seeds, with its interval.

    The bootstrap of the mean says how it varies with other people; how it varies with the folds is added, see
    `_widened`. With `others`, it is repeats minus others, pair by pair.
    """
    pairs = [repeats, others] if others else [repeats]
    rows = [np.arange(len(one)) for one in repeats]
    by_repeat = [[metrics.compute(one, np.ones((1, len(one)))) for one in several] for several in pairs]
    drawn = _replicated(pairs, rows, repeats[0].group, replicates, seed)
    found = {}
    for name in drawn[0]:
        values = np.array([float(one[name][0]) for one in by_repeat[0]])
        replicated = drawn[0][name]
        if others:
            values = values - np.array([float(one[name][0]) for one in by_repeat[1]])
            replicated = replicated - drawn[1][name]
        widened = _widened(_interval(float(values.mean()), replicated), values)
        found[name] = widened if others else widened.within(name)
    return found


def _widened(interval: Interval, values: np.ndarray) -> Interval:
    """Add to an interval how the mean of values (R,) of repeats varies with the folds.

    On each side the variance is W + B / R: W that of the bootstrap, B that between repeats; the half width is its root
    times the quantile of t, with degrees of freedom after Satterthwaite, as W is known well and B from few repeats.
    """
    between = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    if not between > 0:
        return interval
    from scipy.special import ndtri, stdtrit

    tail = 1 - (100 - COVERAGE_PERCENT) / 200

    def half(one_side: float) -> float:
        total = (one_side / ndtri(tail)) ** 2 + between
        return float(np.copysign(stdtrit((len(values) - 1) * (total / between) ** 2, tail) * np.sqrt(total), one_side))

    low, high = half(interval.value - interval.low), half(interval.high - interval.value)
    return Interval(interval.value, interval.value - low, interval.value + high)


def paired_difference(
    first: Predictions, second: Predictions, replicates: int = 2000, seed: int | list[int] = 0
) -> dict[str, Interval]:
    """Return first minus second for each metric: paired, each replicate draws the same groups for both.

    Both hold the same rows in the same order (`evaluate.compare` aligns them by id).
    """
    assert np.array_equal(first.ids, second.ids), "paired predictions hold the same rows"
    assert np.array_equal(first.group, second.group), "paired predictions are resampled by the same groups"
    return repeated_intervals([first], replicates, seed, [second])


def _replicated(
    sides: Sequence[Sequence[Predictions]],
    rows: Sequence[np.ndarray],
    group: np.ndarray,
    replicates: int,
    seed: int | list[int],
) -> list[dict[str, np.ndarray]]:
    """Return for each side the mean of each metric over its predictions in each replicate, [replicates].

    All see the same draws of `group` (N,); the i-th predictions of a side hold the rows `rows[i]`.
    """
    runs: list[list[dict[str, np.ndarray]]] = [[] for _ in sides]
    for weights in draw_weights(group, replicates, seed):
        for side, run in zip(sides, runs, strict=True):
            run.append(_mean([metrics.compute(one, weights[:, at]) for one, at in zip(side, rows, strict=True)]))
    return [{name: np.concatenate([part[name] for part in run]) for name in run[0]} for run in runs]


def _mean(several: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([one[name] for one in several], axis=0) for name in several[0]}


def _interval(value: float, drawn: np.ndarray) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"))
    tail = (100 - COVERAGE_PERCENT) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
