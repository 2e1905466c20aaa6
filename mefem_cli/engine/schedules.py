"""Closed forms of what changes during training; each is a pure function of the step and the planned length."""

from __future__ import annotations

import math

PAPER_BATCH = 2048
PAPER_LEARNING_RATE = 1e-3  # at that batch
PAPER_EMA_GAP = 0.004  # 1 - .996
LEAST_LEARNING_RATE = 1e-4
LATE_STEPS = 5_000  # in runs of so many steps the target follows late; measured on 460 to 1,400
LATE_GAP_STEPS = 4.5  # the EMA gap at the end times the steps: e^(-4.5/2) of the initial target remains
FORGETTING_GAP_STEPS = 20  # in longer runs, the gap at the start times the steps: at most e^(-20/2) remains
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
    """Return the peak learning rate for small data: square-root scaling from 1e-3 at 2,048, not under 1e-4."""
    return max(LEAST_LEARNING_RATE, PAPER_LEARNING_RATE * math.sqrt(batch_size / PAPER_BATCH))


def small_data_ema(batch_size: int, total_steps: int) -> tuple[float, float]:
    """Return START and END of the EMA momentum for small data.

    A linear schedule whose gaps to 1 sum up to s leaves the share e^-s of the initial target in the last one. Up to
    5,000 steps START is 1 and END 1 - 4.5 / total_steps: the target stays as it began while the source learns, follows
    in the second half, and keeps a share of about e^-2.25. Longer runs go from 1 - max(.004 B / 2048, 20 / total_steps)
    to 1, and keep e^-10 or less. Gaps are .05 at most.

    >>> small_data_ema(64, 1500), small_data_ema(64, 20_000)
    ((1.0, 0.997), (0.999, 1.0))
    """
    if total_steps <= LATE_STEPS:
        return 1.0, 1 - min(LATE_GAP_STEPS / max(total_steps, 1), MAX_EMA_GAP)
    gap = max(PAPER_EMA_GAP * batch_size / PAPER_BATCH, FORGETTING_GAP_STEPS / total_steps)
    return 1 - min(gap, MAX_EMA_GAP), 1.0
