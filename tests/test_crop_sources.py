"""Tables, given boxes, videos and turned faces, from the command's options to the manifest."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_crop_run import crop, photo, rows

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.faces.crop import CropOptions
from mefem_cli.stores.crops import Crops

SIDE = 400


@pytest.fixture
def photos(tmp_path):
    for index in range(3):
        photo(tmp_path / "photos" / f"{index}.png", index, side=SIDE)
    return tmp_path / "photos"


def by_name(out: Path) -> dict[str, dict]:
    return {Path(row["source"]).name: row for row in rows(out)}


def video(path: Path, num_frames: int = 30, side: int = 256, rate: int = 10) -> Path:
    """A video whose frames are gray, each a little lighter than the one before."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.options = {"qscale": "2"}
        for index in range(num_frames):
            pixels = np.full((side, side, 3), 20 + 6 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(out: Path) -> dict[int, float]:
    """Mean gray of each crop by frame."""
    found = {}
    for row in rows(out):
        with Image.open(out / row["path"]) as image:
            found[row["frame"]] = float(np.asarray(image).mean())
    return found


# Tables


def test_a_table_names_files_boxes_and_labels(photos, tmp_path):
    table = tmp_path / "clinic.csv"
    boxes = ("[150, 150, 270, 270]", "[150,150,100,100]", "nonsense")
    lines = [f'photos/{index}.png;"{box}";{30 + index},5' for index, box in enumerate(boxes)]
    table.write_text("path;box;age\n" + "\n".join([*lines, "photos/absent.png;[1,2,3,4];1", "../x.png;[1,2,3,4];1"]))
    crop(table, tmp_path / "out", detector="auto")
    found = by_name(tmp_path / "out")
    first = found["0.png"]
    assert (first["status"], first["detector"], first["score"]) == ("ok", "given", None)
    assert (first["crop_x"], first["crop_y"], first["crop_side"]) == (90, 90, 240)
    assert (first["label:age"], found["2.png"]["label:age"]) == (30.5, 32.5)
    assert [found[name]["reason"] for name in ("1.png", "2.png", "absent.png", "x.png")] == [
        "bad-box",
        "bad-box",
        "unreadable",
        "unreadable",
    ]
    assert "leaves the table" in found["x.png"]["detail"]
    assert crop(table, tmp_path / "out", detector="auto").new == 0
    table.write_text(table.read_text().replace("[150, 150, 270, 270]", "[150, 150, 280, 280]"))
    assert crop(table, tmp_path / "out", detector="auto").new == 1  # another box is another source
    assert by_name(tmp_path / "out")["0.png"]["crop_side"] == 260


def test_several_boxes_of_a_picture_are_several_faces(photos, tmp_path):
    table = tmp_path / "faces.parquet"
    boxes = {"box_x": [60.0, 190.0], "box_y": [70.0, 190.0], "box_w": [120.0, 140.0], "box_h": [110.0, 140.0]}
    pq.write_table(pa.table({"path": ["photos/0.png"] * 2, **boxes, "age": [5.0, 70.0]}), table)
    crop(table, tmp_path / "out", detector="auto")
    assert [(row["face"], row["label:age"], row["crop_side"]) for row in rows(tmp_path / "out")] == [
        (0, 5, 240),
        (1, 70, 280),
    ]
    assert [row["path"] for row in rows(tmp_path / "out")] == [
        "images/faces.parquet/photos/0.png.0.jpg",
        "images/faces.parquet/photos/0.png.1.jpg",
    ]
    assert len(Crops.open(tmp_path / "out")) == 2


def test_boxes_join_a_downloaders_shards_by_url(tmp_path):
    """FaceCaption-15M: a Parquet of url and box; img2dataset's tar shards say in a sidecar which url a picture has."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for index in range(3):
            sidecar = {"key": f"{index:09d}", "url": f"http://x/{index}", "status": "success", "error_message": None}
            for suffix, data in (("jpg", buffer.getvalue()), ("json", json.dumps(sidecar).encode())):
                info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    table = tmp_path / "boxes.parquet"
    urls = ["http://x/1", "http://x/0", "http://x/none"]
    texts = ["[100, 100, 220, 230]", "broken", "[1, 2, 3, 4]"]
    pq.write_table(pa.table({"url": urls, "box": texts, "caption": ["a", "b", "c"]}), table)
    options = {"boxes": str(table), "key": "url", "detector": "short"}
    crop(tmp_path / "00000.tar", tmp_path / "out", **options)
    found = rows(tmp_path / "out")
    assert [row["reason"] for row in found] == ["bad-box", "", "no-face"]
    assert (found[1]["detector"], found[1]["crop_side"], found[1]["label:caption"]) == ("given", 260, "a")
    with pytest.raises(UsageError, match="absent"):
        crop(tmp_path / "00000.tar", tmp_path / "other", boxes=str(table), key="absent")


def test_a_shells_star_does_not_read_the_photos_twice(photos, tmp_path):
    (photos / "labels.csv").write_text("path,age\n0.png,5\n")
    assert crop(sorted(photos.iterdir()), tmp_path / "out").crops == 3


# Videos


@pytest.mark.parametrize(
    ("choice", "frames"), [("middle", [15]), ("first", [0]), ("7", [7]), ("every:1s", [0, 10, 20]), ("best", None)]
)
def test_frames_of_a_video(tmp_path, choice, frames):
    video(tmp_path / "clips" / "a.mp4")
    crop(tmp_path / "clips", tmp_path / "out", frame=choice)
    found = brightness(tmp_path / "out")
    assert len(found) == 1 if frames is None else list(found) == frames
    for index, level in found.items():
        assert level == pytest.approx(20 + 6 * index, abs=4)
        name = f"images/clips/a.mp4.f{index}.jpg"
        assert (tmp_path / "out" / name).is_file()
    assert crop(tmp_path / "clips", tmp_path / "out", frame=choice).new == 0


def test_best_frame_is_the_one_whose_face_scores_most(shared_data, tmp_path):
    """Nothing, then a face, then nothing: the middle frame of ten candidates that show it."""
    av = pytest.importorskip("av")
    with Image.open(shared_data / "crop_scenes" / "single_800.jpg") as image:
        face = np.asarray(image.convert("RGB").resize((640, 640)))
    (tmp_path / "clips").mkdir()
    with av.open(str(tmp_path / "clips" / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 640
        stream.pix_fmt = "yuv420p"
        for index in range(30):
            pixels = face if 18 <= index < 24 else np.full_like(face, 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for choice, reason in (("best", ""), ("middle", "no-face")):
        options = {"detector": "auto", "frame": choice, "pad": "edge", "min_size": 100}
        if reason:
            with pytest.raises(NoInputError, match="1 no-face"):
                crop(tmp_path / "clips", tmp_path / choice, **options)
        else:
            crop(tmp_path / "clips", tmp_path / choice, **options)
        (row,) = rows(tmp_path / choice)
        assert row["reason"] == reason
        if not reason:
            assert 18 <= row["frame"] < 24


def test_avspeech(tmp_path):
    """A headerless table of segments beside the clips: a frame from the middle of each segment."""
    video(tmp_path / "av" / "abcdefghijk.mp4", num_frames=30)
    (tmp_path / "av" / "test.csv").write_text(
        "abcdefghijk,0.5,1.5,0.4,0.5\nabcdefghijk,2.0,2.8,0.4,0.5\nmissing0000,1,2,.5,.5\n"
    )
    crop(tmp_path / "av" / "test.csv", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["frame"] for row in found if row["status"] == "ok"] == [10, 24]
    assert [row["detail"] for row in found if row["status"] != "ok"] == [
        "no clip of it is in the table's folder or below"
    ]
    assert len({row["id"] for row in found}) == 3


def test_a_segment_behind_the_end_is_a_reject(tmp_path):
    video(tmp_path / "av" / "a.mp4")
    (tmp_path / "t.csv").write_text("path,segment_start,segment_end\nav/a.mp4,100,120\nav/a.mp4,0,2\n")
    crop(tmp_path / "t.csv", tmp_path / "out", frame="every:500ms")
    found = rows(tmp_path / "out")
    assert [row["reason"] for row in found] == ["unreadable", "", "", "", ""]


def test_a_box_far_larger_than_the_picture_is_a_mistake(photos, tmp_path):
    (tmp_path / "t.csv").write_text('path,box\nphotos/0.png,"[0,0,12000,400]"\nphotos/1.png,"[150,150,270,270]"\n')
    crop(tmp_path / "t.csv", tmp_path / "out", detector="auto", pad="edge")
    assert [row["reason"] for row in rows(tmp_path / "out")] == ["bad-box", ""]


def test_the_face_nearest_the_point_is_taken(shared_data, tmp_path):
    scene = shared_data / "crop_scenes" / "multi_03.jpg"
    with Image.open(scene) as image:
        width, height = image.size
    crop(scene, tmp_path / "all", detector="auto", faces="all", pad="edge", min_size=50)
    centres = [(row["box_x"] + row["box_w"] / 2, row["box_y"] + row["box_h"] / 2) for row in rows(tmp_path / "all")]
    assert len(centres) == 3
    for number, (x, y) in enumerate(centres):
        table = tmp_path / f"{number}.csv"
        table.write_text(f"path,point_x,point_y\n{scene},{x / width + 0.01:.4f},{y / height - 0.01:.4f}\n")
        crop(table, tmp_path / f"out{number}", detector="auto", pad="edge", min_size=50)
        (row,) = rows(tmp_path / f"out{number}")
        assert (row["box_x"] + row["box_w"] / 2, row["box_y"] + row["box_h"] / 2) == pytest.approx((x, y))


def test_a_video_under_a_pictures_name_is_read_as_what_it_is(tmp_path):
    video(tmp_path / "a.mp4").rename(tmp_path / "a.jpg")
    crop(tmp_path / "a.jpg", tmp_path / "out", frame="first")
    assert list(brightness(tmp_path / "out")) == [0]


def test_broken_and_bombastic_videos_are_rejects(tmp_path):
    whole = video(tmp_path / "clips" / "a.mp4").read_bytes()
    (tmp_path / "clips" / "cut.mp4").write_bytes(whole[:200])
    (tmp_path / "clips" / "text.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    crop(tmp_path / "clips", tmp_path / "out")
    assert [row["reason"] for row in rows(tmp_path / "out")] == ["", "unreadable", "unreadable"]
    with pytest.raises(NoInputError, match="1 too-large"):
        crop(tmp_path / "clips" / "a.mp4", tmp_path / "large", max_pixels=1000)


# Turned and padded faces


def test_aligned_eyes_are_level(shared_data, tmp_path):
    with Image.open(shared_data / "crop_scenes" / "single_800.jpg") as image:
        turned = image.convert("RGB").rotate(14, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    turned.save(tmp_path / "turned.png")
    options = {"detector": "auto", "pad": "edge", "min_size": 50}
    crop(tmp_path / "turned.png", tmp_path / "plain", **options)
    crop(tmp_path / "turned.png", tmp_path / "level", align="eyes", **options)
    (plain,), (level,) = rows(tmp_path / "plain"), rows(tmp_path / "level")
    assert (plain["angle"], level["angle"]) == (0, pytest.approx(-14, abs=3))
    angles = {}
    for name, row in (("plain", plain), ("level", level)):
        again = tmp_path / name / row["path"]
        crop(again, tmp_path / f"{name}_again", detector="short", pad="edge", min_size=50)
        (found,) = rows(tmp_path / f"{name}_again")
        angles[name] = np.degrees(np.arctan2(found["kp_1_y"] - found["kp_0_y"], found["kp_1_x"] - found["kp_0_x"]))
    assert abs(angles["plain"]) > 9
    assert abs(angles["level"]) < 4
    for wrong in ({"detector": "none"}, {"boxes": "x.csv"}):
        with pytest.raises(UsageError, match="--align eyes"):
            CropOptions(align="eyes", **wrong)


def test_padding_is_told(shared_data, tmp_path):
    scene = shared_data / "crop_scenes" / "single_800.jpg"
    with Image.open(scene) as image:
        image.crop((0, 0, 800, 500)).save(tmp_path / "a.png")
    crop(tmp_path / "a.png", tmp_path / "out", detector="auto", pad="reflect", min_size=50, scale=4)
    (row,) = rows(tmp_path / "out")
    assert 0 < row["padded"] < 1
    assert f"{row['padded']:.1%} of the crop is invented" in row["detail"]
