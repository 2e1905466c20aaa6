"""Results as JSON rows, as tables on a terminal, and as a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli import parts
from mefem_cli.evaluation import conformal, covariates, metrics
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.job import Job, Results
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.evaluation.numbers import SHOWN, TITLES, cell, number
from mefem_cli.evaluation.score import Difference, Mean, Score, Subgroup
from mefem_cli.stores import product

if TYPE_CHECKING:
    from rich.table import Table

MAX_CALIBRATED = 12  # rows of a table that has a second one beside it


def rows(results: Results) -> list[dict[str, Any]]:
    """Return one JSON object for each thing found, scores first; an undefined number is None.

    Scores, then learning curves, baselines of age and sex, means, subgroups and differences.
    """
    return [
        *(score_row(score) for score in results.scores),
        *(curve_row(score) for score in results.curves),
        *(score_row(score, "baseline") for score in results.baselines),
        *(mean_row(mean) for mean in results.means),
        *(subgroup_row(subgroup) for subgroup in results.subgroups),
        *(difference_row(difference) for difference in results.differences),
    ]


def score_row(score: Score, kind: str = "score") -> dict[str, Any]:
    """Return a score as a JSON object; `per_fold` holds all folds of all repeats."""
    row = _row(kind, score, score.predictions, _found(score))
    conformal = score.conformal
    row |= {
        "repeats": len(score.seeds),
        "fold_names": list(score.fold_names),
        "calibration": {name: _known(value) for name, value in score.calibration.items()},
        "conformal": {name: _known(value) for name, value in vars(conformal).items()},
    }
    if score.published:
        row["published"] = dict(score.published)
    if score.num_permutations:
        p_values = {name: _known(value) for name, value in score.p_values.items()}
        row["permutation"] = {"n": score.num_permutations, "p": p_values}
    return row


def curve_row(score: Score) -> dict[str, Any]:
    """Return a point of a learning curve as a JSON object: `fraction` of the people, on average `n_train` of them."""
    row = _row("curve", score, score.predictions, _found(score))
    return {**row, "fraction": score.fraction, "n_train": _known(score.num_train)}


def mean_row(mean: Mean) -> dict[str, Any]:
    """Return a mean as a JSON object: `over` targets or a label, of which there are `count`."""
    found = {"metrics": mean.metrics, "baseline": {}, "per_fold": {}}
    row = _row("mean", mean.scores[0], mean.scores[0].predictions, found)
    return {**row, "task": mean.task, "over": mean.over, "count": mean.count}


def _found(score: Score) -> dict[str, Any]:
    by_repeat = [metrics.per_fold(one) for one in score.seeds]
    per_fold = {name: [value for one in by_repeat for value in one[name]] for name in by_repeat[0]}
    return {"metrics": score.metrics, "baseline": score.baseline, "per_fold": per_fold}


def subgroup_row(subgroup: Subgroup) -> dict[str, Any]:
    """Return the score of a subgroup as a JSON object; `by` and `value` say which."""
    folds = metrics.per_fold(subgroup.predictions)
    found = {"metrics": subgroup.metrics, "baseline": subgroup.baseline, "per_fold": folds}
    row = _row("subgroup", subgroup.score, subgroup.predictions, found)
    return {**row, "by": subgroup.by, "value": subgroup.value}


def difference_row(difference: Difference) -> dict[str, Any]:
    """Return first minus second as a JSON object; `minus_store` is the second, `verdict` is about the first."""
    first, second = difference.first, difference.second
    folds_first, folds_second = _found(first)["per_fold"], _found(second)["per_fold"]
    folds = {
        name: [one - other for one, other in zip(folds_first[name], folds_second[name], strict=False)]
        for name in folds_first
    }
    row = _row(
        "difference", first, first.predictions, {"metrics": difference.metrics, "baseline": {}, "per_fold": folds}
    )
    return {
        **row,
        "n": difference.num_rows,
        "n_groups": difference.num_groups,
        "minus_store": second.store,
        "minus_model": second.model,
        "minus_head": second.head,
        "minus_features": second.features,
        "verdict": {name: difference.verdict(name) for name in difference.metrics},
    }


def _row(kind: str, score: Score, predictions: Predictions, found: Mapping[str, Any]) -> dict[str, Any]:
    intervals: Mapping[str, Interval] = found["metrics"]
    return {
        "row": kind,
        "task": score.task,
        "head": score.head,
        "features": score.features,
        "store": score.store,
        "model": score.model,
        "kind": score.kind,
        "n": len(predictions),
        "n_groups": len(np.unique(predictions.group)),
        "folds": len(np.unique(score.predictions.fold)),
        "metrics": {
            name: {"value": _known(one.value), "low": _known(one.low), "high": _known(one.high)}
            for name, one in intervals.items()
        },
        "per_fold": {name: [_known(value) for value in values] for name, values in found["per_fold"].items()},
        "baseline": {name: _known(value) for name, value in found["baseline"].items()},
    }


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def plan(job: Job) -> list[dict[str, Any]]:
    """Return what a job would do, one object for each task."""
    return [
        {
            "task": problem.task,
            "kind": "classification" if problem.classes else "regression",
            "classes": list(problem.classes),
            "n": len(problem.ids),
            "n_groups": problem.num_groups,
            "folds": problem.num_folds,
            "heads": [f"{head} on {features}" for head, features in job.pairs],
            "stores": [str(store.path) for store in job.stores],
        }
        for problem, *_ in job.problems
    ]


def plan_table(job: Job) -> Table:
    """Return the plan as a table."""
    from rich.table import Table

    table = Table("task", "kind", "faces", "groups", "folds", "heads", show_edge=False)
    for one in plan(job):
        kind = one["kind"] + (f" ({len(one['classes'])} classes)" if one["classes"] else "")
        heads = ", ".join(one["heads"])
        table.add_row(one["task"], kind, f"{one['n']:,}", f"{one['n_groups']:,}", str(one["folds"]), heads)
    return table


def tables(results: Results) -> list[Table]:
    """Return for each task a table of scores beside their baseline, then what was found about them."""
    found = []
    for title in dict.fromkeys(heading(score) for score in results.scores):
        scores = [score for score in results.scores if heading(score) == title]
        tasks = {score.task for score in scores}
        baselines = [score for score in results.baselines if score.task in tasks]
        means = [mean for mean in results.means if mean.scores[0] in scores]
        found.append(_score_table(scores, baselines, means))
        if len(scores) <= MAX_CALIBRATED:
            found.append(_calibration_table(scores))
        curves = [score for score in results.curves if score.task in tasks]
        if curves:
            found.append(_curve_table(curves))
        for score in scores:
            subgroups = [one for one in results.subgroups if one.score is score]
            for by in dict.fromkeys(one.by for one in subgroups):
                found.append(_subgroup_table([one for one in subgroups if one.by == by], scores))
        differences = [one for one in results.differences if one.first in scores]
        for key in dict.fromkeys(_minus(one) for one in differences):
            found.append(_difference_table([one for one in differences if _minus(one) == key], scores))
    return found


def heading(score: Score) -> tuple[str, str]:
    """Targets of one protocol and of one kind share a table."""
    room, _, target = score.task.partition(".")
    return (room if target and room in parts.names("tasks") else score.task, score.kind)


def _minus(difference: Difference) -> tuple[str, str, str]:
    """Differences from one store, or from the baseline of age and sex in it, share a table."""
    second = difference.second
    is_baseline = second.features == covariates.NAME
    return (difference.first.task, second.store, second.features if is_baseline else "")


def _table(title: str, text_columns: list[str], kind: str) -> Table:
    """Return an empty table with columns of text, then one for each metric shown for this kind of task."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    for name in text_columns:
        table.add_column(name, overflow="fold", min_width=min(len(name), 8))
    for name in SHOWN[kind]:
        table.add_column(f"{TITLES[name]} [95 %]", justify="right", no_wrap=True)
    return table


