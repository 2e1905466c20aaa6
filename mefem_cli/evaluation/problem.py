"""A task on faces, before any feature is read: targets, who is who, folds, what each learns from.

They depend on labels, groups, copies and the seed only, so two encoders are compared on the same folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli import tasks
from mefem_cli.console import plural
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import duplicates, labels, splits
from mefem_cli.evaluation.folds import assign_folds, strata
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.splits import Split

if TYPE_CHECKING:
    from mefem_cli.stores.joining import Faces

INNER_FOLDS = 5
GROUP_LABELS = ("subject", "patient")  # a label of this name says who is who
MIN_TRAIN_GROUPS = 4  # people to learn from: fewer cannot be split to choose options


@dataclass(frozen=True)
class Problem:
    """A task on faces. Rows are in the order of their ids."""

    task: str
    ids: np.ndarray  # (n,) str
    rows: np.ndarray  # (n,) int: rows of the store or the crops
    target: np.ndarray  # (n,) float64, or int64 class index
    classes: tuple[str, ...]  # empty: regression
    group: np.ndarray  # (n,) int: people (and copies of one photo), resampled together
    fold: np.ndarray  # (n,) int: the fold that predicts the row; -1: it is only learned from
    inner: tuple[np.ndarray, ...]  # for each fold, the inner folds of its training rows; -1: never held out
    seed: int
    notes: tuple[str, ...]
    train: tuple[np.ndarray, ...] = ()  # for each fold, the rows it learns from, ascending
    fold_names: tuple[str, ...] = ()  # of a split that the data say
    photos_of: np.ndarray | None = None  # (n,) int: rows of one number are averaged after predicting
    by: Mapping[str, np.ndarray] = field(default_factory=dict)  # (n,) subgroups that the task scores apart
    mean_over: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    repeats: tuple[Problem, ...] = ()  # the same rows with other seeds

    @property
    def num_folds(self) -> int:
        """How many folds there are."""
        return len(self.inner)

    @property
    def num_groups(self) -> int:
        """How many people are predicted."""
        return len(np.unique(self.group[self.fold >= 0]))


def prepare(
    faces: Faces,
    task: str,
    options: ProbeOptions | None = None,
    seed: int = 0,
    only_ids: np.ndarray | None = None,
) -> Problem:
    """Return targets, groups and folds of a task; they depend on labels, groups, copies and the seed only.

    `only_ids` restricts to some faces, as comparing two stores does. Raises NoInputError where no label is usable and
    UsageError where there are fewer groups, or groups of some class, than folds, or where the task has several targets.
    """
    options = options or ProbeOptions()
    asked = ask(faces, task, options.kind)
    if len(asked.targets) > 1:
        raise UsageError(f"task {task} has several targets; name one, such as {asked.targets[0].task}")
    return make_problem(faces, asked, asked.targets[0], options, seed, only_ids)


def ask(faces: Faces, task: str, kind: str | None = None, task_options: Any = None) -> labels.Asked:
    """Return the targets that a task means for some faces."""
    sources = faces.meta["source"] if "source" in faces.meta else np.full(len(faces), "", object)
    return labels.load_task(tasks.Faces(faces.labels, sources), task, kind, task_options)


def make_problem(
    faces: Faces,
    asked: labels.Asked,
    target: labels.Target,
    options: ProbeOptions,
    seed: int = 0,
    only_ids: np.ndarray | None = None,
) -> Problem:
    """Return the problem of one of a task's targets; see `prepare`."""
    used = np.argsort(faces.ids[target.rows], kind="stable")  # row order must not matter: two stores get the same folds
    if only_ids is not None:
        used = used[np.isin(faces.ids[target.rows[used]], only_ids)]
        if not len(used):
            raise NoInputError(f"task {target.task}: none of the faces to use has a usable label")
    split, notes = _split(faces, asked, options)
    if split is not None:
        is_in = split.fold[target.rows[used]] != splits.LEFT_OUT
        if not is_in.all():
            notes += [f"{target.task}: {int((~is_in).sum())} faces belong to no part of the split and are left out"]
        used = used[is_in]
        split = split.where(target.rows[used])
    rows, values = target.rows[used], target.values[used]
    photos_of, people = None, asked.people
    if options.aggregate:
        averaged = splits.column(faces, options.aggregate, "--aggregate")
        photos_of = _photos_of(averaged[rows])
        if people is None and not any(known in faces.labels for known in GROUP_LABELS):
            people = averaged  # photos of one person must not be on both sides
    group, about_groups = _groups(faces, rows, options.group, people)
    if photos_of is not None:
        _refuse_several_people(options, photos_of, group)
    notes = [*asked.notes, *target.notes, *about_groups, *notes]
    problem = Problem(
        target.task,
        faces.ids[rows],
        rows,
        values,
        target.classes,
        group,
        np.zeros(len(rows), int),
        (),
        seed,
        (),
        photos_of=photos_of,
        by={name: column[rows] for name, column in target.made.by.items()},
        mean_over=target.made.mean_over,
        published=target.made.published,
    )
    make = _own_folds if split is None else _given_folds
    first, *others = (make(problem, options, split, seed + number, notes) for number in range(options.repeats))
    return replace(first, notes=tuple(dict.fromkeys(notes)), repeats=tuple(others))


