"""What `mefem embed` costs beside the encoder. Run: python examples/benchmarks/embed.py [speed|store|memory ...]

Ratios of things that take turns in one process: on a busy machine times differ by a third, ratios by a few per cent.

    speed   images/s of the engine over those of bare forward passes on tensors that are ready (wanted: .95 or more),
            and what storing patches costs (wanted: under 5 %); ViT-S/16 at 224 px
    store   patches of some rows: runs of rows over h5py's fancy indexing (wanted: 5x or more); a store of 100,000 x 384
            CLS features: seconds until its first batch is there (wanted: under .5)
    memory  peak resident memory over the number of crops, a process each (wanted: flat)

Time: about 10 minutes on 2 cores, without --count and --device. `--device cuda` on a GPU; there it also says which
share of the time the device waited for data (wanted: under 5 %).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from measuring import interleaved, median, ratio, table

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from synthetic import write_crops

from mefem_cli import console
from mefem_cli.backbones import vit
from mefem_cli.embedding import EmbedOptions, Job
from mefem_cli.engine import allocator
from mefem_cli.engine.device import DeviceOptions
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.stores.product import ProductOptions
from mefem_cli.stores.runs import Run

MIB = 1 << 20


def write_run(folder: Path, backbone: str = "vit_small_patch16_224", **sizes: Any) -> Path:
    """Write a run with an untrained encoder."""
    torch.manual_seed(0)
    encoder = vit.build(vit.Options(backbone, **sizes))
    vit.save_encoder(Run.create(folder, {}), {"target": encoder}, {}, {"inputs": {}})
    return folder


def prepare(run: Path, crops: Path, out: Path, args: argparse.Namespace, patches: bool = False) -> Job:
    """Return a job that starts from nothing."""
    machine = DeviceOptions(device=args.device, precision=args.precision, batch_size=str(args.batch))
    product = ProductOptions(out=str(out), overwrite=True)
    return Job.prepare([crops], EmbedOptions([str(run)], patches=patches), machine, product)


# Speed ---------------------------------------------------------------------------------------------------------------


def speed(folder: Path, args: argparse.Namespace) -> None:
    """Compare the whole of embedding with bare forward passes."""
    crops, run = write_crops(folder / "crops", args.count), write_run(folder / "run")
    jobs = {
        name: prepare(run, crops, folder / f"{name}.h5", args, name == "patches") for name in ("vectors", "patches")
    }
    job = jobs["vectors"]
    ready = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=job.device.torch)
    encoder = job.embeddings[0].encoder

    @torch.inference_mode()
    def bare() -> None:
        left = args.count
        while left > 0:
            with job.device.autocast():
                encoder.features(ready[: min(left, args.batch)])
            left -= args.batch
        if job.device.is_cuda:
            torch.cuda.synchronize()

    if job.device.torch.type == "cpu":
        allocator.keep_freed_memory()
    waits: list[float] = []

    def embed() -> None:
        before = job.stream.waited
        begun = time.perf_counter()
        job.run()
        waits.append((job.stream.waited - before) / (time.perf_counter() - begun))

    seconds = interleaved({"bare forward": bare, "vectors": embed, "patches": jobs["patches"].run}, args.repeats)
    rows = []
    for name in seconds:
        rate = args.count / median(seconds[name], "wall")
        relative = [f"{1 / ratio(seconds, name, 'bare forward', clock):.3f}" for clock in ("wall", "cpu")]
        rows.append((name, f"{rate:.1f}", *relative))
    title = f"{args.count} crops, ViT-S/16, batches of {args.batch}, {job.device}, {torch.get_num_threads()} threads"
    table(title, ("", "images/s", "over bare, wall", "over bare, CPU"), rows)
    cost = [ratio(seconds, "patches", "vectors", clock) - 1 for clock in ("wall", "cpu")]
    print(f"\nstoring patches costs {cost[0]:+.1%} wall, {cost[1]:+.1%} CPU")
    print(f"waiting for data: {np.median(waits):.1%} of the time")


# The store -----------------------------------------------------------------------------------------------------------


def store(folder: Path, args: argparse.Namespace) -> None:
    """Compare ways to read a store."""
    path, dim, patches = folder / "patches.h5", 384, 196
    generator = np.random.default_rng(0)
    with FeatureWriter(path, {}, dim, num_patches=patches, has_cls=False, has_mean=False) as writer:
        for begin in range(0, 2000, 100):
            features = generator.normal(size=(100, patches, dim)).astype(np.float16)
            writer.append_stored([str(begin + row) for row in range(100)], {"patches": features})
        writer.finish({}, {})
    rows = np.flatnonzero(generator.random(2000) < 0.8)  # the rows of four folds of five: runs of five on average
    with FeatureStore.open(path) as opened, h5py.File(path) as file:

        def fancy() -> None:
            for begin in range(0, len(rows), 256):
                file["patches"][rows[begin : begin + 256]]

        def stored() -> None:
            for begin in range(0, len(rows), 256):
                opened.read_rows("patches", rows[begin : begin + 256])

        def everything() -> None:
            for begin in range(0, 2000, 256):
                opened.read_rows("patches", slice(begin, begin + 256))

        seconds = interleaved({"fancy indexing": fancy, "read_rows": stored, "all rows": everything}, args.repeats)
    found = [
        (name, f"{median(one, 'wall'):.3f}", f"{1 / ratio(seconds, name, 'fancy indexing', 'wall'):.1f}")
        for name, one in seconds.items()
    ]
    table(f"patches of {len(rows)} of 2,000 rows, 196 x 384 float16", ("", "s", "times as fast"), found)
    _opening(folder / "many.h5", dim, args.repeats)


def _opening(path: Path, dim: int, repeats: int) -> None:
    with FeatureWriter(path, {}, dim, has_mean=False) as writer:
        for begin in range(0, 100_000, 10_000):
            ids = [f"{begin + row:016x}" for row in range(10_000)]
            writer.append_stored(ids, {"cls": np.ones((10_000, dim), np.float16)})
        writer.finish({"age": np.arange(100_000)}, {})
    code = f"""
