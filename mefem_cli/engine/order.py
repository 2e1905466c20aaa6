"""The order of faces: a function of the seed and the epoch alone, for one source or several with weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mefem_cli.engine import seeds
from mefem_cli.errors import UsageError


@dataclass(frozen=True)
class FaceOrder:
    """Which faces an epoch takes, and in which order.

    A weight says how often a face comes in an epoch: 2 is twice; .25 means that another quarter of the faces with that
    weight comes in each epoch.

    >>> len(FaceOrder(np.arange(10), np.full(10, 1.5)))
    15
    """

    rows: np.ndarray  # [N] of the crops, distinct
    weights: np.ndarray | None = None  # [N], above 0; None: 1

    def __len__(self) -> int:
        """Faces in an epoch, those that come twice counted twice."""
        if self.weights is None:
            return len(self.rows)
        distinct, counts = np.unique(self.weights, return_counts=True)
        return sum(
            count * int(weight) + int(count * (weight % 1)) for weight, count in zip(distinct, counts, strict=True)
        )

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, int64 [len(self)]."""
        generator = seeds.numpy_generator(seed, seeds.ORDER, epoch)
        if self.weights is None:
            return generator.permutation(self.rows)
        taken = []
        for weight in np.unique(self.weights):
            rows = self.rows[self.weights == weight]
            some = generator.permutation(rows)[: int(len(rows) * (weight % 1))]
            taken += [np.repeat(rows, int(weight)), some]
        return generator.permutation(np.concatenate(taken))


def split_weights(sources: Sequence[Path]) -> tuple[list[Path], list[float]]:
    """Return folders and weights from `crops_a=2 crops_b`; a folder whose name has an equals sign is a folder.

    >>> split_weights([Path("crops_a=2"), Path("crops_b")])
    ([PosixPath('crops_a'), PosixPath('crops_b')], [2.0, 1.0])
    """
    folders, weights = [], []
    for source in sources:
        match = None if os.path.lexists(source) else re.fullmatch(r"(.+)=([^=/]*)", str(source), re.DOTALL)
        folders.append(Path(match[1]) if match else source)
        weights.append(_weight(match[2], str(source)) if match else 1.0)
    return folders, weights


def _weight(text: str, given: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or not 0 < float(text) <= 1000:
        raise UsageError(f"{given}: wanted a weight above 0 (up to 1000) behind the equals sign, as in crops=2")
    return float(text)
