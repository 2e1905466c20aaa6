"""Closed forms of what changes during training; each is a pure function of the step and the planned length."""

from __future__ import annotations

import math

PAPER_BATCH = 2048
PAPER_LEARNING_RATE = 1e-3  # at that batch
PAPER_EMA_GAP = 0.004  # 1 - .996
MIN_FORGETTING_STEPS = 20  # the EMA gap times the steps: at most e^(-20/2) of the initial target remains
MAX_EMA_GAP = 0.05


def linear(start: float, end: float, step: int, total_steps: int) -> float:
    """Return the value at `step` of a straight line from `start` at step 0 to `end` at the last step."""
    return start + (end - start) * min(step / max(total_steps - 1, 1), 1.0)


def cosine(start: float, end: float, step: int, total_steps: int) -> float:
    """Return the value at `step` of half a cosine from `start` at step 0 to `end` at the last step."""
    progress = min(step / max(total_steps - 1, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(peak: float, step: int, total_steps: int, warmup_steps: int, final: float = 1e-6) -> float:
    """Return the learning rate: linear from peak / 5 to `peak` over the warm-up, then cosine to `final`.

    The paper's 2e-4 -> 1e-3 is the factor of 5.
    """
    if step < warmup_steps:
        return peak / 5 + (peak - peak / 5) * step / warmup_steps
    return cosine(peak, final, step - warmup_steps, total_steps - warmup_steps)


def small_data_learning_rate(batch_size: int) -> float:
    """Return the peak learning rate for small data: square-root scaling from 1e-3 at 2,048, not under 5e-4."""
    return max(5e-4, PAPER_LEARNING_RATE * math.sqrt(batch_size / PAPER_BATCH))


def small_data_ema_start(batch_size: int, total_steps: int) -> float:
    """Return where the EMA momentum starts so that short runs forget their initial target.

    With a linear schedule from START to 1 the initial target's share after all steps is about
    exp(-(1 - START) * total_steps / 2). So the gap 1 - START is at least 20 / total_steps, which leaves e^-10; the
    gap is capped at .05, which is reached by runs under 400 steps.

    >>> small_data_ema_start(64, 2000)
    0.99
    """
    gap = max(PAPER_EMA_GAP * batch_size / PAPER_BATCH, MIN_FORGETTING_STEPS / max(total_steps, 1))
    return 1 - min(gap, MAX_EMA_GAP)
