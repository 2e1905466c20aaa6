"""report.html of a probe: what the scores are, how each comes about, where it fails, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.console import plural
from mefem_cli.evaluation.numbers import SHOWN, TITLES, cell
from mefem_cli.evaluation.saved import UNITS
from mefem_cli.reports import curves, html, probe_figures
from mefem_cli.reports.probe_faces import Faces, jpeg, with_heat
from mefem_cli.reports.probe_figures import Panel
from mefem_cli.reports.probe_overview import (
    differences,
    figure,
    figures_of,
    merit,
    name_of,
    overview,
    protocol,
    protocols,
    title_of,
)

if TYPE_CHECKING:
    from mefem_cli.evaluation.job import Results
    from mefem_cli.evaluation.score import Score
    from mefem_cli.stores.features import FeatureStore

REPORT = "report.html"
NUM_WORST, NUM_LOOKED_AT = 12, 10  # faces shown
MOST_DETAILED = 48  # scores with figures of their own, the best of each task first: more make the page too large
MOST_OPEN = 8  # tasks whose best score is unfolded
MOST_CLASSES = 20  # of a confusion matrix
STYLE = (
    "<style>"
    + curves.VARIABLES
    + """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.figures figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; min-width: 0; } .figures .wide { grid-column: 1 / -1; }
