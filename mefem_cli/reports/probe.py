"""report.html of a probe: what the scores are, how each comes about, where it fails, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.console import plural
from mefem_cli.evaluation.report import SHOWN, TITLES, cell, model_title, number
from mefem_cli.evaluation.saved import UNITS
from mefem_cli.reports import curves, html, probe_figures
from mefem_cli.reports.probe_faces import Faces, jpeg, with_heat
from mefem_cli.reports.probe_figures import Panel

if TYPE_CHECKING:
    from mefem_cli.evaluation.bootstrap import Interval
    from mefem_cli.evaluation.job import Results
    from mefem_cli.evaluation.score import Difference, Score
    from mefem_cli.stores.features import FeatureStore

REPORT = "report.html"
NUM_WORST, NUM_LOOKED_AT = 12, 10  # faces shown
MOST_DETAILED = 24  # scores with figures of their own; all are in scores.json
MOST_CLASSES = 20  # of a confusion matrix
BASELINE = "baseline"  # the model's name of scores that look at no face
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
</style>"""
)
METRICS_IN_WORDS = {
    "r2": "r2 is the share of the label's variance that the prediction explains: 1 is perfect, 0 is no better than "
    "saying the average for everyone, below 0 is worse than that.",
    "mae": "MAE is how far the prediction is off, on average over faces.",
    "accuracy": "Accuracy is the share of faces whose class is right; compare it with the baseline, which names the "
    "most frequent class every time.",
    "auroc": "AUROC is how often a face of a class gets a higher score for it than one of another class; 0.5: chance.",
}
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
    detailed = 0
    for task in tasks:
        scores = [score for score in results.scores if score.task == task]
        body += [html.heading(_title(scores)), *_overview(scores, results), *_differences(results, task)]
        ranked = sorted(scores, key=_merit, reverse=True)
        for rank, score in enumerate(ranked):
            if detailed < MOST_DETAILED:
                body.append(_details(score, scores, results, faces.get(score.store), is_open=rank == 0))
            detailed += 1
    if detailed > MOST_DETAILED:
        body.append(html.paragraph(f"Figures are drawn for {MOST_DETAILED} scores of {detailed}; scores.json has all."))
    body += [html.heading("What these scores do not say"), html.points(NOT_SAID)]
    body += [html.heading("How it was made"), *_making(provenance, stores)]
    return html.page(f"mefem probe: {', '.join(tasks)}", _lead(results), body)


def _merit(score: Score) -> float:
    value = score.metrics[SHOWN[score.kind][0]].value
    return value if np.isfinite(value) else -np.inf


def _lead(results: Results) -> str:
    first = results.scores[0].predictions
    people = len(np.unique(first.group))
    return (
        f"{plural(len(first), 'face')} of {plural(people, 'person', 'people')}. Every face was predicted by a head "
        "that learned from other people only; brackets and bars are 95 % intervals, a bootstrap over people."
    )


def _title(scores: Sequence[Score]) -> str:
    unit = UNITS.get(scores[0].task)
    return f"{scores[0].task} ({unit})" if unit else scores[0].task


def _name(score: Score, scores: Sequence[Score]) -> str:
    """Return what tells a score from the others of its task."""
    has_models = len({one.store for one in scores}) > 1
    model = f" of {model_title(score, list(scores))}" if has_models else ""
    return f"{score.head} on {score.features}{model}"


# All scores of a task -------------------------------------------------------------------------------------------------


def _overview(scores: Sequence[Score], results: Results) -> Iterator[str]:
    """Yield the table of a task's scores and the same as figures."""
    kind, shown = scores[0].kind, SHOWN[scores[0].kind]
    baseline = scores[0].baseline
    lines = [(_name(one, scores), one) for one in scores]
    lines += [("baseline: age and sex alone", one) for one in results.baselines if one.task == scores[0].task][:1]
    rows = [[name, *(cell(one.metrics[metric]) for metric in shown)] for name, one in lines]
    rows.append(["baseline: " + _constant(kind), *(number(baseline[name]) for name in shown)])
    yield _numbers(["head", *(f"{TITLES[name]} [95 %]" for name in shown)], rows)
    yield html.paragraph(" ".join(METRICS_IN_WORDS[name] for name in shown))
    colours = {store: number for number, store in enumerate(dict.fromkeys(one.store for one in scores))}
    figures = []
    panels = [Panel(TITLES[one], [score.metrics[one] for _, score in lines], baseline[one]) for one in shown]
    svg = probe_figures.intervals([name for name, _ in lines], panels, [colours.get(one.store, 0) for _, one in lines])
    figures.append(_figure("All heads", svg, f"Dashed: {_constant(kind)}.", is_wide=True))
    yield _figures(figures + _efficiency(scores, results.curves, shown[0], baseline[shown[0]]))