import time
from mefem_cli.stores.features import FeatureStore
begun = time.perf_counter()
with FeatureStore.open({str(path)!r}) as store:
    next(store.iter_batches("cls", batch_size=256))
    first = time.perf_counter() - begun
    store.ids, store.labels["age"]
print(first, time.perf_counter() - begun)
"""
    answers = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(repeats)]
    first, ids = zip(*(map(float, one.stdout.split()) for one in answers), strict=True)
    print(f"\n100,000 x {dim} CLS: first batch after {np.median(first):.3f} s, ids and a label {np.median(ids):.3f} s")


# Memory --------------------------------------------------------------------------------------------------------------


def memory(folder: Path, args: argparse.Namespace) -> None:
    """Print the peak memory of embedding few and many crops with a tiny encoder."""
    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 3, "image_size": 64, "patch_size": 8}
    run = write_run(folder / "tiny", "vit_tiny_patch16_224", **sizes)
    rows = []
    for count in (args.count, 4 * args.count, 16 * args.count):
        crops = write_crops(folder / f"crops-{count}", count, size=64)
        line = [sys.executable, __file__, "peak", "--crops", str(crops), "--run", str(run)]
        answer = subprocess.run([*line, "--out", str(folder / "m.h5")], capture_output=True, text=True, check=True)
        rows.append((f"{count:,}", json.loads(answer.stdout)["mib"]))
    table("peak memory of a process, patches stored", ("crops", "MiB"), rows)


def peak(args: argparse.Namespace) -> None:
    """Embed once and print this process's peak memory.

    Of Linux's own count: getrusage's starts from what the parent had, which made the crops.
    """
    prepare(Path(args.run), Path(args.crops), Path(args.out), args, patches=True).run()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"mib": int(status["VmHWM"].split()[0]) * 1024 // MIB}))


def main() -> None:
    """Run the parts that are named, all by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=256, help="crops")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    for name in ("crops", "run", "out"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    console.configure(console.ConsoleOptions(quiet=True))
    if args.what == ["peak"]:
        peak(args)
        return
    known = {"speed": speed, "store": store, "memory": memory}
    for name in args.what or known:
        with tempfile.TemporaryDirectory(prefix="mefem-bench-") as folder:
            known[name](Path(folder), args)


if __name__ == "__main__":
    main()
