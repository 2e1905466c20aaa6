"""What `mefem ablate` costs beside its steps, and whether it survives: overhead, busy slots, kills, a lost Ray node.

    python examples/benchmarks/ablate.py CROPS --task age              # all but Ray; about 5 minutes on two free cores
    python examples/benchmarks/ablate.py CROPS --task age --only ray   # needs pip install "mefem-cli[ray]"

A grid of twelve small pretrainings on two jobs. `launch` times a step that has nothing to do, as ablate starts it and
as a new Python process that imports the same. `busy` is the share of two jobs' time that steps were at work. `kill`
kills the driver, and then a step, again and again, each time runs the same command once more, and compares results.csv
with that of an undisturbed run. `ray` does so on two nodes of this machine, one of which is killed in mid-run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measuring import table

from mefem_cli.executors.local import environment
from mefem_cli.executors.processes import Processes

JOBS, CELLS, PORT = 2, 12, 6411
STEPS_A_CELL = 3
SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "depth": 2,
    "embed_dim": 96,
    "num_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "predictor_depth": 1,
    "predictor_width": 48,
    "batch_size": 32,
    "monitor": 0,
    "checkpoint_every": 0.02,
    "device": "cpu",
    "probe.epochs": 5,
    "bootstraps": 200,
}


def command(args: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """Return the command line of the grid: six widths with and without a CLS token."""
    words = ["--vary", "width=1,2,3,4,5,6", "--vary", "cls_prob=0.5,none", "--crops", args.crops, "--task", args.task]
    words += [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words += ["--epochs", str(args.epochs), "--limit", str(args.limit), "-o", str(out), "--quiet", *more]
    return [sys.executable, "-m", "mefem_cli", "ablate", *words]


def run(args: argparse.Namespace, out: Path, *more: str) -> float:
    """Run the grid to its end and return its seconds."""
    begun = time.perf_counter()
    subprocess.run(command(args, out, *more), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that are there."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(one) for thread in threads for one in (thread / "children").read_text().split()]
    except OSError:
        return []


# Overhead -------------------------------------------------------------------------------------------------------


def launch_seconds() -> list[tuple[str, str, str]]:
    """Return the seconds of a step with nothing to do, wall (median) and CPU: as ablate starts it, and as a process."""
    with tempfile.TemporaryDirectory() as folder:
        processes, log = Processes(environment(JOBS)), Path(folder) / "log"
        processes.run(["pretrain", "--print-sbatch"], log)  # it starts the server
        (server,) = (
            pid for pid in children(os.getpid()) if b"executors.warm" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        before = _cpu_of_children(server)
        warm = [_timed(lambda: processes.run(["pretrain", "--print-sbatch"], log)) for _ in range(10)]
        warm_cpu = (_cpu_of_children(server) - before) / 10
        processes.close()
    imports = "import mefem_cli.pretraining, mefem_cli.reports.health"
    before = _cpu_of_children(os.getpid())
    cold = [_timed(lambda: subprocess.run([sys.executable, "-c", imports], check=True)) for _ in range(3)]
    cold_cpu = (_cpu_of_children(os.getpid()) - before) / 3
    rows = (("as ablate starts it", warm, warm_cpu), ("as a new process", cold, cold_cpu))
    return [(name, f"{statistics.median(wall):.2f}", f"{cpu:.2f}") for name, wall, cpu in rows]


def _cpu_of_children(pid: int) -> float:
    """Return the CPU seconds of the children of a process that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _timed(call) -> float:  # type: ignore[no-untyped-def]
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def busy(out: Path) -> tuple[float, float]:
    """Return the share of the jobs' time that steps were at work, and the seconds a cell that they were not."""
    rows = [json.loads(line) for path in out.glob("cells/*/seconds.jsonl") for line in path.read_text().splitlines()]
    at_work = sum(row["seconds"] for row in rows)
    ended = max(path.stat().st_mtime for path in out.glob("cells/*/seconds.jsonl"))
    room = JOBS * (ended - (out / "provenance.json").stat().st_mtime)
    return at_work / room, (room - at_work) / CELLS


# Kills ----------------------------------------------------------------------------------------------------------


