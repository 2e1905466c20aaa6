"""What a run will take of this machine: time from a few real steps, memory and disk. Nothing is written.

The steps change the objective's weights; it is of no use afterwards but for more such steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mefem_cli.engine import allocator, distributed
from mefem_cli.engine.cache import free_memory
from mefem_cli.engine.device import Device
from mefem_cli.engine.fit import MAX_REFERENCE_FACES, MIN_REFERENCE_FACES, Trainer
from mefem_cli.engine.order import FaceOrder
from mefem_cli.engine.plan import Plan, TrainOptions
from mefem_cli.engine.resources import peak_host_memory
from mefem_cli.engine.stream import Batch, ImageStream

MIN_TIMED_STEPS, MAX_TIMED_STEPS = 4, 8  # in the time given, if all goes well
TELLING_FACES, MOST_WARM_UPS, FACTOR = 16, 4, 4  # of a step, times the seconds given, from one size to the next
MAX_READ_FACES = 64
FLOAT_BYTES = 4  # of weights, gradients and each of AdamW's two moments, on any device
REPORT_BYTES = 3_000_000  # report.html, metrics, log


@dataclass(frozen=True)
class Trial:
    """What a few training steps took."""

    num_faces: int  # of a timed step
    num_steps: int  # that were timed
    step_seconds: float  # the median
    update_seconds: float  # of that for the optimiser and the EMA, whatever the number of faces
    forward_seconds: float  # of a forward pass, per face
    kept_bytes: float  # for the backward pass, per face
    peak_bytes: int | None  # of memory while they ran: of the device, on a CPU of the process

    def seconds_of(self, num_faces: float) -> float:
        """Return the seconds of a step of so many faces."""
        return self.update_seconds + max(self.step_seconds - self.update_seconds, 0.0) * num_faces / self.num_faces


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    trial: Trial
    read_seconds: float  # to read and decode a face, all threads together
    step_seconds: float  # of a global batch
    seconds: float  # of the whole run
    watch_share: float  # of `seconds`, for the measures at the end of each epoch
    memory_bytes: int | None  # peak, of each process
    memory_is_measured: bool
    memory_free: int


def make_trainer(
    objective: Any, stream: ImageStream, order: FaceOrder, plan: Plan, device: Device, options: TrainOptions
) -> Trainer:
    """Return the engine's own trainer, whose run folder is never written to."""
    if not device.is_cuda:
        allocator.keep_freed_memory()
    nowhere = distributed.ReadOnlyRun(Path())
    trainer = Trainer(
        objective, stream, order, plan, device, nowhere, 0, activation_checkpointing=options.activation_checkpointing
    )
    trainer.objective.train()
    return trainer


def read_faces(stream: ImageStream, order: FaceOrder, device: Device, seed: int) -> tuple[torch.Tensor, float]:
    """Return some training faces, uint8 [n, 3, S, S] on the device, and the seconds per face that they took to read.

    n is 64 or the number of faces, and 2 at least: one face stands there twice.
    """
    rows = np.resize(order.epoch(seed, 0)[:MAX_READ_FACES], max(2, min(MAX_READ_FACES, len(order))))
    begun = time.perf_counter()
    (batch,) = stream.batches([rows], device.torch)
    return batch.images, (time.perf_counter() - begun) / len(rows)


def try_steps(trainer: Trainer, faces: torch.Tensor, most: int, seconds: float) -> Trial:
    """Take real steps of up to `most` faces, timed ones for about so many seconds and some before that to warm up.

    The first ones, of one face and of two, show what the backward pass keeps of a face: the second keeps that much
    more.
    """
    kept_one, kept_two = (_weigh_step(trainer, faces[:number]) for number in (1, 2))
    some = _choose_faces(trainer, faces, most, seconds)
    num_faces = len(some)
    if trainer.device.is_cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device.torch)
    times: list[float] = []
    while len(times) < MAX_TIMED_STEPS and sum(times) + max(times, default=0.0) < seconds:
        times.append(_take_step(trainer, some))
    part = some[: math.ceil(num_faces / 4)]
    return Trial(
        num_faces=num_faces,
        num_steps=len(times),
        step_seconds=float(np.median(times)),
        update_seconds=_time_update(trainer),
        forward_seconds=_time_forward(trainer, part) / len(part),
        kept_bytes=max(kept_two - kept_one, 0),
        peak_bytes=_peak_memory(trainer.device),
    )


def _choose_faces(trainer: Trainer, faces: torch.Tensor, most: int, seconds: float) -> torch.Tensor:
    """Return as many faces as a timed step has time for, up to `most`.

    Few faces on a busy machine take as long as many, so that a step of two says nothing of one of 64: slow steps are
    only believed from `TELLING_FACES` on, or when time is up.
    """
    begun, num_faces = time.perf_counter(), min(2, most)
    while True:
        some = faces.repeat(math.ceil(num_faces / len(faces)), 1, 1, 1)[:num_faces]
        latest = min(_take_step(trainer, some) for _ in range(2))  # the first of a size is slow
        is_slow = latest > seconds / MIN_TIMED_STEPS
        is_late = time.perf_counter() - begun > MOST_WARM_UPS * seconds
        if num_faces == most or (is_slow and (num_faces >= TELLING_FACES or is_late)):
            return some
        num_faces = min(most, FACTOR * num_faces)


