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
