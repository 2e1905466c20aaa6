"""BlazeFace, both ranges, through MediaPipe Tasks: pixels -> face boxes with six keypoints.

Short-range BlazeFace knows close-ups, full-range BlazeFace knows small faces. `auto` asks both and speaks the
short-range convention of what a face box is.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mefem_cli.errors import MefemError
from mefem_cli.faces.geometry import Box, intersection_over_union

ASSETS = Path(__file__).parent / "assets"
MODELS = {  # file, sha256 (NOTICE says where they come from)
    "short": (
        "blaze_face_short_range.tflite",
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    ),
    "full": (
        "blaze_face_full_range_sparse.tflite",
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    ),
}
THRESHOLDS = {"short": 0.7, "full": 0.5}  # a hit of at least so much is a face: no false positive on the test scenes
LOWEST_SCORE = 0.3  # what the models are asked for; a best hit below its threshold is the reject `low-score`
SAME_FACE = 0.3  # intersection over union from which two boxes are one face

# Full-range boxes in the short-range convention: medians over 1,603 faces that both models find in 1,731
# head-and-shoulder pictures. The full-range side is 1.058 times the short-range one, and its centre lies 0.043
# full-range sides higher (1.060 and 0.045 on 37 faces of the test scenes).
FULL_OVER_SHORT = 1.06
FULL_CENTRE_DOWN = 0.043

MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object")
SYSTEM_PACKAGES = "libegl1 libgles2 libgl1 libglib2.0-0"


@dataclass(frozen=True)
class Detection:
    """One face: its box (x, y, width, height in px), six keypoints [6, 2] in px, the score and the model that found it.

    A box that was given has no keypoints and no score (NaN). Keypoints are BlazeFace's: right eye, left eye, nose,
    mouth, right ear, left ear (of the person).
    """

    box: Box
    keypoints: np.ndarray | None
    score: float
    model: str

    @property
    def rank(self) -> float:
        """Faces are ranked by area times score, px^2."""
        return self.box[2] * self.box[3] * self.score


@dataclass(frozen=True)
class Found:
    """What a detector saw: `faces`, largest area x score first, and the best `doubtful` hit if there is no face."""

    faces: list[Detection]
    doubtful: Detection | None = None


class FaceDetector:
    """The models that `auto`, `short` or `full` need. Not to be shared by threads; close it, or use it in a `with`.

    `min_score` replaces the thresholds of both models. Raises MefemError where a model file was changed or MediaPipe
    misses a system library.

    >>> with FaceDetector("auto") as detector:
    ...     detector.detect(np.zeros((64, 64, 3), np.uint8)).faces
    []
    """

    def __init__(self, choice: Literal["auto", "short", "full"] = "auto", min_score: float | None = None):
        names = ["short", "full"] if choice == "auto" else [choice]
        self.thresholds = {name: THRESHOLDS[name] if min_score is None else min_score for name in names}
        lowest = min(LOWEST_SCORE, *self.thresholds.values())
        with quiet_stderr():
            self._models = {name: _create(name, lowest) for name in names}
            for model in self._models.values():  # the first detection prints too
                _detect(model, _image_of(np.zeros((128, 128, 3), np.uint8)), "")

    def detect(self, pixels: np.ndarray) -> Found:
        """Find faces in uint8 [H, W, 3] sRGB."""
        image = _image_of(pixels)
        hits = {name: _detect(model, image, name) for name, model in self._models.items()}
        return choose(hits, self.thresholds)

    def close(self) -> None:
        """Free the models now: left to the interpreter's exit, MediaPipe prints while it frees them."""
        with quiet_stderr():
            while self._models:
                self._models.popitem()[1].close()

    def __enter__(self) -> FaceDetector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def choose(hits: dict[str, list[Detection]], thresholds: dict[str, float]) -> Found:
    """Merge what the models found: a face that both see keeps its short-range box.

    `hits` maps a model's name to its detections, full-range ones in their own convention.
    """
    hits = {name: [to_short_convention(hit) for hit in found] for name, found in hits.items()}
    sure = {name: [hit for hit in found if hit.score >= thresholds[name]] for name, found in hits.items()}
    faces = list(sure.get("short", []))
    for hit in sure.get("full", []):
        if all(intersection_over_union(hit.box, other.box) < SAME_FACE for other in sure.get("short", [])):
            faces.append(hit)
    if faces:
        return Found(sorted(faces, key=lambda face: -face.rank))
    return Found([], max((hit for found in hits.values() for hit in found), key=lambda hit: hit.rank, default=None))


def to_short_convention(hit: Detection) -> Detection:
    """Map a full-range box to where the short-range model would put it; a short-range one stays as it is."""
    if hit.model != "full":
        return hit
    x, y, width, height = hit.box
    centre_x, centre_y = x + width / 2, y + height / 2 + FULL_CENTRE_DOWN * height
    width, height = width / FULL_OVER_SHORT, height / FULL_OVER_SHORT
    return replace(hit, box=(centre_x - width / 2, centre_y - height / 2, width, height))


def _create(name: str, lowest_score: float) -> Any:
    tasks = _import_tasks()
    base = tasks["BaseOptions"](model_asset_buffer=_model_bytes(name))
    options = tasks["FaceDetectorOptions"](base_options=base, min_detection_confidence=lowest_score)
    try:
        return tasks["FaceDetector"].create_from_options(options)
    except OSError as error:
        raise _explained(error) from error


def _import_tasks() -> dict[str, Any]:
    try:
        from mediapipe.tasks.python.core.base_options import BaseOptions
        from mediapipe.tasks.python.vision.face_detector import FaceDetector, FaceDetectorOptions
    except (ImportError, OSError) as error:
        raise _explained(error) from error
    return {"BaseOptions": BaseOptions, "FaceDetector": FaceDetector, "FaceDetectorOptions": FaceDetectorOptions}


def _explained(error: Exception) -> Exception:
    """Return the one line that a missing system library deserves; other errors stay what they are."""
    missing = MISSING_LIBRARY.search(str(error))
    if missing is None:
        return error
    return MefemError(
        f"MediaPipe needs the system library {missing[1]}, which is not installed; "
        f"on Debian or Ubuntu type: apt-get install {SYSTEM_PACKAGES}"
    )


def _model_bytes(name: str) -> bytes:
    file, expected = MODELS[name]
    content = (ASSETS / file).read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise MefemError(f"{ASSETS / file} is not the model that this version ships; install mefem-cli again")
    return content


def _image_of(pixels: np.ndarray) -> Any:
    """Return a MediaPipe image, which is a copy of the pixels, for all models to look at."""
    from mediapipe.tasks.python.vision.core.image import Image, ImageFormat

    return Image(image_format=ImageFormat.SRGB, data=np.ascontiguousarray(pixels))


def _detect(model: Any, image: Any, name: str) -> list[Detection]:
    result = model.detect(image)
    width, height = image.width, image.height
    detections = []
    for hit in result.detections:
        box = hit.bounding_box
        keypoints = np.array([(point.x * width, point.y * height) for point in hit.keypoints], dtype=np.float64)
        corner = (float(box.origin_x), float(box.origin_y))
        score = float(hit.categories[0].score)
        detections.append(Detection((*corner, float(box.width), float(box.height)), keypoints, score, name))
    return detections


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere for the block: C++ libraries print there, past Python. Errors still rise."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