def _constant(kind: str) -> str:
    return "the average for everyone" if kind == "regression" else "the most frequent class for everyone"


def _efficiency(scores: Sequence[Score], found: Sequence[Score], metric: str, baseline: float) -> list[str]:
    """Return the figure of scores against the share of training people, where `--fraction` asked for several."""
    by_head: dict[str, list[tuple[float, Interval]]] = {}
    for one in found:
        if one.task == scores[0].task:
            by_head.setdefault(_name(one, scores), []).append((one.fraction, one.metrics[metric]))
    several = {name: points for name, points in by_head.items() if len(points) > 1}
    if not several:
        return []
    caption = "How the score grows with the people to learn from; a curve that still rises asks for more of them."
    svg = probe_figures.efficiency(several, TITLES[metric], baseline)
    return [_figure(f"{TITLES[metric]} by the number of people", svg, caption)]


def _differences(results: Results, task: str) -> Iterator[str]:
    """Yield the paired differences of a task between encoders."""
    found = [one for one in results.differences if one.first.task == task]
    if not found:
        return
    shown = SHOWN[found[0].first.kind]
    scores = [one for pair in found for one in (pair.first, pair.second) if one.model != BASELINE]
    names = [f"{one.first.head} on {one.first.features}: {_pair(one, scores)}" for one in found]
    yield "<h3>Differences</h3>"
    yield _numbers(
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
    yield _figures([_figure("Differences", svg, "Right of the dashed line the first is higher.", is_wide=True)])


def _pair(one: Difference, scores: list[Score]) -> str:
    if one.second.model == BASELINE:
        return f"{model_title(one.first, scores)} - age and sex alone"
    return f"{model_title(one.first, scores)} - {model_title(one.second, scores)}"


# One score ------------------------------------------------------------------------------------------------------------


def _details(score: Score, scores: Sequence[Score], results: Results, faces: Faces | None, is_open: bool) -> str:
    """Return everything about one score, folded up unless `is_open`."""
    shown = SHOWN[score.kind]
    values = ", ".join(f"{TITLES[name]} {cell(score.metrics[name])}" for name in shown)
    figures = _regression(score) if score.kind == "regression" else _classification(score)
    figures += _subgroups(score, results)
    parts = [_figures(figures)]
    if score.kind == "classification":
        parts.append(_confusion(score))
    parts += [*_attention(score, faces), *_worst(score, faces)]
    summary = f'{escape(_name(score, scores))} <span class="soft">{escape(values)}</span>'
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
        _figure(
            "Predicted and true",
            probe_figures.scatter(found.target, found.output, named),
            "One dot a face; on the dashed line a prediction is right. A flat cloud says the average for everyone.",
        ),
        _figure(
            "Errors (Bland-Altman)",
            probe_figures.bland_altman(found.target, found.output, f" {score.task}"),
            f"Predictions are {mean:+.2g}{of_unit} off on average; 95 % of errors lie about between {low:.3g} and "
            f"{high:.3g}{of_unit} (lines, if errors are normal). A slope: high values are predicted too low, low ones "
            f"too high, or the reverse.{held}",
        ),
        _figure(
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
    return [_figure("Calibration", probe_figures.calibration(bins, *labels, is_share=True), caption)]


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
        figures.append(_figure(f"{TITLES[metric]} by {by}", svg, caption))
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
    figures = [_figure("Mean over faces", probe_figures.heat(mean), caption)]
    yield _figures(figures)
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


def _figures(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _figure(title: str, svg: str, caption: str, is_wide: bool = False) -> str:
    wide = ' class="wide"' if is_wide else ""
    return f"<figure{wide}><h4>{escape(title)}</h4>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _numbers(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f'<div class="numbers">{html.table(columns, rows)}</div>'
