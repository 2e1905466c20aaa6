"""The training loop. It knows an objective only by the protocol below."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mefem_cli import console
from mefem_cli.engine import checkpoint, monitors, seeds
from mefem_cli.engine.device import Device
from mefem_cli.engine.monitors import map_tensors, to_device
from mefem_cli.engine.plan import Plan
from mefem_cli.engine.stream import Batch, ImageStream
from mefem_cli.errors import Diverged, OutOfMemory, Stopped
from mefem_cli.stores.runs import Run

LOG_EVERY_STEPS = 10
MAX_NON_FINITE_STEPS = 3  # in a row
MIN_REFERENCE_FACES, MAX_REFERENCE_FACES = 64, 512  # training faces for the mean target per position


class Objective(Protocol):
    """What is learned: an `nn.Module` that owns its masks and views, its loss and what happens after a step."""

    image_size: int  # px; the engine passes uint8 images [B, 3, image_size, image_size]

    def draw(self, num_faces: int, generator: torch.Generator) -> Any:
        """Draw what is random in a step for a global batch: tensors, nested, whose first dimension is the face."""

    def __call__(self, images: torch.Tensor, draws: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return named loss terms, whose sum is minimised, and named statistics for the log; means over faces."""

    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """Do what follows an optimiser step, such as the EMA; return values of its schedules for the log."""

    def encoders(self) -> dict[str, nn.Module]:
        """Return the encoders to keep, the one for use first. Each has `features(images)`."""