.figures h4 { font-size: .95rem; margin: 0 0 .2rem; } details .figures { margin: .8rem 0; }
.figures svg { width: 100%; height: auto; } .figures figcaption { font-size: .85rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; } .tiles { margin: .6rem 0; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; } summary .soft { font-weight: 400; }
table.confusion td { text-align: right; border: 1px solid var(--line); }
table.confusion th { font-size: .85rem; max-width: 9rem; overflow-wrap: anywhere; }
td, th { overflow-wrap: anywhere; } .numbers td + td { white-space: nowrap; }
.numbers td:first-child, .numbers th:first-child { overflow-wrap: break-word; min-width: 9rem; }
.figures .wide { overflow-x: auto; } .figures .wide svg { min-width: 36rem; }
</style>"""
)
NOT_SAID = (
    "Whether it holds elsewhere. The intervals say how much a score would vary with other people like these; another "
    "camera, clinic, country or age range may score differently, and a test on another data set is the way to know.",
    "What in the picture tells. A label can be read from light, camera, dress, make-up or the source of a photo as "
    "well as from the face; scores within a source (--by) and on one left out (--leave-out) help to tell these apart.",
    "How good a prediction for one person is. A mean over people hides large errors: look at the limits of agreement "
    "and at the worst errors.",
    "Whether the labels are right. They are taken as the truth; errors in them lower a score, shared bias raises it.",
    "That subgroups differ. With twenty of them, one interval misses the true value by chance alone, and small groups "
    "have wide intervals.",
    "That an r2 can be compared between groups of people: with equal errors it is lower where the label varies less.",
    "How a score would vary if the encoder were trained again.",
)


def page(results: Results, stores: Sequence[FeatureStore], provenance: Mapping[str, Any], show_faces: bool) -> str:
    """Return report.html; names in it are escaped, and with `show_faces` it holds crops from where they were made."""
    faces = {str(store.path): Faces(store) for store in stores} if show_faces else {}
    tasks = list(dict.fromkeys(score.task for score in results.scores))
    body = [STYLE]
    if results.notes:
        body.append(html.points(results.notes))
    for of_protocol in protocols(results):
        body += protocol(of_protocol, results)
    by_task = [[score for score in results.scores if score.task == task] for task in tasks]
    ranked = [sorted(scores, key=merit, reverse=True) for scores in by_task]
    best_first = [*(scores[0] for scores in ranked), *(one for scores in ranked for one in scores[1:])]
    detailed = {id(score) for score in best_first[:MOST_DETAILED]}
    for task, scores, in_order in zip(tasks, by_task, ranked, strict=True):
        body += [html.heading(title_of(scores)), *overview(scores, results), *differences(results, task)]
        is_open = len(tasks) <= MOST_OPEN
        body += [
            _details(score, scores, results, faces.get(score.store), is_open=is_open and score is in_order[0])
            for score in in_order
            if id(score) in detailed
        ]
    if len(best_first) > MOST_DETAILED:
        drawn = f"Figures are drawn for {MOST_DETAILED} scores of {len(best_first)}, the best of each task first"
        body.append(html.paragraph(f"{drawn}; scores.json and predictions.parquet have all."))
    body += [html.heading("What these scores do not say"), html.points(NOT_SAID)]
    body += [html.heading("How it was made"), *_making(provenance, stores)]
    return html.page(f"mefem probe: {', '.join(tasks)}", _lead(results), body)


def _lead(results: Results) -> str:
    first = results.scores[0].predictions
    people = len(np.unique(first.group))
    return (
        f"{plural(len(first), 'face')} of {plural(people, 'person', 'people')}. Every face was predicted by a head "
        "that learned from other people only; brackets and bars are 95 % intervals, a bootstrap over people."
    )


# One score ------------------------------------------------------------------------------------------------------------


def _details(score: Score, scores: Sequence[Score], results: Results, faces: Faces | None, is_open: bool) -> str:
    """Return everything about one score, folded up unless `is_open`."""
    shown = SHOWN[score.kind]
    values = ", ".join(f"{TITLES[name]} {cell(score.metrics[name])}" for name in shown)
    figures = _regression(score) if score.kind == "regression" else _classification(score)
    figures += _subgroups(score, results)
    parts = [figures_of(figures)]
    if score.kind == "classification":
        parts.append(_confusion(score))
    parts += [*_attention(score, faces), *_worst(score, faces)]
    summary = f'{escape(name_of(score, scores))} <span class="soft">{escape(values)}</span>'
    return f"<details{' open' * is_open}><summary>{summary}</summary>{''.join(parts)}</details>"


def _regression(score: Score) -> list[str]:
    found, unit = score.predictions, UNITS.get(score.task, "")
    named = f" {score.task}, {unit}" if unit else f" {score.task}"
    of_unit = f" {unit}" if unit else ""
    mean, low, high = probe_figures.limits_of_agreement(found.target, found.output)
    bins = probe_figures.bins(found.output, found.target, found.group)
    slope, intercept = score.calibration["slope"], score.calibration["intercept"]
    conformal = score.conformal
    held = (
        f" A prediction ± {conformal.half_width:.3g}{of_unit} held the truth of {100 * conformal.coverage:.0f} % of "
        f"people (aim: {100 * conformal.level:.0f} %)."
        if np.isfinite(conformal.half_width)
        else ""
    )
    return [
        figure(
            "Predicted and true",
            probe_figures.scatter(found.target, found.output, named),
            "One dot a face; on the dashed line a prediction is right. A flat cloud says the average for everyone.",
        ),
        figure(
            "Errors (Bland-Altman)",
            probe_figures.bland_altman(found.target, found.output, f" {score.task}"),
            f"Predictions are {mean:+.2g}{of_unit} off on average; 95 % of errors lie about between {low:.3g} and "
            f"{high:.3g}{of_unit} (lines, if errors are normal). A slope: high values are predicted too low, low ones "
            f"too high, or the reverse.{held}",
        ),
        figure(
            "Calibration",
            probe_figures.calibration(bins, f"predicted{named}", f"true{named}, mean", is_share=False),
            f"The mean truth where about one value was predicted. Observed = {intercept:.3g} {slope:+.2f} x "
            "predicted; a slope under 1: predictions are spread too wide.",
        ),
    ]


def _classification(score: Score) -> list[str]:
    found = score.predictions
    if len(found.classes) == 2:
        predicted, observed = found.output[:, 1], (found.target == 1).astype(float)
        labels = (f'probability of "{found.classes[1]:.20}"', "share of faces that are")
    else:
        predicted, observed = found.output.max(axis=1), (found.prediction == found.target).astype(float)
        labels = ("probability of the predicted class", "share of faces predicted right")
    bins = probe_figures.bins(predicted, observed, found.group)
    caption = (
        "On the dashed line probabilities mean what they say; a flatter curve: the head is too sure. Expected "
        f"calibration error {score.calibration['ece']:.3f}."
    )
    return [figure("Calibration", probe_figures.calibration(bins, *labels, is_share=True), caption)]


def _confusion(score: Score) -> str:
    """Return the confusion matrix as a table whose cells are the darker, the larger their share of the true class."""
    found, classes = score.predictions, score.predictions.classes
    if len(classes) > MOST_CLASSES:
        return html.paragraph(f"{len(classes)} classes: too many for a confusion matrix; see predictions.parquet.")
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (found.target, found.prediction), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name[:40])}</th>" for name in classes)
    lines = []
    for name, row, part in zip(classes, counts, share, strict=True):
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--curve-1) {55 * one:.0f}%, transparent)">{count:,}'
            f' <span class="soft">{100 * one:.0f} %</span></td>'
            for count, one in zip(row, part, strict=True)
        )
        lines.append(f"<tr><th>{escape(name[:40])}</th>{cells}</tr>")
    return (
        "<h3>Which classes are mixed up</h3>"
        f'<div class="scroll"><table class="confusion"><thead><tr><th>true \\ predicted</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="soft">Faces, and their share of the true class in the row.</p>'
    )


def _subgroups(score: Score, results: Results) -> list[str]:
    """Return a figure for each `--by`, of the metric that the spread of the label in a group does not change."""
    metric = "mae" if score.kind == "regression" else "accuracy"
    figures = []
    mine = [one for one in results.subgroups if one.score is score]
    for by in dict.fromkeys(one.by for one in mine):
        groups = [one for one in mine if one.by == by]
        names = [f"({len(one.predictions):,}) {one.value}" for one in groups]
        panel = Panel(TITLES[metric], [one.metrics[metric] for one in groups], score.metrics[metric].value)
        svg = probe_figures.intervals(names, [panel])
        caption = f"Dashed: all faces; in brackets the number of faces. Values of {by} with few people are not shown."
        figures.append(figure(f"{TITLES[metric]} by {by}", svg, caption))
    return figures


# Faces ----------------------------------------------------------------------------------------------------------------


def _attention(score: Score, faces: Faces | None) -> Iterator[str]:
    """Yield what the head looked at: its mean over faces and that of single faces, each by a head that never saw it."""
    shares = score.attention
    if shares is None:
        return
    side = int(np.sqrt(shares.shape[1]))
    num_patches = side * side
    if shares.shape[1] - num_patches > 1:
        return  # not a square grid, perhaps with a CLS token
    patches = shares[:, :num_patches].reshape(-1, side, side)
    mean = patches.mean(axis=0)
    caption = "Mean over all faces, each looked at by a head that had not learned from it."
    if shares.shape[1] > num_patches:
        caption += f" The CLS token, which has no place, got {100 * shares[:, -1].mean():.0f} %."
    yield "<h3>Where the head looks</h3>"
    figures = [figure("Mean over faces", probe_figures.heat(mean), caption)]
    yield figures_of(figures)
    if faces is None:
        return
    ids = [str(name) for name in score.predictions.ids]
    tiles = []
    average = faces.mean(ids[:: max(1, len(ids) // 200)])
    if average is not None:
        tiles.append((jpeg(with_heat(average, mean)), "mean face, mean attention"))
    for row in np.linspace(0, len(ids) - 1, min(NUM_LOOKED_AT, len(ids))).astype(int):
        pixels = faces.pixels(ids[row])
        if pixels is not None:
            tiles.append((jpeg(with_heat(pixels, patches[row])), Path(faces.names.get(ids[row], ids[row])).name[-40:]))
    if tiles:
        yield html.tiles(tiles)
        yield (
            '<p class="soft">Dark blue: nothing, green: an even share, yellow: twice that or more. Attention says '
            "where values were taken from, not why; patches also hold what the encoder gathered from elsewhere.</p>"
        )


def _worst(score: Score, faces: Faces | None) -> Iterator[str]:
    """Yield the faces with the largest errors."""
    found = score.predictions
    rows = np.arange(len(found))
    if found.classes:
        badness = 1 - found.output[rows, found.target]
        wrong = np.flatnonzero(found.prediction != found.target)
        worst = wrong[np.argsort(-badness[wrong], kind="stable")][:NUM_WORST]
        what = "Wrong with the most confidence"
    else:
        badness = np.abs(found.output - found.target)
        worst = np.argsort(-badness, kind="stable")[:NUM_WORST]
        what = "Largest errors"
    if not len(worst):
        return
    yield f"<h3>{what}</h3>"
    told = [(str(found.ids[row]), _told(score, int(row))) for row in worst]
    pictures = [] if faces is None else [(faces.pixels(name), name, words) for name, words in told]
    known = [
        (jpeg(pixels), words, f"{faces.names.get(name, '')} {name}")
        for pixels, name, words in pictures
        if faces and pixels is not None
    ]
    if known:
        yield html.tiles(known)
        yield '<p class="soft">Look for what they share: wrong labels, bad crops, glasses, light, a kind of person.</p>'
    else:
        if faces is not None:
            yield html.paragraph("Their crops are no longer where they were embedded from.")
        yield html.table(["id", "truth and prediction"], told)


def _told(score: Score, row: int) -> str:
    found = score.predictions
    if found.classes:
        guess = int(found.prediction[row])
        sure = f"{100 * found.output[row, guess]:.0f} %"
        return f"{found.classes[found.target[row]]:.24}, said {found.classes[guess]:.24} ({sure})"
    return f"true {found.target[row]:.4g}, said {found.output[row]:.4g}"


# Page -----------------------------------------------------------------------------------------------------------------


def _making(provenance: Mapping[str, Any], stores: Sequence[FeatureStore]) -> Iterator[str]:
    command = [str(word) for word in provenance.get("command") or []]
    yield html.code([" ".join(command)])
    rows = [
        (f"store {store.path.name}", f"{store.model_name}, {len(store)} faces, sha256 {store.sha256}")
        for store in stores
    ]
    rows += [("mefem", f"{provenance.get('mefem')} (commit {provenance.get('git_commit') or 'unknown'})")]
    rows += [
        (name, str(value)) for name, value in (provenance.get("options") or {}).items() if value not in (None, [], "")
    ]
    yield html.table(["", ""], rows)
    yield html.paragraph(
        "The same as numbers: scores.json, predictions.parquet (every prediction) and provenance.json."
    )
