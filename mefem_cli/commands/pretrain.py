"""Crops -> a run folder with an encoder.

Trains an encoder on face crops without labels. Reads crops/ or the crops folders named, writes
runs/<time>-<mask>/ and points runs/latest at it. Stopped runs go on with --resume. -n prints the plan.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.parts import Given

ARGUMENT = ("crops", "Crops folders; default: the pipe, else crops/.")
ROOMS = ("objectives", "masks", "backbones")
OPTIONS = (
    "engine.plan:TrainOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)


def run(arguments: list[str], given: Given) -> None:
    """Train, or with `--dry-run` print the plan."""
    from mefem_cli import console

    begun = time.monotonic()
    job = _prepare(arguments, given)
    from mefem_cli.reports import training  # it loads torch, as the job has by now

    if job.product.dry_run:
        training.print_plan(job)
        return
    job.train()
    training.write_report(job.run)
    job.run.become_latest()
    corrupt = {"unreadable": len(job.stream.corrupt)} if job.stream.corrupt else {}
    console.product(
        job.run.path, time.monotonic() - begun, crops=len(job.crops), rejects=corrupt, steps=job.plan.total_steps
    )


def _prepare(arguments: list[str], given: Given) -> Any:
    from pathlib import Path

    from mefem_cli import console
    from mefem_cli.errors import NoInputError

    product = given.build("stores.product", "ProductOptions")
    folders = [Path(argument) for argument in arguments]
    if not folders and not product.resume and console.stdin_is_pipe():
        folders = [console.read_pipe("a crops folder")]
    if not folders and not product.resume:
        folders = [Path("crops")]
    for folder in folders:
        if not folder.exists():
            raise NoInputError(f"{folder}/: no such folder; make it with mefem crop, or name a crops folder")
    from mefem_cli.pretraining import Job  # it loads torch: not before the folders are there

    return Job.prepare(folders, given, product)