def _take_step(trainer: Trainer, faces: torch.Tensor) -> float:
    """Take a training step of just these faces; return its seconds."""
    num_faces = len(faces)
    trainer.plan = replace(trainer.plan, batch_size=num_faces, accumulate=1)
    trainer.part, trainer.accumulate = slice(0, num_faces), 1
    begun = time.perf_counter()
    trainer._train_step(Batch(faces, np.arange(num_faces), np.ones(num_faces, dtype=bool)))
    trainer.skipped.item()  # waits for the device
    return time.perf_counter() - begun


def _weigh_step(trainer: Trainer, faces: torch.Tensor) -> int:
    """Take a training step; return the bytes that it kept for the backward pass."""
    kept: dict[int, int] = {}  # bytes by address, as many tensors are views of one storage

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _take_step(trainer, faces)
    return sum(kept.values())


def _time_update(trainer: Trainer) -> float:
    """Return the seconds of the optimiser's step and the EMA, with the gradients that are there."""
    begun = time.perf_counter()
    trainer._optimizer_step(torch.zeros((), device=trainer.device.torch))
    trainer.objective.after_step(trainer.step, trainer.plan.total_steps)
    trainer.skipped.item()  # waits for the device
    return time.perf_counter() - begun


@torch.no_grad()
def _time_forward(trainer: Trainer, faces: torch.Tensor) -> float:
    draws = trainer.device.put(trainer.objective.draw(len(faces), torch.Generator().manual_seed(0)))
    begun = time.perf_counter()
    with trainer.device.autocast():
        terms, _ = trainer.objective(faces, draws)
    torch.stack(list(terms.values())).sum().item()
    return time.perf_counter() - begun


def _peak_memory(device: Device) -> int | None:
    return torch.cuda.max_memory_allocated(device.torch) if device.is_cuda else peak_host_memory()


def estimate_run(
    trial: Trial, read_seconds: float, trainer: Trainer, plan: Plan, num_monitor: int, processes: int, cache_bytes: int
) -> Estimate:
    """Return what a run by this plan takes, judged from a trial.

    Several GPUs are taken to be as many times as fast; processes on a CPU share its cores.
    """
    device = trainer.device
    share = plan.batch_size / (processes if device.is_cuda else 1)
    computing, reading = trial.seconds_of(share), read_seconds * share
    # On a CPU decoding takes its time from the step; beside a GPU it only counts where it is slower.
    step_seconds = max(computing, reading) if device.is_cuda else computing + reading
    later_steps = computing if cache_bytes else step_seconds
    num_reference = min(max(len(trainer.rows) // 10, MIN_REFERENCE_FACES), MAX_REFERENCE_FACES, len(trainer.rows))
    forward_passes = 2 * num_monitor + num_reference if num_monitor else 0  # features and losses; mean targets
    watching = (plan.epochs + 1) * forward_passes * trial.forward_seconds
    first_steps = min(plan.total_steps, plan.steps_per_epoch)
    seconds = first_steps * step_seconds + (plan.total_steps - first_steps) * later_steps + watching
    micro_batch = math.ceil(plan.batch_size / processes / plan.accumulate)
    memory = trial.peak_bytes
    if memory is not None:
        memory += round(trial.kept_bytes * (micro_batch - trial.num_faces))
        if not device.is_cuda:  # a checkpoint is copied before it is written
            memory += checkpoint_bytes(trainer.objective) + cache_bytes
    return Estimate(
        trial=trial,
        read_seconds=read_seconds,
        step_seconds=step_seconds,
        seconds=seconds,
        watch_share=watching / seconds if seconds else 0.0,
        memory_bytes=memory,
        memory_is_measured=device.is_cuda and micro_batch == trial.num_faces,
        memory_free=torch.cuda.mem_get_info(device.torch)[0] if device.is_cuda else free_memory(),
    )


def checkpoint_bytes(objective: Any) -> int:
    """Return the size of last.ckpt: all weights, and two moments of those that are trained."""
    trained = sum(one.numel() for one in objective.parameters() if one.requires_grad)
    return FLOAT_BYTES * (sum(one.numel() for one in objective.state_dict().values()) + 2 * trained)


def encoder_bytes(objective: Any) -> int:
    """Return the size of the encoders that a run writes."""
    encoders = objective.encoders().values()
    return FLOAT_BYTES * sum(value.numel() for encoder in encoders for value in encoder.state_dict().values())


def disk_bytes(objective: Any, keep: int) -> int:
    """Return what a run folder takes in the end, with `keep` more pairs of encoders; while a checkpoint is written,
    the one before it is there too.
    """
    return checkpoint_bytes(objective) + (keep + 1) * encoder_bytes(objective) + REPORT_BYTES
