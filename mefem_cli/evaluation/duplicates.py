"""Who must stay together: people, byte-equal photos, and photos that look the same.

Two crops look the same if their perceptual hashes (64 bits, /meta/phash) differ in at most four bits. Likeness is not
transitive, so chains of it could join everything: people are joined nearest first, and never more than
`MAX_PEOPLE` of them. Features play no part; faces that only an encoder finds alike are reported, see `twins`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mefem_cli.evaluation.folds import join_rows

DUPLICATE_COLUMNS = ("sha256", "crop_sha256")  # equal: the same photo
MAX_BITS = 4
MAX_PEOPLE = 50  # that likeness may join: more than the bursts of one photographer, far less than a fold
HASH = re.compile("[0-9a-fA-F]{16}")
BANDS = 5  # by the pigeonhole principle, hashes that differ in 4 bits agree in one of 5 bands
SET_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
TWIN_COSINE = 0.995  # of features standardised over all faces; measured: copies lie above, even of weak encoders
MAX_TWIN_ROWS = 20_000
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Clusters:
    """Rows that must lie in one fold, and why."""

    group: np.ndarray  # (n,) int
    num_exact: int  # people that byte-equal photos joined to others
    num_alike: int  # people that photos which look the same joined to others
    num_refused: int  # joins that would have made a cluster of more than `MAX_PEOPLE`


def cluster(ids: np.ndarray, people: np.ndarray, meta: Mapping[str, np.ndarray]) -> Clusters:
    """Return the clusters of rows by who is who (n,) ("" or NaN: nobody known) and manifest columns (n,)."""
    copies = [meta[column] for column in DUPLICATE_COLUMNS if column in meta]
    alone, exact = join_rows(people), join_rows(people, *copies)
    num_exact = int(alone.max()) - int(exact.max())
    if "phash" not in meta:
        return Clusters(exact, num_exact, 0, 0)
    first, second, distance = similar_pairs(parse_hashes(meta["phash"]))
    # Nearest first, then by id, so that the outcome does not depend on the order of rows.
    rank = np.argsort(np.argsort(ids, kind="stable"))
    low, high = np.minimum(rank[first], rank[second]), np.maximum(rank[first], rank[second])
    order = np.lexsort((high, low, distance))
    group, num_joined, num_refused = _join_capped(exact, first[order], second[order])
    return Clusters(group, num_exact, num_joined, num_refused)


def parse_hashes(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (m,) that have a hash of 16 hex digits, and the hashes (m,) uint64."""
    rows = [row for row, cell in enumerate(texts) if HASH.fullmatch(str(cell))]
    return np.array(rows, int), np.array([int(texts[row], 16) for row in rows], np.uint64)


def similar_pairs(
    hashed: tuple[np.ndarray, np.ndarray], max_bits: int = MAX_BITS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pairs of rows whose hashes differ in at most `max_bits` (4 or fewer): first, second, distance, each (P,).

    Of rows with one and the same hash, each is paired with the next only: that joins them all.
    """
    rows, hashes = hashed
    order = np.argsort(hashes, kind="stable")
    rows, hashes = rows[order], hashes[order]
    is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, bool)
    equal = np.flatnonzero(~is_first)
    pairs = [(rows[equal - 1], rows[equal], np.zeros(len(equal), int))]
    rows, hashes = rows[is_first], hashes[is_first]
    width = -(-64 // BANDS)
    for band in range(BANDS):
        key = (hashes >> np.uint64(band * width)) & np.uint64((1 << min(width, 64 - band * width)) - 1)
        pairs += [(rows[one], rows[two], bits) for one, two, bits in _pairs_in_band(key, hashes, max_bits)]
    first, second, distance = (np.concatenate(several) for several in zip(*pairs, strict=True))
    first, second = np.minimum(first, second), np.maximum(first, second)
    _, once = np.unique(np.stack([first, second]), axis=1, return_index=True)  # two hashes may agree in several bands
    return first[once], second[once], distance[once]


def _pairs_in_band(
    key: np.ndarray, hashes: np.ndarray, max_bits: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return pairs of indices with one key: in the order of keys, rows one apart, two apart, ... while any agree."""
    order = np.argsort(key, kind="stable")
    key, hashes = key[order], hashes[order]
    found = []
    at = np.arange(len(key) - 1)
    for apart in range(1, len(key)):
        at = at[at + apart < len(key)]
        at = at[key[at] == key[at + apart]]
        if not len(at):
            break
        bits = num_bits(hashes[at] ^ hashes[at + apart])
        near = bits <= max_bits
        found.append((order[at[near]], order[at[near] + apart], bits[near]))
    return found


def num_bits(values: np.ndarray) -> np.ndarray:
    """Return how many bits are set in each of (n,) uint64."""
    return SET_BITS[np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=int)


def _join_capped(group: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Join the groups (n,) of pairs of rows in their order; return the groups, how many were joined, and refused."""
    parent = list(range(int(group.max()) + 1))
    size = [1] * len(parent)

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    num_joined = num_refused = 0
    for one, other in zip(group[first].tolist(), group[second].tolist(), strict=True):
        one, other = root(one), root(other)
        if one == other:
            continue
        if size[one] + size[other] > MAX_PEOPLE:
            num_refused += 1
            continue
        parent[other] = one
        size[one] += size[other]
        num_joined += 1
    roots = np.array([root(one) for one in range(len(parent))])
    return np.unique(roots[group], return_inverse=True)[1], num_joined, num_refused


def twins(features: np.ndarray, group: np.ndarray, fold: np.ndarray) -> int:
    """Return how many faces have a near twin of another group in another fold, by their features [n, D] alone.

    Only counted, so that folds never depend on the encoder. Features are standardised, likeness is their cosine.
    """
    chosen = np.random.default_rng(0).permutation(len(features))[:MAX_TWIN_ROWS]
    one = features[chosen].astype(np.float32)
    one = (one - one.mean(axis=0)) / np.maximum(one.std(axis=0), 1e-6)
    one /= np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-6)
    group, fold = group[chosen], fold[chosen]
    has_twin = np.zeros(len(one), bool)
    for begin in range(0, len(one), BLOCK_ROWS):
        near, other = np.nonzero(one[begin : begin + BLOCK_ROWS] @ one[begin:].T >= TWIN_COSINE)
        near, other = begin + near, begin + other
        is_apart = (group[near] != group[other]) & (fold[near] != fold[other])
        has_twin[near[is_apart]] = has_twin[other[is_apart]] = True
    return int(has_twin.sum())
