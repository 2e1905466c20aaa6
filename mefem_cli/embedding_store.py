"""One encoder and the feature store that it fills: what is there already, what it lacks, and how it is put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.backbones import _alignment, _frozen
from mefem_cli.backbones._frozen import Loaded, Preprocessing
from mefem_cli.engine.device import Device
from mefem_cli.engine.encode import Encoding
from mefem_cli.engine.stream import Resized, View
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores import feature_parts
from mefem_cli.stores import product as products
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.feature_parts import Parts
from mefem_cli.stores.features import JOINED, KINDS, FeatureStore, FeatureWriter

if TYPE_CHECKING:
    from mefem_cli.embedding import EmbedOptions

DEFAULTS = {"compress": None, "alignment": _frozen.NO_ALIGNMENT}  # what stores of an earlier mefem do not record


@dataclass(frozen=True)
class Aligned:
    """The face laid onto the template of its encoder."""

    preprocessing: Preprocessing
    keypoints: np.ndarray  # [N, 4, 2], px of the crops

    @property
    def image_size(self) -> int:
        """Side of the encoder's input, px."""
        return self.preprocessing.image_size

    def fill(self, crop: np.ndarray, row: int, image: np.ndarray) -> None:
        """Warp the crop into `image`."""
        image[:] = _alignment.aligned(crop, self.keypoints[row], self.preprocessing)


