"""Two stores as one: `--train-store` to learn from, `--test-store`, another data set, to predict."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mefem_cli.errors import UsageError
from mefem_cli.evaluation.problem import GROUP_LABELS
from mefem_cli.stores.features import FeatureStore, Rows

TRAIN, TEST = "train", "test"
IDENTITIES = (*GROUP_LABELS, "subject_id", "patient_id")  # names of people mean nothing in another data set


class StorePair(FeatureStore):
    """The rows of a store to learn from, then those of one to test on; columns that only one has are left out.

    People of two data sets may have equal names, so a label `subject` or the like counts within its own store.
    Raises UsageError where the features are of two encoders.
    """

    def __init__(self, train: FeatureStore, test: FeatureStore, group: str | None = None):
        self._identities = (*IDENTITIES, group)
        _refuse_two_encoders(train, test)
        self.train, self.test = train, test
        self.path, self.provenance = test.path, test.provenance
        self.part_of_pair = np.array([TRAIN] * len(train) + [TEST] * len(test), dtype=object)
        self.labels = {name: self._joined("labels", name) for name in train.labels if name in test.labels}  # type: ignore[assignment]
        self.meta = {name: self._joined("meta", name) for name in train.meta if name in test.meta}  # type: ignore[assignment]

    def _joined(self, group: str, name: str) -> np.ndarray:
        parts = [getattr(store, group)[name] for store in (self.train, self.test)]
        is_identity = group == "labels" and name in self._identities
        if is_identity or len({part.dtype.kind for part in parts}) > 1:
            parts = [np.array([_text(cell) for cell in part], dtype=object) for part in parts]
        if is_identity:
            parts = [
                np.array([cell and f"{word}/{cell}" for cell in part], dtype=object)
                for word, part in zip((TRAIN, TEST), parts, strict=True)
            ]
        return np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.train) + len(self.test)

    @property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        """The crops' ids, (N,); those to learn from begin with `train/`, as a test face may have the same."""
        return np.concatenate([[f"{TRAIN}/{one}" for one in self.train.ids], self.test.ids]).astype(object)

    @property
    def sha256(self) -> str:  # type: ignore[override]
        """A sha256 of both stores'."""
        return hashlib.sha256((self.train.sha256 + self.test.sha256).encode()).hexdigest()

    @property
    def inputs(self) -> dict[Path, str]:
        """Both stores' paths and sha256, for the provenance."""
        return {one.path: one.sha256 for one in (self.train, self.test)}

    def has(self, kind: str) -> bool:
        """Whether both hold features of this kind."""
        return self.train.has(kind) and self.test.has(kind)

    def read_rows(self, name: str, rows: Rows) -> np.ndarray:
        """Return rows of features as stored."""
        numbers = np.arange(len(self))[rows]
        is_train = numbers < len(self.train)
        first = self.train.read_rows(name, numbers[is_train])
        second = self.test.read_rows(name, numbers[~is_train] - len(self.train))
        result = np.empty((len(numbers), *first.shape[1:]), np.result_type(first, second))
        result[is_train], result[~is_train] = first, second
        return result

    def close(self) -> None:
        """Close both files."""
        self.train.close()
        self.test.close()


def _text(cell: object) -> str:
    if isinstance(cell, float | np.floating):
        return "" if cell != cell else f"{cell:g}"
    return str(cell)


def _refuse_two_encoders(train: FeatureStore, test: FeatureStore) -> None:
    one, other = train.model_sha256, test.model_sha256
    shared = [kind for kind in train.kinds if test.has(kind)]
    wants = "; embed both with one encoder: `mefem embed --model`"
    if one and other and one != other:
        raise UsageError(
            f"--train-store {train.path} is of encoder {train.model_name} ({one[:12]}), --test-store {test.path} of "
            f"{test.model_name} ({other[:12]}){wants}"
        )
    for kind in shared:
        if train.shape(kind)[1:] != test.shape(kind)[1:]:
            raise UsageError(f"{train.path} and {test.path} hold {kind} features of two sizes{wants}")