def _split(faces: Faces, asked: labels.Asked, options: ProbeOptions) -> tuple[Split | None, list[str]]:
    """Return who is tested on among all rows, where an option, the pair of stores or the data set says it."""
    if options.split:
        return splits.parse(splits.column(faces, options.split, "--split"), f"--split {options.split}"), []
    if isinstance(options.folds, str):
        return splits.read_folds(faces, Path(options.folds)), []
    if options.leave_out:
        values = splits.column(faces, options.leave_out, "--leave-out")
        return splits.leave_out(values, options.leave_out), []
    pair = getattr(faces, "part_of_pair", None)
    if pair is not None:
        return splits.parse(pair, "--test-store"), []
    if asked.split is not None:
        return splits.parse(asked.split, f"task {asked.task}"), [f"{asked.task}: the data set's own split is used"]
    return None, []


def _groups(
    faces: Faces, rows: np.ndarray, name: str | None, people: np.ndarray | None
) -> tuple[np.ndarray, list[str]]:
    """Return who is who among some rows, (n,) int: faces of one person, or of photos that are copies, are one group."""
    if name is None and people is None:
        name = next((known for known in GROUP_LABELS if known in faces.labels), None)
    notes: list[str] = []
    if name is not None:
        people = labels.find(faces.labels, name)
    if people is None:
        notes.append("no label subject or patient: if people appear twice, name who is who with --group LABEL")
        people = np.full(len(faces), "", dtype=object)
    columns = {
        column: faces.meta[column][rows] for column in ("phash", *duplicates.DUPLICATE_COLUMNS) if column in faces.meta
    }
    found = duplicates.cluster(faces.ids[rows], labels.without_missing_texts(people)[rows], columns)
    has_people = people.dtype.kind == "f" or (people != "").any()
    who, one_who = ("people", "person") if has_people else ("faces", "face")
    if found.num_exact:
        shares = f"{plural(found.num_exact, one_who, who)} {'shares' if found.num_exact == 1 else 'share'}"
        notes.append(f"{shares} a photo with another; they stay in one fold")
    if found.num_alike:
        has = f"{plural(found.num_alike, one_who, who)} {'has' if found.num_alike == 1 else 'have'}"
        notes.append(f"{has} a photo that looks the same as another's; they stay in one fold")
    if found.num_refused:
        notes.append(
            f"{found.num_refused} more look the same, but would chain over {duplicates.MAX_PEOPLE} {who} together; "
            "they may lie in several folds"
        )
    return _numbered_by_appearance(found.group), notes


def _numbered_by_appearance(group: np.ndarray) -> np.ndarray:
    """Return groups numbered in the order of their first rows, so that folds do not depend on where rows are stored."""
    _, first_row, index = np.unique(group, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_row))[index]


def _photos_of(values: np.ndarray) -> np.ndarray:
    """Return a number for each value of a label, and one of its own for each row without a value, (n,) int."""
    values = labels.without_missing_texts(values)
    missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.asarray(values == "", bool)
    index = np.unique(values.astype(str), return_inverse=True)[1]
    return np.where(missing, index.max() + 1 + np.arange(len(values)), index)


def _refuse_several_people(options: ProbeOptions, photos_of: np.ndarray, group: np.ndarray) -> None:
    """Raise UsageError where photos to be averaged are of several groups, which may lie in different folds."""
    pairs = np.unique(np.stack([photos_of, group]), axis=1)
    if pairs.shape[1] > len(np.unique(photos_of)):
        raise UsageError(
            f"--aggregate {options.aggregate}: some of its values hold photos of several people; name the label that "
            "says who is who, or give it to --group too"
        )


def _own_folds(problem: Problem, options: ProbeOptions, split: Split | None, seed: int, notes: list[str]) -> Problem:
    """Return the problem with folds that are stratified and keep groups together."""
    assert isinstance(options.folds, int)
    _refuse_too_few(problem, options.folds)
    row_strata = strata(problem.target, bool(problem.classes), options.folds)
    fold = assign_folds(problem.group, row_strata, options.folds, [seed, 0])
    train = tuple(np.flatnonzero(fold != number) for number in range(options.folds))
    inner = tuple(
        _inner_folds(problem.group[rows], row_strata[rows], [seed, 1, number]) for number, rows in enumerate(train)
    )
    return replace(problem, fold=fold, train=train, inner=inner, seed=seed)


