"""Tables and figures of all scores of a task, or of the targets of a data set, for report.html of a probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.evaluation.numbers import SHOWN, TITLES, cell, number
from mefem_cli.evaluation.report import heading, model_title
from mefem_cli.evaluation.saved import UNITS
from mefem_cli.reports import html, probe_figures
from mefem_cli.reports.probe_figures import Panel

if TYPE_CHECKING:
    from mefem_cli.evaluation.bootstrap import Interval
    from mefem_cli.evaluation.job import Results
    from mefem_cli.evaluation.score import Difference, Mean, Score

BASELINE = "baseline"  # the model's name of scores that look at no face
METRICS_IN_WORDS = {
    "r2": "r2 is the share of the label's variance that the prediction explains: 1 is perfect, 0 is no better than "
    "saying the average for everyone, below 0 is worse than that.",
    "mae": "MAE is how far the prediction is off, on average over faces.",
    "accuracy": "Accuracy is the share of faces whose class is right; compare it with the baseline, which names the "
    "most frequent class every time.",
    "auroc": "AUROC is how often a face of a class gets a higher score for it than one of another class; 0.5: chance.",
}


def merit(score: Score) -> float:
    """Return what scores are ranked by, higher is better."""
    value = score.metrics[SHOWN[score.kind][0]].value
    return value if np.isfinite(value) else -np.inf


def title_of(scores: Sequence[Score]) -> str:
    """Return a task with its unit."""
    unit = UNITS.get(scores[0].task)
    return f"{scores[0].task} ({unit})" if unit else scores[0].task


def name_of(score: Score, scores: Sequence[Score]) -> str:
    """Return what tells a score from the others of its task."""
    has_models = len({one.store for one in scores}) > 1
    model = f" of {model_title(score, list(scores))}" if has_models else ""
    return f"{score.head} on {score.features}{model}"


# The targets of a data set --------------------------------------------------------------------------------------------


def protocols(results: Results) -> list[list[Score]]:
    """Return the scores of each data set that has several targets of one kind."""
    by_heading: dict[tuple[str, str], list[Score]] = {}
    for score in results.scores:
        by_heading.setdefault(heading(score), []).append(score)
    return [scores for scores in by_heading.values() if len({one.task for one in scores}) > 1]


def protocol(scores: Sequence[Score], results: Results) -> Iterator[str]:
    """Yield the means over the targets of a data set, and a figure of all of them for each head."""
    kind = scores[0].kind
    shown = SHOWN[kind]
    targets = {one.task: one.task.partition(".")[2] for one in scores}
    yield html.heading(f"{heading(scores[0])[0]}: {len(targets)} targets")
    means = [mean for mean in results.means if mean.over == "targets" and mean.scores[0] in scores]
    if means:
        rows = [[_mean_name(mean, scores), *(cell(mean.metrics[name]) for name in shown)] for mean in means]
        yield numbers(["head", *(f"{TITLES[name]} [95 %]" for name in shown)], rows)
    figures = []
    for name in dict.fromkeys(name_of(one, scores) for one in scores):
        mine = sorted((one for one in scores if name_of(one, scores) == name), key=merit, reverse=True)
        panels = [Panel(TITLES[metric], [one.metrics[metric] for one in mine], None) for metric in shown]
        svg = probe_figures.intervals([targets[one.task] for one in mine], panels)
        figures.append(figure(f"All targets: {name}", svg, "Each target has a section of its own.", is_wide=True))
    yield figures_of(figures)


def _mean_name(mean: Mean, scores: Sequence[Score]) -> str:
    return f"{name_of(mean.scores[0], scores)}, mean over {mean.count} {mean.over}"


# All scores of a task -------------------------------------------------------------------------------------------------


def overview(scores: Sequence[Score], results: Results) -> Iterator[str]:
    """Yield the table of a task's scores and the same as figures."""
    kind, shown = scores[0].kind, SHOWN[scores[0].kind]
    baseline = scores[0].baseline
    lines = [(name_of(one, scores), one) for one in scores]
    lines += [("baseline: age and sex alone", one) for one in results.baselines if one.task == scores[0].task][:1]
    rows = [[name, *(cell(one.metrics[metric]) for metric in shown)] for name, one in lines]
    means = [mean for mean in results.means if mean.over != "targets" and mean.scores[0] in scores]
    rows += [[_mean_name(mean, scores), *(cell(mean.metrics[name]) for name in shown)] for mean in means]
    rows.append(["baseline: " + _constant(kind), *(number(baseline[name]) for name in shown)])
    if published := scores[0].published:
        rows.append(["published by others (other splits)", *(number(published.get(name, np.nan)) for name in shown)])
    yield numbers(["head", *(f"{TITLES[name]} [95 %]" for name in shown)], rows)
    yield html.paragraph(" ".join(METRICS_IN_WORDS[name] for name in shown))
    colours = {store: number for number, store in enumerate(dict.fromkeys(one.store for one in scores))}
    figures = []
    panels = [Panel(TITLES[one], [score.metrics[one] for _, score in lines], baseline[one]) for one in shown]
    svg = probe_figures.intervals([name for name, _ in lines], panels, [colours.get(one.store, 0) for _, one in lines])
    figures.append(figure("All heads", svg, f"Dashed: {_constant(kind)}.", is_wide=True))
    yield figures_of(figures + _efficiency(scores, results.curves, shown[0], baseline[shown[0]]))


