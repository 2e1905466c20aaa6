"""The probing protocol: a label, a store and a head -> out-of-fold predictions -> scores with intervals.

    problem = prepare(store, "bmi", ProbeOptions())          # targets, groups and folds: no features involved
    score = evaluate_head(store, problem, "linear", "mean")  # 5 fits, each tested on people it has not seen
    compare(score, other)                                    # paired bootstrap of the difference

Learning rate, weight decay, penalty and number of neighbours are chosen inside each training fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from mefem_cli import parts, probes
from mefem_cli.evaluation import bootstrap, covariates, metrics, streaming
from mefem_cli.evaluation.heads import choose_pairs
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.problem import Problem, prepare, with_fraction
from mefem_cli.evaluation.score import Difference, Score, Subgroup, baseline_metrics, compare, subgroups
from mefem_cli.evaluation.streaming import StreamedTokens, open_features
from mefem_cli.stores.features import FeatureStore

__all__ = [
    "Difference",
    "Predictions",
    "ProbeOptions",
    "Problem",
    "Score",
    "Subgroup",
    "baseline_metrics",
    "compare",
    "evaluate",
    "evaluate_head",
    "prepare",
    "read_features",
    "subgroups",
]

AfterFold = Callable[[str], None]


def evaluate(
    store: FeatureStore,
    task: str,
    head: str = "linear",
    features: str | None = None,
    options: ProbeOptions | None = None,
    seed: int = 0,
    head_options: Any = None,
) -> Score:
    """Prepare a task and score one head on it; `features` defaults to the first of the head's that the store has."""
    options = options or ProbeOptions()
    ((head, features),) = choose_pairs([store], head, features)
    return evaluate_head(store, prepare(store, task, options, seed), head, features, options, head_options)


def read_features(store: FeatureStore, features: str, rows: np.ndarray) -> np.ndarray:
    """Return features of some rows in the stored precision: [n, D], `cls+mean` [n, 2 D], with patches [n, T, D]."""
    return streaming.read(store, features.split("+"), rows)


def evaluate_head(
    store: FeatureStore,
    problem: Problem,
    head: str,
    features: str,
    options: ProbeOptions | None = None,
    head_options: Any = None,
    after_fold: AfterFold | None = None,
) -> Score:
    """Fit a head on each training fold, predict its test fold, and score all predictions together."""
    options = options or ProbeOptions()
    read = open_features(store, features, problem.rows, options.max_memory)
    return score_features(store, read, problem, head, features, options, head_options, after_fold)


def score_features(
    store: FeatureStore,
    read: np.ndarray | StreamedTokens,
    problem: Problem,
    head: str,
    features: str,
    options: ProbeOptions,
    head_options: Any = None,
    after_fold: AfterFold | None = None,
) -> Score:
    """Score a head on features [n, ...] of a problem's rows; see `evaluate_head`."""
    module = parts.load("probes", head)
    head_options = head_options or module.Options()

    def tell() -> None:
        if after_fold is not None:
            after_fold(f"{problem.task}: {head} on {features}")

    found = [_fit(read, one, module, head_options, options.device, tell) for one in (problem, *problem.repeats)]
    predictions = [one.predictions for one in found]
    rows = np.searchsorted(problem.ids.astype(str), predictions[0].ids.astype(str))
    attention = found[0].attention
    return Score(
        problem.task,
        head,
        features,
        str(store.path),
        store.model_name,
        predictions[0],
        found[0].baseline,
        bootstrap.repeated_intervals(predictions, options.bootstraps, [problem.seed, 2]),
        tuple(chosen for one in found for chosen in one.chosen),
        None if attention is None else attention[rows],
        tuple(predictions[1:]),
        num_train=float(np.mean([len(np.unique(problem.group[rows])) for rows in problem.train])),
        published=problem.published,
        by={name: values[rows] for name, values in problem.by.items()},
        mean_over=problem.mean_over,
        fold_names=problem.fold_names,
    )


@dataclass(frozen=True)
class _Fits:
    """What the heads of all folds gave."""

    predictions: Predictions
    baseline: Predictions  # the mean, or the class shares, of each training fold
    chosen: list[dict[str, Any]]
    attention: np.ndarray | None  # (n, T), of all rows of the problem


