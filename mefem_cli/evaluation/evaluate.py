"""The probing protocol: a label, a store and a head -> out-of-fold predictions -> scores with intervals.

    problem = prepare(store, "bmi", ProbeOptions())          # targets, groups and folds: no features involved
    score = evaluate_head(store, problem, "linear", "mean")  # 5 fits, each tested on people it has not seen
    compare(score, other)                                    # paired bootstrap of the difference

Learning rate, weight decay, penalty and number of neighbours are chosen inside each training fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mefem_cli import parts, probes
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import bootstrap, labels, metrics
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.folds import assign_folds, join_rows, strata
from mefem_cli.evaluation.heads import choose_pairs
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.stores.features import FeatureStore

INNER_FOLDS = 5
GROUP_LABELS = ("subject", "patient")  # a label of this name says who is who
DUPLICATE_COLUMNS = ("sha256", "crop_sha256")  # equal: the same photo, so one fold
MIN_SUBGROUP = 20  # subgroups of fewer people are not shown: too few to say anything, too few to hide in


@dataclass(frozen=True)
class ProbeOptions:
    """The protocol."""

    store: list[str] = field(default_factory=list)  # feature store; given twice or more, the first is compared with
    # the others; default: the pipe, else features.h5
    head: str = "default"  # attentive, mlp, linear, knn, several with commas, or all; default: linear and mlp, and
    # attentive where patches are stored
    features: str | None = None  # patches, cls, mean, patches+cls or cls+mean; default: patches for attentive, else cls
    kind: str | None = None  # regression or classification; default: text or few whole numbers are classes
    group: str | None = None  # label that says who is who; default: subject or patient
    folds: int = 5  # folds; each person lies in one
    by: list[str] = field(default_factory=list)  # also scores for each value of this label (quarters of a number)
    bootstraps: int = 2000  # bootstrap samples of groups behind each 95 % interval
    device: str = "auto"  # where attentive and mlp heads are trained: auto, cpu, cuda, cuda:N or mps

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UsageError(f"--folds {self.folds}: wanted a whole number from 2")
        if self.bootstraps < 100:
            raise UsageError(f"--bootstraps {self.bootstraps}: wanted a whole number from 100")
        if self.kind is not None and self.kind not in labels.KINDS:
            raise UsageError(f"--kind {self.kind}: wanted {' or '.join(labels.KINDS)}")


@dataclass(frozen=True)
class Problem:
    """A task on the rows of a store, before any feature is read. Rows are in the order of their ids."""

    task: str
    ids: np.ndarray  # (n,) str
    rows: np.ndarray  # (n,) int: rows of the store
    target: np.ndarray  # (n,) float64, or int64 class index
    classes: tuple[str, ...]  # empty: regression
    group: np.ndarray  # (n,) int: people (and copies of one photo), resampled together
    fold: np.ndarray  # (n,) int
    inner: tuple[np.ndarray, ...]  # for each fold, the inner folds of its training rows
    seed: int
    notes: tuple[str, ...]

    @property
    def num_folds(self) -> int:
        """How many folds there are."""
        return len(self.inner)

    @property
    def num_groups(self) -> int:
        """How many people there are."""
        return int(self.group.max()) + 1


@dataclass(frozen=True)
class Score:
    """What one head reads from one kind of features of one store."""

    task: str
    head: str
    features: str
    store: str
    model: str
    predictions: Predictions
    baseline_predictions: Predictions  # the mean, or the class shares, of each training fold
    metrics: dict[str, Interval]
    chosen: tuple[dict[str, Any], ...] = ()  # for each fold, what was chosen inside it
    attention: np.ndarray | None = None  # (n, T): what the head looked at, of heads that look at tokens

    @property
    def kind(self) -> str:
        """`regression` or `classification`."""
        return "classification" if self.predictions.classes else "regression"

    @property
    def baseline(self) -> dict[str, float]:
        """Each metric of the baseline; a constant has no correlation."""
        return baseline_metrics(self.baseline_predictions)


@dataclass(frozen=True)
class Subgroup:
    """A score among the faces with one value of a label."""

    score: Score
    by: str
    value: str
    predictions: Predictions
    metrics: dict[str, Interval]
    baseline: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """First minus second, on the faces that both predict."""

    first: Score
    second: Score
    num_rows: int
    num_groups: int
    metrics: dict[str, Interval]

    def verdict(self, metric: str) -> str:
        """`better` or `worse` (the first) where the interval excludes 0, else `unclear`."""
        difference = self.metrics[metric]
        if not difference.excludes_zero:
            return "unclear"
        return "better" if (difference.value > 0) != (metric in metrics.LOWER_IS_BETTER) else "worse"


def prepare(
    store: FeatureStore,
    task: str,
    options: ProbeOptions | None = None,
    seed: int = 0,
    only_ids: np.ndarray | None = None,
) -> Problem:
    """Return targets, groups and folds of a task; they depend on labels, groups, copies and the seed only.

    `only_ids` restricts to some faces, as comparing two stores does. Raises NoInputError where no label is usable and
    UsageError where there are fewer groups, or groups of some class, than folds.
    """
    options = options or ProbeOptions()
    target = labels.load_target(store.labels, task, options.kind)
    group, notes = _groups(store, options.group)
    used = np.argsort(store.ids[target.rows], kind="stable")  # row order must not matter: two stores get the same folds
    if only_ids is not None:
        used = used[np.isin(store.ids[target.rows[used]], only_ids)]
        if not len(used):
            raise NoInputError(f"task {task}: none of the faces to use has a usable label")
    rows, values = target.rows[used], target.values[used]
    group = _numbered_by_appearance(group[rows])
    _refuse_too_few(target, values, group, options.folds)
    row_strata = strata(values, bool(target.classes), options.folds)
    fold = assign_folds(group, row_strata, options.folds, [seed, 0])
    inner = tuple(_inner_folds(group, row_strata, fold != number, [seed, 1, number]) for number in range(options.folds))
    notes = (*target.notes, *notes)
    return Problem(task, store.ids[rows], rows, values, target.classes, group, fold, inner, seed, notes)


def _groups(store: FeatureStore, name: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return who is who, (N,) int: faces of one group label, or from one photo, are one group."""
    if name is None:
        name = next((known for known in GROUP_LABELS if known in store.labels), None)
    notes: list[str] = []
    if name is None:
        notes.append("no label subject or patient: if people appear twice, name who is who with --group LABEL")
        people = np.array([""] * len(store), dtype=object)
    else:
        people = labels.without_missing_texts(labels.find(store.labels, name))
    copies = [store.meta[column] for column in DUPLICATE_COLUMNS if column in store.meta]
    group = join_rows(people, *copies)
    num_joined = int(join_rows(people).max()) - int(group.max())
    if num_joined:
        notes.append(f"{num_joined} {'people' if name else 'faces'} share a photo with another; they stay in one fold")
    return group, tuple(notes)


