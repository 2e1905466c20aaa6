"""Which metrics are shown, what they are called, and how a value and its interval are written."""

from __future__ import annotations

import math

from mefem_cli.evaluation.bootstrap import Interval

# Shown in a table, in this order; JSON has all metrics.
SHOWN = {"regression": ("r2", "mae"), "classification": ("accuracy", "auroc")}
TITLES = {"r2": "r2", "mae": "MAE", "accuracy": "accuracy", "auroc": "AUROC"}
DECIMALS, MOST_DECIMALS = 3, 6  # of a number below 10, and where two numbers would look alike


def cell(interval: Interval, sign: str = "") -> str:
    """Return a value with its interval: 0.412 [0.371, 0.450].

    It has more than three decimals where the ends, or the end next to 0 and 0, would look alike.
    """
    low, high = interval.low, interval.high
    gaps = [high - low, *([min(abs(low), abs(high))] if interval.excludes_zero else [])]
    decimals = max((_decimals(gap) for gap in gaps), default=DECIMALS)
    return f"{number(interval.value, sign, decimals)} [{number(low, '', decimals)}, {number(high, '', decimals)}]"


def _decimals(gap: float) -> int:
    """Return how many decimals a number wants for a difference of `gap` to be seen."""
    if not (math.isfinite(gap) and gap > 0):
        return DECIMALS
    return min(max(DECIMALS, -math.floor(math.log10(gap))), MOST_DECIMALS)


def number(value: float, sign: str = "", decimals: int = DECIMALS) -> str:
    """Return a number with three decimals below 10, else four digits at least: r2 0.412, MAE 12.31."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 0.5 * 10**-decimals:
        value, sign = 0.0, ""  # no "-0.000"
    if abs(value) < 10 or decimals > DECIMALS:
        return f"{value:{sign}.{decimals}f}"
    return f"{value:{sign}#.4g}".rstrip(".")
