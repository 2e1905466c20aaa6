"""One picture or video -> face crops by the paper's rule, or the reason why not.

BlazeFace gives a box; the crop is the square with side `scale * max(box width, box height)`, centred on the box; it is
rejected if it leaves the image or is too small; else it is resampled to `size` px.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mefem_cli.errors import OutputError, UsageError
from mefem_cli.faces import geometry, images, phash, reading, video
from mefem_cli.faces.detector import Detection, FaceDetector, Found, quiet_stderr
from mefem_cli.faces.geometry import Square
from mefem_cli.faces.rows import CONTENT, STILL_FRAME, Row, failed_row, new_row
from mefem_cli.faces.source import NOTHING, Given, GivenFace, Source
from mefem_cli.stores.crops import IMAGES, KEYPOINTS, OK, path_to_text
from mefem_cli.stores.product import parse_shard

LONGEST_NAME = 255  # bytes that file systems allow in one name
LARGEST_BOX = 2  # longer sides of the picture; a given box of more is a mistake
GIVEN = "given"  # stands for the detector where boxes are given


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
    align: Literal["none", "eyes"] = "none"  # eyes: turn the square until the eyes are level
    frame: str = "middle"  # of a video: middle, first, best (of ten, by score), every:2s, or the frame's number
    boxes: str | None = None  # CSV or Parquet table with face boxes to use instead of the detector
    labels: str | None = None  # CSV or Parquet table to join: its column path ends the picture's path, or is its stem
    key: str | None = None  # column of --labels or --boxes that names pictures, instead of path
    format: Literal["jpeg", "png", "webp"] = "jpeg"  # of the crops
    quality: int = 95  # of JPEG and WebP crops, 1 to 100
    shards: bool = False  # write the crops into tar files of about 1 GiB (webdataset) instead of one file each
    shard: str | None = None  # i/N: do the i-th of N parts of the work, by the names of the sources; join with --merge
    merge: bool = False  # the sources are crops folders of one recipe: join them
    max_pixels: int = 120_000_000  # larger pictures are rejected as too-large
    retry_rejected: bool = False  # try rejected pictures of an earlier run again
    max_rejects: str | None = None  # exit code 3 if more faces are rejected, as a number or as a percentage (10%)
    null: bool = False  # paths on stdin end with a zero byte, as find -print0 writes them
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
        if self.key is not None and self.labels is None and self.boxes is None:
            raise UsageError(f"--key {self.key}: names a column of --labels or --boxes, which are not given")
        if self.max_rejects is not None and not re.fullmatch(r"\d+|\d+(\.\d+)?%", self.max_rejects):
            raise UsageError(f"--max-rejects {self.max_rejects}: wanted a number (20) or a percentage (10%)")
        if self.align != "none" and (self.detector == "none" or self.boxes is not None):
            without = "--detector none" if self.detector == "none" else "--boxes"
            raise UsageError(f"--align {self.align}: wants the eyes that a detector finds; leave {without} out")
        video.parse_frame_choice(self.frame)
        assert self.part

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many; (1, 1) is the whole. Raises UsageError."""
        return parse_shard(self.shard)

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that decide what a crop looks like; one crops folder has one recipe."""
        names = "detector min_score faces scale size min_size pad align frame format quality shards max_pixels"
        return {name: getattr(self, name) for name in names.split()}

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
    angle: float = 0.0  # radians that the square is turned by, clockwise in the picture
    padded: float = 0.0  # share of the crop that lies outside the picture
    pixels: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Shot:
    """One picture taken from a source, with the faces in it."""

    frame: int
    picture: images.Picture
    faces: list[Face]

    def merit(self) -> tuple[bool, float]:
        """How good a frame of a video is: one with a crop first, then by the best score of a face."""
        scores = [face.detection.score for face in self.faces if face.detection is not None]
        return any(face.pixels is not None for face in self.faces), max(scores, default=0.0)


def crop_faces(
    picture: images.Picture, options: CropOptions, detector: FaceDetector | None, given: Given = NOTHING
) -> list[Face]:
    """Crop the faces in a picture; without a detector the centred square of the whole.

    Returns at least one item: a picture without a face is one whose `reason` says so.
    """
    if given.faces:
        return [_cut_given(picture, face, rank, options) for rank, face in enumerate(given.faces)]
    if detector is None:
        return [_cut(picture, geometry.centred_square(picture.width, picture.height), None, 0, options)]
    found = find_faces(picture, detector)
    if not found.faces:
        return [_no_face(found.doubtful, detector)]
    faces = found.faces
    if given.point is not None:
        wanted = np.array(given.point) * (picture.width, picture.height)
        faces = sorted(faces, key=lambda face: math.dist(geometry.centre(face.box), wanted))[:1]
    if options.faces == "one" and len(faces) > 1:
        square = geometry.square_around(faces[0].box, options.scale)
        return [Face("not-one-face", f"{len(faces)} faces", 0, faces[0], square)]
    chosen = faces if options.faces == "all" else faces[:1]
    squares = [geometry.square_around(face.box, options.scale) for face in chosen]
    return [_cut(picture, squares[rank], face, rank, options) for rank, face in enumerate(chosen)]


def find_faces(picture: images.Picture, detector: FaceDetector) -> Found:
    """Find faces in a picture, in its own pixels; large ones are looked for at a reduced scale."""
    pixels, scale = picture.for_detection()
    found = detector.detect(pixels)
    doubtful = None if found.doubtful is None else _in_picture(found.doubtful, scale)
    return Found([_in_picture(face, scale) for face in found.faces], doubtful)


def _in_picture(face: Detection, scale: images.Scale) -> Detection:
    keypoints = None if face.keypoints is None else scale.points_in_picture(face.keypoints)
    return replace(face, box=scale.box_in_picture(face.box), keypoints=keypoints)


def _no_face(doubtful: Detection | None, detector: FaceDetector) -> Face:
    if doubtful is None:
        return Face("no-face")
    wanted = detector.thresholds[doubtful.model]
    return Face("low-score", f"score {doubtful.score:.2f}, wanted {wanted:g}", 0, doubtful)


def _cut_given(picture: images.Picture, face: GivenFace, rank: int, options: CropOptions) -> Face:
    if face.box is None:
        return Face("bad-box", face.problem, rank)
    detection = Detection(face.box, None, math.nan, GIVEN)
    size = f"{picture.width} x {picture.height} px"
    if geometry.intersection_over_union(face.box, (0, 0, picture.width, picture.height)) <= 0:
        return Face("bad-box", f"the box lies outside the picture of {size}", rank, detection)
    if max(face.box[2:]) > LARGEST_BOX * max(picture.width, picture.height):
        return Face("bad-box", f"the box is far larger than the picture of {size}", rank, detection)
    return _cut(picture, geometry.square_around(face.box, options.scale), detection, rank, options)


def _cut(picture: images.Picture, square: Square, face: Detection | None, rank: int, options: CropOptions) -> Face:
    """Apply the paper's rule to one square."""
    angle, outside, details = 0.0, 0.0, []
    if options.align == "eyes" and face is not None and face.keypoints is not None:
        angle = geometry.eye_angle(face.keypoints)
    if not geometry.is_inside(square, picture.width, picture.height, angle):
        if options.pad == "none":
            where = _where_it_leaves(square, picture.width, picture.height, angle)
            return Face("border", where, rank, face, square, angle)
        outside = geometry.outside_fraction(square, picture.width, picture.height, angle)
        details.append(f"padded by {options.pad}: {outside:.1%} of the crop is invented")
    if square.side < options.min_size:
        detail = f"the square is {round(square.side, 2):g} px, wanted {options.min_size}"
        return Face("small", detail, rank, face, square, angle)
    pad: Literal["reflect", "edge"] = "reflect" if options.pad == "reflect" else "edge"
    pixels = picture.crop(square, options.size, pad, angle)
    return Face("", "; ".join(details), rank, face, square, angle, outside, pixels)


