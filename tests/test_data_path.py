"""From crops to batches: what is kept decoded, the order of weighted sources, and crops in tar shards."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic import write_crops

from mefem_cli.engine import cache
from mefem_cli.engine.cache import DecodedCache, make_cache
from mefem_cli.engine.order import FaceOrder, split_weights
from mefem_cli.engine.stream import ImageStream, decode
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores.crops import SCHEMA, Crops, write_manifest

CPU = torch.device("cpu")


def batches(stream, rows):
    return [batch.images.permute(0, 2, 3, 1).numpy() for batch in stream.batches(rows, CPU)]


@pytest.mark.parametrize("workers", [1, 3])
def test_cached_batches_are_the_batches(tmp_path, workers):
    folder = write_crops(tmp_path / "crops", 30, size=48)
    (folder / "images" / "0003.jpg").write_bytes(b"broken")
    crops = Crops.open(folder)
    rows = [np.random.default_rng(seed).permutation(30)[:20] for seed in range(6)]
    plain = batches(ImageStream(crops, 32, workers), rows)
    kept = ImageStream(crops, 32, workers, DecodedCache(30, 32))
    for first, second in zip(plain, batches(kept, rows), strict=True):
        np.testing.assert_array_equal(first, second)
    (folder / "images" / "0005.jpg").unlink()
    for first, second in zip(plain, batches(kept, rows), strict=True):
        np.testing.assert_array_equal(first, second)  # nothing is read any more
    assert len(kept.corrupt) == 1


def test_processes_share_what_they_decode():
    name = f"mefem-test-{np.random.default_rng().integers(1 << 40)}"
    mine = DecodedCache(5, 8, name)
    try:
        script = (
            "import numpy as np\nfrom mefem_cli.engine.cache import DecodedCache\n"
            f"other = DecodedCache(5, 8, {name!r})\n"
            "other.put(3, np.full((8, 8, 3), 77, np.uint8))\nother.put(4, None)\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
        image = np.zeros((8, 8, 3), np.uint8)
        assert mine.get(3, image) is True
        assert (image == 77).all()
        assert (mine.get(4, image), mine.get(0, image)) == (False, None)
    finally:
        mine.forget_name()
    assert not (cache.SHARED_MEMORY / name).exists()


def test_the_cache_takes_what_memory_allows(monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 1_000_000)
    assert make_cache("auto", 10, 64) is not None  # 123 kB
    assert make_cache("auto", 30, 64) is None  # 369 kB: more than a quarter
    assert make_cache("ram", 30, 64) is not None
    assert make_cache("off", 10, 64) is None
    with pytest.raises(UsageError, match="--cache ram: 100 crops of 64 px take"):
        make_cache("ram", 100, 64)


weights = st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.7]), min_size=1, max_size=40)


@given(weights, st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_takes_each_face_as_often_as_its_weight_says(values, seed, epoch):
    values = np.array(values)
    rows = np.arange(len(values)) * 3
    order = FaceOrder(rows, values)
    taken = order.epoch(seed, epoch)
    assert len(taken) == len(order)
    counts = np.array([(taken == row).sum() for row in rows])
    assert ((counts == np.floor(values)) | (counts == np.floor(values) + 1)).all()
    for value in np.unique(values):
        extra = (counts - np.floor(values))[values == value].sum()
        assert extra == int((values == value).sum() * (value % 1))
    np.testing.assert_array_equal(taken, order.epoch(seed, epoch))


def test_epochs_and_seeds_differ_and_equal_weights_change_nothing():
    rows = np.arange(50)
    order = FaceOrder(rows)
    assert not np.array_equal(order.epoch(0, 0), order.epoch(0, 1))
    assert not np.array_equal(order.epoch(0, 0), order.epoch(1, 0))
    assert sorted(order.epoch(0, 0)) == rows.tolist()
    half = FaceOrder(rows, np.full(50, 0.5))
    assert set(half.epoch(0, 0)) != set(half.epoch(0, 1))


def test_weights_behind_folders(tmp_path):
    (tmp_path / "odd=3").mkdir()
    folders, found = split_weights([tmp_path / "a=2", tmp_path / "b", tmp_path / "c=.5", tmp_path / "odd=3"])
    assert [folder.name for folder in folders] == ["a", "b", "c", "odd=3"]
    assert found == [2, 1, 0.5, 1]
    for wrong in ("a=0", "a=-1", "a=x", "a=", "a=1e9", "a=nan"):
        with pytest.raises(UsageError, match="wanted a weight above 0"):
            split_weights([tmp_path / wrong])


def packed(path, seeds, size=64):
    """A tar shard of pictures as other programs write them: no manifest."""
    with tarfile.open(path, "w") as archive:
        for seed in seeds:
            buffer = io.BytesIO()
            pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            for name, data in ((f"{seed}.jpg", buffer.getvalue()), (f"{seed}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards_of_crops_are_crops(tmp_path):
    one, two = packed(tmp_path / "00.tar", range(4)), packed(tmp_path / "01.tar", range(4, 7))
    crops = Crops.open(one, two, write_crops(tmp_path / "crops", 3, size=64))
    assert (len(crops), crops.size, len(set(crops.ids))) == (10, 64, 10)
    with tarfile.open(two) as archive:
        assert crops.read_bytes(5) == archive.extractfile("5.jpg").read()
    (batch,) = batches(ImageStream(crops, 64), [np.array([5, 9, 0])])
    np.testing.assert_array_equal(batch[0], decode(crops.read_bytes(5), 64))
    assert crops.columns["source"][:4].tolist() == [""] * 4
    digests = crops.inputs()
    packed(tmp_path / "00.tar", range(3))
    assert Crops.open(one, two).inputs()[str(one)] != digests[str(one)]
    assert Crops.open(one, two).inputs()[str(two)] == digests[str(two)]


def test_tar_shards_that_are_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing")
    with pytest.raises(NoInputError, match="not a tar|cut short"):
        Crops.open(tmp_path / "a.tar")
    whole = packed(tmp_path / "b.tar", range(3))
    with open(whole, "r+b") as file:
        file.truncate(whole.stat().st_size // 2)
    with pytest.raises(NoInputError, match="cut short"):
        Crops.open(whole)


OPENING = """
import re, sys
from pathlib import Path
from mefem_cli.stores.crops import Crops
crops = Crops.open(Path(sys.argv[1]))
print(int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024, crops.describe(5))
"""


def test_a_million_crops_take_little_memory(tmp_path):
    """Under 200 bytes a face, by what 300,000 more add to the most that a process held."""
    folder = write_crops(tmp_path / "crops", 3, size=64)
    peaks = []
    for count in (100_000, 400_000):
        columns = {
            "id": pa.array([f"{row:016x}" for row in range(count)]),
            "path": pa.array([f"images/photos/2024/face_{row:07d}.jpg.jpg" for row in range(count)]),
            "status": pa.array(["ok"] * count),
        }
        write_manifest(folder, pa.table({one.name: columns.get(one.name, pa.nulls(count, one.type)) for one in SCHEMA}))
        command = [sys.executable, "-c", OPENING, str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "face_0000005.jpg.jpg" in answer
        peaks.append(int(answer.split()[0]))
    assert (peaks[1] - peaks[0]) / 300_000 < 200
