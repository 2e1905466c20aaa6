"""Embedding crops with an encoder into a feature store; what `mefem embed` runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.backbones import vit
from mefem_cli.engine.device import Device, DeviceOptions, announce, choose_device
from mefem_cli.engine.stream import ImageStream
from mefem_cli.errors import NoInputError, OutOfMemory, OutputError, UsageError
from mefem_cli.stores import product as products
from mefem_cli.stores import runs
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.stores.product import ProductOptions

RUNS = Path("runs")
AUTO_BATCH = {"cpu": 32, "cuda": 256, "mps": 64}


@dataclass(frozen=True)
class EmbedOptions:
    """The features."""

    model: str | None = None  # a run folder or its model.safetensors; default: runs/latest
    encoder: Literal["target", "source"] | None = None  # which encoder of the run; default: target, the EMA of source
    patches: bool = False  # store the features of every patch too
    dtype: Literal["float16", "float32"] = "float16"  # precision in the store


@dataclass
class Job:
    """Crops and an encoder, ready to run."""

    options: EmbedOptions
    product: ProductOptions
    crops: Crops
    encoder: vit.ViTEncoder
    model: dict[str, Any]  # what tells this encoder from others in the store
    device: Device
    stream: ImageStream
    batch_size: int
    out: Path

    @classmethod
    def prepare(
        cls, folders: list[Path], options: EmbedOptions, machine: DeviceOptions, product: ProductOptions
    ) -> Job:
        """Load the encoder and open the crops. Raises MefemError for whatever is missing or does not fit."""
        path = Path(options.model) if options.model else runs.latest_run(RUNS)
        encoder, description, weights = vit.load_encoder(path, options.encoder)
        crops = Crops.open(*(folders or _default_crops(description)))
        if product.limit is not None:
            crops = crops.select(range(min(product.limit, len(crops))))
        which = "source" if weights.name == runs.ENCODER_FILES["source"] else "target"
        model = {"name": _model_name(weights, which), "sha256": products.file_sha256(weights), "encoder": which}
        device = choose_device(machine.device, machine.precision)
        stream = ImageStream(crops, encoder.image_size, machine.workers)
        batch_size = _batch_size(machine.batch_size, device)
        out = Path(product.out or "features.h5")
        return cls(options, product, crops, encoder.to(device.torch), model, device, stream, batch_size, out)

    def run(self) -> dict[str, int]:
        """Write the store, embedding only what an existing store of the same encoder lacks.

        Returns counts: `crops` in the store, `embedded` now, `unreadable`. Raises OutputError if the store at `out`
        was made by another encoder or with other options, or holds none of these crops.
        """
        old = self._existing_store()
        if (
            old is not None
            and old.provenance.get("inputs") == self.crops.inputs()
            and set(old.ids) == set(self.crops.ids)
        ):
            console.note(f"{self.out}: complete already")
            return {"crops": len(old), "embedded": 0, "unreadable": 0}
        announce(self.device)
        kept = self._reusable_rows(old)
        done = set(old.ids[kept]) if old is not None else set()
        missing = np.array([row for row, name in enumerate(self.crops.ids) if name not in done], dtype=int)
        sizes: dict[str, Any] = {
            "embed_dim": self.encoder.embed_dim,
            "num_patches": self.encoder.num_patches if self.options.patches else 0,
        }
        writer = FeatureWriter(
            self.out, self._provenance(), dtype=self.options.dtype, has_cls=self.encoder.class_token, **sizes
        )
        with writer:
            if old is not None:
                old.copy_rows_into(writer, kept)
            self._embed(missing, writer)
            names = [*(old.ids[kept] if old is not None else []), *(self.crops.ids[row] for row in missing)]
            unreadable = set(self.stream.corrupt)
            row_of = {name: row for row, name in enumerate(self.crops.ids)}
            rows = np.array([row_of[name] for name in names if name not in unreadable], dtype=int)
            if not len(rows):
                raise NoInputError("none of the crops can be read; rerun mefem crop")
            columns = {name: values[rows] for name, values in self.crops.columns.items() if name != "id"}
            writer.finish({name: values[rows] for name, values in self.crops.labels.items()}, columns)
        if old is not None:
            old.close()
        return {"crops": len(rows), "embedded": len(missing) - len(unreadable), "unreadable": len(unreadable)}

    def _embed(self, rows: np.ndarray, writer: FeatureWriter) -> None:
        batches = (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))
        with console.progress("embed", len(rows)) as bar:
            for batch in self.stream.batches(batches, self.device.torch):
                features = self._forward(batch.images)
                readable = batch.readable
                names = [self.crops.ids[row] for row in batch.index[readable]]
                if names:
                    writer.append(names, **{kind: values[readable] for kind, values in features.items()})
                bar.advance(len(batch.index))

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """Return float32 features of a batch, halving it while the device is out of memory."""
        kinds = ["cls"] * self.encoder.class_token + ["mean"] + ["patches"] * self.options.patches
        try:
            with self.device.autocast():
                features = self.encoder.features(images)
            return {kind: features[kind].float().cpu().numpy() for kind in kinds}
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise OutOfMemory("out of memory with one face at a time; try --device cpu") from error
        half = len(images) // 2
        parts = self._forward(images[:half]), self._forward(images[half:])
        return {kind: np.concatenate([part[kind] for part in parts]) for kind in kinds}

    # The store at `out`, if there is one ------------------------------------------------------------------------

    def _existing_store(self) -> FeatureStore | None:
        if not self.out.exists() or self.product.overwrite:
            return None
        store = FeatureStore.open(self.out)
        recorded = {**store.provenance.get("model", {}), **store.provenance.get("options", {})}
        changes = products.difference(recorded, {**self.model, **self._settings()}, frozenset({"name"}))
        if changes:
            raise OutputError(f"{self.out} was made differently: {changes}; type --overwrite or another -o")
        if not self._reusable_rows(store).any():
            raise OutputError(f"{self.out} holds other crops; type --overwrite or another -o")
        return store

    def _reusable_rows(self, store: FeatureStore | None) -> np.ndarray:
        """Return a mask over the store's rows, True: the crop is still there and its bytes are the same."""
        if store is None:
            return np.zeros(0, dtype=bool)
        current = dict(zip(self.crops.ids, self.crops.columns["crop_sha256"], strict=True))
        pairs = zip(store.ids, store.meta["crop_sha256"], strict=True)
        return np.array([current.get(name) == digest for name, digest in pairs], dtype=bool)

    def _settings(self) -> dict[str, Any]:
        precision = "bf16" if self.device.dtype is torch.bfloat16 else "fp32"
        return {"patches": self.options.patches, "dtype": self.options.dtype, "precision": precision}

    def _provenance(self) -> dict[str, Any]:
        record = products.provenance(self._settings(), self.crops.inputs(), self.product.seed, str(self.device))
        preprocessing = {
            "image_size": self.encoder.image_size,
            "mean": list(self.encoder.mean),
            "std": list(self.encoder.std),
            "interpolation": self.encoder.interpolation,
        }
        return {**record, "model": self.model, "preprocessing": preprocessing}

    def print_plan(self) -> None:
        """Print on stdout what would be embedded; nothing is written."""
        old = self._existing_store()
        reusable = int(self._reusable_rows(old).sum())
        dim, patches = self.encoder.embed_dim, self.encoder.num_patches * self.options.patches
        vectors = int(self.encoder.class_token) + 1 + patches
        plan = {
            "out": str(self.out.absolute()),
            "crops": len(self.crops),
            "to_embed": len(self.crops) - reusable,
            "model": self.model,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "estimated_bytes": len(self.crops) * vectors * dim * np.dtype(self.options.dtype).itemsize,
            "options": asdict(self.options),
        }
        if console.wants_json():
            console.emit(plan)
            return
        from rich.table import Table

        shown = Table("plan", "", show_edge=False)
        for name, value in plan.items():
            shown.add_row(name.replace("_", " "), str(value))
        console.table(shown)


def _default_crops(description: dict[str, Any]) -> list[Path]:
    """Return the crops folders that the run was trained on, where they still exist, else crops/."""
    recorded = [Path(folder) for folder in description.get("provenance", {}).get("inputs", {})]
    if recorded and all(folder.exists() for folder in recorded):
        return recorded
    if not Path("crops").exists():
        raise NoInputError("no crops: those of the run are gone and there is no crops/; name a crops folder")
    return [Path("crops")]


def _model_name(weights: Path, which: str) -> str:
    folder = weights.resolve().parent.name
    return folder if which == "target" else f"{folder}:source"


def _batch_size(asked: str, device: Device) -> int:
    if asked == "auto":
        return AUTO_BATCH.get(device.torch.type, 32)
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(f"--batch-size {asked}: wanted auto or a positive number")
    return int(asked)