def _given_folds(problem: Problem, options: ProbeOptions, split: Split | None, seed: int, notes: list[str]) -> Problem:
    """Return the problem with the folds of a split; a fold never learns from the people that it tests."""
    assert split is not None
    if not split.names:
        raise NoInputError(f"task {problem.task}: none of the faces to test on has a usable label")
    row_strata = strata(problem.target, bool(problem.classes), INNER_FOLDS)
    train, inner, num_dropped = [], [], 0
    for number, name in enumerate(split.names):
        others = split.fold != number
        is_train = others & ~np.isin(problem.group, problem.group[~others])
        num_dropped += int((others & ~is_train).sum())
        rows = np.flatnonzero(is_train)
        _refuse_small_training(problem, rows, f"to predict {name}")
        train.append(rows)
        chooses = split.chooses[rows]
        if len(np.unique(problem.target[rows[chooses]])) > 1 and not chooses.all():
            inner.append(np.where(chooses, 0, -1))
        else:
            inner.append(_inner_folds(problem.group[rows], row_strata[rows], [seed, 1, number]))
    if num_dropped:
        notes.append(
            f"{problem.task}: {num_dropped} faces are not learned from in a fold that tests the same people or copies"
        )
    return replace(problem, fold=split.fold, train=tuple(train), inner=tuple(inner), seed=seed, fold_names=split.names)


def _refuse_small_training(problem: Problem, rows: np.ndarray, why: str) -> None:
    num_groups, target = np.count_nonzero(np.bincount(problem.group[rows])), problem.target[rows]
    if num_groups < MIN_TRAIN_GROUPS or (target == target[0]).all():
        what = f"{len(rows)} faces of {num_groups} people"
        raise UsageError(
            f"task {problem.task}: {why} there are {what} to learn from"
            + (", all with one label" if num_groups >= MIN_TRAIN_GROUPS else f", fewer than {MIN_TRAIN_GROUPS}")
            + "; type a larger share or another split"
        )


def _refuse_too_few(problem: Problem, num_folds: int) -> None:
    values, group = problem.target, problem.group
    num_groups = len(np.unique(group))
    if num_groups < num_folds:
        raise UsageError(
            f"task {problem.task}: {len(values)} faces of {plural(num_groups, 'group')} have the label, fewer than the "
            f"{num_folds} folds; label more faces" + (f" or type --folds {num_groups}" if num_groups > 1 else "")
        )
    if not problem.classes and len(np.unique(values)) == 1:
        raise NoInputError(f"task {problem.task}: the label is {values[0]:g} for all {len(values)} faces")
    for index, name in enumerate(problem.classes):
        count = len(np.unique(group[values == index]))
        if count < num_folds:
            raise UsageError(
                f'task {problem.task}: class "{name:.40}" has {count} group{"s" * (count != 1)}, fewer than the '
                f"{num_folds} folds; empty it in the labels" + (f" or type --folds {count}" if count > 1 else "")
            )


def _inner_folds(group: np.ndarray, row_strata: np.ndarray, seed: list[int]) -> np.ndarray:
    """Return inner folds of the training rows, (n,) int, from their groups and strata."""
    group = np.unique(group, return_inverse=True)[1]
    return assign_folds(group, row_strata, min(INNER_FOLDS, int(group.max()) + 1), seed)


def with_fraction(problem: Problem, fraction: float) -> Problem:
    """Return the problem with fewer people to learn from, and the same to predict.

    Each fold's training groups have one stratified order; a fraction takes its beginning, so smaller fractions are
    subsets of larger ones. Raises UsageError where too few are left.
    """
    row_strata = strata(problem.target, bool(problem.classes), INNER_FOLDS)
    train, inner = [], []
    for number, (rows, folds) in enumerate(zip(problem.train, problem.inner, strict=True)):
        order = _stratified_order(problem.group[rows], row_strata[rows], [problem.seed, 3, number])
        kept = np.isin(problem.group[rows], order[: math.ceil(fraction * len(order))])
        _refuse_small_training(problem, rows[kept], f"--fraction {fraction:g}:")
        train.append(rows[kept])
        is_chosen_on_val = (folds < 0).any()
        keeps_val = is_chosen_on_val and len(np.unique(problem.target[rows[kept & (folds >= 0)]])) > 1
        if kept.all() or (keeps_val and (folds[kept] < 0).any()):
            inner.append(folds[kept])
        else:
            seed = [problem.seed, 1, number]
            inner.append(_inner_folds(problem.group[rows[kept]], row_strata[rows[kept]], seed))
    repeats = tuple(with_fraction(one, fraction) for one in problem.repeats)
    return replace(problem, train=tuple(train), inner=tuple(inner), repeats=repeats)


def _stratified_order(group: np.ndarray, row_strata: np.ndarray, seed: list[int]) -> np.ndarray:
    """Return the groups in an order every beginning of which has the strata in about their shares."""
    rng = np.random.default_rng(seed)
    groups, first_row = np.unique(group, return_index=True)
    stratum = row_strata[first_row]
    place = np.empty(len(groups))
    for one in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == one))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return groups[np.argsort(place, kind="stable")]
