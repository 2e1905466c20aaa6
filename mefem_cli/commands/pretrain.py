"""Crops -> a run folder with an encoder.

Trains an encoder on face crops without labels. Reads crops/ or the crops folders named, writes
runs/<time>-<mask>/ and points runs/latest at it. Stopped runs go on with --resume. -n prints the plan.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.parts import Given

ARGUMENT = ("crops", "Crops folders; default: the pipe, else crops/.")
ROOMS = ("objectives", "masks", "backbones.vit")
OPTIONS = (
    "engine.plan:TrainOptions",
    "engine.device:DeviceOptions",
    "engine.launch:LaunchOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)


def run(arguments: list[str], given: Given) -> None:
    """Train, or with `--dry-run` print the plan."""
    from mefem_cli.engine import launch

    begun = time.monotonic()
    product = given.build("stores.product", "ProductOptions")
    options = given.build("engine.launch", "LaunchOptions")
    if options.print_sbatch:
        print(launch.sbatch_script(options.gpus, sys.argv[1:], product.out), end="")
        return
    alone = launch.place().size == 1
    folders = _folders(arguments, product) if alone else None  # a missing one is told before torch is loaded
    if alone and options.gpus > 1 and not product.dry_run:
        piped = [] if arguments or folders is None else [str(folder) for folder in folders]
        raise SystemExit(launch.run_processes(options.gpus, [*sys.argv[1:], *piped]))
    from mefem_cli.engine import distributed

    with distributed.session(given.values.get("device", "auto")) as world:
        job = world.agree(
            lambda: _prepare(_folders(arguments, product) if folders is None else folders, given, product)
        )
        if job.product.dry_run:
            if world.is_first:
                _print_plan(job)
            return
        job.train()
        if world.is_first:
            _finish(job, time.monotonic() - begun)


def _prepare(folders: list[Path], given: Given, product: Any) -> Any:
    from mefem_cli.pretraining import Job

    return Job.prepare(folders, given, product)


def _print_plan(job: Any) -> None:
    from mefem_cli.reports import plan

    plan.print_plan(job)


def _finish(job: Any, seconds: float) -> None:
    from mefem_cli import console

    job.run.become_latest()
    corrupt = {"unreadable": len(job.stream.corrupt)} if job.stream.corrupt else {}
    console.product(job.run.path, seconds, crops=len(job.crops), rejects=corrupt, steps=job.plan.total_steps)


def _folders(arguments: list[str], product: Any) -> list[Path]:
    """Return the crops folders named, else that of the pipe, else `crops`; a resumed run knows its own."""
    from mefem_cli import console
    from mefem_cli.errors import NoInputError

    folders = [Path(argument) for argument in arguments]
    if not folders and not product.resume and console.stdin_is_pipe():
        folders = [console.read_pipe("a crops folder")]
    if not folders and not product.resume:
        folders = [Path("crops")]
    for folder in folders:
        without_weight = Path(str(folder).rpartition("=")[0] or folder)  # crops=2 counts twice
        if not folder.exists() and not without_weight.exists():
            raise NoInputError(f"{folder}/: no such folder; make it with mefem crop, or name a crops folder")
    return folders