class Trainer:
    """Trains one objective on one device.

    The order of faces is a function of (seed, epoch) and the masks of (seed, step), both for the whole global batch;
    so a run that was stopped and resumed is the run that was not.
    """

    def __init__(
        self, objective: Any, stream: ImageStream, rows: np.ndarray, plan: Plan, device: Device, run: Run, seed: int
    ):
        self.objective = objective.to(device.torch)
        self.stream, self.rows, self.plan, self.device, self.run, self.seed = stream, rows, plan, device, run, seed
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameter_groups(objective), lr=plan.lr, betas=(0.9, 0.999), fused=True)
        self.accumulate = plan.accumulate
        self.step = 0
        self.skipped = torch.zeros((), device=device.torch)
        self.skipped_in_a_row = torch.zeros((), device=device.torch)
        self.worst_in_a_row = torch.zeros((), device=device.torch)

    def fit(self, monitor_rows: np.ndarray, checkpoint_minutes: float, resume: bool) -> None:
        """Train to the planned end, writing metrics and checkpoints.

        Raises Stopped after SIGTERM or SIGUSR1 and KeyboardInterrupt after Ctrl-C, both with a checkpoint saved;
        Diverged after three non-finite steps in a row; OutOfMemory if one face at a time does not fit.
        """
        meter = _Meter(self)
        if resume:
            self.load_checkpoint(meter)
        self.objective.train()
        last_checkpoint = time.monotonic()
        with stop_signals() as stop, console.progress("pretrain", self.plan.total_steps) as bar:
            bar.advance(self.step)
            if self.step == 0:
                self._monitor(monitor_rows, {})
            for batch in self.stream.batches(self._order(), self.device.torch):
                losses, meter.schedules = self._train_step(batch)
                meter.add(losses, len(batch.index))
                self.step += 1
                epoch_ends = self.step % self.plan.steps_per_epoch == 0
                if self.step % LOG_EVERY_STEPS == 0 or epoch_ends:
                    row = meter.row()
                    self._raise_if_diverged()
                    self.run.append_metrics({"kind": "step", **row})
                    bar.advance(self.step - bar.done, f"loss {row['loss']:.4f}")
                if epoch_ends:
                    self._monitor(monitor_rows, meter.epoch_row())
                if stop.signal or (time.monotonic() - last_checkpoint) / 60 >= checkpoint_minutes:
                    self.save_checkpoint(meter)
                    last_checkpoint = time.monotonic()
                if stop.signal:
                    raise stop.error(self.run)
            if stop.signal:  # it came during the last measurement, or there are no steps at all
                self.save_checkpoint(meter)
                raise stop.error(self.run)
        self.save_checkpoint(meter)

    # One step ---------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Forward, backward, optimiser, EMA; nothing waits for the device. Return measures and schedules' values."""
        draws = to_device(
            self.objective.draw(len(batch.index), seeds.torch_generator(self.seed, seeds.MASKS, self.step)), self.device
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.step)
            group["weight_decay"] = self.plan.weight_decay_at(self.step) if group["decays"] else 0.0
        while True:
            try:
                losses = self._accumulate_gradients(batch.images, draws)
                break
            except torch.OutOfMemoryError:
                self._halve_micro_batch(len(batch.index))
        grad_norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        )
        self._step_unless_non_finite(grad_norm)
        return {**losses, "grad_norm": grad_norm}, self.objective.after_step(self.step, self.plan.total_steps)

    def _accumulate_gradients(self, images: torch.Tensor, draws: Any) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, torch.Tensor] = {}
        num_faces = len(images)
        micro = math.ceil(num_faces / self.accumulate)
        for start in range(0, num_faces, micro):
            part = slice(start, min(start + micro, num_faces))
            share = (part.stop - part.start) / num_faces
            with self.device.autocast():
                terms, statistics = self.objective(
                    images[part], map_tensors(draws, lambda tensor, part=part: tensor[part])
                )
            loss = torch.stack(list(terms.values())).sum() * share
            loss.backward()
            named = {
                "loss": loss,
                **({f"loss_{name}": term * share for name, term in terms.items()} if len(terms) > 1 else {}),
            }
            for name, value in {**named, **{name: value * share for name, value in statistics.items()}}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        return totals

    def _step_unless_non_finite(self, grad_norm: torch.Tensor) -> None:
        """Let the fused optimiser skip the step on the device if a gradient is not finite, and count it."""
        found = (~torch.isfinite(grad_norm)).float()
        self.optimizer.found_inf = found  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.skipped += found
        self.skipped_in_a_row = (self.skipped_in_a_row + found) * found
        self.worst_in_a_row = torch.maximum(self.worst_in_a_row, self.skipped_in_a_row)

    def _raise_if_diverged(self) -> None:
        if self.worst_in_a_row.item() >= MAX_NON_FINITE_STEPS:
            raise Diverged(
                f"the loss was not finite for {MAX_NON_FINITE_STEPS} steps in a row near step {self.step}; "
                f"try a lower --lr than {self.plan.lr:g} or --precision fp32"
            )

    def _halve_micro_batch(self, num_faces: int) -> None:
        micro = math.ceil(num_faces / self.accumulate)
        if micro == 1:
            raise OutOfMemory("out of memory with one face at a time; try a smaller --backbone or --image-size")
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulate *= 2
        micro = math.ceil(num_faces / self.accumulate)
        message = f"out of memory: going on with micro-batches of {micro} of {num_faces} faces"
        console.warn(message)
        self.run.log(message)

    # The data order ---------------------------------------------------------------------------------------------

    def _order(self) -> Iterator[np.ndarray]:
        """Yield the rows of each remaining step; a function of the seed and the step alone."""
        steps_per_epoch, batch_size = self.plan.steps_per_epoch, self.plan.batch_size
        order, order_epoch = self.rows, -1
        for step in range(self.step, self.plan.total_steps):
            epoch, number = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order = seeds.numpy_generator(self.seed, seeds.ORDER, epoch).permutation(self.rows)
                order_epoch = epoch
            yield order[number * batch_size : (number + 1) * batch_size]

    # Watching and saving ----------------------------------------------------------------------------------------

    def _monitor(self, monitor_rows: np.ndarray, row: dict[str, Any]) -> None:
        """Write the epoch row: the mean of the epoch's steps and what is measured on the monitor faces."""
        measured: dict[str, float] = {}
        if len(monitor_rows):
            num_reference = min(max(len(self.rows) // 10, MIN_REFERENCE_FACES), MAX_REFERENCE_FACES, len(self.rows))
            reference = seeds.numpy_generator(self.seed, seeds.MONITOR, 1).choice(
                self.rows, num_reference, replace=False
            )
            pairs = monitors.health(self.objective, self.stream, monitor_rows, reference, self.device, self.seed)
            measured = {name: round(value, 6) for name, value in pairs}
        epoch = self.step // self.plan.steps_per_epoch if self.plan.steps_per_epoch else 0
        self.run.append_metrics(
            {
                "kind": "epoch",
                "step": self.step,
                "epoch": epoch,
                "samples": self.step * self.plan.batch_size,
                **row,
                **measured,
            }
        )
        shown = ("loss", "rankme", "loss_over_position")
        described = [f"{name} {value:.3f}" for name, value in {**row, **measured}.items() if name in shown]
        self.run.log(f"epoch {epoch}: {', '.join(described)}")

    def save_checkpoint(self, meter: _Meter) -> None:
        """Write last.ckpt."""
        state = {
            "step": self.step,
            "accumulate": self.accumulate,
            "skipped": self.skipped.item(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": meter.state(),
        }
        checkpoint.save(self.run.checkpoint_path, state)

    def load_checkpoint(self, meter: _Meter) -> None:
        """Go back to last.ckpt. Raises OutputError if it is damaged or made with other options."""
        path = self.run.checkpoint_path
        state = checkpoint.load(path)
        checkpoint.load_into(self.objective, state["objective"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.accumulate = state["step"], state["accumulate"]
        self.skipped.fill_(state["skipped"])
        meter.restore(state["meter"], self.device)
        self.run.truncate_metrics(self.step)


class _Meter:
    """Averages of steps, kept on the device until a log line is due."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.schedules: dict[str, float] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self._epoch_rows: list[tuple[int, dict[str, Any]]] = []
        self._reset_window()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to write the same rows."""
        return {"sums": self.sums, "steps": self.steps, "faces": self.faces, "epoch_rows": self._epoch_rows}

    def restore(self, state: dict[str, Any], device: Device) -> None:
        """Take over the state of an earlier run."""
        self.sums = map_tensors(state["sums"], lambda tensor: tensor.to(device.torch))
        self.steps, self.faces, self._epoch_rows = state["steps"], state["faces"], state["epoch_rows"]

    def _reset_window(self) -> None:
        self.sums = {}
        self.steps = self.faces = 0
        self.begun = time.perf_counter()
        self.waited_before = self.trainer.stream.waited

    def add(self, values: dict[str, torch.Tensor], num_faces: int) -> None:
        """Add one step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.faces += num_faces

    def row(self) -> dict[str, Any]:
        """Return the row of the steps since the last one; here the host waits for the device."""
        trainer, plan = self.trainer, self.trainer.plan
        means = {name: (value / self.steps).item() for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.begun
        row = {
            "step": trainer.step,
            "epoch": (trainer.step - 1) // plan.steps_per_epoch,
            "samples": trainer.step * plan.batch_size,
            **means,
            "lr": plan.learning_rate(trainer.step - 1),
            "weight_decay": plan.weight_decay_at(trainer.step - 1),
            **self.schedules,
            "skipped": int(trainer.skipped.item()),
            "images_per_second": round(self.faces / seconds, 2),
            "data_wait": round((trainer.stream.waited - self.waited_before) / seconds, 4),
        }
        self._epoch_rows.append((self.steps, row))
        self._reset_window()
        return row

    def epoch_row(self) -> dict[str, Any]:
        """Return the epoch's mean of losses and rates and the last value of the rest."""
        steps = [count for count, _ in self._epoch_rows]
        last = dict(self._epoch_rows[-1][1])
        for name in ("loss", "grad_norm", "images_per_second", "data_wait"):
            last[name] = float(np.average([row[name] for _, row in self._epoch_rows], weights=steps))
        self._epoch_rows.clear()
        self._reset_window()
        return {name: value for name, value in last.items() if name not in ("step", "epoch", "samples")}


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split trained parameters: matrices and convolutions decay; biases, norms, tokens and positions do not."""
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_token = any(word in name for word in ("token", "position", "pos_embed"))
            (constant if parameter.ndim < 2 or is_token else decaying).append(parameter)
    return [{"params": decaying, "decays": True}, {"params": constant, "decays": False}]


class _Stop:
    """Which signal asked for a stop, if any."""

    signal: int | None = None

    def error(self, run: Run) -> BaseException:
        run.log(f"stopped by signal {self.signal} after saving {run.checkpoint_path.name}")
        if self.signal == signal.SIGINT:
            console.note(f"a checkpoint is saved; go on with mefem pretrain --resume -o {run.path}")
            return KeyboardInterrupt()
        return Stopped(
            f"stopped by signal {self.signal} with a checkpoint saved; go on with mefem pretrain --resume -o {run.path}"
        )


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    """Note SIGTERM, SIGUSR1 and the first Ctrl-C instead of dying; the loop saves a checkpoint and stops."""
    stop = _Stop()

    def take_note(number: int, frame: FrameType | None) -> None:
        if stop.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # pressed twice: now
        stop.signal = number

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, take_note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
