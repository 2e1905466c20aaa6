"""Whole runs: what a crops folder holds, and that stopping, repeating and changing things loses and doubles nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.faces import job
from mefem_cli.faces.crop import CropOptions, crop_path
from mefem_cli.faces.journal import Journal
from mefem_cli.stores.crops import KEYPOINTS, SCHEMA, Crops, read_manifest, text_to_path
from mefem_cli.stores.product import ProductOptions

WHOLE = {"detector": "none", "workers": 1}  # crops without a detector: fast, and any picture will do


def photo(path: Path, seed: int = 0, side: int = 256, **options) -> Path:
    """Write a picture that differs by seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    for index in range(6):
        photo(tmp_path / "photos" / f"{'sub/' if index % 2 else ''}{index}.jpg", index)
    (tmp_path / "photos" / "broken.png").write_bytes(b"<html>")
    photo(tmp_path / "photos" / "little.png", 9, side=100)
    return tmp_path / "photos"


def crop(sources, out, *, overwrite=False, limit=None, **options):
    sources = [str(one) for one in (sources if isinstance(sources, list) else [sources])]
    product_options = ProductOptions(out=str(out), overwrite=overwrite, limit=limit)
    return job.crop(sources, CropOptions(**{**WHOLE, **options}), product_options)


def content(out: Path) -> dict[str, bytes]:
    """Every file that a reader may open, but for provenance, which holds the command line."""
    files = [path for path in out.rglob("*") if path.is_file() and ".parts" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != "provenance.json"}


def rows(out: Path) -> list[dict]:
    return read_manifest(out).to_pylist()


def test_folder_of_crops(photos, tmp_path):
    report = crop(photos, tmp_path / "out")
    assert (report.crops, report.rejects, report.new, report.vanished) == (6, {"unreadable": 1, "small": 1}, 8, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")) == [
        "contact.html",
        "images",
        "manifest.parquet",
        "provenance.json",
        "rejects.csv",
    ]
    found = rows(tmp_path / "out")
    assert [row["source"] for row in found] == [
        str(photos / name)
        for name in ("0.jpg", "2.jpg", "4.jpg", "broken.png", "little.png", "sub/1.jpg", "sub/3.jpg", "sub/5.jpg")
    ]
    first = found[0]
    assert first["path"] == "images/photos/0.jpg.jpg"
    assert (first["width"], first["height"], first["crop_side"]) == (256, 256, 256)
    assert first["detector"] == "none"
    with Image.open(tmp_path / "out" / first["path"]) as image:
        assert image.size == (224, 224)
        assert not image.getexif()
    with (tmp_path / "out" / "rejects.csv").open(newline="") as file:
        rejects = list(csv.DictReader(file))
    assert [(Path(row["source"]).name, row["reason"]) for row in rejects] == [
        ("broken.png", "unreadable"),
        ("little.png", "small"),
    ]
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["options"]["detector"] == "none"
    assert record["crops"] == 6


def test_manifest_columns_are_those_of_the_contract(photos, tmp_path):
    crop(photos, tmp_path / "out")
    expected = ["id", "source", "frame", "face", "status", "reason", "detail", "detector", "score"]
    expected += ["box_x", "box_y", "box_w", "box_h"]
    expected += [f"kp_{index}_{axis}" for index in range(6) for axis in "xy"]
    expected += ["crop_x", "crop_y", "crop_side", "width", "height", "path", "sha256", "crop_sha256"]
    expected += ["phash", "duplicate_of", "padded", "angle", "crop_offset", "crop_bytes"]  # ours
    assert pq.read_schema(tmp_path / "out" / "manifest.parquet").names == expected


def test_hashes_are_those_of_the_files(photos, tmp_path):
    import hashlib

    crop(photos, tmp_path / "out")
    for row in rows(tmp_path / "out"):
        assert row["sha256"] == hashlib.sha256(Path(row["source"]).read_bytes()).hexdigest()
        if row["status"] == "ok":
            assert row["crop_sha256"] == hashlib.sha256((tmp_path / "out" / row["path"]).read_bytes()).hexdigest()


