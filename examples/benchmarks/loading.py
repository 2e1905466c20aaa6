"""The section `loader` of pretrain.py: decoders, the stream against the bare decoder, and the pipeline people use."""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from measuring import interleaved, median, ratio, table
from PIL import Image

from mefem_cli.engine.cache import DecodedCache
from mefem_cli.engine.stream import ImageStream
from mefem_cli.faces.images import encode_jpeg
from mefem_cli.stores import crops

SIZE, QUALITY = 224, 95  # of a crop, as `mefem crop` writes it
NUM_CROPS, BATCH = 512, 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Data:
    """The same crops three times: in memory, in a folder, in a tar shard."""

    contents: list[bytes]
    paths: list[Path]
    folder: crops.Crops
    shard: crops.Crops


def loader(arguments: argparse.Namespace) -> None:
    """Print what decoders and loaders need per crop, and how long a device waits that is slower than the loader."""
    with tempfile.TemporaryDirectory(prefix="mefem-benchmark-") as folder:
        data = make_data(arguments.photos, Path(folder))
        torch.set_num_threads(1)
        decoders(data, arguments.repeats)
        one_core(data, arguments.repeats)
        all_cores(data, arguments.repeats, arguments.threads)
        waiting(data, arguments.threads)
        torch.set_num_threads(arguments.threads)


def make_data(photos: Path, folder: Path) -> Data:
    """Cut the middle of photos to crops of 224 px, NUM_CROPS in all, each picture as often as it takes."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise SystemExit(f"no photos below {photos}; name some with --photos")
    contents = [_crop(path) for path in files[:: max(1, len(files) // NUM_CROPS)][:NUM_CROPS]]
    contents = [contents[number % len(contents)] for number in range(NUM_CROPS)]
    (folder / crops.IMAGES).mkdir(parents=True)
    rows, paths = [], []
    with tarfile.open(folder / "crops.tar", "w") as shard:
        for number, content in enumerate(contents):
            paths.append(folder / crops.IMAGES / f"{number:06d}.jpg")
            paths[-1].write_bytes(content)
            member = tarfile.TarInfo(paths[-1].name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
            name = f"{crops.IMAGES}/{paths[-1].name}"
            rows.append({"id": f"{number:016x}", "source": name, "status": crops.OK, "path": name})
    (folder / crops.PROVENANCE).write_text(f'{{"options": {{"size": {SIZE}}}}}')
    crops.write_manifest(folder, pa.Table.from_pylist(rows, schema=crops.SCHEMA))
    return Data(contents, paths, crops.Crops.open(folder), crops.Crops.open(folder / "crops.tar"))


def _crop(path: Path) -> bytes:
    with Image.open(path) as photo:
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        square = photo.convert("RGB").resize((SIZE, SIZE), box=(left, top, left + side, top + side), reducing_gap=3)
    return encode_jpeg(np.asarray(square), QUALITY)


# Decoders -------------------------------------------------------------------------------------------------------------


def decoders(data: Data, repeats: int) -> None:
    """Print what each decoder needs for a crop whose bytes are in memory, one thread."""
    from torchvision.io import ImageReadMode, decode_jpeg

    buffer = np.empty((SIZE, SIZE, 3), np.uint8)
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in data.contents]

    def pillow(content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    ways: dict[str, Callable[[], None]] = {
        "simplejpeg, into a buffer": lambda: _each(data.contents, lambda one: decode_into(one, buffer)),
        "simplejpeg": lambda: _each(data.contents, lambda one: simplejpeg.decode_jpeg(one, "RGB")),
        "torchvision.io": lambda: _each(tensors, lambda one: decode_jpeg(one, ImageReadMode.RGB)),
        "Pillow": lambda: _each(data.contents, pillow),
    }
    seconds = interleaved(ways, repeats)
    first = next(iter(ways))
    rows = [
        (name, f"{median(times, 'cpu') / NUM_CROPS * 1e3:.3f}", f"{ratio(seconds, name, first, 'cpu'):.2f}")
        for name, times in seconds.items()
    ]
    kibibytes = sum(map(len, data.contents)) / NUM_CROPS / 1024
    table(f"decoding JPEG crops of {SIZE} px, {kibibytes:.0f} KiB", ("decoder", "CPU ms a crop", "to the first"), rows)


def decode_into(content: bytes, buffer: np.ndarray) -> None:
    """Decode a crop with the decoder that the stream uses."""
    simplejpeg.decode_jpeg(content, "RGB", buffer=buffer)


def _each(items: list, work: Callable) -> None:
    for item in items:
        work(item)


# Loaders --------------------------------------------------------------------------------------------------------------


class UsualFaces(torch.utils.data.Dataset):
    """What people write: Pillow, a random resized crop, a float tensor, normalised."""

    def __init__(self, paths: list[Path]):
        from torchvision import transforms

        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(0.3, 1.0)),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def usual(data: Data, workers: int) -> Callable[[], None]:
    """Return one pass of PyTorch's own loader over the crops; its workers live on from pass to pass."""
    dataset = UsualFaces(data.paths)
    batches = torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0)
    return lambda: _exhaust(iter(batches))