def _constant(kind: str) -> str:
    return "the average for everyone" if kind == "regression" else "the most frequent class for everyone"


def _efficiency(scores: Sequence[Score], found: Sequence[Score], metric: str, baseline: float) -> list[str]:
    """Return the figure of scores against the share of training people, where `--fraction` asked for several."""
    by_head: dict[str, list[tuple[float, Interval]]] = {}
    for one in found:
        if one.task == scores[0].task:
            by_head.setdefault(name_of(one, scores), []).append((one.fraction, one.metrics[metric]))
    several = {name: points for name, points in by_head.items() if len(points) > 1}
    if not several:
        return []
    caption = "How the score grows with the people to learn from; a curve that still rises asks for more of them."
    svg = probe_figures.efficiency(several, TITLES[metric], baseline)
    return [figure(f"{TITLES[metric]} by the number of people", svg, caption)]


def differences(results: Results, task: str) -> Iterator[str]:
    """Yield the paired differences of a task between encoders."""
    found = [one for one in results.differences if one.first.task == task]
    if not found:
        return
    shown = SHOWN[found[0].first.kind]
    scores = [one for pair in found for one in (pair.first, pair.second) if one.model != BASELINE]
    names = [f"{one.first.head} on {one.first.features}: {_pair(one, scores)}" for one in found]
    yield "<h3>Differences</h3>"
    yield numbers(
        ["first minus second", *(f"{TITLES[name]} [95 %]" for name in shown), "verdict on the first"],
        [
            [name, *(cell(one.metrics[metric], "+") for metric in shown), one.verdict(shown[0])]
            for name, one in zip(names, found, strict=True)
        ],
    )
    yield html.paragraph(
        "Both predict the same faces, and each bootstrap draws the same people for both, so what makes people hard to "
        f"predict cancels out. Better or worse: the interval of {TITLES[shown[0]]} excludes 0; unclear is not equal."
    )
    panels = [Panel(f"difference in {TITLES[one]}", [each.metrics[one] for each in found], 0.0) for one in shown]
    svg = probe_figures.intervals(names, panels)
    yield figures_of([figure("Differences", svg, "Right of the dashed line the first is higher.", is_wide=True)])


def _pair(one: Difference, scores: list[Score]) -> str:
    if one.second.model == BASELINE:
        return f"{model_title(one.first, scores)} - age and sex alone"
    return f"{model_title(one.first, scores)} - {model_title(one.second, scores)}"


# Pieces of the page ---------------------------------------------------------------------------------------------------


def figures_of(figures: Sequence[str]) -> str:
    """Return figures side by side."""
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def figure(title: str, svg: str, caption: str, is_wide: bool = False) -> str:
    """Return an SVG with its title and caption."""
    wide = ' class="wide"' if is_wide else ""
    return f"<figure{wide}><h4>{escape(title)}</h4>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def numbers(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table whose numbers do not wrap."""
    return f'<div class="numbers">{html.table(columns, rows)}</div>'