def _numbered_by_appearance(group: np.ndarray) -> np.ndarray:
    """Return groups numbered in the order of their first rows, so that folds do not depend on where rows are stored."""
    _, first_row, index = np.unique(group, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_row))[index]


def _refuse_too_few(target: labels.Target, values: np.ndarray, group: np.ndarray, num_folds: int) -> None:
    num_groups = len(np.unique(group))
    if num_groups < num_folds:
        raise UsageError(
            f"task {target.task}: {len(values)} faces of {num_groups} groups have the label, fewer than the "
            f"{num_folds} folds; label more faces" + (f" or type --folds {num_groups}" if num_groups > 1 else "")
        )
    if not target.classes and len(np.unique(values)) == 1:
        raise NoInputError(f"task {target.task}: the label is {values[0]:g} for all {len(values)} faces")
    for index, name in enumerate(target.classes):
        count = len(np.unique(group[values == index]))
        if count < num_folds:
            raise UsageError(
                f'task {target.task}: class "{name:.40}" has {count} group{"s" * (count != 1)}, fewer than the '
                f"{num_folds} folds; empty it in the labels" + (f" or type --folds {count}" if count > 1 else "")
            )


def _inner_folds(group: np.ndarray, row_strata: np.ndarray, is_train: np.ndarray, seed: list[int]) -> np.ndarray:
    train_group = np.unique(group[is_train], return_inverse=True)[1]
    num_folds = min(INNER_FOLDS, int(train_group.max()) + 1)
    return assign_folds(train_group, row_strata[is_train], num_folds, seed)


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
    kinds = features.split("+")
    arrays = [store.read_rows(kind, slice(None))[rows] for kind in kinds]
    if "patches" in kinds:
        return np.concatenate([one if one.ndim == 3 else one[:, None] for one in arrays], axis=1)
    return np.concatenate(arrays, axis=1)


