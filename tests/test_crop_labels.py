"""Tables as clinics write them, and their rows on the right pictures."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mefem_cli import console
from mefem_cli.errors import OutputError, UsageError
from mefem_cli.faces import boxes
from mefem_cli.faces.labels import join
from mefem_cli.stores import joining, tables
from mefem_cli.stores.joining import match, read_labels
from mefem_cli.stores.tables import HashIndex, Rows, as_texts, open_table, spooled, to_numbers


def written(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def columns_of(path) -> dict[str, list]:
    table = open_table(path)
    return spooled(table.batches(table.can_label)).to_pydict()


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the user reads on stderr."""
    lines: list[str] = []
    monkeypatch.setattr(console, "note", lines.append)
    return lines


# Reading


def test_plain_csv(tmp_path):
    path = written(tmp_path, "path,age,name\na.jpg,31,Anna\n\nb.jpg,, Bert \nc.jpg\n")
    assert columns_of(path) == {
        "path": ["a.jpg", "b.jpg", "c.jpg"],
        "age": [31.0, None, None],
        "name": ["Anna", "Bert", ""],
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_german_excel_csv(tmp_path, encoding, delimiter, line_end):
    text = "path;größe;gewicht|a.jpg;1,82;80|b.jpg;1,7;NA|".replace("|", line_end).replace(";", delimiter)
    path = written(tmp_path, text, encoding)
    assert columns_of(path) == {"path": ["a.jpg", "b.jpg"], "größe": [1.82, 1.7], "gewicht": [80.0, None]}


def test_quoted_fields_hold_delimiters_quotes_and_lines(tmp_path):
    path = written(tmp_path, 'path,note\n"a,b.jpg","she said ""no""\nand left"\n')
    assert columns_of(path) == {"path": ["a,b.jpg"], "note": ['she said "no"\nand left']}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "2.5", "-3e2", "+4", "5.", ".5"], [1, 2.5, -300, 4, 5, 0.5]),
        (["1,5", "n/a", "", "NaN", "-"], [1.5, None, None, None, None]),
        (["", ""], [None, None]),
        ([], []),
        (["007", "12"], None),
        (["-012"], None),
        (["76561198000000001"], None),  # would be ...000 as float64
        (["1", "male"], None),
        (["1_0"], None),
        (["1,000,000"], None),
        (["1\n"], None),
        (["1e999"], None),
        (["inf"], None),
        (["2024-01-02"], None),
        (["0.5", "0"], [0.5, 0]),
    ],
)
def test_numbers(texts, expected):
    numbers = to_numbers(pa.array(texts, pa.string()))
    assert (numbers if numbers is None else numbers.to_pylist()) == expected


@pytest.mark.parametrize("batch_rows", [2, 1 << 13])
def test_a_column_is_numbers_only_if_all_of_it_is(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(tables, "BATCH_ROWS", batch_rows)
    path = written(tmp_path, "path,age,code\n" + "".join(f"{one}.jpg,{one},{one}\n" for one in range(9)) + "x,9,A1\n")
    found = columns_of(path)
    assert found["age"] == [float(one) for one in range(10)]
    assert found["code"] == [*map(str, range(9)), "A1"]


def test_parquet(tmp_path):
    path = tmp_path / "labels.parquet"
    content = {
        "path": ["a.jpg", "b.jpg"],
        "age": pa.array([3, None]),
        "sex": pa.array(["m", None]).dictionary_encode(),
        "bmi": [21.5, float("nan")],
        "well": [True, None],
        "long_id": [2**60, 1],
        "lists": [[1, 2], None],
        "image": [{"bytes": b"\xff\xd8", "path": "a"}, None],
    }
    pq.write_table(pa.table(content), path)
    assert columns_of(path) == {
        "path": ["a.jpg", "b.jpg"],
        "age": [3.0, None],
        "sex": ["m", ""],
        "bmi": [21.5, None],
        "well": [1.0, None],
        "long_id": [str(2**60), "1"],
        "lists": ["[1, 2]", ""],
    }


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"path": pa.array([], pa.string()), "age": pa.array([], pa.int64())}), path)
    assert columns_of(path) == {"path": [], "age": []}


def test_csv_with_a_header_only(tmp_path):
    assert columns_of(written(tmp_path, "path,age")) == {"path": [], "age": []}


