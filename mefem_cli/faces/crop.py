"""One picture -> face crops by the paper's rule, or the reason why not.

BlazeFace gives a box; the crop is the square with side `scale * max(box width, box height)`, centred on the box; it is
rejected if it leaves the image or is too small; else it is resampled to `size` px.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mefem_cli.errors import OutputError, UsageError
from mefem_cli.faces import geometry, images
from mefem_cli.faces.detector import Detection, FaceDetector
from mefem_cli.faces.geometry import Square
from mefem_cli.faces.inputs import Source, face_id
from mefem_cli.stores.crops import IMAGES, KEYPOINTS, OK, REJECTED, SCHEMA, path_to_text

LONGEST_NAME = 255  # bytes that file systems allow in one name
STILL_FRAME = 0
Row = dict[str, Any]  # one row of the manifest, and the source's `name`, `size` and `mtime`


@dataclass(frozen=True)
class CropOptions:
    """The crops."""

    detector: Literal["auto", "short", "full", "none"] = "auto"  # BlazeFace model; auto: both; none: whole picture
    min_score: float | None = None  # least score of a face, for all models (without it: short 0.7, full 0.5)
    faces: Literal["best", "all", "one"] = "best"  # largest area x score, every face, or only pictures with one face
    scale: float = 2.0  # side of the square, in longer sides of the face box
    size: int = 224  # side of a crop, px
    min_size: int = 224  # reject squares whose side in the picture is smaller, px
    pad: Literal["none", "reflect", "edge"] = "none"  # invent what lies beyond the picture instead of rejecting
    labels: str | None = None  # CSV or Parquet table to join: its column path ends the picture's path, or is its stem
    key: str | None = None  # column of --labels that names pictures, instead of path
    quality: int = 95  # of the JPEG crops, 1 to 100
    max_pixels: int = 120_000_000  # larger pictures are rejected as too-large
    retry_rejected: bool = False  # try rejected pictures of an earlier run again
    max_rejects: str | None = None  # exit code 3 if more faces are rejected, as a number or as a percentage (10%)
    workers: int | None = None  # processes that read pictures and find faces; without it one per core

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("min_size", 1), ("max_pixels", 1), ("workers", 1), ("quality", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: wanted {least} or more")
        if self.quality > 100:
            raise UsageError(f"--quality {self.quality}: wanted 1 to 100")
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"--scale {self.scale}: wanted a number above 0")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise UsageError(f"--min-score {self.min_score}: wanted 0 to 1")
        if self.key is not None and self.labels is None:
            raise UsageError(f"--key {self.key}: names a column of --labels TABLE, which is not given")
        if self.max_rejects is not None and not re.fullmatch(r"\d+|\d+(\.\d+)?%", self.max_rejects):
            raise UsageError(f"--max-rejects {self.max_rejects}: wanted a number (20) or a percentage (10%)")

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that decide what a crop looks like; one crops folder has one recipe."""
        names = ("detector", "min_score", "faces", "scale", "size", "min_size", "pad", "quality", "max_pixels")
        return {name: getattr(self, name) for name in names}

    def too_many(self, rejects: int, total: int) -> bool:
        """Return whether `--max-rejects` allows fewer than `rejects` of `total`."""
        if self.max_rejects is None:
            return False
        if self.max_rejects.endswith("%"):
            return rejects > total * float(self.max_rejects[:-1]) / 100
        return rejects > int(self.max_rejects)


@dataclass(frozen=True)
class Face:
    """A face in a picture, or that there is none; `reason` is empty if `pixels` is its crop, uint8 [size, size, 3]."""

    reason: str = ""
    detail: str = ""
    rank: int | None = None
    detection: Detection | None = None
    square: Square | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)


def crop_faces(pixels: np.ndarray, options: CropOptions, detector: FaceDetector | None) -> list[Face]:
    """Crop the faces in uint8 [H, W, 3] sRGB; without a detector the centred square of the whole picture.

    Returns at least one item: a picture without a face is one whose `reason` says so.
    """
    if detector is None:
        height, width = pixels.shape[:2]
        return [_cut(pixels, geometry.centred_square(width, height), None, 0, options)]
    found = detector.detect(pixels)
    if not found.faces:
        return [_no_face(found.doubtful, detector)]
    if options.faces == "one" and len(found.faces) > 1:
        best = found.faces[0]
        square = geometry.square_around(best.box, options.scale)
        return [Face("not-one-face", f"{len(found.faces)} faces", 0, best, square)]
    chosen = found.faces if options.faces == "all" else found.faces[:1]
    squares = [geometry.square_around(face.box, options.scale) for face in chosen]
    return [_cut(pixels, squares[rank], face, rank, options) for rank, face in enumerate(chosen)]


def _no_face(doubtful: Detection | None, detector: FaceDetector) -> Face:
    if doubtful is None:
        return Face("no-face")
    wanted = detector.thresholds[doubtful.model]
    return Face("low-score", f"score {doubtful.score:.2f}, wanted {wanted:g}", 0, doubtful)


def _cut(pixels: np.ndarray, square: Square, face: Detection | None, rank: int, options: CropOptions) -> Face:
    """Apply the paper's rule to one square."""
    height, width = pixels.shape[:2]
    detail = ""
    if not geometry.is_inside(square, width, height):
        if options.pad == "none":
            return Face("border", _where_it_leaves(square, width, height), rank, face, square)
        share = geometry.outside_fraction(square, width, height)
        detail = f"padded by {options.pad}: {share:.1%} of the crop is invented"
    if square.side < options.min_size:
        detail = f"the square is {round(square.side, 2):g} px, wanted {options.min_size}"
        return Face("small", detail, rank, face, square)
    pad: Literal["reflect", "edge"] = "reflect" if options.pad == "reflect" else "edge"
    return Face("", detail, rank, face, square, geometry.resample(pixels, square, options.size, pad))


