"""Folds that keep people apart: grouped, stratified, and a function of groups, labels and a seed only.

The features play no part, so two encoders are compared on the same folds.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_REGRESSION_STRATA = 10


def join_rows(*keys: np.ndarray) -> np.ndarray:
    """Return the cluster of each row, (N,) int: rows that share a value in any key, directly or through others.

    Keys are (N,) arrays, such as the subject and the sha256 of the source; "" and NaN are shared with nobody.

    >>> join_rows(np.array(["ann", "ann", "bob", ""]), np.array(["1", "2", "2", "3"]))
    array([0, 0, 0, 1])
    """
    num_rows = len(keys[0])
    rows, nodes, num_nodes = [], [], num_rows
    for key in keys:
        known = np.flatnonzero(~_missing(key))
        values, node = np.unique(key[known], return_inverse=True)
        rows.append(known)
        nodes.append(num_nodes + node)
        num_nodes += len(values)
    edges = (np.concatenate(rows), np.concatenate(nodes))
    graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(num_nodes, num_nodes))
    component = connected_components(graph, directed=False)[1][:num_rows]
    return np.unique(component, return_inverse=True)[1]


def _missing(key: np.ndarray) -> np.ndarray:
    return np.isnan(key) if key.dtype.kind == "f" else np.asarray(key == "", bool)


def strata(values: np.ndarray, is_classification: bool, num_folds: int) -> np.ndarray:
    """Return the stratum of each row, (N,) int: its class, or its bin between quantiles of a number.

    Bins hold at least two rows a fold where there are enough rows, and there are at most ten.
    """
    if is_classification:
        return np.unique(values, return_inverse=True)[1]
    num_bins = int(np.clip(len(values) // (2 * num_folds), 1, MAX_REGRESSION_STRATA))
    edges = np.quantile(values, np.arange(1, num_bins) / num_bins)
    return np.searchsorted(edges, values, side="right")


def assign_folds(clusters: np.ndarray, row_strata: np.ndarray, num_folds: int, seed: int | list[int]) -> np.ndarray:
    """Return the fold of each row, (N,) int in 0 .. num_folds - 1; a cluster lies in one fold.

    Clusters of several rows are placed first, the largest before the others, each where its strata are rarest so far;
    single rows then fill what is missing. Order among equals is drawn from `seed`.
    """
    rng = np.random.default_rng(seed)
    num_strata = int(row_strata.max()) + 1
    sizes = np.bincount(clusters)
    folds = np.full(len(clusters), -1)
    placed = np.zeros((num_folds, num_strata))  # rows of each stratum in each fold
    # Least squares: placing counts c into fold k adds (n_k + c)^2 - n_k^2 = 2 n_k c + c^2 in each stratum, weighted by
    # the stratum's share, and once more over the fold's size; c^2 is the same for every fold.
    weights = 1 / np.maximum(np.bincount(row_strata, minlength=num_strata), 1)
    order = rng.permutation(len(sizes))
    several = order[sizes[order] > 1]
    several = several[np.argsort(-sizes[several], kind="stable")]
    members = np.split(np.argsort(clusters, kind="stable"), np.cumsum(sizes)[:-1])
    for cluster in several:
        counts = np.bincount(row_strata[members[cluster]], minlength=num_strata)
        cost = placed @ (counts * weights) + placed.sum(axis=1) * counts.sum() / len(clusters)
        fold = int(np.argmin(cost))
        folds[members[cluster]] = fold
        placed[fold] += counts
    for stratum in rng.permutation(num_strata):
        rows = np.flatnonzero((folds < 0) & (row_strata == stratum))
        folds[rng.permutation(rows)] = _fill(placed, stratum, len(rows))
    return folds


def _fill(placed: np.ndarray, stratum: int, num_rows: int) -> np.ndarray:
    """Return folds for `num_rows` single rows of one stratum, evening the stratum out, then the folds' sizes."""
    num_folds = len(placed)
    target = (placed[:, stratum].sum() + num_rows) / num_folds
    quota = np.maximum(np.floor(target - placed[:, stratum]), 0).astype(int)
    while quota.sum() > num_rows:  # folds above the target leave less for the others
        quota[np.argmax(quota)] -= 1
    for _ in range(num_rows - quota.sum()):
        in_stratum = placed[:, stratum] + quota
        quota[np.lexsort((placed.sum(axis=1) + quota, in_stratum))[0]] += 1
    placed[:, stratum] += quota
    return np.repeat(np.arange(num_folds), quota)
