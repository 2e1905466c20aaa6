"""`mefem store`: a summary, stores of one encoder merged, labels joined, vectors for other programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from mefem_cli import console, main, store_tools
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores.features import FeatureStore, FeatureWriter

DIM = 6
RECORD = {
    "mefem": "0.1.0",
    "model": {"name": "tiny", "sha256": "ab", "encoder": "target"},
    "options": {"precision": "fp32", "patches": False, "dtype": "float16"},
    "preprocessing": {"image_size": 64, "interpolation": "bicubic"},
    "inputs": {"/crops": "cd"},
}


def write(
    path: Path, count: int = 5, first: int = 0, record: dict | None = None, dtype: str = "float16", **labels
) -> np.ndarray:
    """Write a store of crops `c0`, `c1`, ...; return its CLS features."""
    cls = np.random.default_rng(first).normal(size=(count, DIM)).astype(dtype)
    meta = {
        "source": np.array([f"photos/{number:03d}.jpg" for number in range(first, first + count)], dtype=object),
        "crop_sha256": np.array([f"{number:064x}" for number in range(first, first + count)], dtype=object),
        "frame": np.zeros(count, int),
        "detector": np.array(["full"] * count, dtype=object),
    }
    with FeatureWriter(path, {**RECORD, **(record or {})}, DIM, dtype) as writer:
        writer.append([f"c{number}" for number in range(first, first + count)], cls=cls, mean=cls * 2)
        writer.finish({name: np.array(values) for name, values in labels.items()}, meta, {"lost": "ef"})
    return cls.astype(np.float32)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "features.h5", age=[31.0, np.nan, 7.0, 60.0, 44.0], sex=["f", "", "", "m", "f"])
    return tmp_path / "features.h5"


def run(capfd, monkeypatch, *words: str, piped: bool = False) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mefem", "store", *words])
    monkeypatch.setattr(console, "stdin_is_pipe", lambda: piped)
    with pytest.raises(SystemExit) as end:
        main.main()
    console.configure(console.ConsoleOptions())
    return int(end.value.code or 0), *capfd.readouterr()


# Info ----------------------------------------------------------------------------------------------------------------


def test_info_tells_what_a_store_holds(store, capfd, monkeypatch):
    code, out, err = run(capfd, monkeypatch, "info", "--json")
    known = json.loads(out)
    assert (code, err) == (0, "")
    assert (known["crops"], known["unreadable"], known["features"]) == (5, 1, {"cls": [DIM], "mean": [DIM]})
    assert known["model"] == {"name": "tiny", "sha256": "ab", "encoder": "target"}
    assert known["labels_missing"] == {"age": 1, "sex": 2}
    assert known["preprocessing"]["image_size"] == 64
    assert known["bytes"] == store.stat().st_size
    code, out, _ = run(capfd, monkeypatch, "info", str(store))
    assert code == 0
    for words in ("5, 1 unreadable", "cls 6, mean 6", "float16", "tiny", "age (1 missing), sex (2 missing)", "/crops"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "info, merge, labels or export"),
        (("imfo", "features.h5"), 2, 'did you mean "info"'),
        (("features.h5",), 2, "type mefem store info features.h5"),
        (("info", "nowhere.h5"), 3, "does not exist"),
        (("labels", "features.h5"), 2, "a store and a table"),
        (("merge", "features.h5", "-o", "x.h5"), 2, "two stores or more"),
        (("merge", "features.h5", "features.h5"), 2, "-o merged.h5"),
        (("export", "features.h5"), 2, "-o features.parquet"),
        (("export", "features.h5", "-o", "x.csv"), 2, "ends in .parquet or .npz"),
    ],
)
def test_mistakes_are_told_in_a_line(store, capfd, monkeypatch, words, code, told):
    answer, out, err = run(capfd, monkeypatch, *words)
    assert (answer, out) == (code, "")
    assert told in err and err.count("\n") == 1


def test_options_of_another_verb_have_no_effect_and_say_so(store, capfd, monkeypatch):
    assert "--key has no effect with info" in run(capfd, monkeypatch, "info", "--key", "id")[2]


def test_all_stores_of_a_pipe_are_told(store, tmp_path, capfd, monkeypatch):
    write(tmp_path / "b.h5", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{store}\n" + json.dumps({"out": str(tmp_path / "b.h5")}) + "\n\n"))
    monkeypatch.setattr(console.select, "select", lambda *waiting: ([0], [], []))
    code, out, err = run(capfd, monkeypatch, "info", "--json", piped=True)
    assert (code, err) == (0, "")
    assert [json.loads(line)["crops"] for line in out.splitlines()] == [5, 2]


# Merge ---------------------------------------------------------------------------------------------------------------


def test_merged_stores_have_the_rows_of_both_in_order(store, tmp_path, capfd, monkeypatch):
    first = FeatureStore.open(store).read("cls")
    second = write(tmp_path / "b.h5", 3, first=5, age=["31", "x", ""], bmi=[20.0, 21.0, np.nan])
    code, out, _ = run(capfd, monkeypatch, "merge", "features.h5", "b.h5", "-o", "both.h5")
    assert (code, out) == (0, f"{tmp_path / 'both.h5'}\n")
    with FeatureStore.open(tmp_path / "both.h5") as both:
        assert list(both.ids) == [f"c{number}" for number in range(8)]
        assert np.array_equal(both.read("cls"), np.concatenate([first, second]))
        assert np.array_equal(both.read("mean"), np.concatenate([first, second]).astype(np.float16) * np.float16(2))
        assert list(both.labels["age"]) == ["31", "", "7", "60", "44", "31", "x", ""]
        assert list(both.labels["sex"]) == ["f", "", "", "m", "f", "", "", ""]
        assert np.array_equal(both.labels["bmi"], [np.nan] * 5 + [20, 21, np.nan], equal_nan=True)
        assert both.meta["source"][7] == "photos/007.jpg"
        assert set(both.provenance["inputs"]) == {str(store), str(tmp_path / "b.h5")}
        assert (both.model["sha256"], both.unreadable) == ("ab", {"lost": "ef"})


@pytest.mark.parametrize(
    ("record", "dtype", "told"),
    [
        ({"model": {"name": "x", "sha256": "zz", "encoder": "target"}}, "float16", "sha256 was ab, is zz"),
        ({"preprocessing": {"image_size": 96, "interpolation": "bicubic"}}, "float16", "image-size was 64, is 96"),
        ({}, "float32", "dtype was float16, is float32"),
        ({"options": {"precision": "bf16"}}, "float16", "precision was fp32, is bf16"),
    ],
)
def test_stores_of_different_encoders_are_not_merged(store, tmp_path, record, dtype, told):
    write(tmp_path / "b.h5", first=5, record=record, dtype=dtype)
    with pytest.raises(UsageError, match=told):
        store_tools.merge([store, tmp_path / "b.h5"], tmp_path / "both.h5")


def test_a_crop_in_two_stores_is_named(store, tmp_path):
    write(tmp_path / "b.h5", first=4)
    with pytest.raises(UsageError, match=r"features.h5 and .*b.h5 have 1 crop in common, the first is c4"):
        store_tools.merge([store, tmp_path / "b.h5"], tmp_path / "both.h5")
    assert not (tmp_path / "both.h5").exists()


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("path,bmi,note\nphotos/001.jpg,20.5,x\n003,30,\n", None),
        ("id,bmi,note\nc1,20.5,x\nc3,30,\nc9,1,\n", "id"),
        ("who;bmi;note\n001;20,5;x\n003;30;\n", "who"),
    ],
)
def test_a_table_becomes_labels(store, tmp_path, table, key):
    (tmp_path / "t.csv").write_text(table)
    with h5py.File(store) as file:
        before = file["cls"][()].tobytes()
    assert store_tools.attach(store, tmp_path / "t.csv", key, None) == (store, 2)
    with FeatureStore.open(store) as after:
        assert np.array_equal(after.labels["bmi"], [np.nan, 20.5, np.nan, 30, np.nan], equal_nan=True)
        assert list(after.labels["note"]) == ["", "x", "", "", ""]
        assert after.labels["sex"][3] == "m"
        assert after.joined_labels == ["bmi", "note"]
        assert after.read_rows("cls", slice(None)).tobytes() == before


def test_labels_join_by_the_value_of_a_label(store, tmp_path):
    (tmp_path / "t.csv").write_text("sex,word\nf,woman\nm,man\n")
    store_tools.attach(store, tmp_path / "t.csv", "sex", tmp_path / "new.h5")
    with FeatureStore.open(tmp_path / "new.h5") as after, FeatureStore.open(store) as before:
        assert list(after.labels["word"]) == ["woman", "", "", "man", "woman"]
        assert "word" not in before.labels


def test_replaced_labels_are_told(store, tmp_path, capfd):
    (tmp_path / "t.csv").write_text("path,age\n000,99\n")
    store_tools.attach(store, tmp_path / "t.csv", None, None)
    assert "labels of the store are replaced: age" in capfd.readouterr().err
    with FeatureStore.open(store) as after:
        assert np.array_equal(after.labels["age"], [99] + [np.nan] * 4, equal_nan=True)


def test_a_picture_with_several_faces_gets_no_labels_by_its_path(tmp_path):
    path = tmp_path / "features.h5"
    with FeatureWriter(path, RECORD, DIM, has_mean=False) as writer:
        writer.append(["a", "b", "c"], cls=np.ones((3, DIM)))
        sources, frames = np.array(["x.jpg", "x.jpg", "y.jpg"], dtype=object), np.zeros(3, int)
        writer.finish({}, {"source": sources, "frame": frames, "detector": np.array(["full"] * 3, dtype=object)})
    (tmp_path / "t.csv").write_text("path,age\nx.jpg,1\ny.jpg,2\n")
    with FeatureStore.open(path) as store:
        assert np.array_equal(store.join_labels(tmp_path / "t.csv").labels["age"], [np.nan, np.nan, 2], equal_nan=True)


def test_a_table_that_fits_nothing_is_refused_and_the_store_stays(store, tmp_path):
    before = store.read_bytes()
    (tmp_path / "t.csv").write_text("path,age\nother.jpg,99\n")
    with pytest.raises(NoInputError, match="no row fits.*--key"):
        store_tools.attach(store, tmp_path / "t.csv", None, None)
    assert store.read_bytes() == before


# Export --------------------------------------------------------------------------------------------------------------


def test_vectors_go_to_parquet(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_tools, "EXPORT_ROWS", 2)
    assert store_tools.export(store, tmp_path / "f.parquet") == 5
    table = pq.read_table(tmp_path / "f.parquet")
    with FeatureStore.open(store) as known:
        assert table.column_names == ["id", "source", "label:age", "label:sex", "cls", "mean"]
        assert table["id"].to_pylist() == list(known.ids)
        for kind in ("cls", "mean"):
            assert np.array_equal(np.array(table[kind].to_pylist(), np.float32), known.read(kind))
        assert np.array_equal(table["label:age"].to_numpy(), known.labels["age"], equal_nan=True)
        assert table["label:sex"].to_pylist() == list(known.labels["sex"])


def test_vectors_go_to_numpy_without_pickles(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_tools, "EXPORT_ROWS", 2)
    store_tools.export(store, tmp_path / "f.npz", "mean")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays, FeatureStore.open(store) as known:
        assert sorted(arrays.files) == ["id", "label:age", "label:sex", "mean", "source"]
        assert np.array_equal(arrays["mean"], known.read("mean"))
        assert arrays["id"].tolist() == list(known.ids)
        assert np.array_equal(arrays["label:age"], known.labels["age"], equal_nan=True)


def test_what_exists_stays_without_overwrite(store, tmp_path, capfd, monkeypatch):
    (tmp_path / "f.npz").write_bytes(b"mine")
    assert run(capfd, monkeypatch, "export", "-o", "f.npz")[0] == OutputError.exit_code
    assert (tmp_path / "f.npz").read_bytes() == b"mine"
    assert run(capfd, monkeypatch, "export", "-o", "f.npz", "--overwrite", "--features", "cls")[0] == 0
    with np.load(tmp_path / "f.npz") as arrays:
        assert "cls" in arrays.files


def test_features_that_are_not_stored_are_told(tmp_path):
    with FeatureWriter(tmp_path / "f.h5", RECORD, DIM, has_cls=False) as writer:
        writer.append(["a"], mean=np.ones((1, DIM)))
        writer.finish({}, {})
    with pytest.raises(UsageError, match="--features cls.* has mean only"):
        store_tools.export(tmp_path / "f.h5", tmp_path / "f.npz", "cls")