def ours(source: crops.Crops, workers: int, cache: DecodedCache | None = None) -> Callable[[], None]:
    """Return one pass of the stream over the crops, in batches on the CPU."""
    stream = ImageStream(source, SIZE, workers, cache)
    order = np.random.default_rng(0).permutation(len(source))
    return lambda: _exhaust(stream.batches((order[at : at + BATCH] for at in range(0, len(order), BATCH)), CPU))


def _exhaust(batches: Iterator) -> None:
    for _ in batches:
        pass


def one_core(data: Data, repeats: int) -> None:
    """Print CPU time per crop with one decoding thread: what each loader adds to the bare decoder."""
    buffer = np.empty((SIZE, SIZE, 3), np.uint8)
    ways = {
        "bare decoder, bytes in memory": lambda: _each(data.contents, lambda one: decode_into(one, buffer)),
        "mefem, crops folder": ours(data.folder, 1),
        "mefem, tar shard": ours(data.shard, 1),
        "mefem, kept decoded": ours(data.folder, 1, DecodedCache(NUM_CROPS, SIZE)),
        "Pillow + random crop + normalise": usual(data, 0),
    }
    seconds = interleaved(ways, repeats)
    bare, folder = list(ways)[:2]
    rows = [
        (
            name,
            f"{median(times, 'cpu') / NUM_CROPS * 1e3:.3f}",
            f"{1 / ratio(seconds, name, bare, 'cpu'):.1%}",
            f"{ratio(seconds, name, folder, 'cpu'):.2f}",
        )
        for name, times in seconds.items()
    ]
    header = ("loader", "CPU ms a crop", "of the bare rate", "time to mefem's")
    table(f"loading {NUM_CROPS} crops in batches of {BATCH}, one thread", header, rows)


def all_cores(data: Data, repeats: int, workers: int) -> None:
    """Print crops a second on all cores."""
    name = f"PyTorch DataLoader, {workers} workers"
    ways = {"mefem, crops folder": ours(data.folder, workers), name: usual(data, workers)}
    seconds = interleaved(ways, repeats)
    rows = [
        (one, f"{NUM_CROPS / median(times, 'wall'):.0f}", f"{1 / ratio(seconds, one, name, 'wall'):.2f}x")
        for one, times in seconds.items()
    ]
    table(f"loading on {workers} cores", ("loader", "crops/s", "to DataLoader"), rows)


def waiting(data: Data, workers: int) -> None:
    """Print the share of time that a device waits which takes 1.2 to 2 times as long for a batch as decoding does."""
    ours(data.folder, workers)()
    begun = time.perf_counter()
    ours(data.folder, workers)()
    decoding = (time.perf_counter() - begun) / (NUM_CROPS / BATCH)
    rows = []
    for slower in (1.2, 1.5, 2.0):
        stream = ImageStream(data.folder, SIZE, workers)
        rounds = np.tile(np.arange(NUM_CROPS), 4)
        batches = stream.batches((rounds[at : at + BATCH] for at in range(0, len(rounds), BATCH)), CPU)
        next(batches)  # the first one is always waited for
        stream.waited, begun = 0.0, time.perf_counter()
        for _ in batches:
            time.sleep(decoding * slower)
        rows.append((f"{slower}x", f"{stream.waited / (time.perf_counter() - begun):.2%}"))
    table("a device that is the bound (a sleep stands for it)", ("its time to that of decoding", "data wait"), rows)