LONG = "x" * (tables.LONGEST_FIELD + 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"PK\x03\x04 zipped", "Excel"),
        (b"PAR1 broken", "damaged Parquet"),
        (b"path,a,a\nx,1,2\n", "several columns"),
        (b"path,a\nx,1\nx,1,2\n", "row 2 has 3 fields"),
        (b'path,a\nx,1\ny,"2\nz,3\n', "row 2 is no CSV"),
        (b'path,"a\n', "the header is no CSV"),
        (b"a\0b\0", "no text"),
        (b"path,a\n" + b"x,1\n" * 300_000 + b"\0", "no text"),
        (f"path,a\nb,{LONG}\n".encode(), "row 1 is no CSV"),
        (b"path" + b"," * tables.LONGEST_ROW + b"\nx\n", "a row of more than"),
        (b"path,a\n" + b'"x\ny",' * 200_000, "a row of more than"),
    ],
    ids=lambda one: None if isinstance(one, bytes) else one,
)
def test_broken_tables_say_why(tmp_path, content, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        columns_of(path)


def test_what_is_no_file_says_so(tmp_path):
    with pytest.raises(UsageError, match="no regular file"):
        open_table(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        open_table(tmp_path / "absent.csv")


def parquet_bytes(tmp_path) -> bytes:
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"path": [f"{one}.jpg" for one in range(50)], "age": range(50)}), path, compression="none")
    return path.read_bytes()


@pytest.mark.parametrize("change", ["cut", "flip"])
def test_damaged_parquet_files_are_an_error_or_read(tmp_path, change):
    whole = parquet_bytes(tmp_path)
    path = tmp_path / "labels.parquet"
    for place in range(4, len(whole), 11):
        damaged = (
            whole[:place] if change == "cut" else whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        )
        path.write_bytes(damaged)
        try:
            columns_of(path)
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 300


def test_texts_that_are_no_utf8_in_parquet(tmp_path):
    path = tmp_path / "labels.parquet"
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"path": bad}), path)
    with pytest.raises(UsageError, match="damaged Parquet"):
        columns_of(path)


def test_a_small_parquet_file_that_repeats_a_huge_text_is_refused(tmp_path):
    path = tmp_path / "bomb.parquet"
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"path": repeated}), path, dictionary_pagesize_limit=1 << 30, compression="zstd")
    assert path.stat().st_size < 100_000  # it would be 100 GB in memory
    with pytest.raises(UsageError, match="a field of more than"):
        columns_of(path)


def test_rows_and_index_find_what_was_written():
    batches = [pa.record_batch({"a": pa.array(some, pa.float64())}) for some in ([0, 1, 2], [], [3], [4, 5])]
    rows = Rows(spooled(batches))
    assert len(rows) == 6 and [rows[one] for one in range(6)] == [[float(one)] for one in range(6)]
    index = HashIndex(np.array([7, 3, 7, 9]))
    assert [index.find(one).tolist() for one in (7, 3, 9, 1, 8, 10)] == [[0, 2], [1], [3], [], [], []]
    assert HashIndex(np.empty(0, np.int64)).find(1).tolist() == []


def test_texts_of_numbers_are_the_shortest_ones():
    assert as_texts(pa.array([12.0, 0.1, None, float("nan"), 1e300])).to_pylist() == ["12", "0.1", "", "", "1e+300"]
    assert as_texts(pa.array([7, None])).to_pylist() == ["7", ""]


# Matching


def test_key_column(tmp_path):
    table = written(tmp_path, "image,age\na,1\nb,2\n")
    with pytest.raises(UsageError, match='no column "path".*image, age'):
        read_labels(table, None)
    with pytest.raises(UsageError, match='did you mean "image"'):
        read_labels(table, "imag")
    assert read_labels(table, "image").key == "image"
    with pytest.raises(UsageError, match='distinct.*1 keys, the first is "a"'):
        read_labels(written(tmp_path, "path,age\na,1\na,2\nb,1\n,5\n,6\n"), None)


SOURCES = ["/p/t2i/a.jpg", "/p/t2i/b.jpg", "/p/style/a.jpg", "/p/style/c.png"]


@pytest.mark.parametrize(
    ("keys", "rows", "unmatched", "ambiguous"),
    [
        (["t2i/a.jpg", "style/a.jpg"], [0, -1, 1, -1], [], []),
        (["b.jpg", "c.png"], [-1, 0, -1, 1], [], []),
        (["b", "c.jpg"], [-1, 0, -1, 1], [], []),
        (["a.jpg"], [-1, -1, -1, -1], [], ["a.jpg"]),
        (["2i/b.jpg"], [-1, 0, -1, -1], [], []),  # not the end of a path at a folder's border, but the stem fits
        (["z.jpg", ""], [-1, -1, -1, -1], ["z.jpg", ""], []),
        (["./t2i\\b.jpg"], [-1, 0, -1, -1], [], []),
        (["b.jpg", "b.png"], [-1, 0, -1, -1], ["b.png"], []),
        (["x/b.png", "y/b.gif"], [-1, -1, -1, -1], [], ["x/b.png", "y/b.gif"]),
        (["/p/style/c.png"], [-1, -1, -1, 0], [], []),
        (["/".join("d" * 5000)], [-1, -1, -1, -1], ["/".join("d" * 5000)], []),
    ],
)
def test_matching(keys, rows, unmatched, ambiguous):
    matched = match(keys, SOURCES)
    assert matched.row_of_source.tolist() == rows
    assert [keys[row] for row in matched.unmatched] == unmatched
    assert [keys[row] for row in matched.ambiguous] == ambiguous


