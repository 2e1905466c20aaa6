"""What `mefem crop` reaches: accuracy, speed, memory, listing, video and restart, as tables on stdout.

    python examples/benchmarks/crop.py                    # all sections, about ten minutes on two quiet cores
    python examples/benchmarks/crop.py accuracy video     # some of them

Each figure is measured in the same run as what it is compared with, contenders taking turns. Wall time means little on
a busy machine: the load is printed, and CPU time beside it. Needs Linux, the folder `--shared` with test pictures, and
for the videos PyAV (pip install "mefem-cli[video]"); a section that misses something says so and is left out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per process, as in the workers

from crop_measure import Setting, Skipped, load  # noqa: E402

SECTIONS = {
    "accuracy": "crop_accuracy",
    "speed": "crop_speed",
    "runs": "crop_runs",
    "memory": "crop_scale",
    "listing": "crop_scale",
    "video": "crop_video",
    "restart": "crop_scale",
}


def main() -> None:
    """Run the sections that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; without any all")
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="folder with data/ (default: %(default)s)"
    )
    parser.add_argument("--temp", type=Path, help="where temporary files go, up to 3 GiB")
    parser.add_argument("--paths", type=int, default=200_000, help="files to list (default: %(default)s)")
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="inputs of the memory section (default: %(default)s)"
    )
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in given.sections or SECTIONS:
        begun = time.monotonic()
        print(f"## {name}\n\n{load()}\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="mefem-benchmark-", dir=given.temp) as folder:
            try:
                run = getattr(importlib.import_module(SECTIONS[name]), name)
                run(Setting(given.shared.absolute(), Path(folder), given.paths, given.inputs))
            except Skipped as why:
                print(f"left out: {why}\n")
        print(f"({time.monotonic() - begun:.0f} s; {load()})\n", flush=True)


if __name__ == "__main__":
    main()
