"""The plan of a training run, as `mefem pretrain --dry-run` prints it: data, choices, cost, P(source), options."""

from __future__ import annotations

import os
import shlex
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.engine import estimate, monitors, schedules, tune
from mefem_cli.engine.device import cores
from mefem_cli.engine.plan import explain
from mefem_cli.errors import MefemError
from mefem_cli.parts import Given
from mefem_cli.pretraining import SUBJECT_LABELS, Job
from mefem_cli.stores.crops import Crops

STEP_SECONDS, ALTERNATIVE_SECONDS = 2.5, 0.6  # what timed steps may take; those before them take as long
TOO_LONG = 86_400  # seconds; a CPU run that takes longer has its alternatives named
SMALLER = {"image_size": 128, "backbone": "vit_tiny_patch16_224"}
BUSY = 0.75  # processes that run on a core already, from which on a trial is disturbed
SHOWN_LABELS = 6
NO_OPTIONS = ("crops", "weights", "inputs", "ema_planned", "init_sha256")  # of what config.yaml records
NO_BREAK = "\N{NO-BREAK SPACE}"  # between an option and its value, which belong on one line
Row = tuple[str, Any, str]  # name, value, why


def print_plan(job: Job) -> None:
    """Print on stdout what the run would do, as a table or with `--json` as an object. Nothing is written."""
    plan = describe(job)
    if console.wants_json():
        console.emit(plan)
        return
    from rich.table import Table
    from rich.text import Text

    shown = Table("plan", "", "why", show_edge=False)
    for rows in (_data_rows(plan), _choice_rows(plan), _cost_rows(plan)):
        for row in rows:
            shown.add_row(*(Text(_printable(str(cell))) for cell in row))
        shown.add_section()
    console.table(shown)
    if plan["p_source"]:
        print("\nP(source), percent, of each patch\n")
        for line in plan["p_source"]:
            print("".join(f"{100 * chance:4.0f}" for chance in line))
    print("\nall options, as resolved\n")
    typed = " ".join(_printable(one).replace(" ", NO_BREAK) for one in _typed(plan["options"]))
    lines = textwrap.fill(typed, 100, break_on_hyphens=False, break_long_words=False)
    print(lines.replace(NO_BREAK, " "))


def describe(job: Job) -> dict[str, Any]:
    """Return the plan as one object of plain values."""
    masker = getattr(job.objective, "masker", None)
    p_source = masker.p_source().numpy().round(4).tolist() if masker else None
    choices = [{"name": name, "value": value, "reason": reason} for name, value, reason in _choices(job)]
    cost = _cost(job)  # last, as it trains the objective for some steps
    return {
        "out": str(job.run.path.absolute()),
        "crops": len(job.crops),
        "training_faces": len(job.order.rows),
        "monitor_faces": len(job.monitor_rows),
        "preset": job.plan.preset,
        "batch_size": job.plan.batch_size,
        "steps": job.plan.total_steps,
        "device": str(job.device),
        "estimated_seconds": cost["time"]["seconds"],
        "estimated_bytes": cost["disk"]["bytes"],
        "data": fingerprint(job.crops, job.config["weights"]),
        "choices": choices,
        "start": job.start.lines() if job.start else [],
        **cost,
        "p_source": p_source,
        "options": job.config,
    }