def _score_table(scores: list[Score], baselines: list[Score], means: list[Mean]) -> Table:
    first = scores[0]
    has_models, has_targets = len({score.store for score in scores}) > 1, len({score.task for score in scores}) > 1
    names = [*["target"] * has_targets, "head", "features", *["model"] * has_models]
    table = _table(_title(scores), names, first.kind)

    def add(score: Score, cells: list[str], *words: str, style: str = "") -> None:
        target = [score.task.partition(".")[2]] * has_targets
        model = [*words[2:], ""][:1] * has_models
        table.add_row(*target, *words[:2], *model, *cells, style=style)

    for task in dict.fromkeys(score.task for score in scores):
        of_task = [score for score in scores if score.task == task]
        for score in of_task:
            cells = [cell(score.metrics[name]) for name in SHOWN[score.kind]]
            add(score, cells, score.head, score.features, model_title(score, scores))
        if has_targets and len(scores) > MAX_CALIBRATED:
            continue  # the mean says it
        constant = "average" if first.kind == "regression" else "majority"
        cells = [number(of_task[0].baseline[name]) for name in SHOWN[first.kind]]
        add(of_task[0], cells, "baseline", constant, style="dim")
        for score in [one for one in baselines if one.task == task and one.store == of_task[0].store]:
            cells = [cell(score.metrics[name]) for name in SHOWN[score.kind]]
            add(score, cells, "baseline", score.features, style="dim")
        if of_task[0].published:
            cells = [number(of_task[0].published.get(name, math.nan)) for name in SHOWN[first.kind]]
            add(of_task[0], cells, "published", "(other splits)", style="dim")
    for mean in means:
        score = mean.scores[0]
        cells = [cell(mean.metrics[name]) for name in SHOWN[score.kind]]
        target = [f"mean of {mean.count}"] * has_targets
        features = score.features if has_targets else f"{score.features}, mean over {mean.count} {mean.over}"
        model = [model_title(score, scores)] * has_models
        table.add_row(*target, score.head, features, *model, *cells, style="bold")
    return table


