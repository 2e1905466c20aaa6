"""What `mefem ablate --dry-run` says: the cells, what they share, and how long it takes by steps that were timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli import console
from mefem_cli.ablation import steps
from mefem_cli.ablation.grid import Cell
from mefem_cli.ablation.runner import Strand
from mefem_cli.ablation.tables import about, duration
from mefem_cli.engine.plan import make_plan
from mefem_cli.errors import MefemError, UsageError
from mefem_cli.executors.local import cores
from mefem_cli.parts import Given

if TYPE_CHECKING:
    from rich.table import Table

    from mefem_cli.ablation.job import Job

MONITOR_SHARE = 0.05  # of the faces are watched and not trained on, at most
TRIAL_SECONDS = 1.0  # for the timed steps of one size
NARROWEST_NAME = 20  # characters: loss_weight=circular in one piece
TRIAL_IMAGES = 8  # for a given encoder
# Options of a pretraining that leave the time of a step as it is.
WITHOUT_TIME = frozenset(
    ("epochs", "warmup_epochs", "lr", "weight_decay", "ema", "loss_weight", "r0", "sigma", "keep", "spread", "limit")
)


@dataclass(frozen=True)
class Cost:
    """What an encoder takes."""

    seconds_an_epoch: float
    seconds_a_face: float  # to embed it


def describe(job: Job) -> dict[str, Any]:
    """Return what a job would do, as JSON, timing some steps of each size that is to be trained; nothing is written."""
    todo = [strand for strand in job.strands if strand.state in ("new", "begun")]
    counts = {strand.folder: num_steps(strand.cells[0], len(job.crops)) for strand in job.strands}
    seconds = _seconds(job)
    known = [one for one in seconds.values() if one is not None]
    return {
        "out": str(job.out.absolute()),
        "crops": len(job.crops),
        "cells": [_describe_cell(job, cell, counts, seconds) for cell in job.cells],
        "tasks": list(job.grid.tasks),
        "seeds": job.seeds,
        "pretrainings": len([strand for strand in job.strands if not strand.model]),
        "models": list(job.grid.models),
        "to_train": len(todo),
        "steps": sum(counts[strand.folder] or 0 for strand in todo),
        "on": job.where.on,
        "jobs": job.jobs,
        "gpus": job.gpus,
        "estimated_seconds": sum(known) / min(job.jobs or 1, max(1, len(known))),
        "estimate_is_whole": len(known) == len(seconds),
    }


def _describe_cell(job: Job, cell: Cell, counts: dict[Path, int | None], seconds: dict[Path, Any]) -> dict[str, Any]:
    own = [strand for strand in job.strands if cell in strand.cells]
    return {
        "cell": cell.name,
        "group": cell.group,
        "pretraining": "" if cell.model else own[0].folder.name,
        "model": cell.model,
        "epochs": None if cell.model else steps.settled("pretrain", cell.pretrain)["epochs"],
        "steps": counts[own[0].folder],
        "head": cell.probe["head"],
        "features": cell.probe.get("features"),
        "reads": cell.reads,
        "states": ["cannot run" if seconds.get(strand.folder, 0.0) is None else strand.state for strand in own],
        "estimated_seconds": [seconds.get(strand.folder, 0.0) for strand in own],  # of the encoder, shared with others
    }


def num_steps(cell: Cell, num_crops: int) -> int | None:
    """Return the steps of a pretraining, within a few; None where its options do not fit the faces."""
    if cell.model:
        return 0
    options = Given(cell.pretrain).build("engine.plan", "TrainOptions")
    faces = num_crops - min(options.monitor, int(MONITOR_SHARE * num_crops))
    try:
        return make_plan(options, faces, cell.pretrain.get("batch_size", "auto")).total_steps
    except UsageError:
        return None


# Time -----------------------------------------------------------------------------------------------------------


def _seconds(job: Job) -> dict[Path, float | None]:
    """Return the seconds to train and embed by the folder of each strand that is not there; None: it cannot be told.

    Those of a size are timed once. Probing is not counted. A given encoder embeds once, for its first seed.
    """
    import torch

    todo = [strand for strand in job.strands if strand.state == "new" or strand.state == "begun"]
    todo += [one for one in job.strands if one.model and one.seed == job.seeds[0] and not one.is_finished]
    if todo and not job.gpus:
        torch.set_num_threads(max(1, cores() // (job.jobs or 1)))
    costs: dict[str, Cost | None] = {}
    found: dict[Path, float | None] = {}
    with console.progress("timing steps", len({_size(strand.cells[0]) for strand in todo})) as bar:
        for strand in todo:
            size = _size(strand.cells[0])
            if size not in costs:
                costs[size] = _try(strand)
                bar.advance()
            found[strand.folder] = _of_strand(strand, costs[size], len(job.crops))
    return found


def _size(cell: Cell) -> str:
    """Return a key of what the time of a step depends on."""
    if cell.model:
        return cell.model
    options = steps.settled("pretrain", cell.pretrain)
    kept = {name: value for name, value in options.items() if name not in WITHOUT_TIME}
    return steps.key({**kept, "cls_prob": steps.trains_cls(cell.pretrain)})


def _of_strand(strand: Strand, cost: Cost | None, num_crops: int) -> float | None:
    if cost is None:
        return None
    stores = len({strand.store(cell) for cell in strand.cells})
    epochs = 0 if strand.model else steps.settled("pretrain", strand.cells[0].pretrain)["epochs"]
    return cost.seconds_an_epoch * epochs + cost.seconds_a_face * num_crops * stores


def _try(strand: Strand) -> Cost | None:
    """Time an encoder; None where its options do not fit."""
    try:
        return _try_model(strand) if strand.model else _try_steps(strand)
    except MefemError as error:
        console.warn(f"{strand.cells[0].name}: {error}")
        return None


def _try_steps(strand: Strand) -> Cost:
    """Take some real steps of a pretraining, whose run folder is never made."""
    from mefem_cli.engine import estimate
    from mefem_cli.pretraining import Job as Pretraining
    from mefem_cli.stores.product import ProductOptions

    nowhere = str(strand.folder / "estimate")
    given = Given({**strand.cells[0].pretrain, "epochs": 1, "seed": strand.seed, "out": nowhere})
    job = Pretraining.prepare([Path(one) for one in strand.crops], given, ProductOptions(out=nowhere, dry_run=True))
    faces, read_seconds = estimate.read_faces(job.stream, job.order, job.device, strand.seed)
    trainer = estimate.make_trainer(job.objective, job.stream, job.order, job.plan, job.device, job.train_options)
    trial = estimate.try_steps(trainer, faces, -(-job.plan.batch_size // job.plan.accumulate), TRIAL_SECONDS)
    found = estimate.estimate_run(
        trial, read_seconds, trainer, job.plan, len(job.monitor_rows), job.processes, job.cache_bytes
    )
    return Cost(found.seconds, read_seconds + trial.forward_seconds)


def _try_model(strand: Strand) -> Cost:
    """Embed some random pixels with a given encoder."""
    import torch

    from mefem_cli.backbones import _frozen
    from mefem_cli.engine.device import choose_device

    embed = strand.cells[0].embed
    device = choose_device(embed.get("device", "auto"), embed.get("precision", "auto"))
    encoder = _frozen.load(strand.model, embed.get("encoder"), Given(dict(embed))).encoder.to(device.torch)
    side = encoder.preprocessing.image_size
    images = torch.randint(0, 256, (TRIAL_IMAGES, 3, side, side), dtype=torch.uint8, device=device.torch)
    times = []
    with torch.inference_mode(), device.autocast():
        for _ in range(3):
            begun = time.perf_counter()
            encoder.features(images)["cls" if encoder.class_token else "mean"].sum().item()
            times.append(time.perf_counter() - begun)
    return Cost(0.0, min(times) / TRIAL_IMAGES)


# Shown ----------------------------------------------------------------------------------------------------------


def to_table(plan: dict[str, Any]) -> Table:
    """Return the cells as a table; an encoder that several share has its steps and time in its first line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cell", overflow="fold", min_width=NARROWEST_NAME)
    for name in ("heads", "encoder"):
        table.add_column(name, overflow="fold")
    for name in ("epochs", "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", min_width=len("finished"))
    seen: set[str] = set()
    for cell in plan["cells"]:
        encoder = cell["pretraining"] or cell["model"]
        is_shared = encoder in seen
        seen.add(encoder)
        named = "given" if cell["model"] else cell["pretraining"][:6]
        num_epochs = "" if cell["epochs"] is None else str(cell["epochs"])
        count = "" if cell["model"] else "?" if cell["steps"] is None else f"{cell['steps']:,}"
        cost = ("same", "") if is_shared else (count, _shown_seconds(cell["estimated_seconds"]))
        states = ", ".join(dict.fromkeys(cell["states"]))
        table.add_row(*map(Text, (cell["cell"], cell["reads"], named, num_epochs, *cost, states)))
    return table


