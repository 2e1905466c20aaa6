"""Whole runs of `mefem crop` on one core and on two, and the loop that people write, on the same pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crop_measure import Setting, Skipped, Watched, load, mefem_crop, table, watch
from crop_pictures import hard_links, phone_photos, portraits

ROUNDS = 2  # contenders taking turns; the fastest counts
PLAIN = Path(__file__).with_name("crop_plain.py")


@dataclass(frozen=True)
class Contender:
    """A way to crop a folder: `run(folder, out)`."""

    name: str
    run: Callable[[Path, Path], Watched]


def runs(setting: Setting) -> None:
    """Print pictures a second of each contender, with and without the time to start, and how they compare."""
    if len(os.sched_getaffinity(0)) < 2:
        raise Skipped("one core only")
    print("CPU and wall time are those of a run of many pictures less those of one of few: starting is left out.\n")
    for name, make, few, many in (("1024 px", portraits, 64, 1500), ("12 megapixels", phone_photos, 16, 120)):
        files = make(setting, setting.folder(f"{name} files"), 40 if make is portraits else 8)
        folders = {count: setting.folder(f"{name} {count}") for count in (few, many)}
        for count, folder in folders.items():
            hard_links(files, folder, count)
        fastest = {one.name: [float("inf")] * 4 for one in CONTENDERS}
        for _ in range(ROUNDS):
            for one in CONTENDERS:
                small = _run(setting, one, folders[few])
                large = _run(setting, one, folders[many])
                taken = [small.wall, small.cpu, large.wall, large.cpu]
                fastest[one.name] = [min(pair) for pair in zip(fastest[one.name], taken, strict=True)]
        _tell(name, {one: _without_start(*taken) for one, taken in fastest.items()}, few, many)
        print(f"{load()}\n")


def _without_start(small: float, small_cpu: float, large: float, large_cpu: float) -> list[float]:
    """Return the wall and CPU time between two runs, and the wall time of each.

    Of the fastest runs, not the least difference: that would count a small run that something else slowed down.
    """
    return [large - small, large_cpu - small_cpu, small, large]


def _run(setting: Setting, contender: Contender, folder: Path) -> Watched:
    out = setting.work / "out"
    taken = contender.run(folder, out)
    shutil.rmtree(out)
    return taken


def _plain(models: str) -> Callable[[Path, Path], Watched]:
    def run(folder: Path, out: Path) -> Watched:
        out.mkdir()
        return watch([sys.executable, str(PLAIN), models, str(folder), str(out)], 2, stderr=subprocess.DEVNULL)

    return run


SHORT = ("--detector", "short")
CONTENDERS = [
    Contender("mefem, 2 cores", lambda folder, out: mefem_crop(folder, "-o", out, cores=2)),
    Contender("mefem, 1 core", lambda folder, out: mefem_crop(folder, "-o", out, cores=1)),
    Contender("plain, short", _plain("short")),
    Contender("plain, short and full", _plain("short,full")),
    Contender(
        "mefem short, 2 cores", lambda folder, out: mefem_crop(folder, "--detector", "short", "-o", out, cores=2)
    ),
]


def _tell(name: str, times: dict[str, list[float]], few: int, many: int) -> None:
    rows = []
    ours = times["mefem, 2 cores"]
    for contender, (wall, cpu, start, whole) in times.items():
        count = many - few
        row = [name, contender, count / wall, cpu / count * 1000, start, whole]
        rows.append([*row, wall / ours[0], whole / ours[3]])
    header = ["pictures", "contender", "pictures/s", "CPU ms a picture", f"{few} pictures, s", f"{many} pictures, s"]
    table([*header, "mefem is faster, x", "start included, x"], rows)
