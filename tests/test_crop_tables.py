"""Tables that name files, with boxes, segments and labels; boxes from a table of their own; a downloader's sidecars."""

from __future__ import annotations

import csv
import doctest
import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefem_cli import console
from mefem_cli.errors import UsageError
from mefem_cli.faces import avspeech, boxes, sidecars, tables
from mefem_cli.faces.boxes import NO_BOX, BoxTable
from mefem_cli.faces.sidecars import file_sidecar, sidecars_of, useful
from mefem_cli.faces.source import Given, GivenFace
from mefem_cli.faces.tables import LEAVES, MISSING, TableRow, is_table, rows_of
from mefem_cli.stores import tables as stored_tables


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the user reads on stderr."""
    lines: list[str] = []
    monkeypatch.setattr(console, "note", lines.append)
    return lines


def written(folder: Path, text: str, name: str = "clinic.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows_in(folder: Path, text: str) -> list[TableRow]:
    return list(rows_of(written(folder, text)))


def parquet(folder: Path, columns: dict, name: str = "boxes.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


# A table as a source


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("a.csv", b"path,age\n", True),
        ("a.CSV", b"\xef\xbb\xbfpath", True),
        ("a.tsv", b"path\tage\n", True),
        ("a.txt", b"path\tage\n", True),
        ("a.txt", b"\xff\xfep\0a\0", True),
        ("a.csv", b"gr\xf6\xdfe,1", True),
        ("a.csv", b"\xff\xd8\xff\xe0\0\x10JFIF", False),
        ("a.csv", b"", True),
        ("a", b"PAR1\x15\x04", True),
        ("a.parquet", b"broken", True),
        ("a.xlsx", b"PK\x03\x04", True),
        ("a.jpg", b"path,age\n", False),
        ("path,age", b"path,age\n", False),
    ],
)
def test_what_is_a_table(name, start, expected):
    assert is_table(name, start) is expected


def test_labels_are_typed_over_the_whole_table(tmp_path):
    rows = rows_in(tmp_path, "path;alter;code;note\na.jpg;1,5;1;\nsub/b.jpg;;2;x\nc.jpg;NA;A1;y\n")
    assert [row.path for row in rows] == ["a.jpg", "sub/b.jpg", "c.jpg"]
    assert [row.given.labels for row in rows] == [
        {"alter": 1.5, "code": "1", "note": None},
        {"alter": None, "code": "2", "note": "x"},
        {"alter": None, "code": "A1", "note": "y"},
    ]
    assert all(row.problem == row.tag == "" and row.given.faces == () for row in rows)


def test_parquet_rows(tmp_path, told):
    columns = {"path": ["a.jpg", "b.jpg"], "age": pa.array([3, None]), "jpg": [b"1", b"2"], "n": ["x", None]}
    rows = list(rows_of(parquet(tmp_path, columns)))
    assert [(row.path, row.given.labels) for row in rows] == [
        ("a.jpg", {"age": 3.0, "n": "x"}),
        ("b.jpg", {"age": None, "n": None}),
    ]
    assert told == [f"{tmp_path}/boxes.parquet: no labels, as they hold binary data: jpg"]


@pytest.mark.parametrize(
    ("path", "expected", "problem"),
    [
        ("/abs//x/./a.jpg", "/abs/x/a.jpg", ""),
        ("//host/a.jpg", "/host/a.jpg", ""),
        ("./a.jpg", "a.jpg", ""),
        ("sub\\a.jpg", "sub/a.jpg", ""),
        ("sub/a\\b.jpg", "sub/a\\b.jpg", ""),
        ("a..b.jpg", "a..b.jpg", ""),
        ("-a.jpg", "-a.jpg", ""),
        ("../a.jpg", "../a.jpg", LEAVES),
        ("x/../../a.jpg", "x/../../a.jpg", LEAVES),
        ("..\\a.jpg", "../a.jpg", LEAVES),
        ("x/..", "x/..", LEAVES),
        ("C:\\photos\\a.jpg", "C:/photos/a.jpg", LEAVES),
        ("c:a.jpg", "c:a.jpg", LEAVES),
        ("", "row 1", "the row names no file"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>", ""),
    ],
)
def test_paths(tmp_path, path, expected, problem):
    (row,) = rows_of(parquet(tmp_path, {"path": [path]}))
    assert (row.path, row.problem) == (expected, problem)


def test_a_zero_byte_in_a_path_is_no_crash(tmp_path):
    (row,) = rows_of(parquet(tmp_path, {"path": ["a\0.jpg"]}))
    assert row.problem == LEAVES
    assert not os.path.exists(tmp_path / row.path)  # a path with a zero byte would raise


def test_a_file_named_twice_is_refused_with_both_rows(tmp_path):
    with pytest.raises(UsageError, match=r'rows 1 and 4 both name "a.jpg"'):
        rows_in(tmp_path, "path,age\na.jpg,1\nb.jpg,2\nc.jpg,3\n./a.jpg,4\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("file,age\na,1\n", 'no column "path".*file, age'),
        ("url,box\nhttp://a,\n", 'no column "path".*--boxes'),
        ("<!DOCTYPE html>\n<html>\n", 'no column "path"'),
        ("path,box_x,box_y,box_w\na,1,2,3\n", "has a column box_x but no box_h"),
        ("path,point_y\na,1\n", "wants both of point_x, point_y"),
        ("path,age\na,1,2\n", "row 1 has 3 fields"),
    ],
)
def test_tables_that_are_no_source_say_why(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        rows_in(tmp_path, text)


def test_segments_and_points(tmp_path):
    text = (
        "path,segment_start,segment_end,point_x,point_y,who\n"
        "v.mp4,12.25,15,0.5,0.25,a\nv.mp4,20,21,,,b\nw.mp4,,,,,c\n"
        "x.mp4,5,5,,,d\nz.mp4,-1,5,,,f\nq.mp4,1,2,0.5,1.5,g\nr.mp4,a/b,2,,,h\n"
    )
    rows = rows_in(tmp_path, text)
    assert [(row.tag, row.given.segment, row.given.point) for row in rows[:3]] == [
        ("_12.25-15@0.5,0.25", (12.25, 15.0), (0.5, 0.25)),
        ("_20-21", (20.0, 21.0), None),
        ("", None, None),
    ]
    assert [row.problem for row in rows[3:]] == [
        "the segment ends before it starts: 5, 5",
        "the segment ends before it starts: -1, 5",
        "the point is no two numbers from 0 to 1: 0.5, 1.5",
        "start and end of the segment are no two numbers: a_b, 2",
    ]
    assert all(row.given.segment is None and row.given.labels for row in rows[3:])


def test_segments_that_are_open_at_one_end(tmp_path):
    rows = rows_in(tmp_path, "path,segment_start,segment_end\nv.mp4,12.5,\nv.mp4,nan,3\nv.mp4,,\n")
    assert [(row.tag, row.given.segment) for row in rows] == [
        ("_12.5-end", (12.5, math.inf)),
        ("_0-3", (0.0, 3.0)),
        ("", None),
    ]
    assert [Given.from_json(row.given.to_json()) for row in rows] == [row.given for row in rows]
    (row,) = rows_in(tmp_path, "path,segment_start\nv.mp4,2\n")
    assert row.given.segment == (2.0, math.inf)


def test_two_rows_of_one_segment_are_refused(tmp_path):
    with pytest.raises(UsageError, match="rows 1 and 2"):
        rows_in(tmp_path, "path,segment_start,segment_end\nv.mp4,1,2\nv.mp4,1.0,2.0\n")


def test_reading_many_rows_keeps_little(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_tables, "BATCH_ROWS", 500)
    path = written(tmp_path, "path,age,name\n" + "".join(f"dir/{one}.jpg,{one},name{one}\n" for one in range(8_000)))
    tracemalloc.start()
    count = sum(1 for _ in rows_of(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 2e6  # the rows as objects are 4 MB


# Boxes of a table

BOX = GivenFace((10.0, 20.0, 30.0, 40.0))


def only_box(tmp_path, box) -> GivenFace | None:
    (row,) = rows_of(parquet(tmp_path, {"path": ["a.jpg"], "box": pa.array([box])}))
    return row.given.faces[0] if row.given.faces else None


@pytest.mark.parametrize(
    "box", ["[10, 20, 40, 60]", " [10.0,20.0,4e1,60] ", [10, 20, 40, 60], [10.0, 20.0, 40.0, 60.0]]
)
def test_a_box_is_read_as_corners(tmp_path, box):
    assert only_box(tmp_path, box) == BOX


@pytest.mark.parametrize("box", [None, "", "  "])
def test_a_missing_box_leaves_the_face_to_the_detector(tmp_path, box):
    assert only_box(tmp_path, pa.scalar(box, pa.string())) is None


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("[1, 2, 3]", "no list of four"),
        ("[1, 2, 3, 4, 5]", "no list of four"),
        ("1, 2, 3, 4", "no list of four"),
        ('{"x": 1}', "no list of four"),
        ("null", "no list of four"),
        ('["1", "2", "3", "4"]', "no list of four"),
        ("[1, 2, 3, true]", "no list of four"),
        ("[1, 2, 3, NaN]", "no list of four"),
        ("[1, 2, 3, Infinity]", "no list of four"),
        ("[1, 2, 3, 1e99]", "no list of four"),
        ("[1, 2, 3, " + "9" * 5000 + "]", "no list of four"),
        ("[" * 100_000, "no list of four"),
        ("<script>alert(1)</script>\n", r"no list of four numbers: <script>alert\(1\)</script>$"),
        ("\x1b[31m", r"numbers: \\x1b\[31m$"),
        ([1.0, 2.0, None, 4.0], "no list of four"),
        ([1.0, 2.0, float("nan"), 4.0], "no list of four"),
        ("[40, 20, 10, 60]", "not beyond"),
        ("[10, 60, 40, 60]", "not beyond"),
    ],
)
def test_a_malformed_box_says_why(tmp_path, box, words):
    face = only_box(tmp_path, box)
    assert face is not None and face.box is None
    with pytest.raises(UsageError, match=words):
        raise UsageError(face.problem)
    assert len(face.problem) < 120 and face.problem.isprintable()


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ("10;20;30;40", BOX),
        ("10,0;20;3e1;+40", BOX),
        ("-5;-5;30;40", GivenFace((-5.0, -5.0, 30.0, 40.0))),
        (";;;", None),
        ("10;20;30;", GivenFace(problem="not four numbers: [10.0, 20.0, 30.0, null]")),
        ("10;20;x;40", GivenFace(problem='not four numbers: [10.0, 20.0, "x", 40.0]')),
        ("10;20;30;-40", GivenFace(problem="its width and height are not above 0: [10.0, 20.0, 30.0, -40.0]")),
        ("10;20;0;40", GivenFace(problem="its width and height are not above 0: [10.0, 20.0, 0.0, 40.0]")),
        ("10;20;30;1e8", GivenFace(problem="not four numbers: [10.0, 20.0, 30.0, 100000000.0]")),
        ("10;20;30;1e999", GivenFace(problem='not four numbers: [10.0, 20.0, 30.0, "1e999"]')),
    ],
)
def test_a_box_is_read_as_sides(tmp_path, sides, expected):
    rows = rows_in(tmp_path, f"path;box_x;box_y;box_w;box_h;age\na.jpg;{sides};7\nb.jpg;1;2;3;4;8\n")
    assert rows[0].given.faces == (() if expected is None else (expected,))
    assert rows[0].given.labels == {"age": 7.0}
    assert rows[1].given.faces == (GivenFace((1.0, 2.0, 3.0, 4.0)),)


def test_rows_of_one_picture_are_its_faces(tmp_path):
    text = 'path,box,who\na.jpg,"[0,0,5,5]",Anna\n./a.jpg,"[9,9,12,12]",\nb.jpg,,Bert\na.jpg,,Carl\nc.jpg,x,Dora\n'
    rows = rows_in(tmp_path, text)
    assert [row.path for row in rows] == ["b.jpg", "a.jpg", "c.jpg"]
    assert rows[0].given == Given(labels={"who": "Bert"})
    assert rows[1].given == Given(
        faces=(
            GivenFace((0.0, 0.0, 5.0, 5.0), labels={"who": "Anna"}),
            GivenFace((9.0, 9.0, 3.0, 3.0), labels={"who": None}),
            GivenFace(problem=NO_BOX, labels={"who": "Carl"}),
        )
    )
    assert rows[2].given.faces[0].problem.startswith("no list of four")
    assert Given.from_json(rows[1].given.to_json()) == rows[1].given


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_grouping_is_the_same_as_a_dictionary(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("grouping")
    text = "path,box,n\n" + "".join(f'{name}.jpg,"[0,0,1,{n + 1}]",{n}\n' for n, name in enumerate(names))
    expected: dict[str, list[float]] = {}
    for n, name in enumerate(names):
        expected.setdefault(f"{name}.jpg", []).append(n + 1.0)
    found = [(row.path, [face.box[3] for face in row.given.faces]) for row in rows_in(folder, text)]
    assert dict(found) == expected and len(found) == len(expected)
    assert sorted(dict(found).items()) == sorted(expected.items())


def test_too_many_scattered_rows_ask_for_a_sorted_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_SCATTERED", 3)
    text = "path,box\n" + "a.jpg,\nb.jpg,\n" * 2
    with pytest.raises(UsageError, match="4 rows .* sort the table by path"):
        rows_in(tmp_path, text)
    assert len(rows_in(tmp_path, "path,box\n" + "a.jpg,\n" * 4 + "b.jpg,\n")) == 2


# AVSpeech


def clips(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


ROWS = "-1zCDX2gFwY,90.000000,93.500000,0.593750,0.288889\n-1zCDX2gFwY,12.3,15.3,0.5,0.25\nab_12-34_56,5.04,9,0.1,1\n"


def test_whole_videos_keep_their_segment(tmp_path):
    clips(tmp_path, "-1zCDX2gFwY.mp4", "deep/er/ab_12-34_56.webm", "-1zCDX2gFwY.jpg", "-1zCDX2gFwY.part")
    rows = rows_in(tmp_path, ROWS)
    assert [(row.path, row.tag, row.problem) for row in rows] == [
        ("-1zCDX2gFwY.mp4", "_90-93.5@0.59375,0.288889", ""),
        ("-1zCDX2gFwY.mp4", "_12.3-15.3@0.5,0.25", ""),
        ("deep/er/ab_12-34_56.webm", "_5.04-9@0.1,1", ""),
    ]
    assert rows[0].given == Given({"youtube_id": "-1zCDX2gFwY"}, (), (90.0, 93.5), (0.59375, 0.288889))


@pytest.mark.parametrize(
    "name",
    [
        "{id}_{a:.6f}_{b:.6f}.mp4",
        "{id}_{a:010.6f}-{b:010.6f}.mp4",
        "{id}/{id}_{a}_{b}_video.mp4",
        "{id}_{a:.3f}_{b:.3f}.mkv",
        "{id}_{a}.webm",
        "x/{id}-{a}-{b}.MP4",
        "{id}_{a:.0f}_{b:.0f}.mp4",
    ],
)
def test_cut_clips_are_the_segment(tmp_path, name):
    segments = [("-1zCDX2gFwY", 90.0, 93.5), ("-1zCDX2gFwY", 12.3, 15.3), ("ab_12-34_56", 5.04, 9.0)]
    names = [name.format(id=one, a=a, b=b) for one, a, b in segments]
    clips(tmp_path, "-1zCDX2gFwY.mp4", "ab_12-34_56.mp4", *names)
    rows = rows_in(tmp_path, ROWS)
    assert [row.path for row in rows] == names
    assert all(row.given.segment is None and row.given.point is not None and not row.problem for row in rows)


def test_a_title_before_the_id_is_a_whole_video(tmp_path):
    clips(tmp_path, "A talk [-1zCDX2gFwY].webm", "[other_12345].mp4")
    assert [row.path for row in rows_in(tmp_path, ROWS)][:2] == ["A talk [-1zCDX2gFwY].webm"] * 2


def test_missing_clips_and_clips_of_other_segments(tmp_path):
    clips(tmp_path, "-1zCDX2gFwY_50.0_53.0.mp4", "zzzzzzzzzzz.mp4")
    rows = rows_in(tmp_path, ROWS)
    assert {(row.path, row.problem) for row in rows} == {("-1zCDX2gFwY", MISSING), ("ab_12-34_56", MISSING)}
    assert len({(row.path, row.tag) for row in rows}) == 3


def test_the_nearest_clip_is_taken(tmp_path):
    clips(tmp_path, "abc_10.0_14.0.mp4", "abc_10.4_14.4.mp4", "abc.mp4")
    assert rows_in(tmp_path, "abc,10.3,14.3,0.5,0.5\n")[0].path == "abc_10.4_14.4.mp4"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("../../etc/passwd,1,2,0.5,0.5", LEAVES),
        ("abc,2,1,0.5,0.5", "the segment ends before it starts: 2, 1"),
        ("abc,1,2,0.5", "the point is no two numbers from 0 to 1: 0.5, None"),
        ("abc,,,,", "the row names no segment"),
        (",1,2,0.5,0.5", "the row names no file"),
    ],
)
def test_rows_of_avspeech_that_are_wrong(tmp_path, row, problem):
    clips(tmp_path, "abc.mp4")
    rows = rows_in(tmp_path, f"abc,1,2,0.5,0.5\n{row}\n")
    assert rows[0].problem == "" and rows[1].problem == problem


def test_a_header_of_five_names_is_no_avspeech(tmp_path):
    assert rows_in(tmp_path, "path,start,end,x,y\na.mp4,1,2,3,4\n")[0].given.labels == {
        "start": 1.0,
        "end": 2.0,
        "x": 3.0,
        "y": 4.0,
    }


# --boxes


def facecaption(tmp_path) -> Path:
    columns = {
        "url": ["http://a/1.jpg", "http://b/2.jpg", "http://a/1.jpg", "http://c/3.jpg"],
        "box": ["[10, 20, 40, 60]", "[0, 0, 0, 5]", "[1.5, 2.5, 3.5, 4.5]", None],
        "caption": ["a woman", None, "a man", "x"],
        "score": [0.5, None, 1.0, 2.0],
    }
    return parquet(tmp_path, columns)


def test_boxes_by_a_label_of_the_source(tmp_path, told):
    given_boxes = BoxTable.read(facecaption(tmp_path), "url")
    assert given_boxes.lookup("/x/00000.tar/0.jpg", {"url": "http://a/1.jpg", "caption": "two people"}) == (
        GivenFace((10.0, 20.0, 30.0, 40.0), labels={"caption": "a woman", "score": 0.5}),
        GivenFace((1.5, 2.5, 2.0, 2.0), labels={"caption": "a man", "score": 1.0}),
    )
    (bad,) = given_boxes.lookup("/x/1.jpg", {"url": "http://b/2.jpg"})
    assert bad.box is None and "not beyond" in bad.problem and bad.labels == {"caption": None, "score": None}
    assert given_boxes.lookup("/x/2.jpg", {"url": "http://a/"}) == ()
    assert given_boxes.lookup("/x/1.jpg", {}) == ()  # no label: its path is no url
    assert given_boxes.lookup("/y/0.jpg", {"url": "http://a/1.jpg"})[0].box == (10.0, 20.0, 30.0, 40.0)
    given_boxes.tell()
    assert told == [
        f"boxes from {given_boxes.path}: 3 of 5 sources have boxes; 1 rows of the table fit no picture, the first is"
        ' "http://c/3.jpg"'
    ]


def test_a_row_without_a_box_is_a_bad_box(tmp_path):
    (face,) = BoxTable.read(facecaption(tmp_path), "url").lookup("/x/0.jpg", {"url": "http://c/3.jpg"})
    assert face == GivenFace(problem=NO_BOX, labels={"caption": "x", "score": 2.0})


def test_boxes_by_a_number(tmp_path):
    given_boxes = BoxTable.read(parquet(tmp_path, {"n": [7, 12], "box": ["[0,0,1,1]", "[0,0,2,2]"]}), "n")
    assert (
        given_boxes.lookup("/x", {"n": 12.0})
        == given_boxes.lookup("/x", {"n": "12"})
        == (GivenFace((0.0, 0.0, 2.0, 2.0)),)
    )


def box_table(tmp_path, *keys: str) -> BoxTable:
    """A table whose row n has a box of width n + 1."""
    return BoxTable.read(parquet(tmp_path, {"path": keys, "box": [[0, 0, n + 1, 1] for n in range(len(keys))]}), None)


def widths(found: tuple[GivenFace, ...]) -> list[float]:
    return [face.box[2] for face in found if face.box]


def test_boxes_by_path(tmp_path):
    given_boxes = box_table(tmp_path, "t2i/a.jpg", "a.jpg", ".\\t2i\\a.jpg", "b", "/abs/c.jpg", "c.png", "", "x/e.png")
    assert widths(given_boxes.lookup("/p/t2i/a.jpg", {})) == [1, 3]  # the longest end
    assert widths(given_boxes.lookup("/p/style/a.jpg", {})) == [2]
    assert widths(given_boxes.lookup("/p/00.tar/b.jpg", {"path": "a.jpg"})) == [
        4
    ]  # the stem; --key path is not asked for
    assert widths(given_boxes.lookup("/abs/c.jpg", {})) == [5]
    assert widths(given_boxes.lookup("/y/e.jpg", {})) == []  # its folder is another


def test_boxes_that_fit_two_pictures_are_refused(tmp_path):
    given_boxes = box_table(tmp_path, "a.jpg")
    assert widths(given_boxes.lookup("/p/x/a.jpg", {})) == widths(given_boxes.lookup("/p/x/a.jpg", {})) == [1]
    with pytest.raises(UsageError, match=r'"a.jpg" fit /p/y/a.jpg and a picture before it'):
        given_boxes.lookup("/p/y/a.jpg", {})


def test_boxes_are_not_given_to_a_second_picture_by_its_stem(tmp_path):
    given_boxes = box_table(tmp_path, "a.jpg", "b.jpg", "b.png")
    assert widths(given_boxes.lookup("/p/a.jpg", {})) == [1]
    assert given_boxes.lookup("/p/a.webp", {}) == ()
    assert given_boxes.lookup("/p/b.webp", {}) == ()  # of b.jpg or of b.png?


def test_tables_without_boxes_or_keys_say_so(tmp_path):
    with pytest.raises(UsageError, match='neither a column "box" nor box_x'):
        BoxTable.read(written(tmp_path, "path,age\na,1\n"), None)
    with pytest.raises(UsageError, match='--key ulr.*did you mean "url"'):
        BoxTable.read(facecaption(tmp_path), "ulr")
    with pytest.raises(UsageError, match='no column "path"; type --key'):
        BoxTable.read(facecaption(tmp_path), None)


def test_boxes_of_a_csv(tmp_path):
    given_boxes = BoxTable.read(written(tmp_path, "path;box_x;box_y;box_w;box_h;who\na.jpg;1,5;2;3;4;Anna\n"), None)
    assert given_boxes.lookup("/p/a.jpg", {}) == (GivenFace((1.5, 2.0, 3.0, 4.0), labels={"who": "Anna"}),)


def test_an_empty_table_of_boxes(tmp_path, told):
    given_boxes = BoxTable.read(written(tmp_path, "path,box\n"), None)
    assert given_boxes.lookup("/p/a.jpg", {}) == ()
    with pytest.raises(UsageError, match="0 of 1 sources have boxes; is --key the column"):
        given_boxes.tell()


def test_box_tables_find_what_a_dictionary_finds(tmp_path):
    chance = random.Random(0)
    urls = [f"http://h/{chance.randrange(3000)}" for _ in range(20_000)]
    lines = [[url, json.dumps([0, 0, n + 1, 1]), f"c{n}"] for n, url in enumerate(urls)]
    path = tmp_path / "boxes.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["url", "box", "caption"], *lines])
    given_boxes = BoxTable.read(path, "url")
    for url in [*chance.sample(urls, 50), "http://h/x"]:
        found = given_boxes.lookup("/x", {"url": url})
        expected = [n for n, one in enumerate(urls) if one == url]
        assert widths(found) == [n + 1 for n in expected]
        assert [face.labels for face in found] == [{"caption": f"c{n}"} for n in expected]


# Sidecars of img2dataset

FIELDS = {
    "url": "http://a/1.jpg",
    "caption": "a woman",
    "key": "000000012",
    "status": "success",
    "error_message": None,
    "width": 256,
    "height": 256,
    "original_width": 1024,
    "original_height": 1024,
    "similarity": 0.25,
    "exif": '{"GPS": "48.1, 11.5"}',
    "sha256": "00ff",
}
LABELS = {"url": "http://a/1.jpg", "caption": "a woman", "similarity": 0.25}


@pytest.mark.parametrize("name", ["00000.tar", "00000"])
def test_the_table_beside_a_shard_or_folder(tmp_path, name):
    failed = {**FIELDS, "key": "000000013", "status": "failed_to_download", "similarity": None, "caption": None}
    pq.write_table(pa.Table.from_pylist([failed, FIELDS]), tmp_path / "00000.parquet")
    table = sidecars_of(str(tmp_path / name))
    assert table is not None
    assert table.labels("000000012") == LABELS
    assert table.labels("000000013") == {"url": "http://a/1.jpg", "caption": None, "similarity": None}
    assert table.labels("12") == {}


def test_a_table_of_ones_own_keeps_its_columns(tmp_path):
    pq.write_table(pa.table({"key": ["a", "b", "b"], "width": [1, 2, 3]}), tmp_path / "photos.parquet")
    table = sidecars_of(str(tmp_path / "photos"))
    assert table is not None
    assert table.labels("a") == {"width": 1.0}
    assert table.labels("b") == {}  # which?


def test_no_or_other_or_damaged_tables_beside(tmp_path, told):
    assert sidecars_of(str(tmp_path / "00000.tar")) is None
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "00000.parquet")
    assert sidecars_of(str(tmp_path / "00000.tar")) is None
    assert told == []
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 broken")
    assert sidecars_of(str(tmp_path / "00000.tar")) is None
    assert "are not used" in told[0] and "damaged" in told[0]


def test_a_table_with_keys_only(tmp_path):
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "00000.parquet")
    table = sidecars_of(str(tmp_path / "00000"))
    assert table is not None and table.labels("a") == {}


def test_json_and_txt_beside_a_picture(tmp_path):
    folder = tmp_path / "00000"
    folder.mkdir()
    picture = str(folder / "000000012.jpg")
    (folder / "000000012.json").write_text(json.dumps(FIELDS))
    (folder / "000000012.txt").write_text("a woman")
    assert file_sidecar(picture) == {}  # such files lie beside pictures for other reasons too
    (tmp_path / "00000_stats.json").write_text("{}")
    assert file_sidecar(picture) == {**LABELS, "txt": "a woman"}
    assert file_sidecar(str(folder / "other.jpg")) == {}
    (folder / "000000012.json").write_text("[" * 100_000)
    assert file_sidecar(picture) == {"txt": "a woman"}
    (folder / "000000012.txt").write_text("x" * 2_000_000)
    assert file_sidecar(picture) == {}


def test_labels_of_other_json_files_are_all_useful():
    own = {"status": "diabetic", "width": 3.0}
    assert useful(own) == own


@pytest.mark.parametrize("module", [tables, boxes, avspeech, sidecars])
def test_docstring_examples(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
