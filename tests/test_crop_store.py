"""The reader of crops folders."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores.crops import HEADER_KEY, LABEL, SCHEMA, Crops, write_manifest


def made(folder, ids, size=224, statuses=None, **labels):
    """Write a crops folder by hand: one row per id, the crop's bytes are its id."""
    (folder / "images").mkdir(parents=True)
    table = {
        name: pa.array(["" if field == pa.string() else 1] * len(ids), field)
        for name, field in zip(SCHEMA.names, SCHEMA.types, strict=True)
    }
    table["id"] = pa.array(ids)
    table["status"] = pa.array(statuses or ["ok"] * len(ids))
    table["path"] = pa.array([f"images/{one}.jpg" for one in ids])
    table["crop_offset"] = pa.nulls(len(ids), pa.int64())
    table["score"] = pa.array([None] * len(ids), pa.float64())
    table |= {LABEL + name: pa.array(values) for name, values in labels.items()}
    for one in ids:
        (folder / "images" / f"{one}.jpg").write_bytes(one.encode())
    (folder / "provenance.json").write_text(json.dumps({"options": {"size": size}}))
    write_manifest(folder, pa.table(table))
    return folder


def test_several_folders_are_one(tmp_path):
    one = made(tmp_path / "one", ["a", "b", "c"], statuses=["ok", "rejected", "ok"], age=[1.0, 2.0, 3.0])
    two = made(tmp_path / "two", ["d"], sex=["f"])
    crops = Crops.open(one, two)
    assert (len(crops), crops.ids, crops.size) == (3, ["a", "c", "d"], 224)
    np.testing.assert_array_equal(crops.labels["age"], [1, 3, np.nan])
    assert crops.labels["sex"].tolist() == ["", "", "f"]
    assert [crops.read_bytes(index) for index in range(3)] == [b"a", b"c", b"d"]
    assert list(crops.inputs()) == [str(one), str(two)]
    assert np.isnan(crops.columns["score"]).all()
    assert "status" in crops.columns
    assert not any(name.startswith(LABEL) for name in crops.columns)


def test_selection_is_a_view_in_its_own_order(tmp_path):
    crops = Crops.open(made(tmp_path / "one", list("abcd")), made(tmp_path / "two", list("xy"))).select([4, 1])
    assert (crops.ids, crops.size) == (["x", "b"], 224)
    assert [crops.read_bytes(index) for index in range(2)] == [b"x", b"b"]
    assert pickle.loads(pickle.dumps(crops)).read_bytes(0) == b"x"


def test_what_cannot_be_opened(tmp_path):
    one, two = made(tmp_path / "one", ["a", "b"]), made(tmp_path / "two", ["b"])
    with pytest.raises(UsageError, match="the face b .*one and .*two"):
        Crops.open(one, two)
    with pytest.raises(UsageError, match="different sizes"):
        Crops.open(one, made(tmp_path / "small", ["c"], size=112))
    with pytest.raises(NoInputError, match="no usable face"):
        Crops.open(made(tmp_path / "rejects", ["d"], statuses=["rejected"]))
    with pytest.raises(NoInputError, match="no such crops folder"):
        Crops.open(tmp_path / "absent")
    with pytest.raises(NoInputError, match="no crops folder"):
        Crops.open(tmp_path)
    (one / "manifest.parquet").unlink()
    with pytest.raises(NoInputError, match="not finished"):
        Crops.open(one)
    (one / "cells").mkdir()
    with pytest.raises(NoInputError, match="is an ablation"):
        Crops.open(one)
    (one / "manifest.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(NoInputError, match="damaged"):
        Crops.open(one)


def test_newer_version_is_refused(tmp_path):
    folder = made(tmp_path / "one", ["a"])
    rows = pq.read_table(folder / "manifest.parquet")
    header = json.dumps({"format": "mefem-crops", "version": 2}).encode()
    pq.write_table(rows.replace_schema_metadata({HEADER_KEY: header}), folder / "manifest.parquet")
    with pytest.raises(UsageError, match="version 2"):
        Crops.open(folder)
    pq.write_table(rows.replace_schema_metadata({}), folder / "manifest.parquet")
    with pytest.raises(NoInputError, match="not written by mefem crop"):
        Crops.open(folder)