def evaluate_head(
    store: FeatureStore,
    problem: Problem,
    head: str,
    features: str,
    options: ProbeOptions | None = None,
    head_options: Any = None,
    after_fold: Callable[[str], None] | None = None,
) -> Score:
    """Fit a head on each training fold, predict its test fold, and score all predictions together."""
    options = options or ProbeOptions()
    module = parts.load("probes", head)
    read = read_features(store, features, problem.rows)
    output = np.zeros((len(problem.ids), len(problem.classes)) if problem.classes else len(problem.ids))
    baseline = np.zeros_like(output)
    chosen, attention = [], {}
    for number, inner in enumerate(problem.inner):
        train, test = np.flatnonzero(problem.fold != number), np.flatnonzero(problem.fold == number)
        known = problem.target[train]
        seed = problem.seed * problem.num_folds + number
        fold = probes.Fold(read, train, test, known, inner, len(problem.classes), seed, options.device)
        fitted = module.fit_predict(fold, head_options or module.Options())
        output[test] = fitted.output
        baseline[test] = np.eye(len(problem.classes))[known].mean(axis=0) if problem.classes else known.mean()
        chosen.append(fitted.chosen)
        if fitted.attention is not None:
            attention[number] = fitted.attention
        if after_fold is not None:
            after_fold(f"{problem.task}: {head} on {features}")
    predictions = _predictions(problem, output)
    scored = bootstrap.intervals(predictions, options.bootstraps, [problem.seed, 2])
    return Score(
        problem.task,
        head,
        features,
        str(store.path),
        store.model_name,
        predictions,
        _predictions(problem, baseline),
        scored,
        tuple(chosen),
        _in_row_order(attention, problem.fold),
    )


def _in_row_order(attention: dict[int, np.ndarray], fold: np.ndarray) -> np.ndarray | None:
    """Return the attention (n, T) of all rows from that of each test fold."""
    if not attention:
        return None
    whole = np.zeros((len(fold), next(iter(attention.values())).shape[1]), np.float32)
    for number, part in attention.items():
        whole[fold == number] = part
    return whole


def _predictions(problem: Problem, output: np.ndarray) -> Predictions:
    return Predictions(problem.ids, problem.target, output, problem.fold, problem.group, problem.classes)


def baseline_metrics(predictions: Predictions) -> dict[str, float]:
    """Return each metric of baseline predictions; a constant has no correlation."""
    values = metrics.compute(predictions, np.ones((1, len(predictions))))
    return {name: float(value[0]) for name, value in values.items() if name != "pearson_r"}


def subgroups(
    score: Score, by: str, values: np.ndarray, bootstraps: int = 2000, seed: int = 0
) -> tuple[list[Subgroup], int]:
    """Return the score among the faces with each value of a label, and how many small groups were left out.

    `values` (n,) belong to `score.predictions.ids`. A number with many values is cut into quarters.
    """
    shown, num_hidden = [], 0
    for value, rows in _cut(labels.without_missing_texts(values)):
        part = score.predictions.subset(rows)
        if len(np.unique(part.group)) < MIN_SUBGROUP:
            num_hidden += 1
            continue
        baseline = baseline_metrics(score.baseline_predictions.subset(rows))
        shown.append(Subgroup(score, by, value, part, bootstrap.intervals(part, bootstraps, [seed, 2]), baseline))
    return shown, num_hidden


def _cut(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return (name, mask) of each value, or of each quarter of a number; missing values belong to none."""
    if values.dtype.kind not in "biuf":
        return [(str(value), values == value) for value in np.unique(values) if value != ""]
    known = values[np.isfinite(values)]
    if labels.looks_like_classes(values):
        return [(f"{value:g}", values == value) for value in np.unique(known)]
    edges = np.unique(np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    pairs = zip(edges[:-1], edges[1:], strict=True)
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairs]
    return [(name, (bins == index) & np.isfinite(values)) for index, name in enumerate(names)]


def compare(first: Score, second: Score, bootstraps: int = 2000, seed: int = 0) -> Difference:
    """Return first minus second with paired 95 % intervals, on the faces that both predict.

    Raises NoInputError where they share no face or disagree on a label.
    """
    shared, in_first, in_second = np.intersect1d(first.predictions.ids, second.predictions.ids, return_indices=True)
    if not len(shared):
        raise NoInputError(f"{first.store} and {second.store} share no faces; embed the same crops into both")
    one, other = first.predictions.subset(in_first), second.predictions.subset(in_second)
    if one.classes != other.classes or not np.allclose(one.target, other.target):
        raise NoInputError(f"{first.store} and {second.store} disagree on {first.task} of the same faces; embed again")
    other = Predictions(one.ids, one.target, other.output, other.fold, one.group, one.classes)
    found = bootstrap.paired_difference(one, other, bootstraps, [seed, 2])
    return Difference(first, second, len(shared), int(one.group.max()) + 1, found)