class Embedding:
    """One encoder and the store that its features go to."""

    def __init__(self, loaded: Loaded, crops: Crops, device: Device, options: EmbedOptions):
        self.loaded, self.crops, self.options = loaded, crops, options
        self.out = Path()
        encoder = self.encoder = loaded.encoder.to(device.torch)
        if options.patches and not encoder.num_patches:
            raise UsageError(f"--patches: {loaded.spec} has no features of patches; leave --patches out")
        has = {"cls": encoder.class_token, "mean": encoder.has_mean, "patches": options.patches}
        self.kinds = [kind for kind in KINDS if has[kind]]
        self.encoding = Encoding(encoder, device, self.kinds, options.dtype)
        sha256 = products.file_sha256(loaded.weights) if loaded.weights is not None else None
        self.model: dict[str, Any] = {"name": loaded.name, "sha256": sha256, **loaded.details}
        if sha256 is None:
            self.model["spec"] = loaded.spec
        precision = "bf16" if device.dtype is torch.bfloat16 else "fp32"
        self.settings: dict[str, Any] = {"patches": options.patches, "dtype": options.dtype, "precision": precision}
        self.settings["compress"] = options.compress
        self.preprocessing: dict[str, Any] = json.loads(json.dumps(asdict(encoder.preprocessing)))
        self.device = device
        self.old: FeatureStore | None = None
        self.kept = np.zeros(0, dtype=bool)  # of the old store's rows, True: the crop is there, with the same bytes

    @property
    def view(self) -> View:
        """What the encoder wants to see of a crop. Raises NoInputError where a crop cannot serve."""
        wanted = self.encoder.preprocessing
        if wanted.alignment == _frozen.NO_ALIGNMENT:
            return Resized(wanted.image_size, wanted.interpolation)
        return Aligned(wanted, _alignment.crop_keypoints(self.crops, self.loaded.spec))

    # What is there already -----------------------------------------------------------------------------------------

    def open_old(self, overwrite: bool) -> None:
        """Open the store at `out`, if one is to be gone on with. Raises OutputError if it is another encoder's."""
        if overwrite or not self.out.exists():
            return
        old = FeatureStore.open(self.out)
        record = old.provenance
        recorded = {**DEFAULTS, **old.model, **record.get("options", {}), **record.get("preprocessing", {})}
        wanted = {**self.model, **self.settings, **self.preprocessing}
        there = {name: recorded.get(name) for name in wanted}
        changes = products.difference(there, wanted, ignore=frozenset({"name"}))
        if changes:
            old.close()
            raise OutputError(f"{self.out} was made differently: {changes}; type --overwrite or another -o")
        current = dict(zip(self.crops.ids, self.crops.columns["crop_sha256"], strict=True))
        pairs = zip(old.ids, old.meta["crop_sha256"], strict=True)
        self.kept = np.array([current.get(name) == digest for name, digest in pairs], dtype=bool)
        if not self.kept.any():
            old.close()
            raise OutputError(f"{self.out} holds other crops; type --overwrite or another -o")
        self.old = old

    def close_old(self) -> None:
        """Close the old store, if there is one."""
        if self.old is not None:
            self.old.close()

    @property
    def is_complete(self) -> bool:
        """Whether the old store is what would be made."""
        old = self.old
        if old is None or old.provenance.get("inputs") != self.crops.inputs() or not self.kept.all():
            return False
        return len(old) + len(self._still_unreadable(old.unreadable)) == len(self.crops)

    def missing(self) -> np.ndarray:
        """Return the rows of the crops that neither the old store nor a part has, in order."""
        parts = Parts(feature_parts.folder_of(self.out))
        for path in parts.damaged:
            console.warn(f"{path} is damaged, as after a power cut; its crops are embedded anew")
        is_there = self._is_old() | (self._places(parts) >= 0)
        is_there[self._still_unreadable({**self._old_unreadable, **parts.unreadable})] = True
        return np.flatnonzero(~is_there)

    def _is_old(self) -> np.ndarray:
        """Return which crops the old store has, (N,) bool."""
        kept = set(self.old.ids[self.kept]) if self.old is not None else set()
        return np.fromiter((name in kept for name in self.crops.ids), bool, len(self.crops))

    @property
    def _old_unreadable(self) -> dict[str, str]:
        return self.old.unreadable if self.old is not None else {}

    def _places(self, parts: Parts) -> np.ndarray:
        return parts.locate(self.crops.ids, self.crops.columns["crop_sha256"])

    def _still_unreadable(self, known: Mapping[str, str]) -> list[int]:
        """Return the rows of crops that could not be read and have not changed since."""
        rows = [row for row, name in enumerate(self.crops.ids) if name in known] if known else []
        return [row for row in rows if bytes_sha256(self.crops, row) == known[self.crops.ids[row]]]

    # Writing ----------------------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Return what all parts of the store have in common."""
        model = {name: value for name, value in self.model.items() if name != "name"}
        return {"model": model, "options": {**self.settings, "compress": None}, "preprocessing": self.preprocessing}

    def finish(self, seed: int) -> tuple[int, set[str]]:
        """Copy the old store's rows and those of the parts into the store; return how many, and the unreadable ids.

        Raises OutputError where rows are missing, NoInputError where there is none.
        """
        ids, parts, is_old = self.crops.ids, Parts(feature_parts.folder_of(self.out)), self._is_old()
        places = self._places(parts)
        new = np.flatnonzero((places >= 0) & ~is_old)
        row_of = {name: row for row, name in enumerate(ids)}
        old_rows = [row_of[name] for name in self.old.ids[self.kept]] if self.old is not None else []
        rows = np.array([*old_rows, *new], dtype=np.int64)
        is_there = np.isin(np.arange(len(ids)), rows)
        known = {**self._old_unreadable, **parts.unreadable}
        unreadable = {ids[row]: known[ids[row]] for row in self._still_unreadable(known) if not is_there[row]}
        if len(rows) + len(unreadable) != len(ids):
            raise OutputError(f"{self.out}: crops changed meanwhile; type the same again, which embeds those anew")
        if not len(rows):
            raise NoInputError("none of the crops can be read; rerun mefem crop")
        with self._writer(seed) as writer:
            if self.old is not None:
                self.old.copy_rows_into(writer, self.kept)
            parts.copy_into(writer, [ids[row] for row in new], places[new])
            writer.finish(self._labels(rows), _Meta(self.crops, rows), unreadable)
        parts.remove()
        return len(rows), set(unreadable)

    def _writer(self, seed: int) -> FeatureWriter:
        record = products.provenance(self.settings, self.crops.inputs(), seed, str(self.device))
        record |= {"model": self.model, "preprocessing": self.preprocessing, "encoder": self.loaded.origin}
        if self.old is not None and JOINED in self.old.provenance:
            record[JOINED] = self.old.provenance[JOINED]
        return FeatureWriter(
            self.out,
            record,
            self.encoder.embed_dim,
            self.options.dtype,
            num_patches=self.encoder.num_patches if self.options.patches else 0,
            has_cls="cls" in self.kinds,
            has_mean="mean" in self.kinds,
            compress=self.options.compress,
        )

    def _labels(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the labels of the crops, and those that `mefem store labels` joined to the old store."""
        labels = {name: values[rows] for name, values in self.crops.labels.items()}
        joined = self.old.joined_labels if self.old is not None else []
        if self.old is None or not joined:
            return labels
        row_of = {name: row for row, name in enumerate(self.old.ids)}
        places = np.array([row_of.get(self.crops.ids[row], -1) for row in rows])
        for name in joined:
            values = self.old.labels[name][places]
            values[places < 0] = np.nan if values.dtype.kind == "f" else ""
            labels[name] = values
        if (places < 0).any():
            console.warn(f"{self.out}: new crops lack the labels joined before; type mefem store labels again")
        return labels


class _Meta(Mapping[str, np.ndarray]):
    """Columns of the manifest at some rows; each is read when it is asked for, as all together are 1 KB a crop."""

    def __init__(self, crops: Crops, rows: np.ndarray):
        self._crops, self._rows = crops, rows
        self._names = [name for name in crops.columns if name != "id"]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._crops.read_column(name)[self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def bytes_sha256(crops: Crops, row: int) -> str:
    """Return the sha256 of an encoded crop as it lies there, "" where there is nothing."""
    try:
        return hashlib.sha256(crops.read_bytes(row)).hexdigest()
    except (OSError, NoInputError):
        return ""
