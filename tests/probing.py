"""Small feature stores for the tests of probing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mefem_cli.stores.features import FeatureStore, FeatureWriter


def text(*values: object) -> np.ndarray:
    """Return texts as a column."""
    return np.array([str(one) for one in values], dtype=object)


def write_store(
    path: Path,
    features: np.ndarray,
    labels: dict[str, np.ndarray],
    meta: dict[str, np.ndarray] | None = None,
    model: dict[str, Any] | None = None,
) -> FeatureStore:
    """Write a store with features [N, D] as cls and open it; ids are 0000, 0001, ..."""
    with FeatureWriter(path, {"model": model or {"name": path.stem}}, features.shape[1], has_mean=False) as writer:
        writer.append([f"{row:04x}" for row in range(len(features))], cls=features)
        writer.finish(labels, meta or {})
    return FeatureStore.open(path)


def people(
    num_people: int, photos: int = 1, seed: int = 0, noise: float = 0.5
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return features [N, 6] and labels of people: a number `y`, classes `c`, `subject`; photos lie side by side."""
    rng = np.random.default_rng(seed)
    hidden = np.repeat(rng.normal(size=(num_people, 3)), photos, axis=0)
    features = np.concatenate([hidden + noise * rng.normal(size=hidden.shape), rng.normal(size=hidden.shape)], axis=1)
    labels = {
        "y": np.round(50 + 10 * hidden[:, 0], 3),
        "c": np.where(hidden[:, 1] > 0, "a", "b").astype(object),
        "subject": text(*np.repeat(np.arange(num_people), photos)),
    }
    return features, labels