def _calibration_table(scores: list[Score]) -> Table:
    """Do predictions mean what they say, and how far off are they for 90 % of people?"""
    from rich import box
    from rich.table import Table

    kind = scores[0].kind
    has_models, has_targets = len({score.store for score in scores}) > 1, len({score.task for score in scores}) > 1
    title = f"{heading(scores[0])[0]}: calibration and {100 * conformal.LEVEL:.0f} % prediction intervals"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    for name in [*["target"] * has_targets, "head", "features", *["model"] * has_models]:
        table.add_column(name, overflow="fold")
    is_regression = kind == "regression"
    columns = ["slope", "intercept", "interval +-"] if is_regression else ["ECE", "classes in set"]
    has_p = any(score.num_permutations for score in scores)
    for name in [*columns, "held the truth", *["p"] * has_p]:
        table.add_column(name, justify="right")
    for score in scores:
        found = score.conformal
        numbers = [*score.calibration.values(), found.half_width if is_regression else found.width]
        cells = [*map(number, numbers), f"{100 * found.coverage:.1f} %"]
        p_value = score.p_values.get(SHOWN[kind][0])
        cells += ["-" if p_value is None else f"{p_value:.3g}"] * has_p
        model = [model_title(score, scores)] * has_models
        table.add_row(*[score.task.partition(".")[2]] * has_targets, score.head, score.features, *model, *cells)
    return table


def _curve_table(curves: list[Score]) -> Table:
    first = curves[0]
    has_models, has_targets = len({score.store for score in curves}) > 1, len({score.task for score in curves}) > 1
    names = [*["target"] * has_targets, "head", "features", *["model"] * has_models, "share", "people"]
    table = _table(f"{heading(first)[0]}: after learning from fewer people", names, first.kind)
    for score in curves:
        words = [*[score.task.partition(".")[2]] * has_targets, score.head, score.features]
        words += [model_title(score, curves)] * has_models
        words += [f"{score.fraction:g}", f"{score.num_train:,.0f}"]
        table.add_row(*words, *(cell(score.metrics[name]) for name in SHOWN[score.kind]))
    return table


def _subgroup_table(subgroups: list[Subgroup], scores: list[Score]) -> Table:
    score, by = subgroups[0].score, subgroups[0].by
    model = f" of {model_title(score, scores)}" if len({one.store for one in scores}) > 1 else ""
    table = _table(f"{score.task} by {by}: {score.head} on {score.features}{model}", [by, "faces"], score.kind)
    for one in subgroups:
        table.add_row(one.value, f"{len(one.predictions):,}", *(cell(one.metrics[name]) for name in SHOWN[score.kind]))
    return table