def test_two_rows_for_one_picture_are_refused():
    with pytest.raises(UsageError, match=r'"b.jpg" and "t2i/b.jpg".*picture /p/t2i/b.jpg'):
        match(["b.jpg", "t2i/b.jpg"], SOURCES)


def slow_match(keys: list[str], sources: list[str]) -> tuple[list[int], set[int], set[int]] | None:
    """Return row of source, unmatched and ambiguous rows; None where two keys are the end of one path."""
    row_of_source, unmatched, ambiguous = [-1] * len(sources), set(), set()
    claims = defaultdict(list)
    by_stem_only = []
    for row, key in enumerate(map(boxes.tidy, keys)):
        fitting = [index for index, one in enumerate(sources) if key and f"/{one}".endswith(f"/{key}")]
        if len(fitting) > 1:
            ambiguous.add(row)
        elif not fitting:
            by_stem_only.append((row, key))
        elif row_of_source[fitting[0]] >= 0:
            return None
        else:
            row_of_source[fitting[0]] = row
    for row, key in by_stem_only:
        stem = boxes.stem_of(key.rpartition("/")[2])
        fitting = [i for i, one in enumerate(sources) if key and boxes.stem_of(one.rpartition("/")[2]) == stem]
        if len(fitting) > 1:
            ambiguous.add(row)
        elif fitting and row_of_source[fitting[0]] < 0:
            claims[fitting[0]].append(row)
        else:
            unmatched.add(row)
    for index, rows in claims.items():
        if len(rows) > 1:
            ambiguous.update(rows)
        else:
            row_of_source[index] = rows[0]
    return row_of_source, unmatched, ambiguous


PATHS = st.lists(
    st.sampled_from(["a", "b", "a.j", "b.j", "a.p", "a.", ".a", "ä\n.j", "a.b.j", "\\"]), min_size=1, max_size=4
)
KEYS = st.tuples(st.sampled_from(["", "/", "./", ".\\"]), PATHS).map(lambda one: one[0] + "/".join(one[1]))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(KEYS, st.just("")), max_size=6),
    st.lists(PATHS.map(lambda one: "/" + "/".join(one)), max_size=6, unique=True),
)
@example(["a", "a"], ["/a"])
def test_matching_is_the_same_as_a_slow_search(keys, sources):
    expected = slow_match(keys, sources)
    if expected is None:
        with pytest.raises(UsageError, match="two rows of labels"):
            match(keys, sources)
        return
    for piece in (joining.PIECE, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joining, "PIECE", piece)
            matched = match(keys, sources)
        assert (matched.row_of_source.tolist(), {*matched.unmatched}, {*matched.ambiguous}) == expected


def test_stems_are_those_of_pathlib():
    for name in ("b.png", "b", ".hidden", "a.tar.gz", "..a", "a b.c"):
        assert boxes.stem_of(name) == PurePosixPath(name).stem


# Joining


def manifest(**columns) -> pa.Table:
    number = len(columns["source"])
    usual = {"frame": [0] * number, "detector": ["short"] * number, "reason": [""] * number}
    return pa.table({**usual, **columns})


def test_join_by_path(tmp_path, told):
    rows = manifest(source=["/p/a.jpg", "/p/t.tar/000000012.jpg", "/p/c.jpg"])
    path = written(tmp_path, "path,age,name\na.jpg,31,<b>Anna</b>\n000000012.jpg,,Bert\nz.jpg,1,Zoe\n")
    joined = join(rows, path, None)
    assert joined["label:age"].to_pylist() == [31.0, None, None]
    assert joined["label:name"].to_pylist() == ["<b>Anna</b>", "Bert", ""]
    assert joined.select(rows.column_names).equals(rows)
    assert told == [
        f"labels from {path}: 2 of 3 rows of the manifest have labels; 1 rows of the table fit no picture, the first"
        ' is "z.jpg"'
    ]


