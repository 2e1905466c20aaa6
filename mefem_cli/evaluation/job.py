"""What `mefem probe` runs: tasks x heads x stores, then subgroups and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import labels
from mefem_cli.evaluation.evaluate import (
    Difference,
    ProbeOptions,
    Problem,
    Score,
    Subgroup,
    compare,
    evaluate_head,
    prepare,
    subgroups,
)
from mefem_cli.evaluation.heads import choose_pairs, chosen_heads
from mefem_cli.stores.features import FeatureStore


@dataclass
class Results:
    """Everything that a probe found, in the order of the command line."""

    scores: list[Score] = field(default_factory=list)
    subgroups: list[Subgroup] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A probe whose labels, folds and heads are known and sound; no feature has been read yet."""

    stores: list[FeatureStore]
    problems: list[list[Problem]]  # for each task, one for each store, on the same faces
    pairs: list[tuple[str, str]]  # (head, features)
    options: ProbeOptions
    seed: int
    notes: list[str]

    @classmethod
    def prepare(
        cls,
        stores: list[FeatureStore],
        tasks: list[str],
        options: ProbeOptions,
        seed: int = 0,
        limit: int | None = None,
    ) -> Job:
        """Check everything that can be checked before the first fit; `limit` keeps the first faces of the store."""
        if not tasks:
            raise UsageError(f"name a task{labels.known_names('', stores[0].labels)}")
        for column in options.by:
            _column(stores[0], column)
        pairs = choose_pairs(stores, options.head, options.features)
        left_out = set(chosen_heads(options.head)) - {head for head, _ in pairs}
        notes = [f"head {head} left out: its features are not stored or not asked for" for head in sorted(left_out)]
        problems = [_on_shared_faces(stores, task, options, seed, limit, notes) for task in dict.fromkeys(tasks)]
        found = [note for several in problems for problem in several for note in problem.notes]
        return cls(stores, problems, pairs, options, seed, list(dict.fromkeys([*notes, *found])))

    @property
    def num_fits(self) -> int:
        """Folds to fit, over all tasks, stores and heads."""
        return sum(len(several) * len(self.pairs) * several[0].num_folds for several in self.problems)

    def run(
        self, head_options: Mapping[str, Any] | None = None, after_fold: Callable[[str], None] | None = None
    ) -> Results:
        """Score each head on each task and store; `after_fold` hears what is being fitted after each fold."""
        results = Results()
        for several in self.problems:
            for head, features in self.pairs:
                scores = [
                    evaluate_head(
                        store, problem, head, features, self.options, (head_options or {}).get(head), after_fold
                    )
                    for store, problem in zip(self.stores, several, strict=True)
                ]
                results.scores += scores
                for other in scores[1:]:
                    results.differences.append(compare(scores[0], other, self.options.bootstraps, self.seed))
        self._add_subgroups(results)
        return results

    def _add_subgroups(self, results: Results) -> None:
        store_of = {str(store.path): store for store in self.stores}
        hidden: dict[str, int] = {}
        for score in results.scores:
            store = store_of[score.store]
            row_of = {name: row for row, name in enumerate(store.ids)}
            rows = [row_of[name] for name in score.predictions.ids]
            for by in self.options.by:
                shown, num_hidden = subgroups(score, by, _column(store, by)[rows], self.options.bootstraps, self.seed)
                results.subgroups += shown
                hidden[by] = max(hidden.get(by, 0), num_hidden)
        for by, count in hidden.items():
            if count:
                results.notes.append(f"--by {by}: {count} subgroups of fewer than 20 people are not shown")


def _column(store: FeatureStore, name: str) -> np.ndarray:
    if name not in store.labels and name in store.meta:
        return store.meta[name]
    return labels.find(store.labels, name)


def _on_shared_faces(
    stores: list[FeatureStore], task: str, options: ProbeOptions, seed: int, limit: int | None, notes: list[str]
) -> list[Problem]:
    """Return the problem for each store, restricted to faces that all of them can use."""
    chosen = None if limit is None else stores[0].ids[:limit]
    problems = [prepare(store, task, options, seed, chosen) for store in stores]
    shared = problems[0].ids
    for problem in problems[1:]:
        shared = np.intersect1d(shared, problem.ids)
    largest = max(len(problem.ids) for problem in problems)
    if all(len(problem.ids) == len(shared) for problem in problems):
        return problems
    if not len(shared):
        raise NoInputError(f"task {task}: the stores share no faces; embed the same crops into both")
    notes.append(f"{task}: {largest - len(shared)} faces that not all stores have are left out")
    return [prepare(store, task, options, seed, shared) for store in stores]


def open_stores(paths: list[Path]) -> list[FeatureStore]:
    """Open stores. Raises UsageError where one is named twice."""
    stores = [FeatureStore.open(path) for path in paths]
    if len({store.path.resolve() for store in stores}) < len(stores):
        raise UsageError(f"--store {paths[0]} is given twice; name another store to compare it with")
    return stores
