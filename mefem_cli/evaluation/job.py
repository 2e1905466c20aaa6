"""What `mefem probe` runs: tasks x heads x stores, then what was asked for beside the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import duplicates, labels
from mefem_cli.evaluation.evaluate import (
    compare,
    evaluate_head,
    learning_curve,
    permutation_test,
    read_features,
    score_age_and_sex,
    subgroups,
)
from mefem_cli.evaluation.heads import choose_pairs, chosen_heads
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.pair import StorePair
from mefem_cli.evaluation.problem import Problem, ask, make_problem, with_fraction
from mefem_cli.evaluation.score import Difference, Mean, Score, Subgroup, mean_over_subgroups, mean_over_targets
from mefem_cli.stores.features import FeatureStore


@dataclass
class Results:
    """Everything that a probe found, in the order of the command line."""

    scores: list[Score] = field(default_factory=list)
    subgroups: list[Subgroup] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[Score] = field(default_factory=list)  # with --fraction: after learning from fewer people
    baselines: list[Score] = field(default_factory=list)  # of age and sex, one for each task and store
    means: list[Mean] = field(default_factory=list)  # over the targets of a task, or over subgroups


@dataclass(frozen=True)
class Job:
    """A probe whose labels, folds and heads are known and sound; no feature has been read yet."""

    stores: list[FeatureStore]
    problems: list[list[Problem]]  # for each target, one for each store, on the same faces
    pairs: list[tuple[str, str]]  # (head, features)
    options: ProbeOptions
    seed: int
    notes: list[str]
    averaged: Mapping[str, list[str]] = field(default_factory=dict)  # task -> its targets, whose mean is its score

    @classmethod
    def prepare(
        cls,
        stores: list[FeatureStore],
        tasks: list[str],
        options: ProbeOptions,
        seed: int = 0,
        limit: int | None = None,
        task_options: Mapping[str, Any] | None = None,
    ) -> Job:
        """Check everything that can be checked before the first fit; `limit` keeps the first faces of the store.

        `task_options` are those of the tasks that have some, by name.
        """
        if not tasks:
            raise UsageError(f"name a task{labels.known_names('', stores[0].labels)}")
        for column in options.by:
            _column(stores[0], column)
        pairs = choose_pairs(stores, options.head, options.features)
        left_out = set(chosen_heads(options.head)) - {head for head, _ in pairs}
        notes = [f"head {head} left out: its features are not stored or not asked for" for head in sorted(left_out)]
        problems: list[list[Problem]] = []
        averaged: dict[str, list[str]] = {}
        for task in dict.fromkeys(tasks):
            given = (task_options or {}).get(task.partition(".")[0])
            asked = [ask(store, task, options.kind, given) for store in stores]
            targets = [one.task for one in asked[0].targets]
            problems += [_on_shared_faces(stores, asked, name, options, seed, limit, notes) for name in targets]
            if asked[0].has_mean and len(targets) > 1:
                averaged[task] = targets
        for problem, *_ in problems:
            for fraction in options.fractions[:1]:  # the smallest: too few people should not be found out late
                with_fraction(problem, fraction)
        found = [note for several in problems for problem in several for note in problem.notes]
        notes = list(dict.fromkeys([*notes, *found]))
        return cls(stores, problems, pairs, options, seed, notes, averaged)

    @property
    def num_fits(self) -> int:
        """Folds to fit, over all tasks, stores and heads."""
        repeats = self.options.repeats
        times = repeats * (1 + len([one for one in self.options.fractions if one < 1])) + self.options.permute
        return sum(len(several) * len(self.pairs) * several[0].num_folds * times for several in self.problems)

    @property
    def inputs(self) -> dict[str, str]:
        """Path -> sha256 of every store, for the provenance."""
        single = [one for store in self.stores for one in _members(store)]
        return {str(store.path.absolute()): store.sha256 for store in single}

    def run(
        self, head_options: Mapping[str, Any] | None = None, after_fold: Callable[[str], None] | None = None
    ) -> Results:
        """Score each head on each task and store; `after_fold` hears what is being fitted after each fold."""
        results = Results()
        for several in self.problems:
            baselines = [
                score_age_and_sex(store, problem, self.options)
                for store, problem in zip(self.stores, several, strict=True)
            ]
            results.baselines += [one for one in baselines if one is not None]
            for head, features in self.pairs:
                scores = self._scores(results, several, head, features, (head_options or {}).get(head), after_fold)
                for other in scores[1:]:
                    results.differences.append(compare(scores[0], other, self.options.bootstraps, self.seed))
                for score, baseline in zip(scores, baselines, strict=True):
                    if baseline is not None:
                        results.differences.append(compare(score, baseline, self.options.bootstraps, self.seed))
        self._add_means(results)
        self._add_subgroups(results)
        self._report_twins(results)
        return results

    def _scores(
        self,
        results: Results,
        several: list[Problem],
        head: str,
        features: str,
        head_options: Any,
        after_fold: Callable[[str], None] | None,
    ) -> list[Score]:
        """Add a head's scores of one target to the results, one for each store, and return them."""
        scores = []
        for store, problem in zip(self.stores, several, strict=True):
            score = evaluate_head(store, problem, head, features, self.options, head_options, after_fold)
            if self.options.permute:
                score = permutation_test(store, problem, score, self.options, head_options, after_fold)
            scores.append(score)
            less = tuple(one for one in self.options.fractions if one < 1)
            if less:
                results.curves += learning_curve(
                    store, problem, head, features, less, self.options, head_options, after_fold
                )
            if self.options.fractions:
                results.curves.append(score)
        results.scores += scores
        return scores

    def _add_means(self, results: Results) -> None:
        for task, targets in self.averaged.items():
            of_task = [score for score in results.scores if score.task in targets]
            for key in dict.fromkeys((one.head, one.features, one.store) for one in of_task):
                scores = [one for one in of_task if (one.head, one.features, one.store) == key]
                mean = mean_over_targets(task, scores, self.options.bootstraps, self.seed)
                if mean is None:
                    results.notes.append(f"{task}: no mean over targets, as they are not known of the same faces")
                else:
                    results.means.append(mean)
        for score in results.scores:
            if score.mean_over:
                mean = mean_over_subgroups(score, score.mean_over, self.options.bootstraps, self.seed)
                results.means += [mean] if mean is not None else []

    def _add_subgroups(self, results: Results) -> None:
        store_of = {str(store.path): store for store in self.stores}
        hidden: dict[str, int] = {}
        for score in results.scores:
            for by, values in self._columns(store_of[score.store], score):
                shown, num_hidden = subgroups(score, by, values, self.options.bootstraps, self.seed)
                results.subgroups += shown
                hidden[by] = max(hidden.get(by, 0), num_hidden)
        for by, count in hidden.items():
            if count:
                results.notes.append(f"--by {by}: {count} subgroups of fewer than 20 people are not shown")

    def _columns(self, store: FeatureStore, score: Score) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the columns (n,) to cut a score's faces by: those asked for, the sources left out, the task's own."""
        names = [*self.options.by, *([self.options.leave_out] if self.options.leave_out else [])]
        row_of = {name: row for row, name in enumerate(store.ids)}
        rows = [row_of[name] for name in score.predictions.ids]
        for name in dict.fromkeys(names):
            yield name, _column(store, name)[rows]
        yield from score.by.items()

    def _report_twins(self, results: Results) -> None:
        """Say how many faces the encoder finds nearly equal to other people's in other folds; folds stay."""
        kinds = {features for _, features in self.pairs if "patches" not in features}
        for features in sorted(kinds):
            for store, problem in zip(self.stores, self.problems[0], strict=True):
                read = read_features(store, features, problem.rows)
                count = duplicates.twins(read, problem.group, problem.fold)
                if count:
                    results.notes.append(
                        f"{store.model_name}: by their {features} features {count} faces nearly equal another person's "
                        f"in another fold (cosine from {duplicates.TWIN_COSINE}); look whether people appear twice"
                    )


