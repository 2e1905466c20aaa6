"""The index of a million crops, for pretrain.py: `million.py make FOLDER`, then `million.py open FOLDER`.

Two processes, as making it takes more memory than opening it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute  # noqa: F401  (what opening loads is no part of the index)

from mefem_cli.stores import crops

COUNT = 1_000_000


def make(folder: Path) -> None:
    """Write a manifest of a million crops that are not there."""
    folder.mkdir()
    (folder / crops.PROVENANCE).write_text('{"options": {"size": 224}}')
    known: dict[str, list[str]] = {name: [f"{row:016x}" for row in range(COUNT)] for name in ("id", "sha256")}
    known["path"] = [f"images/photos/{row // 1000:04d}/{row:07d}.jpg" for row in range(COUNT)]
    known["status"] = [crops.OK] * COUNT
    columns = {one.name: known.get(one.name, pa.nulls(COUNT, one.type)) for one in crops.SCHEMA}
    crops.write_manifest(folder, pa.table(columns))


def open_all(folder: Path) -> None:
    """Print the memory that opening adds to this process, MiB, and the seconds that it takes."""
    before, begun = _peak(), time.perf_counter()
    million = crops.Crops.open(folder)
    million.describe(COUNT // 2)
    print(_peak() - before, time.perf_counter() - begun)


def _peak() -> float:
    status = Path("/proc/self/status").read_text()  # getrusage would count the memory of the process before exec
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    {"make": make, "open": open_all}[sys.argv[1]](Path(sys.argv[2]))
