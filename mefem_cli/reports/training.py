"""The plan of a training run, as `mefem pretrain --dry-run` prints it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mefem_cli import console
from mefem_cli.engine import seeds

if TYPE_CHECKING:
    from mefem_cli.pretraining import Job

TIMED_FACES = 8


def print_plan(job: Job) -> None:
    """Print what the run would do on stdout: data, steps, time and disk, options. Nothing is written."""
    num_values = sum(parameter.numel() for parameter in job.objective.parameters())
    trained = sum(parameter.numel() for parameter in job.objective.parameters() if parameter.requires_grad)
    seconds_per_face = _time_step(job)
    seconds = seconds_per_face * job.plan.batch_size * job.plan.total_steps
    num_bytes = 4 * (num_values + 2 * trained) + 8 * trained  # weights, both encoders twice, two moments
    plan = {
        "out": str(job.run.path.absolute()),
        "crops": len(job.crops),
        "training_faces": len(job.order.rows),
        "monitor_faces": len(job.monitor_rows),
        "preset": job.plan.preset,
        "batch_size": job.plan.batch_size,
        "steps": job.plan.total_steps,
        "device": str(job.device),
        "estimated_seconds": round(seconds),
        "estimated_bytes": num_bytes,
        "options": job.config,
    }
    if console.wants_json():
        console.emit(plan)
        return
    from rich.table import Table

    shown = Table("plan", "", show_edge=False)
    for name, value in plan.items():
        if name not in ("options", "estimated_bytes", "estimated_seconds"):
            shown.add_row(name.replace("_", " "), str(value))
    shown.add_row("estimated time", f"{seconds / 60:.1f} min, from {TIMED_FACES} faces just timed")
    shown.add_row("estimated disk", f"{num_bytes / 1e6:.0f} MB")
    for name, value in job.config.items():
        shown.add_row(f"--{name.replace('_', '-')}", str(value))
    console.table(shown)


def _time_step(job: Job) -> float:
    """Return the seconds per face of a training step, timed on noise after a first step that warms up."""
    objective, device = job.objective.to(job.device.torch), job.device
    size = job.stream.image_size
    images = torch.randint(0, 256, (TIMED_FACES, 3, size, size), dtype=torch.uint8, device=device.torch)
    seconds = 0.0
    for step in range(2):
        draws = device.put(objective.draw(TIMED_FACES, seeds.torch_generator(0, seeds.MASKS, step)))  # type: ignore[operator]
        begun = time.perf_counter()
        with device.autocast():
            losses, _ = objective(images, draws)
        torch.stack(list(losses.values())).sum().backward()
        torch.stack(
            [parameter.grad.sum() for parameter in objective.parameters() if parameter.grad is not None][:1]
        ).cpu()
        seconds = time.perf_counter() - begun
    return seconds / TIMED_FACES
