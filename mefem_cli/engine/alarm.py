"""Is the run healthy? One rule for the alarm during training and for the verdict in the report.

A collapse has two faces, and the loss shows neither: it falls in both.

- The encoder gives nearly the same answer for every face: its features vary half as much over faces as before training
  (`feature_std`) while the predictor is no better than one that knows only the position (`loss_over_position` over
  .95), or they vary along fewer than two directions (`rankme_centred`); in two epoch rows on end.
- The predictor never learns more than the position: after the warm-up `loss_over_position` stays at 1 (.98 or more)
  and has stopped falling, over five epochs and 100 steps.

The limits come from runs on rendered and generated faces. 47 that learned never had less than .45 of the initial
`feature_std` (and a ratio under .6 by then) nor a `rankme_centred` under 4.7, and passed a ratio of 1 by step 240,
still falling. Runs whose target follows the source at once (EMA 0:0) fell to .1-.3 of the initial spread within an
epoch and kept ratios over 1.06. CLS features are not judged: their spread fell to .08 in runs that were fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mefem_cli import console
from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.errors import Diverged

Row = Mapping[str, Any]
Kind = Literal["unmeasured", "early", "healthy", "collapsed", "position only", "diverged"]
BAD: tuple[Kind, ...] = ("collapsed", "position only", "diverged")
COLLAPSED_SPREAD = 0.5  # of the initial feature_std
COLLAPSED_DIRECTIONS = 2.0  # rankme_centred
BLIND_RATIO = 0.95  # loss_over_position over which a small spread is a collapse and not only a small scale
LEARNED_RATIO = 0.98  # loss_over_position under which something else than the position is known
STALLED_EPOCHS, STALLED_STEPS = 5, 100  # over so many epochs and steps at least ...
STALLED_SHARE = 0.98  # ... so much of the ratio is left: it has stopped falling
ROWS_KEPT = 2 * max(STALLED_EPOCHS, STALLED_STEPS)  # besides the first; an epoch may be one step


MEANING: dict[Kind, str] = {
    "unmeasured": "No faces were set aside to measure it on, so nothing here tells whether the encoder is healthy.",
    "early": "The predictor does not know more than the position yet; that comes within the first few hundred steps.",
    "healthy": "The features differ from face to face, and the predictor knows more than the position.",
    "collapsed": "The encoder gives nearly the same answer for every face, or the answers differ in one way only.",
    "position only": "What it sees of a face does not help the predictor, and the loss has stopped falling: nothing "
    "about faces is being learned.",
    "diverged": "The loss is no number any more: weights or activations have overflowed.",
}


@dataclass(frozen=True)
class Verdict:
    """What the epoch rows say: a word, what was measured, and what it means."""

    kind: Kind
    measured: str = ""
    meaning: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the alarm should sound."""
        return self.kind in BAD


def judge(epochs: Sequence[Row], warmup_steps: int = 0) -> Verdict:
    """Return the verdict on a run from its epoch rows so far, the one before the first step included."""
    if epochs and _has_diverged(epochs):
        return Verdict("diverged", f"{epochs[-1].get('skipped', 0)} steps skipped.", MEANING["diverged"])
    rows = [row for row in epochs if not math.isnan(_number(row, "loss_over_position"))]
    if not rows:
        kind: Kind = "unmeasured" if epochs else "early"
        return Verdict(kind, "", MEANING[kind])
    first, last = rows[0], rows[-1]
    kind = "early"
    if len(rows) > 2 and all(_is_collapsed(row, first) for row in rows[-2:]):
        kind = "collapsed"
    elif _is_stalled(rows, warmup_steps):
        kind = "position only"
    elif _number(last, "loss_over_position") < LEARNED_RATIO and not _is_collapsed(last, first):
        kind = "healthy"
    return Verdict(kind, _measures(last, first), MEANING[kind])


def advice(config: Row, kind: Kind) -> str:
    """Return what to try, from the resolved options, most likely first."""
    tries = []
    if config.get("predictor_depth") == 0 and kind != "diverged":
        tries.append("--predictor-depth 6, as without blocks the predictor never sees the source")
    start = str(config.get("ema", "")).partition(":")[0]
    if kind != "diverged" and _as_float(start) < 0.9:
        tries.append(f"--ema .99:1, as {config['ema']} lets the target follow the source at once")
    tries.append(f"--lr {float(config['lr']) / 3:.1g}" if _as_float(config.get("lr")) > 0 else "a lower --lr")
    if kind == "diverged" and config.get("precision") != "fp32":
        tries.append("--precision fp32")
    if kind == "position only":
        tries.append("more --epochs")
    return f"Try {'; '.join(tries)}."