def _difference_table(differences: list[Difference], scores: list[Score]) -> Table:
    first, second = differences[0].first, differences[0].second
    is_baseline = second.features == covariates.NAME
    model = f" of {model_title(first, scores)}" if len({score.store for score in scores}) > 1 else ""
    minus = f"face{model} minus age and sex" if is_baseline else ""
    minus = minus or f"{model_title(first, scores)} minus {model_title(second, scores)}"
    table = _table(f"{first.task}: {minus}, paired", ["head", "features"], first.kind)
    table.add_column("verdict")  # by the first metric shown; JSON has one for each
    for one in differences:
        cells = [cell(one.metrics[name], "+") for name in SHOWN[first.kind]]
        table.add_row(one.first.head, one.first.features, *cells, one.verdict(SHOWN[first.kind][0]))
    return table


def _title(scores: list[Score]) -> str:
    score = scores[0]
    counts = sorted({len(one.predictions) for one in scores})
    count, groups = counts[-1], len(np.unique(score.predictions.group))
    faces = f"{count:,} faces" if len(counts) == 1 else f"{counts[0]:,} to {count:,} faces"
    people = f" of {groups:,} people" if groups < count and len(counts) == 1 else ""
    num_folds = len(np.unique(score.predictions.fold))
    folds = f"{num_folds} folds" if num_folds > 1 else f"tested on {' '.join(score.fold_names)}"
    repeats = f", {len(score.seeds)} repeats" if score.repeats else ""
    return f"{heading(score)[0]}: {faces}{people}, {folds}{repeats}"


def model_title(score: Score, scores: list[Score]) -> str:
    """Return the model's name, or the store's where two stores hold models of one name."""
    stores = {one.store for one in scores}
    return score.model if len({one.model for one in scores}) == len(stores) else Path(score.store).stem


def save(folder: Path, results: Results, provenance: Mapping[str, Any]) -> None:
    """Write scores.json, predictions.parquet and provenance.json into a new folder, all or nothing."""
    import pyarrow.parquet

    with product.writing(folder) as temporary:
        temporary.mkdir()
        chosen = [list(score.chosen) for score in results.scores]
        scores = [{**row, "chosen": one} for row, one in zip(rows(results), chosen, strict=False)]
        product.write_json(temporary / "scores.json", scores + rows(results)[len(scores) :])
        pyarrow.parquet.write_table(_predictions_table(results.scores), temporary / "predictions.parquet")
        product.write_json(temporary / "provenance.json", dict(provenance))


def _predictions_table(scores: list[Score]) -> Any:
    """Return out-of-fold predictions as an Arrow table.

    One run of rows for each repeat. `target` and `prediction` are numbers; of a class they are its index,
    `target_class` and `prediction_class` its name, and `probabilities` those of all classes.
    """
    import pyarrow

    tables = []
    for score, repeat, one in [(each, *pair) for each in scores for pair in enumerate(each.seeds)]:
        count = len(one)
        classes = np.array(one.classes, dtype=object)
        tables.append(
            pyarrow.table(
                {
                    "id": pyarrow.array(one.ids, pyarrow.string()),
                    "task": pyarrow.array([score.task] * count),
                    "head": pyarrow.array([score.head] * count),
                    "features": pyarrow.array([score.features] * count),
                    "store": pyarrow.array([score.store] * count),
                    "target": pyarrow.array(one.target.astype(np.float64)),
                    "prediction": pyarrow.array(one.prediction.astype(np.float64)),
                    "fold": pyarrow.array(one.fold.astype(np.int32)),
                    "repeat": pyarrow.array(np.full(count, repeat, np.int32)),
                    "target_class": _names(classes, one.target, count),
                    "prediction_class": _names(classes, one.prediction, count),
                    "probabilities": pyarrow.array(
                        list(one.output) if one.classes else [None] * count, pyarrow.list_(pyarrow.float64())
                    ),
                }
            )
        )
    return pyarrow.concat_tables(tables)


def _names(classes: np.ndarray, index: np.ndarray, count: int) -> Any:
    import pyarrow

    return pyarrow.array(classes[index] if len(classes) else [None] * count, pyarrow.string())
