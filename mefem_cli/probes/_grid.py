"""Trains many heads at once: one for each learning rate and weight decay, in one pass over the features.

Parameters carry a leading dimension G, one slice per head, so a step is a few large matrix products instead of G small
ones. Heads share the first values, the batches and their order; a sum of losses gives each its own gradient. Learning
rate, weight decay and epoch are chosen on one inner fold, and one head is trained again on all training rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mefem_cli.engine import allocator
from mefem_cli.engine import device as devices
from mefem_cli.errors import UsageError
from mefem_cli.probes import Fitted, Fold, State

WARMUP_SHARE = 0.1  # of the steps; then cosine to 0
PATIENCE = 6  # epochs without a new best loss in the whole grid
EVALUATION_ROWS = 512
MIN_VALUES_FOR_THREADS = 1 << 18  # feature values in a batch


@dataclass(frozen=True)
class Recipe:
    """How heads are trained; every learning rate is tried with every weight decay."""

    learning_rates: str
    weight_decays: str
    epochs: int
    head_batch: int

    def __post_init__(self) -> None:
        for name in ("epochs", "head_batch"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, name)}: wanted a whole number from 1")
        if min(self.rates) <= 0 or min(self.decays) < 0:
            raise UsageError("--learning-rates want numbers above 0, --weight-decays numbers from 0")

    @property
    def rates(self) -> list[float]:
        """The learning rates to choose among."""
        return _numbers("--learning-rates", self.learning_rates)

    @property
    def decays(self) -> list[float]:
        """The weight decays to choose among."""
        return _numbers("--weight-decays", self.weight_decays)


def _numbers(flag: str, given: str) -> list[float]:
    try:
        return [float(word) for word in given.split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {given}: wanted numbers with commas between, such as 1e-4,1e-3") from error


class StackedAdamW:
    """torch's AdamW, with a learning rate and a weight decay for each slice of parameters [G, ...].

    Slices are handed to it as parameter groups that share memory with the stack. Biases, norms and the query do not
    decay.
    """

    def __init__(self, parameters: list[nn.Parameter], grid: list[tuple[float, float]]):
        self.stacks = parameters
        self.rates = [rate for rate, _ in grid for _ in (True, False)]  # of each group: matrices, then the others
        self.slices = [[one.detach()[head] for one in parameters] for head in range(len(grid))]
        groups = []
        for slices, (rate, decay) in zip(self.slices, grid, strict=True):
            groups.append({"params": [one for one in slices if one.ndim >= 2], "lr": rate, "weight_decay": decay})
            groups.append({"params": [one for one in slices if one.ndim < 2], "lr": rate, "weight_decay": 0.0})
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        self.steps = 0

    def step(self, rate_factor: float) -> None:
        """Update all heads, their learning rates multiplied by `rate_factor`, and clear the gradients."""
        self.steps += 1
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor
        for index, stacked in enumerate(self.stacks):
            assert stacked.grad is not None
            for slices, gradient in zip(self.slices, stacked.grad, strict=True):
                slices[index].grad = gradient
            stacked.grad = None
        self.optimiser.step()


@lru_cache(maxsize=1)
def _device(name: str) -> torch.device:
    chosen = devices.choose_device(name, "fp32")
    devices.announce(chosen)
    return chosen.torch


@contextmanager
def _threads_for(batch_values: int) -> Iterator[None]:
    """Use one thread where a step is so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    if batch_values < MIN_VALUES_FOR_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stack(heads: int, *shape: int, fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Return a parameter [G, *shape] of equal slices, uniform in +-1/sqrt(fan_in) as torch's Linear starts."""
    bound = 1 / math.sqrt(fan_in)
    one = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(one.expand(heads, *shape).clone())


Build = Callable[[int, int, torch.Generator], nn.Module]  # (heads, outputs, generator) -> a head: x -> [G, B, outputs]
Look = Callable[[Any, torch.Tensor], torch.Tensor]  # (head, tokens [B, T, D]) -> attention [G, B, T]


def fit_predict(fold: Fold, recipe: Recipe, build: Build, look: Look | None = None) -> Fitted:
    """Choose learning rate, weight decay and epoch on one inner fold, train on all rows, predict the test fold.

    `look` tells what a head looks at; `Fitted.attention` is that of the test fold.
    """
    device = _device(fold.device)
    if device.type == "cpu":
        allocator.keep_freed_memory()  # a step of 20 heads frees over 300 MB of gradients and activations
    with _threads_for(fold.features[0].size * recipe.head_batch):
        return _choose_and_predict(_Trainer(fold, recipe, build, device), fold, recipe, look)


def restore(state: State, build: Build) -> nn.Module:
    """Return a fitted head, alone in its grid (G = 1)."""
    head = build(1, int(state["outputs"]), torch.Generator())
    for name, parameter in head.named_parameters():
        parameter.data = torch.from_numpy(np.array(state[f"head.{name}"], np.float32))[None]
    return head


def predict(state: State, features: np.ndarray, build: Build) -> np.ndarray:
    """Return what a fitted head reads from features [m, ...]: numbers (m,), or class probabilities [m, C]."""
    head = restore(state, build)
    output = _in_parts(features, np.arange(len(features)), torch.device("cpu"), lambda batch: head(batch)[0]).double()
    if "scale_of_target" in state:
        return output[:, 0].numpy() * state["scale_of_target"] + state["mean_of_target"]
    return output.softmax(dim=1).numpy()


@torch.no_grad()
def _in_parts(
    features: np.ndarray, rows: np.ndarray, device: torch.device, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return what is computed from some rows of features, a few at a time, on the host."""
    parts = np.split(rows, np.arange(EVALUATION_ROWS, len(rows), EVALUATION_ROWS))
    return torch.cat([compute(torch.from_numpy(features[part]).to(device).float()).cpu() for part in parts])


def _choose_and_predict(trainer: _Trainer, fold: Fold, recipe: Recipe, look: Look | None) -> Fitted:
    grid = list(product(recipe.rates, recipe.decays))
    is_valid = fold.inner == fold.held_out[0]
    losses = trainer.train(grid, ~is_valid, recipe.epochs, is_valid)[1]  # [epochs, G]
    epoch, best = np.unravel_index(int(np.argmin(losses)), losses.shape)
    rate, decay = grid[best]
    head, _ = trainer.train([grid[best]], np.ones_like(is_valid), int(epoch) + 1)
    chosen = {"learning_rate": rate, "weight_decay": decay, "epochs": int(epoch) + 1}
    attention = None if look is None else trainer.see(lambda batch: look(head, batch)[0], fold.test).numpy()
    return Fitted(trainer.predict(head, fold.test), chosen, trainer.state(head), attention)


class _Trainer:
    """The data of one fold as tensors, and the training of stacked heads on them."""

    def __init__(self, fold: Fold, recipe: Recipe, build: Build, device: torch.device):
        self.fold, self.recipe, self.build, self.device = fold, recipe, build, device
        self.is_regression = fold.num_classes == 0
        if self.is_regression:
            self.offset, self.scale = fold.target.mean(), fold.target.std() or 1.0
            self.target = torch.from_numpy((fold.target - self.offset) / self.scale).float()[:, None]  # [n, 1]
        else:
            self.target = torch.from_numpy(fold.target).long()  # [n]

    def train(
        self, grid: list[tuple[float, float]], rows: np.ndarray, epochs: int, valid: np.ndarray | None = None
    ) -> tuple[nn.Module, np.ndarray]:
        """Train a head for each (learning rate, weight decay) on a mask of training rows.

        Returns the heads and their losses on `valid` after each epoch, [epochs, G] (empty without it); ends early
        where no head of the grid has become the best for a while. The schedule is that of `recipe.epochs`, so training
        again for fewer epochs repeats its beginning.
        """
        generator = torch.Generator().manual_seed(self.fold.seed)
        head = self.build(len(grid), max(self.fold.num_classes, 1), generator).to(self.device)
        optimiser = StackedAdamW(list(head.parameters()), grid)
        indices = torch.from_numpy(np.flatnonzero(rows))
        steps_an_epoch = math.ceil(len(indices) / self.recipe.head_batch)
        total = steps_an_epoch * self.recipe.epochs
        losses = []
        for _ in range(epochs):
            shuffled = indices[torch.randperm(len(indices), generator=generator)]
            for batch in shuffled.chunk(steps_an_epoch):
                self.losses(head, batch).sum().backward()
                optimiser.step(schedule(optimiser.steps, total))
            if valid is not None:
                losses.append(self.evaluate(head, torch.from_numpy(np.flatnonzero(valid))))
                if len(losses) - 1 - int(np.argmin(np.min(losses, axis=1))) >= PATIENCE:
                    break
        return head, np.array(losses)

    def batch(self, rows: np.ndarray) -> torch.Tensor:
        """Return features of some rows; numpy gathers them, as torch gathers float16 value by value on a CPU."""
        return torch.from_numpy(self.fold.features[rows]).to(self.device).float()

    def losses(self, head: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of each head on training rows, [G]: squared error or cross entropy."""
        output = head(self.batch(self.fold.train[rows.numpy()]))  # [G, B, outputs]
        target = self.target[rows].to(self.device)
        if self.is_regression:
            return (output - target).square().mean(dim=(1, 2))
        repeated = target.expand(len(output), -1)
        return functional.cross_entropy(output.transpose(1, 2), repeated, reduction="none").mean(dim=1)

    @torch.no_grad()
    def evaluate(self, head: nn.Module, rows: torch.Tensor) -> np.ndarray:
        """Return the mean loss of each head over training rows, [G]; a head that diverged loses."""
        sums = torch.stack([self.losses(head, part) * len(part) for part in rows.split(EVALUATION_ROWS)])  # [parts, G]
        return torch.nan_to_num(sums.sum(dim=0) / len(rows), nan=torch.inf).cpu().numpy()

    def predict(self, head: nn.Module, rows: np.ndarray) -> np.ndarray:
        """Return predictions of a single head (G = 1): (m,) in the target's unit, or class probabilities [m, C]."""
        output = self.see(lambda batch: head(batch)[0], rows).double()  # [m, outputs]
        if self.is_regression:
            return output[:, 0].numpy() * self.scale + self.offset
        return output.softmax(dim=1).numpy()

    def see(self, compute: Callable[[torch.Tensor], torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        """Return what is computed from the features of some rows, on the host."""
        return _in_parts(self.fold.features, rows, self.device, compute)

    def state(self, head: nn.Module) -> State:
        """Return what a single head (G = 1) is made of; `predict` reads it."""
        state = {f"head.{name}": one.detach()[0].cpu().numpy() for name, one in head.named_parameters()}
        state["outputs"] = np.array(max(self.fold.num_classes, 1))
        if self.is_regression:
            state |= {"mean_of_target": np.array(self.offset), "scale_of_target": np.array(self.scale)}
        return state


def schedule(step: int, total: int) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then cosine to 0."""
    warmup = max(1, round(total * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
