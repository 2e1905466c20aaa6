"""What a step measures, averaged over steps and processes; it stays on the device until a log line is due."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from mefem_cli.engine.fit import Trainer

AVERAGED = ("loss", "grad_norm", "images_per_second", "data_wait")  # over an epoch; of the rest the last value counts


class Meter:
    """Averages since the last log line, and the log lines since the last epoch row."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.schedules: dict[str, float] = {}  # values of the last step
        self.sums: dict[str, torch.Tensor] = {}  # over the steps of this window, this process's share
        self._epoch_rows: list[tuple[int, dict[str, Any]]] = []
        self._reset_window()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run of any number of processes needs to write the same rows; all must call it."""
        return {
            "sums": dict(zip(self.sums, self._summed(), strict=True)),
            "steps": self.steps,
            "epoch_rows": list(self._epoch_rows),
            "schedules": self.schedules,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run; its sums, which are all processes', go to the first one."""
        share = float(self.trainer.world.is_first)
        self.sums = {name: share * value.to(self.trainer.device.torch) for name, value in state["sums"].items()}
        self.steps, self._epoch_rows = state["steps"], list(state["epoch_rows"])
        self.schedules = state.get("schedules", {})

    def _reset_window(self) -> None:
        self.sums = {}
        self.steps = self._timed_steps = 0
        self._begun = time.perf_counter()
        self._waited_before = self.trainer.stream.waited

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self._timed_steps += 1  # unlike `steps` without those before a resume

    def _summed(self) -> torch.Tensor:
        """Return the window's sums over all processes, float32 on the device, [number of sums]."""
        if not self.sums:
            return torch.zeros(0)
        return self.trainer.world.sum(torch.stack([value.float() for value in self.sums.values()]))

    def row(self) -> dict[str, Any]:
        """Return the row of the steps since the last one; here the host waits for the device."""
        trainer, plan = self.trainer, self.trainer.plan
        means = dict(zip(self.sums, (self._summed() / self.steps).tolist(), strict=True))
        seconds = time.perf_counter() - self._begun
        (data_wait,) = trainer.world.largest((trainer.stream.waited - self._waited_before) / seconds)
        row = {
            "step": trainer.step,
            "epoch": (trainer.step - 1) // plan.steps_per_epoch,
            "samples": trainer.step * plan.batch_size,
            **means,
            "lr": plan.learning_rate(trainer.step - 1),
            "weight_decay": plan.weight_decay_at(trainer.step - 1),
            **self.schedules,
            "skipped": int(trainer.skipped.item()),
            "images_per_second": round(self._timed_steps * plan.batch_size / seconds, 2),
            "data_wait": round(data_wait, 4),
        }
        self._epoch_rows.append((self.steps, row))
        self._reset_window()
        return row

    def epoch_row(self) -> dict[str, Any]:
        """Return the epoch's mean of losses and rates and the last value of the rest."""
        steps = [count for count, _ in self._epoch_rows]
        last = dict(self._epoch_rows[-1][1])
        for name in AVERAGED:
            last[name] = float(np.average([row[name] for _, row in self._epoch_rows], weights=steps))
        self._epoch_rows.clear()
        self._reset_window()
        return {name: value for name, value in last.items() if name not in ("step", "epoch", "samples")}