def _shown_seconds(seconds: Sequence[float | None]) -> str:
    """Return the time of each seed; empty where the encoder is there."""
    if not any(one != 0 for one in seconds):
        return ""
    first = next(one for one in seconds if one != 0)
    times = f"{len(seconds)} x " if len(seconds) > 1 else ""
    return "?" if first is None else times + duration(first)


def summary(plan: dict[str, Any]) -> str:
    """Return what the grid is, and how long it takes, in three lines."""
    seeds = ", ".join(map(str, plan["seeds"]))
    machine = f"on GPUs {', '.join(plan['gpus'])}" if plan["gpus"] else f"on {plan['on']}"
    at_once = f"{plan['jobs']} at once" if plan["jobs"] else "as many at once as there is room for"
    given = f"given encoders: {len(plan['models'])}\n" if plan["models"] else ""
    return (
        f"cells: {len(plan['cells'])}, scored on {', '.join(plan['tasks'])} of {plan['crops']:,} faces\n"
        f"pretrainings: {plan['pretrainings']} (seeds {seeds}), of which {plan['to_train']} to train: "
        f"about {plan['steps']:,} steps, {at_once} {machine}\n{given}"
        f"{_told_time(plan)}\n"
        f"-> {plan['out']}"
    )


def _told_time(plan: dict[str, Any]) -> str:
    seconds, is_whole = plan["estimated_seconds"], plan["estimate_is_whole"]
    if not seconds:
        if not is_whole:
            return "time: it cannot be told, as nothing of it can run"
        states = {state for cell in plan["cells"] for state in cell["states"]}
        return "all is finished" if states == {"finished"} else "only probing is left"
    took = about(seconds) if is_whole else f"over {duration(seconds)}"
    some = "" if is_whole else " (of some it cannot be told)"
    return (
        f"time: {took} of training and embedding{some}, by steps timed here; start and reports take some seconds an "
        "encoder, and probing comes on top"
    )
