"""The plan of a training run: batch, steps, learning rate, from the options and the number of faces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from mefem_cli.engine import schedules
from mefem_cli.errors import UsageError

PAPER_FACES = 1_000_000  # from here on the paper's own settings are the default
SMALL_DATA_BATCHES = ((20_000, 64), (100_000, 256), (PAPER_FACES, 1024))  # up to so many faces: this batch


@dataclass(frozen=True)
class TrainOptions:
    """The training."""

    preset: Literal["auto", "paper", "small"] = "auto"  # defaults of the rest; auto is paper from 1M faces
    objective: str = "mefem"  # what is learned: a file in objectives/
    init: str | None = None  # start from a run, an I-JEPA checkpoint, or weights with timm's names; default: random
    epochs: int = 66  # passes over the faces; 0 writes the untrained encoder
    warmup_epochs: float = 3.0  # epochs over which the learning rate rises
    lr: float | None = None  # peak learning rate; default: planned
    weight_decay: str = "0.04:0.4"  # START:END of a cosine; none on biases, norms, tokens and positions
    cache: Literal["auto", "ram", "off"] = "auto"  # keep decoded crops in memory; auto: in a quarter of the free
    accumulate: int = 1  # cut each process's part of a batch into N micro-batches to save memory; same results
    monitor: int = 1024  # faces set aside to watch the encoder, whole subjects, at most 5 %
    watch: list[str] = field(default_factory=list)  # labels that quick probes read after each epoch: a,b or repeated
    stop_on_collapse: bool = False  # end the run with a checkpoint and exit code 6 when the collapse alarm sounds
    track: Literal["none", "tensorboard"] = "none"  # also write the measures for TensorBoard, into the run folder
    checkpoint_every: float = 5.0  # minutes between checkpoints; 0: every step
    keep: int = 0  # encoders to keep on the way besides the last, at epochs evenly spread, in epochs/
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU in runs of 2,000 steps or more
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower

    def __post_init__(self) -> None:
        for name in ("epochs", "warmup_epochs", "monitor", "checkpoint_every", "keep"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted 0 or more")
        if self.accumulate < 1:
            raise UsageError(f"--accumulate {self.accumulate}: wanted 1 or more")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"--lr {self.lr}: wanted a positive number")
        weight_decay_range(self.weight_decay)


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    preset: str
    batch_size: int  # faces of one step, over all micro-batches and devices
    accumulate: int
    epochs: int
    steps_per_epoch: int
    warmup_steps: int
    lr: float
    weight_decay: tuple[float, float]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at a step."""
        return schedules.learning_rate(self.lr, step, self.total_steps, self.warmup_steps)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay at a step."""
        return schedules.cosine(*self.weight_decay, step, self.total_steps)


def weight_decay_range(text: str) -> tuple[float, float]:
    """Return START and END of `--weight-decay START:END`; one number stands for both. Raises UsageError."""
    try:
        values = [float(part) for part in text.split(":")]
        if len(values) in (1, 2) and all(0 <= value < math.inf for value in values):
            return values[0], values[-1]
    except ValueError:
        pass
    raise UsageError(f"--weight-decay {text}: wanted START:END or one number, not negative, such as 0.04:0.4")


def make_plan(options: TrainOptions, num_faces: int, batch_size: str = "auto", num_processes: int = 1) -> Plan:
    """Plan a run on `num_faces` training faces.

    Raises UsageError for a batch that the faces do not fill or that cannot be cut for processes and micro-batches.
    """
    preset = options.preset
    if preset == "auto":
        preset = "paper" if num_faces >= PAPER_FACES else "small"
    batch = _batch_size(batch_size, num_faces, preset)
    if batch % options.accumulate:
        raise UsageError(f"--accumulate {options.accumulate}: does not divide the batch of {batch}")
    if batch < num_processes * options.accumulate:
        raise UsageError(
            f"--batch-size {batch}: {num_processes} processes x {options.accumulate} micro-batches want a face each"
        )
    steps_per_epoch = num_faces // batch
    planned_lr = schedules.PAPER_LEARNING_RATE if preset == "paper" else schedules.small_data_learning_rate(batch)
    return Plan(
        preset=preset,
        batch_size=batch,
        accumulate=options.accumulate,
        epochs=options.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=min(math.ceil(options.warmup_epochs * steps_per_epoch), options.epochs * steps_per_epoch // 2),
        lr=options.lr if options.lr is not None else planned_lr,
        weight_decay=weight_decay_range(options.weight_decay),
    )


def explain(plan: Plan, options: TrainOptions, batch_size: str, num_faces: int) -> dict[str, str]:
    """Return the reason for each of the plan's choices, a few words each; `batch_size` is what was asked for."""
    left_over = num_faces - plan.steps_per_epoch * plan.batch_size
    size = "at least" if num_faces >= PAPER_FACES else "under"
    scaled = f"{schedules.PAPER_LEARNING_RATE:g} x sqrt({plan.batch_size} / {schedules.PAPER_BATCH})"
    rate = f"{scaled}, at least {schedules.LEAST_LEARNING_RATE:g}"
    warmup = _unless_default(options, "warmup_epochs", f"{options.warmup_epochs:g} epochs, as in the paper")
    is_cut = plan.warmup_steps < math.ceil(options.warmup_epochs * plan.steps_per_epoch)
    return {
        "preset": "as asked" if options.preset != "auto" else f"{size} {PAPER_FACES:,} faces",
        "batch_size": _batch_reason(plan, batch_size, num_faces),
        "epochs": _unless_default(options, "epochs", "as in the paper"),
        "steps": f"{plan.steps_per_epoch} an epoch"
        + (f", {left_over} faces left over, others in each" * bool(left_over)),
        "lr": "as asked" if options.lr is not None else "the paper's" if plan.preset == "paper" else rate,
        "warmup_steps": "half of the run at most" if is_cut else warmup,
        "weight_decay": _unless_default(options, "weight_decay", "cosine, as in the paper"),
    }


def _batch_reason(plan: Plan, asked: str, num_faces: int) -> str:
    if asked != "auto":
        return "as asked"
    if plan.batch_size == num_faces // 2:
        return "half of the faces"
    if plan.preset == "paper":
        return "the paper's"
    return next((f"for under {faces:,} faces" for faces, _ in SMALL_DATA_BATCHES if num_faces < faces), "the paper's")


def _unless_default(options: TrainOptions, name: str, reason: str) -> str:
    """Return the reason for a default, and for any other value that somebody asked for it."""
    default = next(one.default for one in fields(options) if one.name == name)
    return reason if getattr(options, name) == default else "as asked"


def _batch_size(asked: str, num_faces: int, preset: str) -> int:
    if asked == "auto":
        batch = schedules.PAPER_BATCH
        if preset == "small":
            batch = next((size for faces, size in SMALL_DATA_BATCHES if num_faces < faces), schedules.PAPER_BATCH)
        return max(1, min(batch, num_faces // 2))
    try:
        batch = int(asked)
    except ValueError as error:
        raise UsageError(f"--batch-size {asked}: wanted auto or a number") from error
    if not 1 <= batch <= num_faces:
        raise UsageError(f"--batch-size {batch}: there are {num_faces} training faces; wanted 1 to {num_faces}")
    return batch
