"""Crops folders made in a moment, for tests of what comes after `mefem crop`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg

from mefem_cli.stores import crops


def smooth_faces(count: int, size: int = 224, seed: int = 0) -> np.ndarray:
    """Return uint8 [count, size, size, 3]: coloured blobs whose radius and tone differ from face to face."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size - 0.5
    faces = []
    for _ in range(count):
        radius, tone = generator.uniform(0.15, 0.35), generator.uniform(60, 220, 3)
        centre = generator.uniform(-0.05, 0.05, 2)
        blob = np.exp(-(((row - centre[0]) ** 2 + (column - centre[1]) ** 2) / radius**2))
        noise = generator.normal(0, 6, (size, size, 1))
        faces.append(np.clip(blob[..., None] * tone + 20 + noise, 0, 255))
    return np.array(faces, dtype=np.uint8)


def write_crops(folder: Path, count: int, size: int = 224, seed: int = 0, first: int = 0, **labels: list) -> Path:
    """Write a crops folder as `mefem crop` would; labels are columns of length `count`."""
    rows = []
    (folder / crops.IMAGES).mkdir(parents=True)
    for number, face in enumerate(smooth_faces(count, size, seed), start=first):
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(face), quality=95, colorsubsampling="444")
        path = f"{crops.IMAGES}/{number:04d}.jpg"
        (folder / path).write_bytes(data)
        rows.append(
            {
                "id": hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:16],
                "source": f"photos/{number:04d}.png",
                "status": crops.OK,
                "path": path,
                "sha256": hashlib.sha256(face.tobytes()).hexdigest(),
                "crop_sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    table = pa.Table.from_pylist(rows, schema=crops.SCHEMA)
    for name, values in labels.items():
        table = table.append_column(crops.LABEL + name, pa.array(values))
    (folder / crops.PROVENANCE).write_text(json.dumps({"options": {"size": size}}))
    crops.write_manifest(folder, table)
    return folder


def write_run(folder: Path, seed: int = 0, class_token: bool = True) -> Path:
    """Write a finished run without training: a ViT of 48 features for 64 px, its two encoders different."""
    import torch

    from mefem_cli import parts
    from mefem_cli.backbones import vit
    from mefem_cli.objectives import mefem
    from mefem_cli.stores.runs import Run

    torch.manual_seed(seed)
    backbone = vit.Options("vit_tiny_patch16_224", image_size=64, patch_size=8, depth=2, embed_dim=48, num_heads=3)
    options = mefem.Options(cls_prob=0.5 if class_token else None, predictor_depth=1)
    objective = mefem.build(options, vit.build(backbone, class_token), parts.Given({"width": 2}))
    with torch.no_grad():
        for parameter in objective.target_encoder.parameters():
            parameter.add_(0.01)
    run = Run.create(folder, {})
    vit.save_encoder(run, objective.encoders(), {}, {"inputs": {}})
    return folder