def _where_it_leaves(square: Square, width: int, height: int) -> str:
    beyond = {
        "on the left": -square.x,
        "at the top": -square.y,
        "on the right": square.x + square.side - width,
        "at the bottom": square.y + square.side - height,
    }
    parts = [f"{round(by, 2):g} px {where}" for where, by in beyond.items() if by > 0]
    return f"the square leaves the picture: {', '.join(parts)}"


class Cropper:
    """The work of one process: sources -> rows of the manifest, the crops written below `out` (None: not written)."""

    def __init__(self, options: CropOptions, out: Path | None):
        self.options, self.out = options, out
        min_score = options.min_score
        self._detector = None if options.detector == "none" else FaceDetector(options.detector, min_score)

    def __call__(self, sources: list[Source]) -> list[list[Row]]:
        """Return the rows of each source. Raises OutputError where a crop cannot be written."""
        return [self.crop_source(source) for source in sources]

    def close(self) -> None:
        """Free the detector."""
        if self._detector is not None:
            self._detector.close()

    def crop_source(self, source: Source) -> list[Row]:
        """Read one picture, crop its faces, write the crops; return a row per face or one for the failure."""
        digest = ""
        try:
            content = _read(source, self.options.max_pixels)
            digest = hashlib.sha256(content).hexdigest()
            picture = images.decode(content, self.options.max_pixels)
            faces = crop_faces(picture.pixels, self.options, self._detector)
        except images.ImageRejected as rejected:
            size = {"width": rejected.width, "height": rejected.height}
            return [failed_row(source, rejected.reason, rejected.detail, sha256=digest, **size)]
        except MemoryError:
            return [failed_row(source, images.TOO_LARGE, "not enough memory to find faces in it", sha256=digest)]
        height, width = picture.pixels.shape[:2]
        known = {"sha256": digest, "width": width, "height": height}
        return [self._row(source, face, known, picture.remark) for face in faces]

    def _row(self, source: Source, face: Face, known: Row, remark: str) -> Row:
        row = failed_row(source, face.reason, "; ".join(filter(None, (face.detail, remark))), **known)
        row |= {"id": face_id(source.name, STILL_FRAME, face.rank or 0), "face": face.rank}
        row["detector"] = "none" if self._detector is None else ""
        if face.detection is not None:
            row |= {"detector": face.detection.model, "score": face.detection.score}
            row |= dict(zip(("box_x", "box_y", "box_w", "box_h"), face.detection.box, strict=True))
            row |= dict(zip(KEYPOINTS, face.detection.keypoints.ravel().tolist(), strict=True))
        if face.square is not None:
            row |= {"crop_x": face.square.x, "crop_y": face.square.y, "crop_side": face.square.side}
        if face.pixels is not None:
            encoded = images.encode_jpeg(face.pixels, self.options.quality)
            path = crop_path(source.name, face.rank if self.options.faces == "all" else None)
            row |= {"status": OK, "path": path, "crop_sha256": hashlib.sha256(encoded).hexdigest()}
            if self.out is not None:
                _write(self.out, path, encoded)
        return row


def failed_row(source: Source, reason: str, detail: str, **known: Any) -> Row:
    """Return the manifest row of a source of which nothing but `known` is known."""
    row: Row = {name: "" if str(SCHEMA.field(name).type) == "string" else None for name in SCHEMA.names}
    row |= {"id": face_id(source.name, STILL_FRAME, 0), "source": path_to_text(source.path), "frame": STILL_FRAME}
    row |= {"status": REJECTED, "reason": reason, "detail": detail}
    row |= {"name": path_to_text(source.name), "size": source.size, "mtime": source.mtime}
    return row | known


def _read(source: Source, max_pixels: int) -> bytes:
    if source.problem:
        raise images.ImageRejected(images.UNREADABLE, source.problem)
    if source.size > max_pixels * images.MAX_BYTES_PER_PIXEL:
        raise images.ImageRejected(images.TOO_LARGE, f"the file has {source.size} bytes; --max-pixels is {max_pixels}")
    try:
        return Path(source.path).read_bytes()
    except OSError as error:
        raise images.ImageRejected(images.UNREADABLE, error.strerror or "cannot be read") from error


def crop_path(name: str, rank: int | None) -> str:
    """Return where the crop of a source lies in a crops folder; `rank` is given where a picture may have several.

    >>> crop_path("photos/anna.png", None)
    'images/photos/anna.png.jpg'
    >>> crop_path("photos/group.jpg", 2)
    'images/photos/group.jpg.2.jpg'
    """
    suffix = ".jpg" if rank is None else f".{rank}.jpg"
    *folders, file = path_to_text(name).split("/")
    return "/".join([IMAGES, *(_fitting(folder, "") for folder in folders), _fitting(file, suffix)])


def _fitting(name: str, suffix: str) -> str:
    """Return name + suffix; a name too long for the file system keeps its beginning and gets its hash."""
    room = LONGEST_NAME - len(suffix.encode())
    if len(name.encode()) <= room:
        return name + suffix
    mark = "~" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return name.encode()[: room - len(mark)].decode(errors="ignore") + mark + suffix


def _write(out: Path, path: str, content: bytes) -> None:
    """Write a crop atomically; until it is whole it lies in the journal's folder, which finished runs sweep."""
    target = out / path
    temporary = out / ".parts" / f"{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}; mend that or name another --out, then run it again") from error
