"""report.html of a training run: a verdict in words, the curves it rests on and how to read them, and what was run.

It is written after epochs, so that a running job can be looked at, and when the run ends, whatever ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli import console
from mefem_cli.engine import alarm, monitors
from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.errors import Diverged, MefemError
from mefem_cli.reports import curves, html
from mefem_cli.reports.curves import Panel
from mefem_cli.reports.panels import panels, start_middle_end
from mefem_cli.stores import product
from mefem_cli.stores.runs import Run

if TYPE_CHECKING:
    from mefem_cli.pretraining import Job

Row = dict[str, Any]
REPORT = "report.html"
MAX_SHARE_OF_TIME, FIRST_COST = 0.02, 1.5  # that reports of a running job may take; s, before one has been timed
NAMED_CROPS = 200
SLOW_DATA = 0.05  # of the time spent waiting for pictures
HEADLINES: dict[alarm.Kind, str] = {
    "healthy": "Healthy",
    "collapsed": "Collapsed",
    "position only": "Not learning: it knows only the position",
    "diverged": "Diverged",
    "early": "Too early to tell",
    "unmeasured": "Not measured",
}
TOO_SHORT = "Ended before it learned"  # the verdict on a finished run for which it is too early
STYLE = (
    f"<style>{curves.VARIABLES}"
    + """
