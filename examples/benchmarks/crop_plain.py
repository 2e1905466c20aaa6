"""The loop that people write: Pillow, MediaPipe, Pillow. For crop.py to compare with.

    python examples/benchmarks/crop_plain.py short FOLDER OUT       (or short,full: both models, as --detector auto)

One process; MediaPipe's own threads are its own affair. Prints how many crops it wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mediapipe as mp
import numpy as np
from mediapipe.tasks.python import BaseOptions
from mediapipe.tasks.python.vision import FaceDetector, FaceDetectorOptions
from PIL import Image, ImageOps

from mefem_cli.faces.detector import ASSETS, MODELS


def main(models: str, folder: str, out: str) -> None:
    """Crop the best face of each JPEG below a folder by the paper's rule."""
    detectors = [_detector(name) for name in models.split(",")]
    count = 0
    for path in sorted(Path(folder).rglob("*.jpg")):
        image = ImageOps.exif_transpose(Image.open(path).convert("RGB"))
        picture = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.asarray(image))
        hits = [hit for detector in detectors for hit in detector.detect(picture).detections]
        if not hits:
            continue
        box = max((hit.bounding_box for hit in hits), key=lambda box: box.width * box.height)
        half = max(box.width, box.height)
        x, y = box.origin_x + box.width / 2, box.origin_y + box.height / 2
        square = (round(x - half), round(y - half), round(x + half), round(y + half))
        if square[0] < 0 or square[1] < 0 or square[2] > image.width or square[3] > image.height or 2 * half < 224:
            continue
        crop = image.crop(square).resize((224, 224), Image.Resampling.BICUBIC)
        crop.save(Path(out) / f"{path.stem}.jpg", quality=95)
        count += 1
    print(count)
    for detector in detectors:
        detector.close()


def _detector(name: str) -> FaceDetector:
    base = BaseOptions(model_asset_path=str(ASSETS / MODELS[name][0]))
    return FaceDetector.create_from_options(FaceDetectorOptions(base_options=base))


if __name__ == "__main__":
    main(*sys.argv[1:])
