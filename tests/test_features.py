"""The feature store: what is written is read back, and whatever is no complete store of ours is refused in one line."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefem_cli.errors import MefemError, NoInputError, OutputError, UsageError
from mefem_cli.stores.features import FeatureStore, FeatureWriter

WIDTH, PATCHES = 8, 3
PROVENANCE = {"model": {"name": "tiny", "sha256": "ab"}, "command": ["mefem", "embed", "x" * 100_000]}


def write(path: Path, ids=("a", "b", "ü"), labels=None, meta=None, dtype="float16", **kinds) -> dict[str, np.ndarray]:
    """Write a store in runs of two rows and return its features."""
    rng = np.random.default_rng(0)
    num_patches = PATCHES if kinds.get("patches", True) else 0
    features = {"cls": rng.normal(size=(len(ids), WIDTH)), "mean": rng.normal(size=(len(ids), WIDTH))}
    if num_patches:
        features["patches"] = rng.normal(size=(len(ids), PATCHES, WIDTH))
    with FeatureWriter(path, PROVENANCE, WIDTH, dtype, num_patches) as writer:
        for begin in range(0, len(ids), 2):
            rows = slice(begin, begin + 2)
            writer.append(list(ids[rows]), **{kind: values[rows] for kind, values in features.items()})
        writer.finish(labels or {}, meta or {})
    return features


@pytest.fixture
def path(tmp_path):
    return tmp_path / "features.h5"


def test_round_trip(path):
    labels = {
        "age": np.array([31, 58, 7]),
        "bmi": np.array([21.5, None, 30], dtype=object),
        "sex/gender 100%": np.array(["f", None, "männlich"], dtype=object),
        ".": np.array([True, False, True]),
    }
    meta = {"source": np.array(["x.jpg", "bad\udcff.jpg", ""], dtype=object), "width": np.array([1, 2, 3])}
    features = write(path, labels=labels, meta=meta)
    with FeatureStore.open(path) as store:
        assert len(store) == 3
        assert list(store.ids) == ["a", "b", "ü"]
        for kind, values in features.items():
            assert store.has(kind)
            assert store.read(kind).dtype == np.float32
            np.testing.assert_array_equal(store.read(kind), values.astype(np.float16).astype(np.float32))
            np.testing.assert_array_equal(np.concatenate([*store.iter_batches(kind, batch_size=2)]), store.read(kind))
        assert set(store.labels) == set(labels)
        np.testing.assert_array_equal(store.labels["age"], [31.0, 58.0, 7.0])
        np.testing.assert_array_equal(store.labels["bmi"], [21.5, np.nan, 30])
        assert list(store.labels["sex/gender 100%"]) == ["f", "", "männlich"]
        assert list(store.labels["."]) == [1.0, 0.0, 1.0]
        assert list(store.meta["source"]) == ["x.jpg", "bad\udcff.jpg", ""]
        assert store.meta["width"].dtype.kind == "i"
        assert (store.embed_dim, store.num_patches, store.dtype) == (WIDTH, PATCHES, "float16")
        assert (store.model_name, store.model_sha256) == ("tiny", "ab")
        assert store.provenance == PROVENANCE


@settings(max_examples=25, deadline=None)
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
def test_any_label_name_travels(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("names") / "features.h5"
    write(path, labels={name: np.array([1.0, 2.0, 3.0])})
    with FeatureStore.open(path) as store:
        assert list(store.labels) == [name]
        assert list(store.labels[name]) == [1.0, 2.0, 3.0]


def test_layout_is_the_documented_one(path):
    write(path, labels={"a/b": np.array(["x", "y", "z"], dtype=object)})
    with h5py.File(path) as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["complete"]) == ("mefem-features", 1, True)
        assert file["patches"].chunks == (1, PATCHES, WIDTH)
        assert file["cls"].dtype == file["patches"].dtype == np.float16
        assert file["cls"].compression is None
        assert list(file["labels"]) == ["a%2Fb"]
        for name in ("id", "labels/a%2Fb"):
            assert h5py.check_string_dtype(file[name].dtype).encoding == "utf-8"


def test_without_patches_or_mean(path):
    with FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, WIDTH)))
        writer.finish({}, {})
    with FeatureStore.open(path) as store:
        assert (store.has("cls"), store.has("mean"), store.has("patches"), store.num_patches) == (True, False, False, 0)
        assert store.model_name == "features"


def test_old_rows_and_new_ones_make_a_new_store(path, tmp_path):
    old = write(path)
    grown = tmp_path / "grown.h5"
    with FeatureStore.open(path) as store, FeatureWriter(grown, {}, WIDTH, num_patches=PATCHES) as writer:
        store.copy_rows_into(writer, keep=np.array([True, False, True]), batch_size=2)
        ones = np.ones((1, WIDTH))
        writer.append(["new"], ones, ones, np.ones((1, PATCHES, WIDTH)))
        writer.finish({}, {})
    with FeatureStore.open(grown) as store:
        assert list(store.ids) == ["a", "ü", "new"]
        np.testing.assert_array_equal(store.read("patches")[:2], old["patches"][[0, 2]].astype(np.float16))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(1e5, OutputError, "crop b: .*1e\\+05.*--dtype float32"), (np.nan, NoInputError, "crop b: .*not finite")],
)
def test_values_that_cannot_be_stored_name_the_crop(path, value, error, words):
    values = np.ones((2, WIDTH))
    values[1, 3] = value
    with pytest.raises(error, match=words), FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a", "b"], cls=values)
    assert list(path.parent.iterdir()) == []


def test_float32_holds_what_float16_cannot(path):
    with FeatureWriter(path, {}, WIDTH, dtype="float32", has_mean=False) as writer:
        writer.append(["a"], cls=np.full((1, WIDTH), 1e5))
        writer.finish({}, {})
    assert FeatureStore.open(path).read("cls").max() == np.float32(1e5)


def test_an_unfinished_store_leaves_the_old_one(path):
    write(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, WIDTH)))
        raise KeyboardInterrupt
    with pytest.raises(AssertionError), FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, WIDTH)))  # finish() forgotten
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_rows_that_do_not_match_are_our_mistake(path):
    with pytest.raises(AssertionError, match="age"), FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, WIDTH)))
        writer.finish({"age": np.array([1.0, 2.0])}, {})


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def _shorten(file):
    del file["labels/age"]
    file["labels/age"] = np.ones(2)


def _drop_features(file):
    for kind in ("cls", "mean", "patches"):
        del file[kind]


def _folder(path, name):
    path.unlink()
    path.mkdir()
    (path / name).touch()


BAD_STORES = {
    "absent": (lambda path: path.unlink(), NoInputError, "does not exist.*mefem embed"),
    "empty": (lambda path: path.write_bytes(b""), NoInputError, "is empty"),
    "text": (lambda path: path.write_text("<html>"), NoInputError, "not an HDF5 file"),
    "cut short": (_cut, NoInputError, "cut short"),
    "foreign": (lambda path: _edit(path, lambda f: f.attrs.pop("format")), NoInputError, "not a feature store"),
    "newer": (lambda path: _edit(path, lambda f: f.attrs.update(version=2)), UsageError, "newer mefem.*upgrade"),
    "incomplete": (lambda path: _edit(path, lambda f: f.attrs.pop("complete")), NoInputError, "incomplete"),
    "no ids": (lambda path: _edit(path, lambda f: f.pop("id")), NoInputError, "missing"),
    "no features": (lambda path: _edit(path, _drop_features), NoInputError, "missing"),
    "short label": (lambda path: _edit(path, _shorten), NoInputError, "differ in length"),
    "crops": (lambda path: _folder(path, "manifest.parquet"), NoInputError, "crops folder.*mefem embed"),
    "run": (lambda path: _folder(path, "config.yaml"), NoInputError, "run folder.*mefem embed"),
    "folder": (lambda path: _folder(path, "x"), NoInputError, "is a folder"),
}


@pytest.mark.parametrize("name", BAD_STORES)
def test_bad_stores_are_one_line(path, name):
    damage, error, words = BAD_STORES[name]
    write(path, labels={"age": np.array([1.0, 2.0, 3.0])})
    damage(path)
    with pytest.raises(error, match=words) as caught:
        FeatureStore.open(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_store_cut_anywhere_never_opens(path):
    write(path, labels={"age": np.array([1.0, 2.0, 3.0])})
    whole = path.read_bytes()
    for size in range(1, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:size])
        with pytest.raises(MefemError):
            FeatureStore.open(path)


def test_a_disk_that_fills_up_is_told_before_hdf5_crashes(tmp_path, monkeypatch):
    from collections import namedtuple

    from mefem_cli.stores import features

    free = [1 << 30, 1 << 30, 1000]  # opened, the first rows written, then full
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(free.pop(0)))
    writer = features.FeatureWriter(tmp_path / "features.h5", {}, embed_dim=4, has_cls=False)
    with pytest.raises(OSError, match="No space left"), writer:
        writer.append(["a"], mean=np.ones((1, 4)))
        writer.append(["b"], mean=np.ones((1, 4)))
    assert list(tmp_path.iterdir()) == []


# Views, runs of rows, joined labels ----------------------------------------------------------------------------------


def numbered(path: Path, count: int = 700, **options) -> np.ndarray:
    """Write a store whose row r holds r; return the features."""
    values = np.repeat(np.arange(count, dtype=np.float32)[:, None], WIDTH, axis=1)
    patches = np.repeat(values[:, None], PATCHES, axis=1)
    with FeatureWriter(path, {}, WIDTH, "float32", PATCHES, has_mean=False, **options) as writer:
        writer.append([str(row) for row in range(count)], cls=values, patches=patches)
        writer.finish(
            {"row": np.arange(count), "odd": np.array(["yes" if row % 2 else "" for row in range(count)])}, {}
        )
    return patches


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "features.h5"
    return path, numbered(path)


@given(
    rows=st.lists(st.integers(0, 699), max_size=60),
    batch_size=st.integers(1, 70),
    kind=st.sampled_from(["cls", "patches"]),
)
def test_any_rows_come_in_their_order(many, rows, batch_size, kind):
    path, patches = many
    with FeatureStore.open(path) as store:
        batches = list(store.iter_batches(kind, np.array(rows, dtype=int), batch_size))
        assert [len(one) for one in batches] == [
            min(batch_size, len(rows) - at) for at in range(0, len(rows), batch_size)
        ]
        expected = patches[rows] if kind == "patches" else patches[rows, 0]
        assert np.array_equal(np.concatenate([expected[:0], *batches]), expected)
        assert np.array_equal(store.select(rows).read(kind), expected)


def test_neighbouring_rows_are_read_in_one_go(many, monkeypatch):
    path, _ = many
    reads: list = []
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, key, **more: (reads.append(key), read(self, key, **more))[1]
    )
    with FeatureStore.open(path) as store:
        (batch,) = store.iter_batches("patches", np.array([3, 4, 5, 6, 400, 401, 402]), 64)
    assert reads == [slice(3, 7), slice(400, 403)]
    assert batch[:, 0, 0].tolist() == [3, 4, 5, 6, 400, 401, 402]


@pytest.mark.parametrize("rows", [slice(5, 20, 3), [7, 3, 3, -1], np.arange(700) % 100 == 1])
def test_a_view_is_the_store_at_those_rows(many, rows):
    path, patches = many
    numbers = np.arange(700)[rows]
    with FeatureStore.open(path) as store:
        view = store.select(rows)
        assert len(view) == len(numbers)
        assert list(view.ids) == [str(one) for one in numbers]
        assert view.labels["row"].tolist() == numbers.tolist()
        assert np.array_equal(np.concatenate([*view.iter_batches("patches", batch_size=4)]), patches[numbers])
        again = view.select([1, 0])
        assert list(again.ids) == [str(numbers[1]), str(numbers[0])]
        assert np.array_equal(again.read("cls"), patches[numbers[[1, 0]], 0])
        with pytest.raises(IndexError):
            view.select([len(numbers)])
        with pytest.raises(IndexError):
            view.select(np.ones(3, bool))


def test_joined_labels_follow_a_view(many, tmp_path):
    path, _ = many
    (tmp_path / "t.csv").write_text("id,age\n3,30\n5,50\n6,60\n")
    with FeatureStore.open(path) as store:
        joined = store.select([6, 5, 4, 3]).join_labels(tmp_path / "t.csv", "id")
        assert np.array_equal(joined.labels["age"], [60, 50, np.nan, 30], equal_nan=True)
        assert joined.select([3, 0]).labels["age"].tolist() == [30, 60]
        assert joined.select([3, 0]).labels["row"].tolist() == [3, 6]
        assert set(joined.labels) == {"row", "odd", "age"} and len(joined.labels) == 3
        assert "age" not in store.labels
        with pytest.raises(UsageError, match="no /meta/source"):
            store.join_labels(tmp_path / "t.csv", "age")


def test_a_compressed_store_holds_the_same(tmp_path, many, monkeypatch):
    pytest.importorskip("hdf5plugin")
    path = tmp_path / "small.h5"
    patches = numbered(path, compress="zstd")
    with FeatureStore.open(path) as store:
        assert store.compression == "zstd"
        assert np.array_equal(store.read("patches"), patches)
    assert path.stat().st_size < many[0].stat().st_size / 2
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(UsageError, match=r"small.h5 is compressed with zstd: wants .*pip install 'mefem-cli\[zstd\]'"):
        FeatureStore.open(path)
    with pytest.raises(UsageError, match="--compress zstd: wants"):
        numbered(tmp_path / "other.h5", compress="zstd")


def test_crops_that_could_not_be_read_are_kept_in_mind(path):
    with FeatureWriter(path, {}, WIDTH, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, WIDTH)))
        writer.finish({}, {}, unreadable={"b": "ab12", "c": ""})
    with FeatureStore.open(path) as store:
        assert store.unreadable == {"b": "ab12", "c": ""}
        assert list(store.ids) == ["a"]