def _members(store: FeatureStore) -> list[FeatureStore]:
    return [store.train, store.test] if isinstance(store, StorePair) else [store]


def _parts(store: FeatureStore) -> list[np.ndarray]:
    """Return the ids of a store, of a pair those to learn from and those to test on."""
    if not isinstance(store, StorePair):
        return [store.ids]
    return [store.ids[store.part_of_pair == part] for part in dict.fromkeys(store.part_of_pair)]


def _column(store: FeatureStore, name: str) -> np.ndarray:
    if name not in store.labels and name in store.meta:
        return store.meta[name]
    return labels.find(store.labels, name)


def _on_shared_faces(
    stores: list[FeatureStore],
    asked: list[labels.Asked],
    task: str,
    options: ProbeOptions,
    seed: int,
    limit: int | None,
    notes: list[str],
) -> list[Problem]:
    """Return the problem of a target for each store, restricted to faces that all of them can use."""
    targets = [_named(one, task, store) for one, store in zip(asked, stores, strict=True)]
    inputs = list(zip(stores, asked, targets, strict=True))
    chosen = None if limit is None else np.concatenate([part[:limit] for part in _parts(stores[0])])
    problems = [make_problem(store, one, target, options, seed, chosen) for store, one, target in inputs]
    shared = problems[0].ids
    for problem in problems[1:]:
        shared = np.intersect1d(shared, problem.ids)
    largest = max(len(problem.ids) for problem in problems)
    if all(len(problem.ids) == len(shared) for problem in problems):
        return problems
    if not len(shared):
        raise NoInputError(f"task {task}: the stores share no faces; embed the same crops into both")
    notes.append(f"{task}: {largest - len(shared)} faces that not all stores have are left out")
    return [make_problem(store, one, target, options, seed, shared) for store, one, target in inputs]


def _named(asked: labels.Asked, name: str, store: FeatureStore) -> labels.Target:
    for target in asked.targets:
        if target.task == name:
            return target
    raise NoInputError(f"task {name}: {store.path} has no usable label for it, another store does")


def open_stores(paths: list[Path]) -> list[FeatureStore]:
    """Open stores. Raises UsageError where one is named twice."""
    stores = [FeatureStore.open(path) for path in paths]
    if len({store.path.resolve() for store in stores}) < len(stores):
        raise UsageError(f"--store {paths[0]} is given twice; name another store to compare it with")
    return stores


def open_pairs(options: ProbeOptions) -> list[FeatureStore]:
    """Open the stores of `--train-store` and `--test-store`, each pair as one."""
    train = [FeatureStore.open(path) for path in options.train_store]
    test = open_stores([Path(path) for path in options.test_store])
    for one, other in zip(train, test, strict=True):
        if one.path.resolve() == other.path.resolve():
            raise UsageError(f"--train-store and --test-store {one.path} are one; type --store for folds within it")
    return [StorePair(one, other, options.group) for one, other in zip(train, test, strict=True)]