:root { --good: #1f9d6b; --bad: #c8322b; }
@media (prefers-color-scheme: dark) { :root { --good: #4fd0a0; --bad: #ff7b70; } }
.verdict { border-left-color: var(--soft); } .verdict.good { border-left-color: var(--good); }
.verdict.bad { border-left-color: var(--bad); } .verdict strong { font-size: 1.3rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem 1.5rem; }
.panels figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; } .panels h3 { font-size: 1rem; margin: 0 0 .2rem; } .panels svg { width: 100%; height: auto; }
.panels figcaption { font-size: .85rem; } td { overflow-wrap: anywhere; }
</style>"""
)


@dataclass(frozen=True)
class About:
    """What the page tells beside the metrics."""

    facts: Sequence[tuple[str, str]]  # the data and the plan, name and value
    warmup_steps: int
    total_epochs: int
    corrupt: Callable[[], Sequence[str]] = tuple  # names the crops that could not be read so far
    why_unwatched: str = ""  # why no faces were set aside


def describe(job: Job) -> About:
    """Return what the page tells of a training job."""
    plan, crops, stream = job.plan, job.crops, job.stream

    def corrupt() -> list[str]:
        row_of = {name: row for row, name in enumerate(crops.ids)} if stream.corrupt else {}
        return [crops.describe(row_of[name]) for name in stream.corrupt]

    facts = {
        "crops": f"{len(crops)} in {', '.join(job.config['crops'])}",
        "trained on": f"{plan.steps_per_epoch * plan.batch_size} faces in an epoch",
        "set aside": f"{len(job.monitor_rows)} faces, to measure health; never trained on",
        "labels": ", ".join(crops.labels) or "none",
        "plan": f"{plan.epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} faces ({plan.preset})",
        "learning rate": f"up to {plan.lr:.3g} after {plan.warmup_steps} steps, then falling",
        "EMA momentum": str(job.config.get("ema", "none")),
        "device": str(job.device),
    }
    why_unwatched = ""
    if not len(job.monitor_rows):
        why_unwatched = monitors.why_unwatched(len(crops), job.train_options.monitor)
        facts["set aside"] = "no faces"
    return About(list(facts.items()), plan.warmup_steps, plan.epochs, corrupt, why_unwatched)


class Reporter(Observer):
    """Writes the page after an epoch, as often as two per cent of the time allow."""

    def __init__(self, about: About):
        self.about = about
        self._begun = time.monotonic()
        self._cost = FIRST_COST  # of a page, seconds
        self._spent = 0.0

    def see(self, trainer: Trainer, row: Row) -> None:
        """Write the page if its share of the time is not used up."""
        begun = time.monotonic()
        is_due = self._spent + self._cost <= MAX_SHARE_OF_TIME * (begun - self._begun)
        if row["kind"] == "epoch" and trainer.world.is_first and is_due:
            write(trainer.run, self.about, "it is running")
            self._cost = time.monotonic() - begun
            self._spent += self._cost


def write(run: Run, about: About, state: str, has_diverged: bool = False) -> Path:
    """Write report.html and the curves under figures/; return the page's path.

    `state` says what the run is doing, or how it ended; `has_diverged` that it ended for steps that were not finite.
    """
    rows = list(run.metrics())
    epochs = [row for row in rows if row["kind"] == "epoch"]
    steps = [row for row in rows if row["kind"] == "step"]
    config = run.config()
    verdict = alarm.judge(epochs, about.warmup_steps)
    if has_diverged and not verdict.is_bad:
        verdict = alarm.Verdict("diverged", state, alarm.MEANING["diverged"])
    corrupt = about.corrupt()
    body = [
        STYLE,
        _verdict(verdict, config, headline(verdict, epochs, about)),
        html.points(_notes(epochs, about, corrupt)),
    ]
    drawn = [(panel, curves.draw(panel)) for panel in panels(steps, epochs) if not panel.is_empty]
    for panel, svg in drawn:
        product.write_text(run.figures / f"{panel.name}.svg", svg)
    body += [
        html.heading("Curves"),
        f'<div class="panels">{"".join(_figure(panel, svg) for panel, svg in drawn)}</div>',
    ]
    if corrupt:
        body += [html.heading("Crops that could not be read"), *_corrupt_crops(corrupt)]
    body += [html.heading("Data and plan"), html.table(("", ""), about.facts)]
    if epochs:
        body += [html.heading("Numbers"), _numbers(epochs)]
    body += [html.heading("Options"), html.table(("option", "value"), config.items())]
    page = html.page(f"Run {run.path.name}", _lead(epochs, about, state), body)
    product.write_text(run.path / REPORT, page)
    return run.path / REPORT


def write_end(run: Run, about: About, error: BaseException) -> None:
    """Write the page of a run that `error` ended early; trouble in writing must not hide what ended it."""
    reason = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    try:
        write(run, about, f"it ended early: {reason}", isinstance(error, Diverged))
    except (OSError, MefemError) as failure:
        console.warn(f"{run.path / REPORT} could not be written: {failure}")


def _lead(epochs: Sequence[Row], about: About, state: str) -> str:
    done = epochs[-1]["epoch"] if epochs else 0
    return f"Epoch {done} of {about.total_epochs}; {state}. Written {time.strftime('%Y-%m-%d %H:%M')}."


def headline(verdict: alarm.Verdict, epochs: Sequence[Row], about: About) -> str:
    """Return the verdict in a few words: for a run that is over it is never too early."""
    is_over = bool(epochs) and epochs[-1]["epoch"] >= about.total_epochs > 0
    return TOO_SHORT if is_over and verdict.kind == "early" else HEADLINES[verdict.kind]


def _verdict(verdict: alarm.Verdict, config: Row, headline: str) -> str:
    lines = [verdict.meaning, verdict.measured]
    if headline == TOO_SHORT:
        lines.append("What it says of faces is little more than what an untrained encoder says. Try more --epochs.")
    if verdict.is_bad:
        lines.append(alarm.advice(config, verdict.kind))
    kind = "bad" if verdict.is_bad else "good" if verdict.kind == "healthy" else ""
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    return f'<div class="callout verdict {kind}"><strong>{escape(headline)}</strong>{paragraphs}</div>'


def _notes(epochs: Sequence[Row], about: About, corrupt: Sequence[str]) -> Iterator[str]:
    """Yield what else should be known about the run, most important first."""
    last = epochs[-1] if epochs else {}
    if about.why_unwatched:
        yield f"Why not: {about.why_unwatched}. mefem probe can compare the encoder with that of --epochs 0."
    for row, verdict in alarm.episodes(epochs, about.warmup_steps):
        yield f"The alarm sounded at epoch {row['epoch']} ({HEADLINES[verdict.kind].lower()}): {verdict.measured}"
    if corrupt:
        yield f"{len(corrupt)} crops could not be read and are left out; they are named below."
    if last.get("skipped"):
        yield f"{last['skipped']} steps were skipped, as their gradients were not finite."
    if (last.get("data_wait") or 0) > SLOW_DATA:
        share = 100 * last["data_wait"]
        yield f"The device waited for pictures {share:.0f} % of the last epoch; try more --workers or a faster disk."
    if "monitor_faces" in last:
        yield (
            f"Health is measured on {last['monitor_faces']} faces that are never trained on; RankMe cannot exceed that "
            "number, so compare it between runs with equally many faces only."
        )


def _figure(panel: Panel, svg: str) -> str:
    return f"<figure><h3>{escape(panel.title)}</h3>{svg}<figcaption>{escape(panel.reading)}</figcaption></figure>"


def _corrupt_crops(corrupt: Sequence[str]) -> Iterator[str]:
    yield html.paragraph("A readable neighbour stood in for each in its batch; the measures above leave them out.")
    yield html.points(corrupt[:NAMED_CROPS])
    if len(corrupt) > NAMED_CROPS:
        yield html.paragraph(f"And {len(corrupt) - NAMED_CROPS} more; run.log names all.")


def _numbers(epochs: Sequence[Row]) -> str:
    """Return a table of all that was measured before the first step, halfway and last."""
    chosen = start_middle_end(epochs)
    names = dict.fromkeys(name for row in epochs for name, value in row.items() if _is_plain(value))
    lines = [(name, *(_shown(row.get(name)) for row in chosen)) for name in names if name != "epoch"]
    return html.table(("measure", *(f"epoch {row['epoch']}" for row in chosen)), lines)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
