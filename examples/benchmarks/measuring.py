"""Measuring what takes turns, so that what disturbs the machine disturbs all, and printing it as Markdown."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Seconds = Mapping[str, list[float]]  # "wall" and "cpu"


def interleaved(tasks: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run the tasks in turn, again and again, so that what disturbs the machine disturbs all; one turn warms up."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            if turn:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def median(seconds: Seconds, clock: str) -> float:
    """Return the median of one clock."""
    return statistics.median(seconds[clock])


def ratio(seconds: Mapping[str, Seconds], name: str, baseline: str, clock: str) -> float:
    """Return the median over turns of a task's time to the baseline's in the same turn."""
    pairs = zip(seconds[name][clock], seconds[baseline][clock], strict=True)
    return statistics.median(one / other for one, other in pairs)


def table(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}; load {os.getloadavg()[0]:.1f}\n")
    lines = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)