def _typed(options: dict[str, Any]) -> list[str]:
    """Return options as they are typed in a shell, each with its value."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name in NO_OPTIONS or value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        else:
            words += [f"{flag} {shlex.quote(str(one))}" for one in (value if isinstance(value, list) else [value])]
    return words


# The data -----------------------------------------------------------------------------------------------------------


def fingerprint(crops: Crops, weights: list[float]) -> dict[str, Any]:
    """Return what tells one set of crops from another: counts by folder and label, subjects, exact duplicates."""
    counts = np.bincount(crops.part_of, minlength=len(crops.folders)).tolist()
    folders = [
        {"path": str(path), "crops": count, "weight": weight}
        for path, count, weight in zip(crops.folders, counts, weights, strict=True)
    ]
    digests = Counter(crops.columns["crop_sha256"].tolist())
    digests.pop("", None)  # a shard of crops has none
    subject = next((name for name in SUBJECT_LABELS if name in crops.labels), None)
    return {
        "folders": folders,
        "size": crops.size,
        "labels": {name: _num_known(crops.labels[name]) for name in crops.labels},
        "subject_label": subject,
        "subjects": len(np.unique(monitors.as_groups(len(crops), crops.labels[subject]))) if subject else None,
        "exact_duplicates": sum(digests.values()) - len(digests),
    }


def _num_known(values: np.ndarray) -> int:
    """Return how many values of a label are not missing."""
    return int(np.isfinite(values).sum() if values.dtype.kind == "f" else (values != "").sum())


def _data_rows(plan: dict[str, Any]) -> Iterator[Row]:
    data = plan["data"]
    yield "out", plan["out"], ""
    yield "crops", f"{plan['crops']:,}", f"{data['size']} px"
    for folder in data["folders"]:
        weight = f"weight {folder['weight']:g}" if folder["weight"] != 1 else ""
        yield "  from", f"{folder['crops']:,}", f"{folder['path']} {weight}".rstrip()
    duplicates = data["exact_duplicates"]
    yield "exact duplicates", f"{duplicates:,}", "the same bytes as another crop" if duplicates else ""
    if data["subject_label"]:
        yield "subjects", f"{data['subjects']:,}", f"by the label {data['subject_label']}"
    labels = [f"{name} {count:,}" for name, count in data["labels"].items()]
    rest = f", and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    yield "labels", f"{len(labels)}", ", ".join(labels[:SHOWN_LABELS]) + rest
    yield "training faces", f"{plan['training_faces']:,}", ""
    reason = "never trained on; whole subjects, at most 5 %"
    if not plan["monitor_faces"]:
        reason = monitors.why_unwatched(plan["crops"], plan["options"]["monitor"])
    yield "monitor faces", f"{plan['monitor_faces']:,}", reason


# The choices --------------------------------------------------------------------------------------------------------


def _choices(job: Job) -> Iterator[Row]:
    plan, config = job.plan, job.config
    why = explain(plan, job.train_options, str(job.given.values.get("batch_size", "auto")), len(job.order))
    yield "preset", plan.preset, why["preset"]
    yield (
        "start",
        *(("loaded weights", job.start.lines()[0]) if job.start else ("random weights", f"seed {config['seed']}")),
    )
    yield "backbone", config["backbone"], _size(job)
    yield "tokens", _tokens(job), f"mask {config['mask']}" if "mask" in config else ""
    yield "batch", plan.batch_size, why["batch_size"]
    yield "epochs", plan.epochs, why["epochs"]
    yield "steps", plan.total_steps, why["steps"]
    yield "learning rate", f"{plan.lr:.3g}", why["lr"]
    yield "warm-up steps", plan.warmup_steps, why["warmup_steps"]
    yield "weight decay", config["weight_decay"], why["weight_decay"]
    if "ema" in config:
        yield "EMA", config["ema"], _ema_reason(job)
    yield "device", str(job.device).removesuffix(f" ({job.device.reason})"), job.device.reason
    if job.processes > 1:
        yield "processes", job.processes, f"{plan.batch_size / job.processes:g} faces of each batch for each"
    if tune.wants_compile(job.train_options.compile, job.device, plan.total_steps):
        yield "compile", "on", "the time below was measured without"


def _size(job: Job) -> str:
    """Say how large the encoder and what is trained with it are."""
    encoder = next(iter(job.objective.encoders().values()))  # type: ignore[operator]
    millions = sum(value.numel() for value in encoder.parameters()) / 1e6
    trained = sum(value.numel() for value in job.objective.parameters() if value.requires_grad) / 1e6
    default = "the default; " if job.config["backbone"] == "vit_small_patch16_224" else ""
    return f"{default}{millions:.1f} M weights, {trained:.1f} M trained with the predictor"


def _tokens(job: Job) -> str:
    splits = getattr(job.objective, "splits", None)
    if splits is None:
        return "all"
    objective: Any = job.objective
    modes = splits(objective.draw(1, torch.Generator().manual_seed(0)))
    return ", ".join(f"{mode.source.shape[1]} source and {mode.target.shape[1]} target" for mode in modes)


def _ema_reason(job: Job) -> str:
    """Say where the planned EMA comes from; see schedules.small_data_ema."""
    plan = job.plan
    if not job.config["ema_planned"]:
        return "as asked"
    if plan.preset == "paper":
        return "the paper's"
    if plan.total_steps <= schedules.LATE_STEPS:
        return f"a run under {schedules.LATE_STEPS:,} steps: the target stays, then follows; END is 1 - 4.5 / steps"
    if schedules.PAPER_EMA_GAP * plan.batch_size / schedules.PAPER_BATCH > (
        schedules.FORGETTING_GAP_STEPS / plan.total_steps
    ):
        return f"the paper's gap at batch {plan.batch_size}"
    return f"1 - {schedules.FORGETTING_GAP_STEPS} / {plan.total_steps} steps: e^-10 of the first target remains"


def _choice_rows(plan: dict[str, Any]) -> Iterator[Row]:
    for choice in plan["choices"]:
        yield choice["name"], choice["value"], choice["reason"]
        if choice["name"] == "start":
            yield from (("", "", line) for line in plan["start"][1:])


# The cost -----------------------------------------------------------------------------------------------------------


def _cost(job: Job) -> dict[str, Any]:
    """Return time, memory and disk, and what takes less time where it is too long."""
    disk = estimate.disk_bytes(job.objective, job.train_options.keep)
    cost: dict[str, Any] = {
        "time": {"seconds": 0},
        "memory": None,
        "disk": {
            "bytes": disk,
            "checkpoint_bytes": estimate.checkpoint_bytes(job.objective),
            "free": _free_disk(job.run.path.absolute()),
        },
        "instead": [],
    }
    if not job.plan.total_steps:
        return cost
    is_busy = not job.device.is_cuda and os.getloadavg()[0] > BUSY * cores()  # asked before the trial adds to it
    faces, read_seconds = estimate.read_faces(job.stream, job.order, job.device, job.product.seed)
    trial, trainer = _try(job, job.objective, faces, STEP_SECONDS)
    found = estimate.estimate_run(
        trial, read_seconds, trainer, job.plan, len(job.monitor_rows), job.processes, job.cache_bytes
    )
    cost["time"] = {
        "seconds": round(found.seconds),
        "step_seconds": found.step_seconds,
        "watch_share": found.watch_share,
        "is_busy": is_busy,
        "read_seconds_per_face": read_seconds,
        "trial": asdict(trial),
    }
    cost["memory"] = {
        "bytes": found.memory_bytes,
        "is_measured": found.memory_is_measured,
        "free": found.memory_free,
        "cache_bytes": job.cache_bytes,
    }
    if found.seconds > TOO_LONG and not job.device.is_cuda:
        cost["instead"] = list(_instead(job, found))
    return cost


def _free_disk(path: Path) -> int:
    """Return the bytes that are free where a folder is or will be."""
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def _try(job: Job, objective: Any, faces: Any, seconds: float) -> tuple[estimate.Trial, Any]:
    trainer = estimate.make_trainer(objective, job.stream, job.order, job.plan, job.device, job.train_options)
    most = -(-job.plan.batch_size // (job.processes * job.plan.accumulate))
    return estimate.try_steps(trainer, faces, most, seconds), trainer


def _instead(job: Job, found: estimate.Estimate) -> Iterator[dict[str, Any]]:
    """Yield what to type to be done sooner, and the seconds that it takes; other encoders are timed as well."""
    epochs = int(job.plan.epochs * TOO_LONG / found.seconds)
    if epochs:
        yield {"type": f"--epochs {epochs}", "seconds": round(found.seconds * epochs / job.plan.epochs)}
    helpful = [name for name in SMALLER if _rebuilt(job, [name])]
    for names in [[name] for name in helpful] + [helpful] * (len(helpful) > 1):
        objective = _rebuilt(job, names)
        if objective is None:
            continue
        faces = torch.randint(0, 256, (2, 3, objective.image_size, objective.image_size), dtype=torch.uint8)
        trial, _ = _try(job, objective, faces.to(job.device.torch), ALTERNATIVE_SECONDS)
        typed = " ".join(f"--{name.replace('_', '-')} {SMALLER[name]}" for name in names)
        share = trial.seconds_of(job.plan.batch_size) / found.trial.seconds_of(job.plan.batch_size)
        if share < 1:
            yield {"type": typed, "seconds": round(found.seconds * share)}


def _rebuilt(job: Job, names: list[str]) -> Any:
    """Return the objective with some options of SMALLER; None where they do not fit the others or save nothing."""
    try:
        objective = job.build(Given({**job.given.values, **{name: SMALLER[name] for name in names}}))
    except MefemError:
        return None
    return objective if _num_operations(objective) < _num_operations(job.objective) else None


def _num_operations(objective: Any) -> int:
    """Return a number that grows with the time of a step: weights times tokens."""
    encoder = next(iter(objective.encoders().values()))
    return encoder.num_tokens * sum(value.numel() for value in encoder.parameters())


def _cost_rows(plan: dict[str, Any]) -> Iterator[Row]:
    spent = plan["time"]
    if "trial" in spent:
        trial = spent["trial"]
        busy = ", less once this busy machine is free" if spent["is_busy"] else ""
        reason = (
            f"{_seconds(spent['step_seconds'])} a step, from {trial['num_steps']} x {trial['num_faces']} faces timed"
            f"{busy}; {100 * spent['watch_share']:.0f} % for measures after each epoch"
        )
        yield "time", _duration(spent["seconds"]), reason
    for row in plan["instead"]:
        yield "  or type", _duration(row["seconds"]), row["type"]
    memory = plan["memory"]
    if memory and memory["bytes"]:
        kind = "measured peak" if memory["is_measured"] else "estimated peak"
        too_much = "; TOO MUCH: type --accumulate 2 or more" if memory["bytes"] > memory["free"] else ""
        yield "memory", _bytes(memory["bytes"]), f"{kind}; {_bytes(memory['free'])} are free{too_much}"
    disk = plan["disk"]
    checkpoint = f"checkpoint {_bytes(disk['checkpoint_bytes'])}, twice while one is written"
    too_much = "; TOO MUCH" if disk["bytes"] + disk["checkpoint_bytes"] > disk["free"] else ""
    yield "disk", _bytes(disk["bytes"]), f"{checkpoint}; {_bytes(disk['free'])} are free{too_much}"


def _duration(seconds: float) -> str:
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), int(seconds // 86_400)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{days} d {round(seconds % 86_400 / 3600)} h"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