def test_labels_of_a_video_go_to_its_frames_and_not_to_crowds(tmp_path, told):
    rows = manifest(
        source=["v.mp4", "v.mp4", "crowd.jpg", "crowd.jpg", "w.mp4", "w.mp4", "w.mp4", "boxed.jpg", "boxed.jpg"],
        frame=[0, 25, 0, 0, 0, 25, 25, 0, 0],
        detector=["short"] * 7 + ["given", ""],
        reason=[""] * 8 + ["bad-box"],
    )
    path = written(tmp_path, "path,age\nv.mp4,1\ncrowd.jpg,2\nw.mp4,3\nboxed.jpg,4\n")
    joined = join(rows, path, None)
    assert joined["label:age"].to_pylist() == [1, 1, None, None, None, None, None, 4, 4]
    assert "4 of 9 rows of the manifest have labels; 2 pictures with several faces get none" in told[0]


def test_join_replaces_labels_of_the_same_name_and_says_so(tmp_path, told):
    rows = manifest(source=["/p/a.jpg", "/p/b.jpg"]).append_column("label:age", pa.array([1.0, 2.0]))
    joined = join(rows, written(tmp_path, "path,age\na.jpg,old\n"), None)
    assert joined["label:age"].to_pylist() == ["old", ""]
    assert joined.column_names == rows.column_names
    assert "replace those that came with the sources: age" in told[1]


@pytest.mark.parametrize(
    ("values", "keys"),
    [(["x", "", "y", "x"], "x,,y,z"), ([7.0, None, 12.0, 7.0], "7,,12,13"), ([7.0, None, 12.0, 7.0], "7.0,,12.0,1.5")],
)
def test_join_by_a_label(tmp_path, told, values, keys):
    rows = manifest(source=["/p/a.jpg", "/p/b.jpg", "/p/c.jpg", "/p/d.jpg"]).append_column(
        "label:url", pa.array(values)
    )
    one, none, two, other = keys.split(",")
    path = written(tmp_path, f"url,age\n{two},2\n{none},9\n{one},1\n{other},3\n")
    joined = join(rows, path, "url")
    assert joined["label:age"].to_pylist() == [1, None, 2, 1]
    assert joined["label:url"].to_pylist() == values
    assert "3 of 4 rows of the manifest have labels; 2 rows of the table fit no picture" in told[0]


def test_nothing_fits_is_a_warning(tmp_path, told):
    join(manifest(source=["/p/a.jpg"]), written(tmp_path, "path,age\nz.jpg,1\n"), None)
    assert told[0].startswith("warning: ") and "0 of 1 rows" in told[0]


def test_joining_nothing(tmp_path, told):
    rows = pa.table({"source": pa.array([], pa.string()), "frame": pa.array([], pa.int64())})
    rows = rows.append_column("detector", rows["source"]).append_column("reason", rows["source"])
    joined = join(rows, written(tmp_path, "path,age,sex\n"), None)
    assert joined.column_names == [*rows.column_names, "label:age", "label:sex"] and len(joined) == 0
    joined = join(manifest(source=["/p/a.jpg"]), written(tmp_path, "path,age,sex\n"), None)
    assert joined["label:age"].to_pylist() == [None]


def test_labels_may_be_named_like_columns_of_the_manifest(tmp_path, told):
    path = written(tmp_path, "path,width,id,image\nq,10,x,a\nr,20,y,b\n")
    joined = join(manifest(source=["/p/b.jpg", "/p/c.jpg"]), path, "image")
    assert joined.column_names[-3:] == ["label:path", "label:width", "label:id"]
    assert joined["label:path"].to_pylist() == ["r", ""]
    assert joined["label:width"].to_pylist() == [20, None]


def test_many_rows_are_taken_in_pieces(tmp_path, told, monkeypatch):
    monkeypatch.setattr(joining, "TAKEN", 10)
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    order = np.random.default_rng(0).permutation(95).tolist()
    path = written(tmp_path, "path,age,name\n" + "".join(f"{one}.jpg,{one},n{one}\n" for one in order))
    joined = join(manifest(source=[f"/p/{one}.jpg" for one in range(100)]), path, None)
    assert joined["label:age"].to_pylist() == [float(one) for one in range(95)] + [None] * 5
    assert joined["label:name"].to_pylist() == [f"n{one}" for one in range(95)] + [""] * 5


def test_tables_of_the_shared_faces_join(shared_data, told):
    table = shared_data / "faces" / "labels.csv"
    keys = read_labels(table, None).keys.to_pylist()
    joined = join(manifest(source=[f"{shared_data}/faces/{key}" for key in keys]), table, None)
    expected = pa.csv.read_csv(table)
    np.testing.assert_array_equal(joined["label:age_est"].to_numpy(), expected["age_est"].to_numpy())
    assert joined["label:subject"].to_pylist() == [str(one) for one in expected["subject"].to_pylist()]
    assert told[0].endswith(f"{len(keys)} of {len(keys)} rows of the manifest have labels")


def test_no_room_for_a_copy_is_told(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(OutputError, match="no room for a copy of the table.*TMPDIR"):
        read_labels(written(tmp_path, "path,age\na,1\n"), None)