class Alarm(Observer):
    """Says once per episode that the run has collapsed, why, and what to try; with `stop` it ends the run."""

    def __init__(self, config: Row, warmup_steps: int, stop: bool = False, earlier: Sequence[Row] = ()):
        self.config, self.stop = config, stop
        self.earlier = [row for row in earlier if row["kind"] == "epoch"]  # of the run that is resumed
        self.episodes = _Episodes(warmup_steps)

    def see(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Judge the run after an epoch. Raises Diverged at the start of an episode if it is to stop."""
        if row["kind"] != "epoch":
            return
        for earlier in self.earlier:
            if earlier["step"] < row["step"]:
                self.episodes.begins(earlier)
        self.earlier = []
        verdict = self.episodes.begins(row)
        if verdict is None:
            return
        named = "collapse" if verdict.kind == "collapsed" else verdict.kind
        what = f"{named} at epoch {row['epoch']} (step {row['step']}): {verdict.measured}"
        lines = (what, f"{verdict.meaning} {advice(self.config, verdict.kind)}")
        if trainer.world.is_first:
            console.warn("\n  ".join(lines))
        for line in lines:
            trainer.run.log(line)
        if self.stop:
            raise Diverged(
                f"stopped by --stop-on-collapse at epoch {row['epoch']}; {trainer.run.path} has a checkpoint"
            )


class _Episodes:
    """Follows a run epoch by epoch and says where an episode begins; it ends when the run is healthy again."""

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.rows: list[Row] = []  # the first and the last ones
        self.lasts = False

    def begins(self, row: Row) -> Verdict | None:
        """Take in the next epoch row; return the verdict if it is bad for the first time."""
        self.rows = [*self.rows[:1], *self.rows[1:][-ROWS_KEPT:], row]
        verdict = judge(self.rows, self.warmup_steps)
        begins = verdict.is_bad and not self.lasts
        self.lasts = verdict.is_bad or (self.lasts and verdict.kind != "healthy")
        return verdict if begins else None


def episodes(epochs: Sequence[Row], warmup_steps: int = 0) -> list[tuple[Row, Verdict]]:
    """Return the epoch rows at which the alarm sounds in a run, each with its verdict."""
    follower = _Episodes(warmup_steps)
    begun = ((row, follower.begins(row)) for row in epochs)
    return [(row, verdict) for row, verdict in begun if verdict]


def _is_collapsed(row: Row, first: Row) -> bool:
    is_narrow = _number(row, "feature_std") < COLLAPSED_SPREAD * _number(first, "feature_std")
    few = min(COLLAPSED_DIRECTIONS, _number(first, "rankme_centred") / 2)
    return (is_narrow and _number(row, "loss_over_position") > BLIND_RATIO) or _number(row, "rankme_centred") < few


def _is_stalled(rows: Sequence[Row], warmup_steps: int) -> bool:
    last = rows[-1]
    window = [row for row in rows if row["step"] >= warmup_steps]
    before = [
        row
        for row in window
        if row["epoch"] <= last["epoch"] - STALLED_EPOCHS and row["step"] <= last["step"] - STALLED_STEPS
    ]
    if not before:
        return False
    ratios = [row["loss_over_position"] for row in window[window.index(before[-1]) :]]
    return min(ratios) >= LEARNED_RATIO and ratios[-1] >= STALLED_SHARE * ratios[0]


def _has_diverged(epochs: Sequence[Row]) -> bool:
    """Whether the encoder's outputs are not finite, or the losses of two epochs on end; one skipped step is not it."""
    outputs = [name for name in ("monitor_loss", "feature_std") if name in epochs[-1]]
    losses = [_number(row, "loss") for row in epochs[-2:] if "loss" in row]
    is_lost = len(losses) == 2 and all(math.isnan(loss) for loss in losses)
    return is_lost or any(math.isnan(_number(epochs[-1], name)) for name in outputs)


def _measures(row: Row, first: Row) -> str:
    """Return what the verdict rests on, then and now."""
    changes = [
        f"{name} {_number(first, name):.3g} -> {_number(row, name):.3g}" for name in ("feature_std", "rankme_centred")
    ]
    ratio = _number(row, "loss_over_position")
    return f"{', '.join(changes)}, loss_over_position {ratio:.2f} (1: the predictor knows only the position)."


def _number(row: Row, name: str) -> float:
    """Return a number of a row; NaN where it is missing or null."""
    return _as_float(row.get(name))


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
