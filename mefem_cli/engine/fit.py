"""The training loop. It knows an objective only by the protocol below."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from torch import nn

from mefem_cli import console
from mefem_cli.engine import checkpoint, distributed, monitors, seeds, tune
from mefem_cli.engine.device import Device, map_tensors
from mefem_cli.engine.distributed import World
from mefem_cli.engine.meter import Meter
from mefem_cli.engine.order import FaceOrder
from mefem_cli.engine.plan import Plan
from mefem_cli.engine.stop import Stop, stop_signals
from mefem_cli.engine.stream import Batch, ImageStream
from mefem_cli.errors import Diverged, OutOfMemory, UsageError
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


class Observer:
    """Looks at a run from outside its steps. Every process calls it with the same rows; the first one may write."""

    def measure(self, trainer: Trainer, row: dict[str, Any]) -> dict[str, Any]:
        """Return values to add to an epoch row, such as the score of a probe."""
        return {}

    def see(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Take note of a row that was just written. Diverged at an epoch row ends the run after a checkpoint."""


class Trainer:
    """Trains one objective on one device, alone or with the same Trainer in other processes.

    The order of faces is a function of (seed, epoch) and the masks of (seed, step), both for the whole global batch;
    so a run that was stopped and resumed is the run that was not, and many processes see what one would see.
    """

    def __init__(
        self,
        objective: Any,
        stream: ImageStream,
        rows: np.ndarray | FaceOrder,
        plan: Plan,
        device: Device,
        run: Run,
        seed: int,
        compile: Literal["auto", "on", "off"] = "off",
        activation_checkpointing: bool = False,
    ):
        self.objective = objective.to(device.torch)
        self.stream, self.plan, self.device, self.seed = stream, plan, device, seed
        self.order = rows if isinstance(rows, FaceOrder) else FaceOrder(rows)
        self.rows = self.order.rows
        self.world: World = distributed.world()
        self.run = run if self.world.is_first else distributed.ReadOnlyRun(run.path)
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameter_groups(objective), lr=plan.lr, betas=(0.9, 0.999), fused=True)
        self.compile = compile
        if activation_checkpointing and not tune.recompute_activations(objective):
            console.warn("--activation-checkpointing has no effect: the objective has no transformer blocks")
        self.forward: nn.Module = objective  # what a step calls; in a job of several processes a wrapper of it
        self.part = self.world.share(plan.batch_size)  # this process's faces of a global batch
        self.accumulate = plan.accumulate  # micro-batches of that part
        self.step = 0
        self.skipped = torch.zeros((), device=device.torch)
        self.skipped_in_a_row = torch.zeros((), device=device.torch)
        self.worst_in_a_row = torch.zeros((), device=device.torch)
        self.meter = Meter(self)
        self.writer = checkpoint.Writer(run.checkpoint_path)
        self._replanned: dict[str, float] | None = None  # schedules here as an earlier, shorter or longer plan had them

    def fit(
        self, monitor_rows: np.ndarray, checkpoint_minutes: float, resume: bool, observers: Sequence[Observer] = ()
    ) -> None:
        """Train to the planned end, writing metrics and checkpoints.

        Raises Stopped after SIGTERM or SIGUSR1 and Interrupted after Ctrl-C, both with a checkpoint saved;
        Diverged after three non-finite steps in a row; OutOfMemory if one face at a time does not fit.
        """
        with (
            self.writer,
            stop_signals(in_a_job=self.world.size > 1) as stop,
            console.progress("pretrain", self.plan.total_steps) as bar,
        ):
            if resume:
                self.world.agree(self.load_checkpoint)
            self.objective.train()
            self._settle_step()
            bar.advance(self.step)
            if self.step == 0:
                self._end_epoch(monitor_rows, observers, {})
            saved = time.monotonic()
            for batch in self.stream.batches(self._order(), self.device.torch):
                losses, self.meter.schedules = self._train_step(batch)
                self.meter.add(losses)
                self._tell_new_schedules()
                self.step += 1
                epoch_ends = self.step % self.plan.steps_per_epoch == 0
                if self.step % LOG_EVERY_STEPS == 0 or epoch_ends:
                    self._log(bar, observers)
                if epoch_ends:
                    self._end_epoch(monitor_rows, observers, self.meter.epoch_row())
                minutes = (time.monotonic() - saved) / 60
                signal_number, due = self.world.largest(stop.signal, minutes >= checkpoint_minutes)
                if signal_number:
                    self._stop(stop, int(signal_number))
                if due:
                    self.save_checkpoint()
                    saved = time.monotonic()
            (signal_number,) = self.world.largest(stop.signal)
            if signal_number:  # it came before the first step, and there are none
                self._stop(stop, int(signal_number))
            self.save_checkpoint()
        self.stream.corrupt = sorted({name for names in self.world.gather(self.stream.corrupt) for name in names})

    # One step ---------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Forward, backward, optimiser, EMA; nothing waits for the device. Return measures and schedules' values."""
        generator = seeds.torch_generator(self.seed, seeds.MASKS, self.step)
        draws = self.objective.draw(self.plan.batch_size, generator)  # of the global batch
        draws = self.device.put(map_tensors(draws, lambda tensor: tensor[self.part]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.step)
            group["weight_decay"] = self.plan.weight_decay_at(self.step) if group["decays"] else 0.0
        losses = None
        while losses is None:
            try:
                losses = self._accumulate_gradients(batch.images, draws)
            except torch.OutOfMemoryError as error:
                if self.world.size > 1:  # the others are in the middle of a step that cannot be taken back
                    raise OutOfMemory(f"out of memory at step {self.step}; train anew with --accumulate") from error
                self._halve_micro_batch()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        found = (~torch.isfinite(grad_norm)).float()
        self._optimizer_step(found)
        self.skipped += found
        self.skipped_in_a_row = (self.skipped_in_a_row + found) * found
        self.worst_in_a_row = torch.maximum(self.worst_in_a_row, self.skipped_in_a_row)
        losses["grad_norm"] = grad_norm / self.world.size  # the meter sums over processes, and all have the same
        return losses, self.objective.after_step(self.step, self.plan.total_steps)

    @property
    def _micro_batch(self) -> int:
        """Faces of a forward pass."""
        return math.ceil((self.part.stop - self.part.start) / self.accumulate)

    def _accumulate_gradients(self, images: torch.Tensor, draws: Any) -> dict[str, torch.Tensor]:
        """Return the sum over micro-batches of loss terms and statistics, as shares of the global batch's mean."""
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, torch.Tensor] = {}
        starts = range(0, len(images), self._micro_batch)
        for start in starts:
            part = slice(start, start + self._micro_batch)
            with self._gradients_meet(start == starts[-1]):
                values = self._backward(images[part], map_tensors(draws, lambda tensor, part=part: tensor[part]))
            for name, value in values.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _backward(self, images: torch.Tensor, draws: Any) -> dict[str, torch.Tensor]:
        """Add a micro-batch's share of the global batch to the gradients; return the same share of what it measured."""
        share = len(images) / self.plan.batch_size
        with self.device.autocast():
            terms, statistics = self.forward(images, draws)
        loss = torch.stack(list(terms.values())).sum() * share
        (loss * self.world.size).backward()  # processes average their gradients; wanted is the sum of the shares
        named = {"loss": loss}
        if len(terms) > 1:
            named |= {f"loss_{name}": term * share for name, term in terms.items()}
        named |= {name: value * share for name, value in statistics.items()}
        return {name: value.detach() for name, value in named.items()}

    def _gradients_meet(self, last: bool) -> AbstractContextManager[object]:
        """Let processes exchange gradients in the last micro-batch of a step only."""
        return nullcontext() if last or self.forward is self.objective else self.forward.no_sync()  # type: ignore[operator]

    def _optimizer_step(self, found_non_finite: torch.Tensor) -> None:
        """Step, unless the device finds 1 in `found_non_finite`: then the fused optimiser changes nothing."""
        self.optimizer.found_inf = found_non_finite  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()

    def _raise_if_diverged(self) -> None:
        if self.worst_in_a_row.item() >= MAX_NON_FINITE_STEPS:
            raise Diverged(
                f"the loss was not finite for {MAX_NON_FINITE_STEPS} steps in a row near step {self.step}; "
                f"try a lower --lr than {self.plan.lr:g} or --precision fp32"
            )

    # Before the first step --------------------------------------------------------------------------------------

    def _settle_step(self) -> None:
        """Compile if asked, find by trial how many faces fit at once, and tie the processes' gradients together."""
        steps_left = self.plan.total_steps - self.step
        compiled = steps_left > 0 and tune.wants_compile(self.compile, self.device, steps_left)
        if compiled:
            tune.compile_objective(self.objective)
        if compiled or (self.device.is_cuda and steps_left > 0):
            while not self._try_micro_batch():
                pass
        self.run.log(f"{self._micro_batch} faces at a time")
        self.forward = self.world.wrap(self.objective)

    def _try_micro_batch(self) -> bool:
        """Run a step on blank faces that changes nothing; return False if it has to be tried again, otherwise."""
        generator = seeds.torch_generator(self.seed, seeds.MASKS, self.step)
        try:
            draws = self.device.put(self.objective.draw(self._micro_batch, generator))
            self._backward(tune.blank_faces(self._micro_batch, self.objective.image_size, self.device), draws)
            self._optimizer_step(torch.ones((), device=self.device.torch))  # so that the moments have their memory
            self.optimizer.zero_grad(set_to_none=True)
            return True
        except torch.OutOfMemoryError:
            self._halve_micro_batch()
        except Exception as error:
            if not tune.failed_to_compile(error):
                raise
            reason = f"torch.compile fails here ({str(error).strip().splitlines()[0][:100]})"
            if self.compile == "on":
                raise UsageError(f"--compile on: {reason}; type --compile off") from error
            console.warn(f"{reason}; going on without")
            tune.undo_compile(self.objective)
        return False

    def _halve_micro_batch(self) -> None:
        num_faces = self._micro_batch
        if num_faces == 1:
            raise OutOfMemory("out of memory with one face at a time; try a smaller --backbone or --image-size")
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulate *= 2
        message = f"out of memory with {num_faces} faces at a time: going on with {self._micro_batch}"
        console.warn(message)
        self.run.log(message)

    # The data order ---------------------------------------------------------------------------------------------

    def _order(self) -> Iterator[np.ndarray]:
        """Yield this process's rows of each remaining step; a function of the seed and the step alone."""
        steps_per_epoch, batch_size = self.plan.steps_per_epoch, self.plan.batch_size
        order, order_epoch = self.rows, -1
        for step in range(self.step, self.plan.total_steps):
            epoch, number = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order = self.order.epoch(self.seed, epoch)
                order_epoch = epoch
            yield order[number * batch_size : (number + 1) * batch_size][self.part]

    # Watching and saving ----------------------------------------------------------------------------------------

    def _end_epoch(self, monitor_rows: np.ndarray, observers: Sequence[Observer], row: dict[str, Any]) -> None:
        """Write the epoch row: the mean of the epoch's steps and what is measured on the monitor faces."""
        measured: dict[str, Any] = {}
        if len(monitor_rows):
            num_reference = min(max(len(self.rows) // 20, MIN_REFERENCE_FACES), MAX_REFERENCE_FACES, len(self.rows))
            reference = seeds.numpy_generator(self.seed, seeds.MONITOR, 1).choice(
                self.rows, num_reference, replace=False
            )
            health = monitors.health(self.objective, self.stream, monitor_rows, reference, self.device, self.seed)
            measured = dict(health)
        epoch = self.step // self.plan.steps_per_epoch if self.plan.steps_per_epoch else 0
        counts = {"step": self.step, "epoch": epoch, "samples": self.step * self.plan.batch_size}
        row = {"kind": "epoch", **counts, **row, **measured}
        for observer in observers:
            row |= observer.measure(self, row)
        shown = [f"{name} {row[name]:.3f}" for name in ("loss", "rankme", "loss_over_position") if name in row]
        self.run.log(f"epoch {epoch}: {', '.join(shown)}")
        try:
            self._write(row, observers)
        except Diverged:
            self.save_checkpoint()
            raise

    def _log(self, bar: console.Progress, observers: Sequence[Observer]) -> None:
        """Write the row of the last few steps."""
        row = self.meter.row()
        self._raise_if_diverged()
        self._write({"kind": "step", **row}, observers)
        bar.advance(self.step - bar.done, f"loss {row['loss']:.4f}")

    def _write(self, row: dict[str, Any], observers: Sequence[Observer]) -> None:
        self.run.append_metrics(row)
        for observer in observers:
            observer.see(self, row)

    def _stop(self, stop: Stop, signal_number: int) -> NoReturn:
        stop.signal = signal_number  # which any of the processes received
        self.save_checkpoint()
        self.writer.wait()
        raise stop.error(self.run)

    def save_checkpoint(self) -> None:
        """Write last.ckpt in the background; it holds nothing that depends on the number of processes."""
        state = {
            "step": self.step,
            "total_steps": self.plan.total_steps,
            "accumulate": self.accumulate,
            "processes": self.world.size,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "schedules": self._schedules(),
        }
        if self.world.is_first:
            self.writer.save(state)

    def load_checkpoint(self) -> None:
        """Go back to last.ckpt. Raises OutputError if it is damaged, made with other options or beyond the plan."""
        path = self.run.checkpoint_path
        state = checkpoint.load(path)
        checkpoint.refuse_longer(state, self.plan.total_steps, self.plan.epochs, path)
        checkpoint.load_into(self.objective, state["objective"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if state.get("processes", 1) == self.world.size:  # else each process has another number of faces
            self.accumulate = state["accumulate"]
        self.skipped.fill_(state["skipped"])
        self.skipped_in_a_row.fill_(state.get("skipped_in_a_row", 0))
        self.meter.restore(state["meter"])
        if state.get("total_steps", self.plan.total_steps) != self.plan.total_steps:
            self._replanned = state["schedules"]
        self.run.truncate_metrics(self.step if self.step else -1)  # step 0 is measured again

    def _schedules(self) -> dict[str, float]:
        """Return the schedules' values at this step; those of the objective are of the step before."""
        rates = {"lr": self.plan.learning_rate(self.step), "weight_decay": self.plan.weight_decay_at(self.step)}
        return {**rates, **self.meter.schedules}

    def _tell_new_schedules(self) -> None:
        """Say once what another number of epochs did to the schedules, which are functions of the planned length."""
        if self._replanned is not None:
            now = self._schedules()
            changes = [
                f"{name} {self._replanned[name]:.4g} -> {now[name]:.4g}" for name in now.keys() & self._replanned
            ]
            message = (
                f"planned anew for {self.plan.total_steps} steps; at step {self.step}: {', '.join(sorted(changes))}"
            )
            console.note(message)
            self.run.log(message)
            self._replanned = None


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split trained parameters: matrices and convolutions decay; biases, norms, tokens and positions do not."""
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_token = any(word in name for word in ("token", "position", "pos_embed"))
            (constant if parameter.ndim < 2 or is_token else decaying).append(parameter)
    return [{"params": decaying, "decays": True}, {"params": constant, "decays": False}]
