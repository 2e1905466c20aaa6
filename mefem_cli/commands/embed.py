"""Crops + encoders -> HDF5 feature stores, one for each encoder.

Reads the crops named, else those that the run was trained on, else crops/; the encoder is runs/latest unless --model
names another: a run, or one of others as in timm:NAME@PATH. With several --model crops are read once, and -o is a
folder (features/<model>.h5) or a pattern with {model}. Run again, also after a kill, it embeds only what is missing.
Prints one path a line, in the order of --model. In a pipe it takes a crops folder or a run.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mefem_cli.embedding import Done
    from mefem_cli.parts import Given

ARGUMENT = ("crops", "Crops folders; default: the pipe, else those of the run, else crops/.")
OPTIONS = (
    "embedding:EmbedOptions",
    "executors.options:PartsOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)
ROOMS = ("backbones",)
LEFT_OUT = ("backbones.vit",)  # its options build an encoder to train; here they come with the run


def run(arguments: list[str], given: Given) -> None:
    """Embed, or with `--dry-run` say what would be embedded."""
    from pathlib import Path

    from mefem_cli import console
    from mefem_cli.engine import launch
    from mefem_cli.stores import runs

    begun = time.monotonic()
    is_alone = launch.place().size == 1
    if "model" not in given and not console.stdin_is_pipe():
        runs.latest_run(Path("runs"))  # raises before torch is loaded
    folders = [Path(argument) for argument in arguments]
    words: list[str] = []  # for the processes of --gpus, which have no pipe
    if is_alone and not folders and console.stdin_is_pipe():
        folders, words = _from_pipe(given)
    from mefem_cli.embedding import EmbedOptions, Job
    from mefem_cli.engine import distributed

    options: EmbedOptions = given.build("embedding", "EmbedOptions")
    machine = given.build("engine.device", "DeviceOptions")
    product = given.build("stores.product", "ProductOptions")
    on = given.build("executors.options", "PartsOptions")
    if not on.where.is_local and not product.dry_run:
        from mefem_cli.executors import embedding as cluster

        _print(cluster.embed(sys.modules[__name__], folders, given, options, product, on), begun)
        return
    if is_alone and options.gpus > 1 and not product.dry_run:
        raise SystemExit(launch.run_processes(options.gpus, [*sys.argv[1:], *words]))
    with distributed.session(machine.device) as world:
        job = world.agree(lambda: Job.prepare(folders, options, machine, product, given, world))
        for name in [*given.unused, *(["resume"] if product.resume else [])]:
            console.warn(f"--{name.replace('_', '-')} has no effect here")
        if product.dry_run:
            if world.is_first:
                job.print_plan()
            return
        done = job.run()
    _print(done, begun)


def _print(done: list[Done], begun: float) -> None:
    from mefem_cli import console

    seconds = time.monotonic() - begun
    for one in done:
        rejects = {"unreadable": one.unreadable} if one.unreadable else {}
        console.product(one.out, seconds, rejects=rejects, crops=one.crops, embedded=one.embedded)


def _from_pipe(given: Given) -> tuple[list[Path], list[str]]:
    """Read what comes down the pipe: crops, or a run, which becomes --model. Return crops, and words for the same."""
    from mefem_cli import console

    arrived = console.read_pipe("a crops folder or a run")
    if (arrived / "manifest.parquet").exists():
        return [arrived], [str(arrived)]
    if "model" in given:
        named = given.values["model"]
        shown = named if isinstance(named, str) else " ".join(named)
        console.warn(f"--model {shown} is used, not {arrived} from the pipe")
        return [], []
    given.values["model"] = [str(arrived)]
    return [], ["--model", str(arrived)]