def test_no_metadata_reaches_a_crop(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "Anna Example"
    exif[images_orientation()] = 6
    photo(tmp_path / "photos" / "a.jpg", exif=exif, comment=b"Anna Example")
    crop(tmp_path / "photos", tmp_path / "out")
    assert b"Anna" not in (tmp_path / "out" / "images" / "photos" / "a.jpg.jpg").read_bytes()


def images_orientation() -> int:
    from mefem_cli.faces.images import ORIENTATION_TAG

    return ORIENTATION_TAG


def test_hostile_names_go_all_the_way(tmp_path):
    raws = [b"caf\xe9.jpg", b"a\nb.jpg", b"<img src=x onerror=alert(1)>.jpg", b"x" * 250 + b".jpg", b"back\\slash.jpg"]
    for index, raw in enumerate(raws):
        plain = photo(tmp_path / "plain.jpg", index, side=100 if index == 2 else 256)
        (tmp_path / "photos").mkdir(exist_ok=True)
        os.rename(plain, os.fsencode(tmp_path / "photos") + b"/" + raw)
    report = crop(tmp_path / "photos", tmp_path / "out")
    assert (report.crops, report.rejects) == (len(raws) - 1, {"small": 1})
    assert {os.fsencode(text_to_path(row["source"])).rpartition(b"/")[2] for row in rows(tmp_path / "out")} == set(raws)
    crops = Crops.open(tmp_path / "out")
    assert all(crops.read_bytes(index).startswith(b"\xff\xd8") for index in range(len(crops)))
    page = (tmp_path / "out" / "contact.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page
    assert crop(tmp_path / "photos", tmp_path / "out").new == 0


def test_crop_paths_stay_inside_and_fit_the_file_system():
    long = crop_path("photos/" + "ä" * 200 + ".jpg")
    assert max(len(piece.encode()) for piece in long.split("/")) <= 255
    assert long != crop_path("photos/" + "ä" * 200 + ".png")
    assert crop_path("photos/a.png") != crop_path("photos/a.jpg")
    assert crop_path("photos/a.jpg", rank=1) == "images/photos/a.jpg.1.jpg"


def test_rerun_does_nothing_and_keeps_every_byte(photos, tmp_path):
    crop(photos, tmp_path / "out")
    before = content(tmp_path / "out")
    stamp = (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns
    assert crop(photos, tmp_path / "out").new == 0
    assert content(tmp_path / "out") == before
    assert (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns == stamp


def test_leftovers_of_killed_runs_are_swept(photos, tmp_path):
    crop(photos, tmp_path / "out")
    leftovers = [
        tmp_path / "out" / name for name in (".parts/77.tmp", ".parts/.00009.arrows.7.tmp", ".contact.html.7.tmp")
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    crop(photos, tmp_path / "out")
    assert not any(path.exists() for path in leftovers)


def test_rerun_takes_new_files_in_and_marks_vanished_ones(photos, tmp_path):
    crop(photos, tmp_path / "out")
    photo(photos / "1_new.jpg", 20)
    (photos / "0.jpg").unlink()
    report = crop(photos, tmp_path / "out")
    assert (report.new, report.vanished, report.crops) == (1, 1, 7)
    details = {Path(row["source"]).name: (row["status"], row["detail"]) for row in rows(tmp_path / "out")}
    assert details["0.jpg"] == ("ok", "source vanished")
    assert details["1_new.jpg"] == ("ok", "")
    photo(photos / "0.jpg", 0)
    crop(photos, tmp_path / "again", overwrite=True)
    crop(photos, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_changed_files_are_read_again_and_stale_crops_removed(photos, tmp_path):
    crop(photos, tmp_path / "out")
    photo(photos / "0.jpg", 77)
    (photos / "2.jpg").write_bytes(b"no image any more")
    report = crop(photos, tmp_path / "out")
    assert report.new == 2
    assert not (tmp_path / "out" / "images" / "photos" / "2.jpg.jpg").exists()
    crop(photos, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_second_folder_is_added(photos, tmp_path):
    photo(tmp_path / "more" / "0.jpg", 5)
    crop(photos, tmp_path / "out")
    report = crop(tmp_path / "more", tmp_path / "out")
    assert (report.crops, report.vanished, report.new) == (7, 0, 1)


def test_same_name_for_another_file_is_refused(photos, tmp_path):
    crop(photos, tmp_path / "out")
    shutil.copytree(photos, tmp_path / "copy" / "photos")
    with pytest.raises(UsageError, match=r"copy/photos/0.jpg would get the id of .*/photos/0.jpg"):
        crop(tmp_path / "copy" / "photos", tmp_path / "out")
    with pytest.raises(UsageError, match="share one id"):
        crop([photos, tmp_path / "copy" / "photos"], tmp_path / "other")


def test_moved_folder_is_the_same_folder(photos, tmp_path):
    crop(photos, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    photos.rename(tmp_path / "elsewhere" / "photos")
    report = crop(tmp_path / "elsewhere" / "photos", tmp_path / "out")
    assert (report.crops, report.vanished) == (6, 0)
    assert rows(tmp_path / "out")[0]["source"] == str(tmp_path / "elsewhere" / "photos" / "0.jpg")


def test_rejects_are_tried_again_on_demand(photos, tmp_path):
    crop(photos, tmp_path / "out")
    assert crop(photos, tmp_path / "out", retry_rejected=True).new == 2


def test_other_options_are_refused_by_name(photos, tmp_path):
    crop(photos, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(OutputError, match="size was 224, is 112"):
        crop(photos, tmp_path / "out", size=112)
    assert content(tmp_path / "out") == before
    assert crop(photos, tmp_path / "out", size=112, min_size=50, overwrite=True).crops == 7
    assert Crops.open(tmp_path / "out").size == 112


def test_overwrite_replaces_nothing_but_crops(photos, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    with pytest.raises(OutputError, match="no crops folder"):
        crop(photos, precious, overwrite=True)
    with pytest.raises(OutputError, match="no crops folder"):
        crop(photos, photos.parent, overwrite=True)
    crop(photos, tmp_path / "out")
    with pytest.raises(UsageError, match="lies in the output"):
        crop(tmp_path / "out" / "images", tmp_path / "out", overwrite=True)
    assert (precious / "thesis.tex").exists()
    assert len(list(photos.iterdir())) == 6


@pytest.mark.parametrize("out", ["file/crops", "file"])
def test_output_that_cannot_be_written(photos, tmp_path, out):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="name another --out"):
        crop(photos, tmp_path / out)


def test_two_runs_at_once_are_refused(photos, tmp_path):
    with Journal(tmp_path / "out").locked(), pytest.raises(OutputError, match="another mefem crop"):
        crop(photos, tmp_path / "out")


def test_nothing_usable(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputError, match="no images found in .*empty"):
        crop(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty" / "a.jpg").write_bytes(b"")
    with pytest.raises(NoInputError, match="no usable face: 1 unreadable; the file is empty; .*contact"):
        crop(tmp_path / "empty", tmp_path / "out")
    assert rows(tmp_path / "out")[0]["detail"] == "the file is empty"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(NoInputError, match="no images found in stdin for --shard 1/2"):
        crop("-", tmp_path / "none", shard="1/2")


def test_nothing_usable_says_what_to_type(shared_data, tmp_path):
    with pytest.raises(NoInputError, match=r"no usable face: 1 border; --pad edge .*--detector none .*; .*contact"):
        crop(shared_data / "crop_scenes" / "edge_top.jpg", tmp_path / "border", detector="auto")
    with pytest.raises(NoInputError, match="no usable face: 1 small; --min-size"):
        crop(shared_data / "crop_scenes" / "single_120.jpg", tmp_path / "small", detector="auto")


def test_why_most_are_unreadable_is_told(tmp_path):
    photo(tmp_path / "photos" / "sound.jpg", 0)
    for index in range(3):
        (tmp_path / "photos" / f"{index}.jpg").write_bytes(b"" if index else b"text")
    assert crop(tmp_path / "photos", tmp_path / "out").why_unreadable == "the file is empty"
    (tmp_path / "photos" / "3.jpg").write_bytes(b"text")
    assert crop(tmp_path / "photos", tmp_path / "out").why_unreadable == ""  # as many are no image


@pytest.mark.parametrize(("limit", "allowed"), [("2", True), ("1", False), ("25%", True), ("24%", False)])
def test_max_rejects(photos, tmp_path, limit, allowed):
    if allowed:
        crop(photos, tmp_path / "out", max_rejects=limit)
    else:
        with pytest.raises(NoInputError, match="--max-rejects .* allows fewer than 2 rejects beside 6 crops"):
            crop(photos, tmp_path / "out", max_rejects=limit)
    assert len(Crops.open(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 101},
        {"scale": 0},
        {"size": 0},
        {"min_score": 2},
        {"key": "x"},
        {"max_rejects": "many"},
        {"workers": 0},
    ],
)
def test_values_out_of_range(options):
    with pytest.raises(UsageError, match="--"):
        CropOptions(**options)


def test_labels_travel(photos, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    table.write_text("path;age;width;sex\n0.jpg;31,5;1;f\nsub/1;40;2;m\nabsent.jpg;1;3;f\n")
    crop(photos, tmp_path / "out")
    crop(photos, tmp_path / "out", labels=str(table))
    assert "1 rows of the table fit no picture" in capsys.readouterr().err
    crops = Crops.open(tmp_path / "out")
    by_name = {Path(source).name: index for index, source in enumerate(crops.columns["source"])}
    assert set(crops.labels) == {"age", "width", "sex"}
    assert crops.labels["age"][by_name["0.jpg"]] == 31.5
    assert crops.labels["sex"][by_name["1.jpg"]] == "m"
    assert np.isnan(crops.labels["age"][by_name["2.jpg"]])
    assert crops.columns["width"][by_name["0.jpg"]] == 256
    stamp = (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns
    crop(photos, tmp_path / "out", labels=str(table))
    assert (tmp_path / "out" / "manifest.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="has labels from"):
        crop(photos, tmp_path / "out")


def test_bad_labels_stop_before_the_work(photos, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,age\n0.jpg,1\n0.jpg,2\n")
    with pytest.raises(UsageError, match="distinct"):
        crop(photos, tmp_path / "out", labels=str(table))
    assert not (tmp_path / "out").exists()
    crop(photos, tmp_path / "out")
    with pytest.raises(UsageError, match="distinct"):
        crop(photos, tmp_path / "out", labels=str(table), overwrite=True)
    assert len(Crops.open(tmp_path / "out")) == 6


def test_all_faces_and_their_labels(shared_data, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,age\nmulti_03.jpg,50\nsingle_800.jpg,30\n")
    scenes = [str(shared_data / "crop_scenes" / name) for name in ("multi_03.jpg", "single_800.jpg")]
    crop(scenes, tmp_path / "out", detector="auto", faces="all", labels=str(table), min_size=100)
    found = rows(tmp_path / "out")
    assert [(row["face"], row["path"]) for row in found] == [
        (0, "images/multi_03.jpg.0.jpg"),
        (1, "images/multi_03.jpg.1.jpg"),
        (2, "images/multi_03.jpg.2.jpg"),
        (0, "images/single_800.jpg.0.jpg"),
    ]
    assert [row["label:age"] for row in found] == [None, None, None, 30]
    keypoints = np.array([[row[name] for name in KEYPOINTS] for row in found]).reshape(-1, 6, 2)
    assert (keypoints[:, 0, 0] < keypoints[:, 1, 0]).all()  # the person's right eye is left in the picture
    assert len({row["id"] for row in found}) == 4
    with pytest.raises(NoInputError, match="1 not-one-face"):
        crop(scenes[:1], tmp_path / "one", detector="auto", faces="one")


def test_padding_replaces_border_rejects(shared_data, tmp_path):
    scene = shared_data / "crop_scenes" / "edge_left.jpg"
    with pytest.raises(NoInputError, match="1 border"):
        crop(scene, tmp_path / "none", detector="auto")
    crop(scene, tmp_path / "reflect", detector="auto", pad="reflect")
    (row,) = rows(tmp_path / "reflect")
    assert row["status"] == "ok"
    assert row["detail"].startswith("padded by reflect")


def test_every_scene(shared_data, tmp_path):
    """Each broken file is a reject with its reason; orientations and formats of one face are crops alike."""
    crop(shared_data / "crop_scenes", tmp_path / "out", detector="auto", workers=2)
    found = {Path(row["source"]).name: row for row in rows(tmp_path / "out")}
    assert len(found) == 50
    assert {name for name, row in found.items() if row["reason"] == "unreadable"} == {
        "bad_empty.jpg",
        "bad_header_only.png",
        "bad_html.jpg",
        "bad_text.jpg",
        "bad_truncated.jpg",
    }
    assert all(
        found[f"edge_{side}.jpg"]["reason"] == "border" for side in ("left", "right", "top", "bottom", "tight", "half")
    )
    assert found["tiny_1x1.png"]["reason"] == "no-face"
    assert {found[f"noface_{index}.jpg"]["reason"] for index in (0, 3, 5, 9)} == {"low-score", "no-face"}
    for family in ("exif", "fmt"):
        family_rows = [row for name, row in found.items() if name.startswith(family)]
        assert len(family_rows) >= 7
        crops = [
            np.asarray(Image.open(tmp_path / "out" / row["path"]).convert("L")).astype(float) for row in family_rows
        ]
        assert all(np.abs(crop - crops[0]).mean() < 6 for crop in crops)


PROGRAM = [sys.executable, "-m", "mefem_cli", "crop"]


def test_killed_run_ends_like_an_undisturbed_one(tmp_path):
    """Kill -9 after the first chunk in the journal, then after some more; then compare every byte."""
    for index in range(60):
        photo(tmp_path / "photos" / f"{index:03d}.png", index, side=400 + index)
    for index in range(6):
        (tmp_path / "photos" / f"{index:03d}.png").write_bytes(b"broken")
    command = [*PROGRAM, str(tmp_path / "photos"), "--detector", "none", "--workers", "2", "-o"]
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True, capture_output=True)
    out = tmp_path / "killed"
    num_killed = 0
    for wanted_rows in (1, 25):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(Journal(out).read()) < wanted_rows:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        num_killed += process.wait() == -signal.SIGKILL
        assert not (out / "manifest.parquet").exists()
    assert num_killed == 2
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert content(out) == content(tmp_path / "undisturbed")
    assert read_manifest(out).select(SCHEMA.names).equals(read_manifest(tmp_path / "undisturbed"))
    assert [path.name for path in (out / ".parts").iterdir() if path.suffix != ".arrows"] == ["lock"]
    assert len(Journal(out).parts()) == 1


def test_interrupted_run_says_so_and_goes_on(tmp_path):
    for index in range(40):
        photo(tmp_path / "photos" / f"{index:03d}.png", index, side=500)
    command = [*PROGRAM, str(tmp_path / "photos"), "--detector", "none", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not len(Journal(tmp_path / "out").read()):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    output, messages = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert messages.count("\n") == 1
    assert "Ctrl-C" in messages
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(Crops.open(tmp_path / "out")) == 40


def test_full_disk_breaks_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: a crop of a noisy picture does not fit."""
    photo(tmp_path / "photos" / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos" / "b.png")
    command = [*PROGRAM, str(tmp_path / "photos"), "--detector", "none", "-o", str(tmp_path / "out")]
    limited = subprocess.run(["bash", "-c", 'ulimit -f 60; exec "$@"', "-", *command], capture_output=True, text=True)
    assert (limited.returncode, limited.stdout) == (4, "")
    assert limited.stderr.count("\n") == 1
    assert "File too large" in limited.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(Crops.open(tmp_path / "out")) == 2
