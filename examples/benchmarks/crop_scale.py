"""Many inputs: memory over a long run, listing a great many paths, and running again with nothing to do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crop_measure import MEBI, Setting, Watched, mefem_crop, table, watch
from crop_pictures import hard_links, mixed_small

# Small squares and crops: the run is about the number of inputs, not about their size.
SMALL = ("--size", "64", "--min-size", "16")
NUM_SHARD_INPUTS = 20_000
MARKS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a run at which memory is looked at

LISTING = """
import json, resource, sys, time
from pathlib import Path
from mefem_cli.faces.inputs import list_sources
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.monotonic(), time.process_time()
listing = list_sources([sys.argv[1]], Path(sys.argv[1] + "-crops"))
taken = time.monotonic() - begun[0], time.process_time() - begun[1]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(listing.sources), *taken, before, peak]))
"""


def memory(setting: Setting) -> None:
    """Print the resident memory of the parent and its workers while many small pictures are cropped."""
    files = mixed_small(setting, setting.folder("files"))
    inputs = setting.folder("inputs")
    hard_links(files, inputs, setting.num_inputs)
    rows = _memory_rows(inputs, setting.work / "crops", setting.num_inputs, "folder, short", "--detector", "short")
    fewer = setting.folder("fewer")
    hard_links(files, fewer, min(NUM_SHARD_INPUTS, setting.num_inputs))
    count = min(NUM_SHARD_INPUTS, setting.num_inputs)
    rows += _memory_rows(fewer, setting.work / "packed", count, "--shards, auto", "--shards")
    table(["run", "inputs done", "s", "parent, MiB", "largest worker, MiB"], rows)


def _memory_rows(inputs: Path, out: Path, count: int, name: str, *options: str) -> list[list[Any]]:
    run = mefem_crop(inputs, *SMALL, *options, "-o", out, look=_journal_size(out))
    sizes = [size for *_, size in run.samples]
    last = sizes.index(max(sizes))  # the workers have ended there, the manifest is being written
    rows = []
    for mark in MARKS:
        at = next(index for index, size in enumerate(sizes) if size >= mark * sizes[last])
        seconds, parent, worker, _ = run.samples[at]
        if worker < 64 * MEBI:  # the look came when they had gone
            worker = next((one for _, _, one, _ in reversed(run.samples[:at]) if one >= 64 * MEBI), worker)
        rows.append([name, round(mark * count), seconds, parent / MEBI, worker / MEBI])
    rows.append([name, "most ever", run.wall, run.parent_peak / MEBI, run.worker_peak / MEBI])
    return rows


def _journal_size(out: Path) -> Callable[[], int]:
    """Return what tells how far a run is: the size of its journal, to which every finished source adds its row."""

    def size() -> int:
        return sum(path.stat().st_size for path in out.glob(".parts/00000.arrows"))

    return size


def listing(setting: Setting) -> None:
    """Print how long listing takes, and the memory it adds."""
    files = mixed_small(setting, setting.folder("files"))
    rows = []
    for count in (setting.num_paths // 4, setting.num_paths):
        folder = setting.folder(f"paths-{count}")
        hard_links(files, folder, count)
        run = watch([sys.executable, "-c", LISTING, str(folder)])
        listed, wall, cpu, before, peak = json.loads(run.output)
        rows.append([listed, wall, cpu, cpu / listed * 1e6, (peak - before) / 1024, (peak - before) * 1024 / listed])
    table(["paths", "wall, s", "CPU, s", "CPU us a path", "memory added, MiB", "bytes a path"], rows)


def restart(setting: Setting) -> None:
    """Print what a run costs that finds all of its work done."""
    inputs = setting.folder("inputs")
    hard_links(mixed_small(setting, setting.folder("files")), inputs, NUM_SHARD_INPUTS)
    rows = []
    for name, options in (("folder", ()), ("--shards", ("--shards",))):
        out = setting.work / f"crops{len(options)}"
        for which in ("first", "again", "again"):
            run = mefem_crop(inputs, "--detector", "none", *SMALL, *options, "-o", out)
            rows.append([name, which, NUM_SHARD_INPUTS, *_costs(run)])
        _touch(inputs)
        rows.append([name, "one of 20,000 changed", NUM_SHARD_INPUTS, *_costs(_again(inputs, out, options))])
    table(["output", "run", "inputs", "wall, s", "CPU, s", "parent's peak, MiB"], rows)


def _again(inputs: Path, out: Path, options: tuple[str, ...]) -> Watched:
    return mefem_crop(inputs, "--detector", "none", *SMALL, *options, "-o", out)


def _costs(run: Watched) -> list[float]:
    return [run.wall, run.cpu, run.parent_peak / MEBI]


def _touch(inputs: Path) -> None:
    """Replace one picture by another one."""
    first, second = sorted(inputs.rglob("*.jpg"))[:2]
    content = second.read_bytes() + bytes([int(time.time()) % 256])
    first.unlink()
    first.write_bytes(content)
