"""Tables as clinics write them, and their rows on the right pictures."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mefem_cli.errors import UsageError
from mefem_cli.faces.labels import label_columns, match, read_labels
from mefem_cli.stores.tables import read_table, to_numbers


def written(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_plain_csv(tmp_path):
    table = read_table(written(tmp_path, "path,age,name\na.jpg,31,Anna\nb.jpg,,\n"))
    np.testing.assert_array_equal(table.values("age"), [31, np.nan])
    assert table.values("age").dtype == np.float64
    assert table.values("name").tolist() == ["Anna", ""]
    assert len(table) == 2


def test_german_excel_csv(tmp_path):
    table = read_table(written(tmp_path, "path;größe;gewicht\r\na.jpg;1,82;80\r\nb.jpg;1,7;NA\r\n", "utf-8-sig"))
    assert list(table.texts) == ["path", "größe", "gewicht"]
    np.testing.assert_array_equal(table.values("größe"), [1.82, 1.7])
    np.testing.assert_array_equal(table.values("gewicht"), [80, np.nan])
    western = read_table(written(tmp_path, "path;größe\na.jpg;1,82\n", "cp1252"))
    assert list(western.texts) == ["path", "größe"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "2.5", "-3e2"], [1, 2.5, -300]),
        (["1,5", "n/a", ""], [1.5, np.nan, np.nan]),
        (["", ""], [np.nan, np.nan]),
        (["007", "12"], None),
        (["1", "male"], None),
        (["1_0"], None),
        (["2024-01-02"], None),
        (["0.5", "0"], [0.5, 0]),
    ],
)
def test_numbers(texts, expected):
    numbers = to_numbers(texts)
    if expected is None:
        assert numbers is None
    else:
        np.testing.assert_array_equal(numbers, expected)


def test_parquet(tmp_path):
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg"], "age": pa.array([3, None]), "sex": ["m", None]}), path)
    table = read_table(path)
    np.testing.assert_array_equal(table.values("age"), [3, np.nan])
    assert table.values("sex").tolist() == ["m", ""]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 zipped", "Excel"),
        (b"PAR1 broken", "damaged Parquet"),
        (b"path,a,a\nx,1,2\n", "several columns"),
        (b"path,a\nx,1,2\n", "row 1 has 3 fields"),
        (b"a\0b\0", "no text"),
    ],
)
def test_broken_tables_say_why(tmp_path, content, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_table(path)


def test_key_column(tmp_path):
    table = written(tmp_path, "image,age\na,1\nb,2\n")
    with pytest.raises(UsageError, match='no column "path".*image, age'):
        read_labels(table, None)
    with pytest.raises(UsageError, match='did you mean "image"'):
        read_labels(table, "imag")
    assert read_labels(table, "image")[1] == "image"
    with pytest.raises(UsageError, match='distinct.*"a"'):
        read_labels(written(tmp_path, "path,age\na,1\na,2\n"), None)
    with pytest.raises(UsageError, match="No such file"):
        read_labels(tmp_path / "absent.csv", None)


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
    ],
)
def test_matching(keys, rows, unmatched, ambiguous):
    matched = match(keys, SOURCES)
    assert matched.row_of_source.tolist() == rows
    assert matched.unmatched == unmatched
    assert matched.ambiguous == ambiguous


def test_two_rows_for_one_picture_are_refused():
    with pytest.raises(UsageError, match=r'"b.jpg" and "t2i/b.jpg"'):
        match(["b.jpg", "t2i/b.jpg"], SOURCES)


def test_labels_may_be_named_like_columns_of_the_manifest(tmp_path):
    table, key = read_labels(written(tmp_path, "path,width,id,image\nq,10,x,a\nr,20,y,b\n"), "image")
    columns = label_columns(table, key, np.array([1, -1]))
    assert list(columns) == ["label:path", "label:width", "label:id"]
    assert columns["label:path"].to_pylist() == ["r", ""]
    assert columns["label:width"].to_pylist() == [20, None]