def _fit(
    read: np.ndarray | StreamedTokens,
    problem: Problem,
    module: ModuleType,
    head_options: Any,
    device: str,
    after_fold: Callable[[], None],
) -> _Fits:
    """Fit a head on the training rows of each fold and predict the fold."""
    output = np.zeros((len(problem.ids), len(problem.classes)) if problem.classes else len(problem.ids))
    baseline = np.zeros_like(output)
    chosen: list[dict[str, Any]] = []
    attention = None
    for number, (train, inner) in enumerate(zip(problem.train, problem.inner, strict=True)):
        test = np.flatnonzero(problem.fold == number)
        known = problem.target[train]
        seed = problem.seed * problem.num_folds + number
        fold = probes.Fold(read, train, test, known, inner, len(problem.classes), seed, device)
        fitted = module.fit_predict(fold, head_options)
        output[test] = fitted.output
        baseline[test] = np.eye(len(problem.classes))[known].mean(axis=0) if problem.classes else known.mean()
        chosen.append(fitted.chosen)
        if fitted.attention is not None:
            attention = (
                np.zeros((len(output), fitted.attention.shape[1]), np.float32) if attention is None else attention
            )
            attention[test] = fitted.attention
        after_fold()
    return _Fits(_predictions(problem, output), _predictions(problem, baseline), chosen, attention)


def _predictions(problem: Problem, output: np.ndarray) -> Predictions:
    """Return the predictions of the rows that are in a test fold; with `--aggregate`, of each person."""
    every = Predictions(problem.ids, problem.target, output, problem.fold, problem.group, problem.classes)
    tested = problem.fold >= 0
    if problem.photos_of is not None:
        return every.subset(tested).averaged(problem.photos_of[tested])
    return every if tested.all() else every.subset(tested)


def learning_curve(
    store: FeatureStore,
    problem: Problem,
    head: str,
    features: str,
    fractions: Sequence[float],
    options: ProbeOptions,
    head_options: Any = None,
    after_fold: AfterFold | None = None,
) -> list[Score]:
    """Return the score after learning from each share of the training people, on the same test people."""
    read = open_features(store, features, problem.rows, options.max_memory)
    scores = []
    for fraction in fractions:
        less = with_fraction(problem, fraction)
        score = score_features(store, read, less, head, features, options, head_options, after_fold)
        scores.append(replace(score, fraction=fraction))
    return scores


def score_age_and_sex(store: FeatureStore, problem: Problem, options: ProbeOptions) -> Score | None:
    """Return the score of a linear head on age and sex, on the same folds; None where the labels are not there."""
    read = covariates.age_and_sex(store.labels, problem)
    if read is None:
        return None
    score = score_features(store, read, problem, "linear", covariates.NAME, options)
    return replace(score, model="baseline")


def permutation_test(
    store: FeatureStore,
    problem: Problem,
    score: Score,
    options: ProbeOptions,
    head_options: Any = None,
    after_fold: AfterFold | None = None,
) -> Score:
    """Return the score with the p-value of each metric: how often labels shuffled between people score as well.

    All is fitted anew each time, with the same folds. p = (1 + as good) / (1 + permutations), so it is never 0
    (Phipson and Smyth 2010).
    """
    module = parts.load("probes", score.head)
    read = open_features(store, score.features, problem.rows, options.max_memory)
    observed = _values(score.predictions)

    def tell() -> None:
        if after_fold is not None:
            after_fold(f"{problem.task}: {score.head} on shuffled labels")

    as_good = dict.fromkeys(observed, 1)
    rng = np.random.default_rng([problem.seed, 4])
    for _ in range(options.permute):
        shuffled = replace(problem, target=problem.target[shuffle_people(problem.group, rng)])
        fits = _fit(read, shuffled, module, head_options or module.Options(), options.device, tell)
        for name, value in _values(fits.predictions).items():
            is_worse = value > observed[name] if name in metrics.LOWER_IS_BETTER else value < observed[name]
            as_good[name] += not is_worse
    p_values = {name: count / (1 + options.permute) for name, count in as_good.items()}
    return replace(score, p_values=p_values, num_permutations=options.permute)


def _values(predictions: Predictions) -> dict[str, float]:
    return {name: float(one[0]) for name, one in metrics.compute(predictions, np.ones((1, len(predictions)))).items()}


def shuffle_people(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return rows (n,) whose labels the rows get: groups of one size swap their labels, photo by photo.

    People of one number of photos are exchangeable, so the test is exact; a person whose number nobody shares keeps
    the label, which makes the test cautious.
    """
    order = np.argsort(group, kind="stable")
    count = np.bincount(group)
    members = np.split(order, np.cumsum(count)[:-1])
    source = np.empty(len(group), int)
    for size in np.unique(count[count > 0]):
        same = np.flatnonzero(count == size)
        for one, other in zip(same, rng.permutation(same), strict=True):
            source[members[one]] = members[other]
    return source
