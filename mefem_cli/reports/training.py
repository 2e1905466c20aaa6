"""What a training run looks like: its plan before, its figures and health page after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mefem_cli import console
from mefem_cli.engine import monitors, seeds
from mefem_cli.reports import html
from mefem_cli.stores import product
from mefem_cli.stores.runs import Run

if TYPE_CHECKING:
    from mefem_cli.pretraining import Job

TIMED_FACES = 8
COLLAPSE_RATIO = 0.98  # a predictor this close to one that knows only the position has learned nothing about faces
INK, ACCENT, SECOND = "#1d2330", "#2a6fdb", "#d9622b"


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
        "training_faces": len(job.training_rows),
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
        draws = monitors.to_device(objective.draw(TIMED_FACES, seeds.torch_generator(0, seeds.MASKS, step)), device)  # type: ignore[operator]
        begun = time.perf_counter()
        with device.autocast():
            losses, _ = objective(images, draws)
        torch.stack(list(losses.values())).sum().backward()
        torch.stack(
            [parameter.grad.sum() for parameter in objective.parameters() if parameter.grad is not None][:1]
        ).cpu()
        seconds = time.perf_counter() - begun
    return seconds / TIMED_FACES


def write_report(run: Run) -> Path:
    """Draw figures/loss.png and figures/health.png and write report.html; return its path."""
    rows = list(run.metrics())
    epochs = [row for row in rows if row["kind"] == "epoch"]
    body = [html.heading("Is it healthy?"), *(html.paragraph(sentence) for sentence in judge(epochs))]
    steps = [row for row in rows if row["kind"] == "step"]
    if steps:
        body += [
            html.heading("Loss"),
            html.figure(_draw_loss(run, steps, epochs), "Loss, learning rate and gradient norm by step."),
        ]
    if any("rankme" in row for row in epochs):
        caption = (
            "Measured after each epoch on faces that are never trained on. RankMe: how many directions the features "
            "use. "
            "Loss over position: 1 means no better than a predictor that knows only where a patch lies."
        )
        body += [html.heading("Health"), html.figure(_draw_health(run, epochs), caption)]
    body += [html.heading("Options"), html.table(("option", "value"), run.config().items())]
    report = run.path / "report.html"
    product.write_text(report, html.page(f"Run {run.path.name}", "Self-supervised training of a face encoder.", body))
    return report


def judge(epochs: list[dict[str, Any]]) -> list[str]:
    """Say in words what the last epoch row means."""
    last = epochs[-1] if epochs else {}
    if "loss_over_position" not in last:
        return ["There were too few faces to set some aside, so the encoder's health was not measured."]
    first = epochs[0]
    sentences = [
        f"RankMe of the mean features is {last['rankme']:.1f} ({last['rankme_centred']:.1f} about the mean face); it "
        f"began at {first['rankme']:.1f} ({first['rankme_centred']:.1f}). Their standard deviation over faces is "
        f"{last['feature_std']:.3f}.",
        f"The loss is {last['loss_over_position']:.3f} of that of a predictor that knows only the position.",
    ]
    if last["loss_over_position"] > COLLAPSE_RATIO and last["epoch"] > 0:
        sentences.append(
            "That is no better than knowing the position: the encoder has collapsed or has not begun to learn. "
            "Try more steps, a lower learning rate or an EMA that starts closer to 1."
        )
    return sentences


def _draw_loss(run: Run, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> Path:
    plt = _pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    top.plot(
        [row["step"] for row in steps],
        [row["loss"] for row in steps],
        color=ACCENT,
        linewidth=1.2,
        label="training loss",
    )
    held_out = [row for row in epochs if "monitor_loss" in row]
    if held_out:
        top.plot(
            [row["step"] for row in held_out],
            [row["monitor_loss"] for row in held_out],
            ".-",
            color=SECOND,
            label="held-out faces",
        )
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.plot([row["step"] for row in steps], [row["grad_norm"] for row in steps], color=INK, linewidth=0.8)
    bottom.set(ylabel="gradient norm", xlabel="step", yscale="log")
    rate = bottom.twinx()
    rate.plot([row["step"] for row in steps], [row["lr"] for row in steps], color=ACCENT, linestyle="--", linewidth=1)
    rate.set_ylabel("learning rate", color=ACCENT)
    return _save(figure, run.figures / "loss.png")


def _draw_health(run: Run, epochs: list[dict[str, Any]]) -> Path:
    plt = _pyplot()
    measured = [row for row in epochs if "rankme" in row]
    names = ("rankme_centred", "feature_std", "loss_over_position")
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for suffix, colour, label in (("", ACCENT, "mean"), ("_cls", SECOND, "CLS")):
            rows = [row for row in measured if name + suffix in row]
            if rows:
                axis.plot(
                    [row["epoch"] for row in rows],
                    [row[name + suffix] for row in rows],
                    ".-",
                    color=colour,
                    label=label,
                )
        axis.set(title=name.replace("_", " "), xlabel="epoch")
    axes[0].legend(frameon=False)
    axes[2].axhline(1, color=INK, linewidth=0.8, linestyle=":")
    return _save(figure, run.figures / "health.png")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return pyplot


def _save(figure: Any, path: Path) -> Path:
    with product.writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    _pyplot().close(figure)
    return path