def run_with_kills(args: argparse.Namespace, out: Path, kills: int, seed: int) -> tuple[int, int]:
    """Run the grid, killing the driver or a step now and then, until it is whole; return how often of each."""
    draw = random.Random(seed)
    drivers = steps = 0
    while True:
        driver = subprocess.Popen(command(args, out, "--jobs", str(JOBS)), stdout=subprocess.DEVNULL)
        while drivers + steps < kills and driver.poll() is None:
            time.sleep(draw.uniform(*args.every))
            at_work = [step for server in children(driver.pid) for step in children(server)]
            if driver.poll() is None and draw.random() < 0.5:
                driver.kill()
                drivers += 1
            elif at_work:
                os.kill(draw.choice(at_work), signal.SIGKILL)
                steps += 1
        driver.wait()
        results = out / "results.csv"
        if driver.returncode == 0 and "failed" not in results.read_text():
            return drivers, steps


def run_on_ray(args: argparse.Namespace, out: Path) -> None:
    """Run the grid on two Ray nodes of one core each, and kill one when its first checkpoint is there."""
    ray = str(Path(sys.executable).with_name("ray"))
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    small = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = [
        ray,
        "start",
        "--head",
        f"--port={PORT}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        *small,
    ]
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # of head and node alike: their defaults may differ
    try:
        subprocess.run(head, **quiet)  # type: ignore[call-overload]
        before = raylets()
        subprocess.run([ray, "start", f"--address=127.0.0.1:{PORT}", *small], **quiet)  # type: ignore[call-overload]
        second = raylets() - before
        driver = subprocess.Popen(command(args, out, "--on", f"ray:127.0.0.1:{PORT}"), stdout=subprocess.DEVNULL)
        while len(list(out.glob("cells/*/run/last.ckpt"))) < 3 and driver.poll() is None:
            time.sleep(0.05)
        for pid in second:
            os.kill(pid, signal.SIGKILL)
        if driver.wait() or not second:
            raise SystemExit("the grid did not end well")
    finally:
        stop_head()


def raylets() -> set[int]:
    """Return the raylets of this machine: one for each node."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_raylet = (path / "comm").read_text().strip() == "raylet" and (path / "stat").read_text().split()[
                2
            ] != "Z"
        except OSError:
            continue
        found |= {int(path.name)} if is_raylet else set()
    return found


def stop_head() -> None:
    """Kill what is left of our cluster: every process that names the session of the head on our port."""
    commands = {pid: words for pid, words in all_commands() if b"/ray/" in words}
    heads = [words for words in commands.values() if f"--gcs_server_port={PORT}".encode() in words]
    sessions = {name for words in heads for name in re.findall(rb"/(session_[^/\0]+)", words)}
    for pid, words in commands.items():
        if any(name in words for name in sessions):
            os.kill(pid, signal.SIGKILL)


def all_commands() -> Iterator[tuple[int, bytes]]:
    """Yield the number and the command line of every process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(path.name), (path / "cmdline").read_bytes()


def main() -> None:
    """Run what was asked for and print it as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops")
    parser.add_argument("--task", default="age")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--every", type=float, nargs=2, default=(4.0, 12.0), help="seconds between two kills")
    parser.add_argument("--only", choices=("launch", "busy", "kill", "ray"))
    parser.add_argument("--keep", help="a folder for the grids, kept")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="mefem-ablate-"))
    try:
        measure(args, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Measure and print."""
    if args.only in (None, "launch"):
        table("A step that has nothing to do", ("", "s", "s of CPU"), launch_seconds())
    if args.only == "launch":
        return
    seconds = run(args, folder / "undisturbed", "--jobs", str(JOBS))
    expected = (folder / "undisturbed" / "results.csv").read_bytes()
    if args.only != "ray":  # which may take a kept grid from before
        share, overhead = busy(folder / "undisturbed")
        rows = [(CELLS, JOBS, f"{seconds:.0f}", f"{100 * share:.1f} %", f"{overhead:.2f}")]
        table("A grid, undisturbed", ("cells", "jobs", "s", "jobs busy", "s a cell beside its steps"), rows)
    if args.only in (None, "kill"):
        drivers, steps = run_with_kills(args, folder / "killed", args.kills, seed=0)
        is_same = (folder / "killed" / "results.csv").read_bytes() == expected
        table(
            "Killed and run again",
            ("driver killed", "step killed", "results.csv is the same"),
            [(drivers, steps, is_same)],
        )
    if args.only == "ray":
        run_on_ray(args, folder / "ray")
        is_same = (folder / "ray" / "results.csv").read_bytes() == expected
        table("Two Ray nodes, one killed in mid-run", ("results.csv is the same",), [(is_same,)])


if __name__ == "__main__":
    main()
