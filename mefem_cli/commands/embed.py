"""Crops + encoder -> an HDF5 feature store.

Reads the crops named, else those that the run was trained on, else crops/; the encoder is runs/latest unless --model
names another. Run again, it embeds only what is new. In a pipe it takes a crops folder or a run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mefem_cli.parts import Given

ARGUMENT = ("crops", "Crops folders; default: the pipe, else those of the run, else crops/.")
OPTIONS = (
    "embedding:EmbedOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)


def run(arguments: list[str], given: Given) -> None:
    """Embed, or with `--dry-run` say what would be embedded."""
    from dataclasses import replace
    from pathlib import Path

    from mefem_cli import console
    from mefem_cli.stores import runs

    if "model" not in given and not console.stdin_is_pipe():
        runs.latest_run(Path("runs"))  # raises before torch is loaded
    from mefem_cli.embedding import Job

    begun = time.monotonic()
    options = given.build("embedding", "EmbedOptions")
    machine = given.build("engine.device", "DeviceOptions")
    product = given.build("stores.product", "ProductOptions")
    folders = [Path(argument) for argument in arguments]
    if not folders and console.stdin_is_pipe():
        arrived = console.read_pipe("a crops folder or a run")
        if (arrived / "manifest.parquet").exists():
            folders = [arrived]
        elif options.model is not None:
            console.warn(f"--model {options.model} is used, not {arrived} from the pipe")
        else:
            options = replace(options, model=str(arrived))
    job = Job.prepare(folders, options, machine, product)
    if product.dry_run:
        job.print_plan()
        return
    counts = job.run()
    rejects = {"unreadable": counts.pop("unreadable")}
    console.product(job.out, time.monotonic() - begun, rejects={k: n for k, n in rejects.items() if n}, **counts)
