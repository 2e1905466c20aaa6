"""Shards, parts of a job on several machines, and what a kill, a lost file or a change of labels leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_crop_run import PROGRAM, content, crop, photo, rows

from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.faces import merge, packing
from mefem_cli.faces.crop import CropOptions
from mefem_cli.faces.journal import Journal
from mefem_cli.stores.crops import Crops, read_manifest
from mefem_cli.stores.product import ProductOptions

NUM_PHOTOS = 12


@pytest.fixture
def photos(tmp_path):
    for index in range(NUM_PHOTOS):
        photo(tmp_path / "photos" / f"{'sub/' if index % 3 == 0 else ''}{index:02d}.jpg", index)
    (tmp_path / "photos" / "broken.png").write_bytes(b"<html>")
    return tmp_path / "photos"


def merged(folders, out, **options):
    product_options = ProductOptions(out=str(out), overwrite=options.pop("overwrite", False))
    return merge.merge([str(one) for one in folders], CropOptions(merge=True, **options), product_options)


def tar_files(out: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive.getmembers():
                assert member.name not in found
                found[member.name] = archive.extractfile(member).read()
    return found


def decoded(out: Path) -> dict[str, bytes]:
    """The bytes of every crop by its id, as a reader gets them."""
    crops = Crops.open(out)
    return {one: crops.read_bytes(index) for index, one in enumerate(crops.ids)}


def test_shards_hold_what_the_folder_holds(photos, tmp_path):
    crop(photos, tmp_path / "folder")
    crop(photos, tmp_path / "packed", shards=True)
    assert decoded(tmp_path / "packed") == decoded(tmp_path / "folder")
    assert not (tmp_path / "packed" / "images").exists()
    assert sorted(one.name for one in (tmp_path / "packed" / ".parts").iterdir()) == ["00001.arrows", "lock"]
    files = tar_files(tmp_path / "packed")
    for row in rows(tmp_path / "packed"):
        if row["status"] == "ok":
            assert hashlib.sha256(files[f"{row['id']}.jpg"]).hexdigest() == row["crop_sha256"]
            assert json.loads(files[f"{row['id']}.json"])["sha256"] == row["sha256"]
    assert len(files) == 2 * NUM_PHOTOS


def test_shards_are_cut_by_size_and_keep_the_order_of_the_manifest(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.pack, "__defaults__", (40_000,))
    crop(photos, tmp_path / "out", shards=True)
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    assert len(shards) > 2
    assert all(shard.stat().st_size <= 40_000 + 20 * 512 for shard in shards)
    ids = [row["id"] for row in rows(tmp_path / "out") if row["status"] == "ok"]
    assert [name[:-4] for name in tar_files(tmp_path / "out") if name.endswith(".jpg")] == ids
    assert len(decoded(tmp_path / "out")) == NUM_PHOTOS


def test_new_crops_get_a_new_shard_and_old_shards_stay(photos, tmp_path):
    crop(photos, tmp_path / "out", shards=True)
    first = (tmp_path / "out" / "shards" / "00000.tar").read_bytes()
    photo(photos / "00_new.jpg", 99)
    crop(photos, tmp_path / "out", shards=True)
    assert (tmp_path / "out" / "shards" / "00000.tar").read_bytes() == first
    assert len(tar_files(tmp_path / "out")) == 2 * (NUM_PHOTOS + 1)
    crop(photos, tmp_path / "folder")
    assert decoded(tmp_path / "out") == decoded(tmp_path / "folder")


@pytest.mark.parametrize("change", ["another picture", "no picture any more", "labels"])
def test_a_shard_with_what_no_longer_holds_is_packed_anew(photos, tmp_path, change):
    crop(photos, tmp_path / "out", shards=True)
    options = {}
    if change == "another picture":
        photo(photos / "01.jpg", 77)
    elif change == "no picture any more":
        (photos / "01.jpg").write_bytes(b"gone")
    else:
        (tmp_path / "labels.csv").write_text("path,age\n01.jpg,30\n")
        options["labels"] = str(tmp_path / "labels.csv")
    crop(photos, tmp_path / "out", shards=True, **options)
    crop(photos, tmp_path / "fresh", shards=True, **options)
    assert tar_files(tmp_path / "out") == tar_files(tmp_path / "fresh")
    assert (
        read_manifest(tmp_path / "out")
        .drop_columns("path")
        .equals(read_manifest(tmp_path / "fresh").drop_columns("path"))
    )
    if change == "labels":
        assert sum(b'"age":30' in one for one in tar_files(tmp_path / "out").values()) == 1


@pytest.mark.parametrize("shards", [False, True])
def test_parts_of_a_job_merge_to_the_whole(photos, tmp_path, shards):
    crop(photos, tmp_path / "whole", shards=shards)
    parts = [tmp_path / f"part{index}" for index in (1, 2, 3)]
    for index, part in enumerate(parts, start=1):
        crop(photos, part, shard=f"{index}/3", shards=shards)
    assert all(0 < len(rows(part)) < NUM_PHOTOS for part in parts)
    report = merged(parts, tmp_path / "merged")
    assert (report.crops, report.rejects) == (NUM_PHOTOS, {"unreadable": 1})
    assert decoded(tmp_path / "merged") == decoded(tmp_path / "whole")
    if not shards:
        assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert all(len(Crops.open(part)) for part in parts)  # they are as they were
    assert merged(parts, tmp_path / "merged").crops == NUM_PHOTOS  # typed again, it is the same
    assert crop(photos, tmp_path / "merged", shards=shards).new == 0  # and one may go on from there


def test_missing_parts_of_a_job_are_told(photos, tmp_path, capsys):
    parts = [tmp_path / f"part{index}" for index in (1, 2, 3)]
    for index, part in enumerate(parts, 1):
        crop(photos, part, shard=f"{index}/3")
    merged(parts, tmp_path / "all")
    assert "not all parts" not in capsys.readouterr().err
    merged([parts[0], parts[2]], tmp_path / "two")
    assert "what --shard 2/3 holds is missing" in capsys.readouterr().err
    crop(photos, tmp_path / "whole")
    merged([parts[0], tmp_path / "whole"], tmp_path / "whole_and_part")
    assert "not all parts" not in capsys.readouterr().err


def test_of_many_missing_parts_the_first_are_told(photos, tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    for index in (1, 3):
        folder = shutil.copytree(crop(photos, tmp_path / f"{index}").out, tmp_path / "parts" / f"{index}")
        recorded = json.loads((folder / "provenance.json").read_text())
        recorded["options"]["shard"] = f"{index}/1000000000"
        (folder / "provenance.json").write_text(json.dumps(recorded))
    merged([tmp_path / "parts" / "1", tmp_path / "parts" / "3"], tmp_path / "out")
    told = capsys.readouterr().err.replace("/1000000000", "")
    assert "what --shard 2, 4, 5, 6, 7 and 999999993 more holds is missing" in told


def test_part_of_a_job_is_told_apart(photos, tmp_path):
    crop(photos, tmp_path / "out", shard="1/2")
    with pytest.raises(OutputError, match="shard was 1/2, is 2/2"):
        crop(photos, tmp_path / "out", shard="2/2")
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match="wanted i/N"):
            CropOptions(shard=wrong)


def test_merged_labels_travel(photos, tmp_path):
    (tmp_path / "labels.csv").write_text("path,age,sex\n01.jpg,30,f\n02.jpg,40,m\n")
    crop(photos, tmp_path / "one", shard="1/2", labels=str(tmp_path / "labels.csv"))
    crop(photos, tmp_path / "two", shard="2/2", labels=str(tmp_path / "labels.csv"))
    merged([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    found = {Path(row["source"]).name: (row["label:age"], row["label:sex"]) for row in rows(tmp_path / "merged")}
    assert (found["01.jpg"], found["02.jpg"], found["04.jpg"]) == ((30, "f"), (40, "m"), (None, ""))


def test_faces_in_both_folders_are_taken_once(photos, tmp_path):
    crop(photos, tmp_path / "one")
    crop(photos, tmp_path / "two")
    assert merged([tmp_path / "one", tmp_path / "two"], tmp_path / "merged").crops == NUM_PHOTOS
    photo(photos / "01.jpg", 77)
    crop(photos, tmp_path / "two")
    with pytest.raises(UsageError, match=r"photos/01.jpg changed between .*one and .*two"):
        merged([tmp_path / "one", tmp_path / "two"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_does_not_merge(photos, tmp_path):
    crop(photos, tmp_path / "one")
    crop(photos, tmp_path / "small", size=112)
    with pytest.raises(UsageError, match="size was 224, is 112"):
        merged([tmp_path / "one", tmp_path / "small"], tmp_path / "out")
    with pytest.raises(UsageError, match="two crops folders or more"):
        merged([tmp_path / "one"], tmp_path / "out")
    with pytest.raises(NoInputError, match="no crops folder"):
        merged([tmp_path / "one", photos], tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        merged([tmp_path / "one", shutil.copytree(tmp_path / "one", tmp_path / "copy")], tmp_path / "small")
    with pytest.raises(UsageError, match="one is named twice"):
        merged([tmp_path / "one", tmp_path / "copy", f"{tmp_path}/./one"], tmp_path / "out")
    with pytest.raises(UsageError, match="both a source and the output"):
        merged([tmp_path / "one", tmp_path / "small"], tmp_path / "one", overwrite=True)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_a_journal_cut_anywhere_costs_work_and_nothing_else(photos, tmp_path, kept, shards):
    """A power cut may leave any beginning of the file that a run appends to."""
    crop(photos, tmp_path / "undisturbed", shards=shards)
    out = tmp_path / "out"
    crop(photos, out, shards=shards)
    (out / "manifest.parquet").unlink()
    (part,) = Journal(out).parts()
    os.truncate(part, int(part.stat().st_size * kept))
    crop(photos, out, shards=shards)
    assert decoded(out) == decoded(tmp_path / "undisturbed")
    assert tar_files(out) == tar_files(tmp_path / "undisturbed")
    assert rows(out) == rows(tmp_path / "undisturbed")


def test_a_lost_or_cut_crop_is_made_again(photos, tmp_path):
    crop(photos, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "images" / "photos" / "01.jpg.jpg").unlink()
    os.truncate(tmp_path / "out" / "images" / "photos" / "02.jpg.jpg", 100)
    assert crop(photos, tmp_path / "out").new == 2
    assert content(tmp_path / "out") == before


def test_killed_while_packing(tmp_path):
    """Kill -9 when the first shard appears, then run again: the bytes of an undisturbed run."""
    for index in range(30):
        photo(tmp_path / "photos" / f"{index:03d}.png", index, side=400)
    script = (
        "import sys, os\n"
        "from mefem_cli.faces import packing\n"
        "packing.pack.__defaults__ = (60_000,)\n"
        "if sys.argv.pop(1) == 'kill':\n"
        "    from mefem_cli.stores import shard_writer\n"
        "    begin = shard_writer.ShardWriter._begin\n"
        "    def dying(self):\n"
        "        if self._number >= 2: os.kill(os.getpid(), 9)\n"
        "        begin(self)\n"
        "    shard_writer.ShardWriter._begin = dying\n"
        "from mefem_cli.main import main\n"
        "main()\n"
    )
    command = ["crop", str(tmp_path / "photos"), "--detector", "none", "--shards", "-o"]
    run = [sys.executable, "-c", script]
    killed = subprocess.run([*run, "kill", *command, str(tmp_path / "out")], capture_output=True)
    assert killed.returncode == -9
    assert (tmp_path / "out" / "shards" / "00000.tar").exists()
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    for out in ("out", "undisturbed"):
        subprocess.run([*run, "live", *command, str(tmp_path / out)], check=True, capture_output=True)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_exact_duplicates_are_marked(photos, tmp_path):
    (photos / "zz_copy.jpg").write_bytes((photos / "01.jpg").read_bytes())
    assert crop(photos, tmp_path / "out").duplicates == 1
    found = {Path(row["source"]).name: row for row in rows(tmp_path / "out")}
    assert found["zz_copy.jpg"]["duplicate_of"] == found["01.jpg"]["id"]
    assert [name for name, row in found.items() if row["duplicate_of"]] == ["zz_copy.jpg"]
    assert found["zz_copy.jpg"]["phash"] == found["01.jpg"]["phash"] != found["02.jpg"]["phash"]


@pytest.mark.parametrize(("name", "start"), [("png", b"\x89PNG"), ("webp", b"RIFF")])
def test_other_formats(photos, tmp_path, name, start):
    crop(photos, tmp_path / "out", format=name)
    crops = Crops.open(tmp_path / "out")
    assert all(crops.read_bytes(index).startswith(start) for index in range(len(crops)))
    assert crops.columns["path"][0].endswith(f".jpg.{name}")
    with Image.open(io.BytesIO(crops.read_bytes(0))) as image:
        assert (image.size, image.mode) == ((224, 224), "RGB")


def test_paths_on_stdin_may_end_with_a_zero_byte(tmp_path):
    odd = photo(tmp_path / "photos" / "plain.png", 1)
    target = tmp_path / "photos" / "two\nlines.png"
    odd.rename(target)
    command = [*PROGRAM, "-", "-0", "--detector", "none", "-o", str(tmp_path / "out")]
    subprocess.run(command, input=os.fsencode(target) + b"\0", check=True, capture_output=True)
    assert len(Crops.open(tmp_path / "out")) == 1


# Tar shards as sources


def tar(path: Path, files: dict[str, bytes], cut: int = 0) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if cut:
        os.truncate(path, cut)
    return path


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_as_sources_bring_their_labels(tmp_path):
    files = {
        "a/1.png": encoded(1),
        "a/1.json": json.dumps({"age": 31, "sex": "f", "nested": {"x": 1}, "caption": "<b>"}).encode(),
        "a/1.txt": b"a face",
        "2.png": encoded(2),
        "2.json": b"broken {",
        "readme.md": b"hello",
    }
    crop(tar(tmp_path / "00000.tar", files), tmp_path / "out")
    first, second = rows(tmp_path / "out")
    assert first["source"] == f"{tmp_path}/00000.tar/a/1.png"
    assert first["path"] == "images/00000.tar/a/1.png.jpg"
    assert (first["label:age"], first["label:sex"], first["label:txt"]) == (31, "f", "a face")
    assert (second["label:age"], second["status"]) == (None, "ok")
    assert first["sha256"] == hashlib.sha256(files["a/1.png"]).hexdigest()
    (tmp_path / "loose" / "a").mkdir(parents=True)
    (tmp_path / "loose" / "a" / "1.png").write_bytes(files["a/1.png"])
    crop(tmp_path / "loose", tmp_path / "other")
    assert decoded(tmp_path / "out")[first["id"]] in decoded(tmp_path / "other").values()
    assert crop(tmp_path / "00000.tar", tmp_path / "out").new == 0


def test_hostile_and_damaged_shards(tmp_path):
    outside = tmp_path / "escaped.png.jpg"
    files = {"../../escaped.png": encoded(1), "/abs/x.png": encoded(2), "fine.png": encoded(3), "late.png": encoded(4)}
    whole = tar(tmp_path / "00000.tar", files)
    cut = tar(tmp_path / "00001.tar", files, cut=whole.stat().st_size * 2 // 3)
    (tmp_path / "00002.tar").write_bytes(b"not a tar at all" * 100)
    crop([whole, cut, tmp_path / "00002.tar"], tmp_path / "out")
    found = {
        row["source"].removeprefix(f"{tmp_path}/"): (row["reason"], row["detail"]) for row in rows(tmp_path / "out")
    }
    assert found["00000.tar/../../escaped.png"] == ("unreadable", "its name leads out of the shard")
    assert found["00000.tar//abs/x.png"][0] == "unreadable"
    assert found["00000.tar/fine.png"] == ("", "")
    assert "tar shard: cut short" in found["00001.tar"][1]
    assert "tar shard: not a tar" in found["00002.tar"][1]
    assert not outside.exists()
    assert all((tmp_path / "out").resolve() in path.resolve().parents for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("shards", [False, True])
def test_a_mended_shard_leaves_no_reject_behind(photos, tmp_path, shards):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index in range(1, 5):
            archive.add(next(photos.rglob(f"0{index}.jpg")), f"{index}.jpg")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:-20480])
    first = crop(tmp_path / "a.tar", tmp_path / "out", shards=shards)
    assert first.rejects == {"unreadable": 1}
    assert crop(tmp_path / "a.tar", tmp_path / "out", shards=shards, limit=1).rejects == {"unreadable": 1}  # not mended
    (tmp_path / "a.tar").write_bytes(whole)
    mended = crop(tmp_path / "a.tar", tmp_path / "out", shards=shards)
    assert (mended.crops, mended.rejects, mended.vanished) == (4, {}, 0)
    assert mended.crops > first.crops
    crop(tmp_path / "a.tar", tmp_path / "anew", shards=shards)
    assert content(tmp_path / "out").keys() == content(tmp_path / "anew").keys()
    assert (tmp_path / "out" / "rejects.csv").read_bytes() == (tmp_path / "anew" / "rejects.csv").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:-20480])
    crop(tmp_path / "a.tar", tmp_path / "out", shards=shards)
    (tmp_path / "a.tar").unlink()
    photo(tmp_path / "b.jpg", 1)
    gone = crop(tmp_path / "b.jpg", tmp_path / "out", shards=shards)  # nobody knows whether it was mended
    assert (gone.rejects, gone.vanished) == ({"unreadable": 1}, 5)


def test_compressed_shard_says_how_to_unpack_it(tmp_path):
    with tarfile.open(tmp_path / "faces.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty.png"))
    with pytest.raises(NoInputError, match="no usable face"):
        crop(tmp_path / "faces.tar", tmp_path / "out")
    assert "gunzip" in rows(tmp_path / "out")[0]["detail"]


def test_packed_shards_and_crops_in_a_folder_are_told_apart(photos, tmp_path):
    crop(photos, photos / "crops")
    with tarfile.open(photos / "more.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty.png"))
    report = crop(photos, tmp_path / "out")
    assert (report.crops, report.rejects) == (NUM_PHOTOS, {"unreadable": 2})
    assert report.skipped == {"crops folder (crops)": 1}
    assert "gunzip" in {Path(row["source"]).name: row["detail"] for row in rows(tmp_path / "out")}["more.tar.gz"]


def test_zero_bytes_in_a_list_of_lines_are_explained(tmp_path):
    command = [*PROGRAM, "-", "-o", str(tmp_path / "out")]
    answer = subprocess.run(command, input=b"a.png\0b.png\0", capture_output=True)
    assert (answer.returncode, b"type -0" in answer.stderr) == (2, True)
    answer = subprocess.run([*command, "-0"], input=b"a.png\nb.png\n", capture_output=True)
    assert (answer.returncode, b"leave -0 away" in answer.stderr) == (2, True)


def test_manifest_says_what_its_columns_are(photos, tmp_path):
    crop(photos, tmp_path / "out", shards=True)
    names = pq.read_schema(tmp_path / "out" / "manifest.parquet").names
    assert names[-6:] == ["phash", "duplicate_of", "padded", "angle", "crop_offset", "crop_bytes"]