def _where_it_leaves(square: Square, width: int, height: int, angle: float) -> str:
    left, top, right, bottom = geometry.bounds(square, angle)
    beyond = {
        "on the left": -left,
        "at the top": -top,
        "on the right": right - width,
        "at the bottom": bottom - height,
    }
    parts = [f"{round(by, 2):g} px {where}" for where, by in beyond.items() if by > 0]
    return f"the square leaves the picture: {', '.join(parts)}"


class Cropper:
    """The work of one process: sources -> rows of the journal.

    Crops are written below `out`; with --shards they travel in the rows; without `out` (a dry run) they are not kept.
    """

    def __init__(self, options: CropOptions, out: Path | None):
        self.options, self.out = options, out
        self._frames = video.parse_frame_choice(options.frame)
        self._detector = None if options.detector == "none" else FaceDetector(options.detector, options.min_score)

    def __call__(self, sources: list[Source]) -> list[list[Row]]:
        """Return the rows of each source. Raises OutputError where a crop cannot be written."""
        with quiet_stderr():  # now and then MediaPipe prints there how some memory is aligned
            return [self.crop_source(source) for source in sources]

    def close(self) -> None:
        """Free the detector."""
        if self._detector is not None:
            self._detector.close()

    def crop_source(self, source: Source) -> list[Row]:
        """Read one source, crop its faces, keep the crops; return a row per face, or one that says what failed."""
        known: Row = {}
        rows: list[Row] = []
        given = Given.from_json(source.given)
        try:
            with reading.opened(source, self.options.max_pixels) as file:
                known["sha256"] = file.sha256
                for frame in self._shots(file, given):
                    rows += self._rows(source, given, frame, file)
        except images.ImageRejected as rejected:
            size = {"width": rejected.width, "height": rejected.height}
            rows.append(failed_row(source, rejected.reason, rejected.detail, **known, **size))
        except MemoryError:
            rows.append(failed_row(source, images.TOO_LARGE, "not enough memory to find faces in it", **known))
        if not rows:
            where = "" if given.segment is None else " in the segment from {:g} to {:g} s".format(*given.segment)
            rows.append(failed_row(source, images.UNREADABLE, f"the video has no frame{where}", **known))
        return rows

    def _shots(self, file: reading.OpenSource, given: Given) -> Iterator[Shot]:
        """Yield the pictures to take from a source with the faces in them: a still, or frames of a video."""
        if not file.is_video:
            picture = images.open_picture(file.content, self.options.max_pixels)
            yield Shot(STILL_FRAME, picture, crop_faces(picture, self.options, self._detector, given))
            return
        frames = video.read_frames(file.file, self._frames, self.options.max_pixels, given.segment)
        shots = (
            Shot(frame.index, picture, crop_faces(picture, self.options, self._detector, given))
            for frame in frames
            for picture in [images.Picture.of(frame.pixels)]
        )
        if self._frames.is_best:
            yield max(shots, key=Shot.merit)
        else:
            yield from shots

    def _rows(self, source: Source, given: Given, shot: Shot, file: reading.OpenSource) -> list[Row]:
        is_numbered = self.options.faces == "all" or len(given.faces) > 1
        rows = []
        for face in shot.faces:
            remark = "; ".join(filter(None, (face.detail, shot.picture.remark)))
            known = {"sha256": file.sha256, "width": shot.picture.width, "height": shot.picture.height}
            row = new_row(source, shot.frame, face.rank, given, reason=face.reason, detail=remark, **known)
            row |= _what_was_found(face, "none" if self._detector is None else "")
            if face.pixels is not None:
                numbers = shot.frame if file.is_video else None, face.rank if is_numbered else None
                row |= self._keep(source, face, numbers)
            rows.append(row)
        return rows

    def _keep(self, source: Source, face: Face, numbers: tuple[int | None, int | None]) -> Row:
        """Encode a crop and write it, or put it into the row; return what the row says of it."""
        assert face.pixels is not None
        encoded = images.encode(face.pixels, self.options.format, self.options.quality)
        kept: Row = {"status": OK, "crop_sha256": hashlib.sha256(encoded).hexdigest(), "crop_bytes": len(encoded)}
        kept |= {"phash": phash.phash(face.pixels), "padded": face.padded, "angle": math.degrees(face.angle)}
        if self.options.shards:
            return kept | {CONTENT: encoded}
        path = crop_path(source.name, *numbers, suffix=images.SUFFIXES[self.options.format])
        if self.out is not None:
            _write(self.out, path, encoded)
        return kept | {"path": path}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _what_was_found(face: Face, model: str) -> Row:
    row: Row = {"detector": model}
    if face.detection is not None:
        row |= {"detector": face.detection.model, "score": _known(face.detection.score)}
        row |= dict(zip(("box_x", "box_y", "box_w", "box_h"), face.detection.box, strict=True))
        if face.detection.keypoints is not None:
            row |= dict(zip(KEYPOINTS, face.detection.keypoints.ravel().tolist(), strict=True))
    if face.square is not None:
        row |= {"crop_x": face.square.x, "crop_y": face.square.y, "crop_side": face.square.side}
    return row


def crop_path(name: str, frame: int | None = None, rank: int | None = None, suffix: str = ".jpg") -> str:
    """Return where a crop lies in a crops folder: `frame` is given for videos, `rank` where there may be several faces.

    >>> crop_path("photos/anna.png")
    'images/photos/anna.png.jpg'
    >>> crop_path("clips/group.mp4", frame=37, rank=2)
    'images/clips/group.mp4.f37.2.jpg'
    """
    which = "" if frame is None else f".f{frame}"
    suffix = f"{which}{suffix}" if rank is None else f"{which}.{rank}{suffix}"
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
