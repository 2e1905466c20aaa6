"""Crops of the faces in a feature store, found where they were when embedded, and attention drawn over them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mefem_cli.errors import MefemError
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore

SIDE = 160  # px of a picture on the page
QUALITY = 85
BRIGHTEST = 2.0  # times an even share of attention
MOST_AVERAGED = 200  # crops behind the mean attention


class Faces:
    """Finds the crops of a store's faces; a face whose crop is gone or has changed has no picture."""

    def __init__(self, store: FeatureStore):
        self._store = store

    @cached_property
    def _places(self) -> dict[str, tuple[Crops, int]]:
        """Crops folder and row of each id, of the folders that are still there."""
        places: dict[str, tuple[Crops, int]] = {}
        for folder in self._store.provenance.get("inputs") or {}:
            try:
                crops = Crops.open(Path(folder))
            except (MefemError, OSError, ValueError):
                continue
            places |= {name: (crops, row) for row, name in enumerate(crops.ids)}
        return places

    @cached_property
    def _digests(self) -> dict[str, str]:
        if "crop_sha256" not in self._store.meta:
            return {}
        return dict(zip(self._store.ids, self._store.meta["crop_sha256"], strict=True))

    @cached_property
    def names(self) -> dict[str, str]:
        """The source of each face, by id."""
        if "source" not in self._store.meta:
            return {}
        return dict(zip(self._store.ids, self._store.meta["source"], strict=True))

    def pixels(self, name: str) -> np.ndarray | None:
        """Return the crop of a face by its id, uint8 [SIDE, SIDE, 3], None where it is not what was embedded."""
        if name not in self._places:
            return None
        crops, row = self._places[name]
        try:
            data = crops.read_bytes(row)
            if self._digests.get(name) and hashlib.sha256(data).hexdigest() != self._digests[name]:
                return None
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        except (MefemError, OSError, ValueError, Image.DecompressionBombError):
            return None

    def mean(self, names: Iterable[str]) -> np.ndarray | None:
        """Return the mean of some crops, uint8 [SIDE, SIDE, 3]."""
        total, count = np.zeros((SIDE, SIDE, 3)), 0
        for name in names:
            pixels = self.pixels(name)
            if pixels is not None:
                total, count = total + pixels, count + 1
            if count == MOST_AVERAGED:
                break
        return (total / count).astype(np.uint8) if count else None


def jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels [H, W, 3] as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def with_heat(pixels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return a crop in grey under its attention [L, L]: dark blue for none, yellow from twice an even share.

    The scale is the same for all faces, so attention that is nearly even looks even.
    """
    from matplotlib import colormaps

    strength = Image.fromarray((shares * shares.size / BRIGHTEST).astype(np.float32))
    smooth = np.clip(np.asarray(strength.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)), 0, 1)
    colour = colormaps["viridis"](smooth)[..., :3] * 255
    grey = pixels.mean(axis=2, keepdims=True)
    weight = 0.25 + 0.4 * smooth[..., None]
    return ((1 - weight) * grey + weight * colour).astype(np.uint8)
