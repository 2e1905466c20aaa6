"""Results as JSON rows, as tables on a terminal, and as a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.evaluation import metrics
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.evaluate import Difference, Score, Subgroup
from mefem_cli.evaluation.job import Job, Results
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.stores import product

if TYPE_CHECKING:
    from rich.table import Table

# Shown in the table, in this order; JSON has all metrics.
SHOWN = {"regression": ("r2", "mae"), "classification": ("accuracy", "auroc")}
TITLES = {"r2": "r2", "mae": "MAE", "accuracy": "accuracy", "auroc": "AUROC"}


def rows(results: Results) -> list[dict[str, Any]]:
    """Return one JSON object for each score, subgroup and difference, scores first; an undefined number is None."""
    return [
        *(score_row(score) for score in results.scores),
        *(subgroup_row(subgroup) for subgroup in results.subgroups),
        *(difference_row(difference) for difference in results.differences),
    ]


def score_row(score: Score) -> dict[str, Any]:
    """Return a score as a JSON object."""
    found = {"metrics": score.metrics, "baseline": score.baseline, "per_fold": metrics.per_fold(score.predictions)}
    return _row("score", score, score.predictions, found)


def subgroup_row(subgroup: Subgroup) -> dict[str, Any]:
    """Return the score of a subgroup as a JSON object; `by` and `value` say which."""
    folds = metrics.per_fold(subgroup.predictions)
    found = {"metrics": subgroup.metrics, "baseline": subgroup.baseline, "per_fold": folds}
    row = _row("subgroup", subgroup.score, subgroup.predictions, found)
    return {**row, "by": subgroup.by, "value": subgroup.value}


def difference_row(difference: Difference) -> dict[str, Any]:
    """Return first minus second as a JSON object; `minus_store` is the second, `verdict` is about the first."""
    first, second = difference.first, difference.second
    folds_first, folds_second = metrics.per_fold(first.predictions), metrics.per_fold(second.predictions)
    folds = {
        name: [one - other for one, other in zip(folds_first[name], folds_second[name], strict=True)]
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
    """Return for each task a table of scores beside their baseline, then its subgroups and differences."""
    found = []
    for task in dict.fromkeys(score.task for score in results.scores):
        scores = [score for score in results.scores if score.task == task]
        found.append(_score_table(scores))
        for score in scores:
            subgroups = [one for one in results.subgroups if one.score is score]
            for by in dict.fromkeys(one.by for one in subgroups):
                found.append(_subgroup_table([one for one in subgroups if one.by == by], scores))
        differences = [one for one in results.differences if one.first.task == task]
        for store in dict.fromkeys(one.second.store for one in differences):
            found.append(_difference_table([one for one in differences if one.second.store == store], scores))
    return found


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


def _score_table(scores: list[Score]) -> Table:
    first = scores[0]
    has_models = len({score.store for score in scores}) > 1
    table = _table(_title(first), ["head", "features", *["model"] * has_models], first.kind)
    for score in scores:
        names = [score.head, score.features, *[model_title(score, scores)] * has_models]
        table.add_row(*names, *(_cell(score.metrics[name]) for name in SHOWN[first.kind]))
    constant = "average" if first.kind == "regression" else "majority"
    cells = [_number(first.baseline[name]) for name in SHOWN[first.kind]]
    table.add_row("baseline", constant, *[""] * has_models, *cells, style="dim")
    return table


def _subgroup_table(subgroups: list[Subgroup], scores: list[Score]) -> Table:
    score, by = subgroups[0].score, subgroups[0].by
    model = f" of {model_title(score, scores)}" if len({one.store for one in scores}) > 1 else ""
    table = _table(f"{score.task} by {by}: {score.head} on {score.features}{model}", [by, "faces"], score.kind)
    for one in subgroups:
        table.add_row(one.value, f"{len(one.predictions):,}", *(_cell(one.metrics[name]) for name in SHOWN[score.kind]))
    return table


def _difference_table(differences: list[Difference], scores: list[Score]) -> Table:
    first, second = differences[0].first, differences[0].second
    title = f"{first.task}: {model_title(first, scores)} minus {model_title(second, scores)}, paired"
    table = _table(title, ["head", "features"], first.kind)
    table.add_column("verdict")  # by the first metric shown; JSON has one for each
    for one in differences:
        cells = [_cell(one.metrics[name], "+") for name in SHOWN[first.kind]]
        table.add_row(one.first.head, one.first.features, *cells, one.verdict(SHOWN[first.kind][0]))
    return table


def _title(score: Score) -> str:
    count, groups = len(score.predictions), len(np.unique(score.predictions.group))
    people = f" of {groups:,} people" if groups < count else ""
    return f"{score.task}: {count:,} faces{people}, {len(np.unique(score.predictions.fold))} folds"


def model_title(score: Score, scores: list[Score]) -> str:
    """Return the model's name, or the store's where two stores hold models of one name."""
    stores = {one.store for one in scores}
    return score.model if len({one.model for one in scores}) == len(stores) else Path(score.store).stem


def _cell(interval: Interval, sign: str = "") -> str:
    return f"{_number(interval.value, sign)} [{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float, sign: str = "") -> str:
    """Three decimals below 10, else four digits: r2 0.412, MAE 12.31."""
    if not math.isfinite(value):
        return "-"
    value += 0.0 if abs(value) >= 0.0005 else -value  # no "-0.000"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.4g}"


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

    `target` and `prediction` are numbers; of a class they are its index, `target_class` and `prediction_class` its
    name, and `probabilities` those of all classes.
    """
    import pyarrow

    tables = []
    for score in scores:
        one, count = score.predictions, len(score.predictions)
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
