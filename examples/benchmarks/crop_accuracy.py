"""Faces found in the test scenes, against where they are: recall, false positives, and what becomes a crop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crop_measure import Setting, mefem_crop, proportion, table

from mefem_cli.faces.geometry import Box, intersection_over_union
from mefem_cli.stores.crops import OK, read_manifest

DETECTORS = ("short", "full", "auto")
SAME_FACE = 0.5  # intersection over union from which a face is found
NEAR = 0.05  # of the true side: how far side and centre of a box may be off for its crop to be compared


@dataclass(frozen=True)
class Scene:
    """A picture and where its upright faces are."""

    file: str
    faces: list[dict[str, Any]]
    is_empty: bool  # it shows no face at all, turned ones included


def accuracy(setting: Setting) -> None:
    """Print recall, false positives and decisions of each detector, then every miss."""
    folder = setting.data("crop_scenes")
    scenes = _scenes(folder)
    rows, remarks = [], []
    for detector in DETECTORS:
        found = _run(folder, setting.work / f"scenes-{detector}", detector)
        row, said = _compare(scenes, found)
        rows.append([detector, *row])
        remarks += [[detector, *one] for one in said]
    num_empty = sum(scene.is_empty for scene in scenes)
    print(f"{sum(len(scene.faces) for scene in scenes)} upright faces; {num_empty} pictures without a face.\n")
    header = "detector", "recall at IoU 0.5 (95 %)", "mean IoU", "false in no-face pictures", "false elsewhere"
    table([*header, f"decisions as crop_ok_224, boxes within {NEAR:.0%}"], rows)
    table(["detector", "picture", "what", "box (x y w h)", "nearest hit"], remarks)


def _scenes(folder: Path) -> list[Scene]:
    """Return the pictures that can be read. Faces without a box are turned ones, which nobody claims to find."""
    entries = json.loads((folder / "ground_truth.json").read_text())
    return [
        Scene(entry["file"], [face for face in entry.get("faces", []) if "box" in face], not entry.get("faces"))
        for entry in entries
        if not entry.get("unreadable")
    ]


def _run(folder: Path, out: Path, detector: str) -> dict[str, list[dict[str, Any]]]:
    """Crop all scenes; return the manifest's rows with a sure face, by picture."""
    options = ["--detector", detector, "--faces", "all", "--pad", "reflect"]
    mefem_crop(folder, *options, "-o", out)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_manifest(out).to_pylist():
        if row["box_x"] is not None and row["reason"] != "low-score":
            rows.setdefault(Path(row["source"]).name, []).append(row)
    return rows


def _compare(scenes: list[Scene], found: dict[str, list[dict[str, Any]]]) -> tuple[list[Any], list[list[Any]]]:
    overlaps: list[float] = []
    num_faces = false_in_empty = false_elsewhere = num_near = num_equal = 0
    remarks = []
    for scene in scenes:
        rows = found.get(scene.file, [])
        num_faces += len(scene.faces)
        pairs = _pairs(scene.faces, rows)
        missed = [face for index, face in enumerate(scene.faces) if index not in {pair[0] for pair in pairs}]
        remarks += [[scene.file, "missed", _text(face["box"]), _nearest(face["box"], rows)] for face in missed]
        spare = [row for index, row in enumerate(rows) if index not in {pair[1] for pair in pairs}]
        if scene.is_empty:
            false_in_empty += len(spare)
        elif scene.faces:  # a turned face that is found all the same is not false
            false_elsewhere += len(spare)
        if scene.is_empty or scene.faces:
            remarks += [[scene.file, "false", _text(_box(row)), f"score {row['score']:.2f}"] for row in spare]
        for face_index, row_index, overlap in pairs:
            face, row = scene.faces[face_index], rows[row_index]
            overlaps.append(overlap)
            if not _is_near(_box(row), face["box"]):
                continue
            num_near += 1
            is_crop = row["status"] == OK and not row["padded"]
            num_equal += is_crop == face["crop_ok_224"]
            if is_crop != face["crop_ok_224"]:
                said = row["reason"] or ("padded" if row["padded"] else "crop")
                truth = f"{said}; truth: side {face['crop2x_side']:.0f}, inside {face['crop2x_inside']}"
                remarks.append([scene.file, truth, _text(face["box"]), _text(_box(row))])
    recall = proportion(len(overlaps), num_faces)
    mean = sum(overlaps) / max(len(overlaps), 1)
    return [recall, mean, false_in_empty, false_elsewhere, proportion(num_equal, num_near)], remarks


def _pairs(faces: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[tuple[int, int, float]]:
    """Pair faces with hits, largest overlap first, each once."""
    overlaps = sorted(
        (
            (intersection_over_union(face["box"], _box(row)), one, other)
            for one, face in enumerate(faces)
            for other, row in enumerate(rows)
        ),
        reverse=True,
    )
    pairs: list[tuple[int, int, float]] = []
    for overlap, one, other in overlaps:
        if overlap >= SAME_FACE and all(one != pair[0] and other != pair[1] for pair in pairs):
            pairs.append((one, other, overlap))
    return pairs


def _box(row: dict[str, Any]) -> Box:
    return row["box_x"], row["box_y"], row["box_w"], row["box_h"]


def _is_near(box: Box, truth: Box) -> bool:
    """Return whether the side of a box, and its centre both ways, are off by at most NEAR of the true side."""
    side = max(truth[2:])
    off = [
        max(box[2:]) - side,
        box[0] + box[2] / 2 - truth[0] - truth[2] / 2,
        box[1] + box[3] / 2 - truth[1] - truth[3] / 2,
    ]
    return max(map(abs, off)) <= NEAR * side


def _nearest(truth: Box, rows: list[dict[str, Any]]) -> str:
    best = max(rows, key=lambda row: intersection_over_union(truth, _box(row)), default=None)
    if best is None or not intersection_over_union(truth, _box(best)):
        return "none"
    return f"{_text(_box(best))}, IoU {intersection_over_union(truth, _box(best)):.2f}, {best['detector']}"


def _text(box: Box) -> str:
    return " ".join(f"{value:.0f}" for value in box)
