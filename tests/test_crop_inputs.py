"""Which files a command line names, in which order, under which names."""

from __future__ import annotations

import io
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.faces.inputs import Wanted, glob_expression, list_sources
from mefem_cli.faces.source import printable
from mefem_cli.stores.crops import face_id, path_to_text, text_to_path

JPEG = b"\xff\xd8\xff\xe0 anything"


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them."""
    for name in (
        "b.jpg",
        "a.png",
        "2024/may/c.JPG",
        "2024/d.webp",
        "labels.csv",
        "notes.txt",
        ".DS_Store",
        "2024/.x/e.jpg",
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"anything")
    (tmp_path / "photos" / "no_suffix").write_bytes(JPEG)
    return tmp_path / "photos"


def names(arguments, out="nowhere", **options):
    return [source.name for source in list_sources([str(one) for one in arguments], out, Wanted(**options)).sources]


def test_folder_is_read_to_its_depth_in_a_stable_order(photos):
    listing = list_sources([str(photos)], "nowhere")
    assert [source.name for source in listing.sources] == [
        "photos/2024/d.webp",
        "photos/2024/may/c.JPG",
        "photos/a.png",
        "photos/b.jpg",
        "photos/no_suffix",
    ]
    assert dict(listing.skipped) == {".csv": 1, ".txt": 1, "hidden": 2}
    assert listing.label_tables == [str(photos / "labels.csv")]


def test_names_do_not_depend_on_how_the_folder_is_written(photos, monkeypatch):
    expected = names([photos])
    monkeypatch.chdir(photos.parent)
    assert names(["photos"]) == names(["photos/"]) == names(["./photos/../photos"]) == expected
    monkeypatch.chdir(photos)
    assert names(["."]) == expected


def test_globs(photos):
    assert names([f"{photos}/*.jpg"]) == ["photos/b.jpg"]
    assert names([f"{photos}/**/*.[jJ]*"]) == ["photos/2024/may/c.JPG", "photos/b.jpg"]
    assert names([f"{photos}/20*"]) == ["photos/2024/d.webp", "photos/2024/may/c.JPG"]
    with pytest.raises(NoInputError, match="no image matches"):
        names([f"{photos}/*.gif"])


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.jpg", "a.jpg", True),
        ("*.jpg", "x/a.jpg", False),
        ("**/a?.jpg", "a1.jpg", True),
        ("**/a?.jpg", "x/y/a1.jpg", True),
        ("**", "x/y", True),
        ("x/**", "x/y/z", True),
        ("[!a]*", "b", True),
        ("[!a]*", "a", False),
        ("[a-c]", "b", True),
        ("a.c", "abc", False),
        ("*\n*", "a\nb", True),
        ("x", "x/y.jpg", True),
    ],
)
def test_glob_expressions(pattern, path, matches):
    assert bool(glob_expression(pattern).fullmatch(path)) is matches


def test_stdin_brings_one_path_a_line(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    lines = b"photos/b.jpg\r\n\nphotos/2024\n" + os.fsencode(str(photos / "a.png")) + b"\nphotos/absent.jpg"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    sources = list_sources(["-"], "nowhere").sources
    absolute = str(photos / "a.png").lstrip("/")
    assert [source.name for source in sources] == [
        "photos/b.jpg",
        "photos/2024/d.webp",
        "photos/2024/may/c.JPG",
        absolute,
        "photos/absent.jpg",
    ]
    assert sources[-1].problem == "no such file"


def test_a_file_named_itself_is_taken_whatever_it_is(photos):
    assert names([photos / "notes.txt"]) == ["notes.txt"]


def test_two_files_under_one_name_are_refused(photos):
    (photos / "2024" / "b.jpg").write_bytes(JPEG)
    with pytest.raises(UsageError, match=r"photos/b\.jpg and .*2024/b\.jpg would share one id"):
        names([photos / "b.jpg", photos / "2024" / "b.jpg"])
    assert names([photos / "b.jpg", photos / "b.jpg"]) == ["b.jpg"]


def test_absent_path_gets_a_suggestion(photos):
    with pytest.raises(NoInputError, match='did you mean ".*photos"'):
        names([f"{photos}x"])
    with pytest.raises(NoInputError, match="there is no folder"):
        names([photos / "absent" / "deep"])


def test_symbolic_links_are_followed_but_not_in_circles(photos):
    (photos / "2024" / "up").symlink_to(photos)
    (photos / "self").symlink_to("self")
    (photos / "broken.jpg").symlink_to("absent")
    (photos / "other").symlink_to(photos / "2024" / "may")
    listing = list_sources([str(photos)], "nowhere")
    found = [source.name for source in listing.sources]
    assert "photos/other/c.JPG" in found
    assert len(found) == len(set(found)) == 7
    assert listing.skipped["symbolic link loop"] == 1
    assert [source.problem for source in listing.sources if source.problem] == ["broken symbolic link"]


def test_special_files_do_not_block(photos):
    os.mkfifo(photos / "pipe.jpg")
    listing = list_sources([str(photos)], "nowhere")
    assert listing.skipped["special file"] == 1
    assert list_sources([str(photos / "pipe.jpg")], "nowhere").sources[0].problem == "not a regular file"


def test_own_output_is_no_source(photos):
    (photos / "crops" / "images").mkdir(parents=True)
    (photos / "crops" / "images" / "x.jpg").write_bytes(JPEG)
    assert not any("crops" in name for name in names([photos], out=photos / "crops"))


def test_limit_takes_the_first(photos):
    assert names([photos], limit=2) == names([photos])[:2]


@pytest.mark.parametrize(
    "raw", [b"caf\xe9.jpg", b"line\nbreak.jpg", b"<b>.jpg", b"back\\xe9.jpg", b"\x1b[31m.jpg", b"a b.jpg"]
)
def test_hostile_names_survive(tmp_path, raw):
    folder = tmp_path / "photos"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/" + raw, "wb") as file:
        file.write(JPEG)
    (name,) = names([folder])
    assert os.fsencode(name) == b"photos/" + raw
    path_to_text(name).encode()  # valid UTF-8
    assert printable(name).isprintable()


@given(st.binary(min_size=1).filter(lambda raw: b"\0" not in raw))
def test_path_text_is_lossless(raw):
    path = os.fsdecode(raw)
    assert text_to_path(path_to_text(path)) == path


@given(st.lists(st.binary(min_size=1), min_size=2, max_size=5, unique=True))
def test_path_texts_differ_where_paths_do(raws):
    assert len({path_to_text(os.fsdecode(raw)) for raw in raws}) == len(raws)


def test_id_is_the_documented_hash():
    import hashlib

    expected = hashlib.sha256(b"photos/caf\xe9.jpg\x003\x0012").hexdigest()[:16]
    assert face_id(os.fsdecode(b"photos/caf\xe9.jpg"), 3, 12) == expected
