"""The demo's report: one HTML page with the outcome first, then the road from photos to scores in pictures."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mefem_cli import __version__
from mefem_cli.demo import PIXELS, PRETRAINED, STEP0, Demo
from mefem_cli.reports import demo_figures, html
from mefem_cli.reports.demo_results import BASELINE, COLUMNS, NAMES, Results, Row
from mefem_cli.stores import product
from mefem_cli.stores.crops import LABEL, OK, REJECTED, read_manifest, text_to_path
from mefem_cli.stores.runs import Run

NUM_PEOPLE = 16  # shown, of BMI from the lowest to the highest
NUM_REJECTS = 3  # shown of each reason
LINE_WIDTH = 100  # of text on the terminal
REASONS_IN_WORDS = {
    "border": "the square around the face leaves the photo",
    "small": "the square around the face is under 224 px",
    "no-face": "no face was found",
    "low-score": "a face perhaps, but not a sure one",
    "unreadable": "the file is damaged",
}


def write(demo: Demo, results: Results) -> Path:
    """Write report.html into the demo's folder and return its path."""
    path = demo.out / "report.html"
    product.write_text(path, _Page(demo, results).html())
    return path


def wrapped(points: list[str]) -> Iterator[str]:
    """Yield the points as lines of a list for the terminal."""
    for point in points:
        yield from textwrap.wrap(point, LINE_WIDTH, initial_indent="- ", subsequent_indent="  ")


class _Page:
    """Reads what the demo made, section by section."""

    def __init__(self, demo: Demo, results: Results):
        self.demo, self.results = demo, results
        self.run = Run(demo.run_path(PRETRAINED))

    def html(self) -> str:
        sections = (self._outcome, self._photos, self._rejects, self._masks, self._training, self._predictions)
        body = [part for section in (*sections, self._subgroups, self._commands) for part in section()]
        options = self.demo.options
        lead = (
            f"{options.num_photos} photos of {options.people} imaginary people became crops, an encoder, features and "
            "scores. Everything on this page was computed on this machine; nothing was downloaded."
        )
        return html.page("mefem demo", lead, body)

    @cached_property
    def rows(self) -> list[Row]:
        """The manifest of the crops."""
        return read_manifest(self.demo.crops).to_pylist()

    @cached_property
    def people(self) -> list[Row]:
        """Manifest rows of some people, evenly spaced from the lowest BMI to the highest."""
        labelled = [row for row in self.rows if row["status"] == OK and row[LABEL + "bmi"] is not None]
        labelled.sort(key=lambda row: row[LABEL + "bmi"])
        chosen = np.linspace(0, len(labelled) - 1, min(NUM_PEOPLE, len(labelled))).astype(int)
        return [labelled[index] for index in chosen]

    def _outcome(self) -> Iterator[str]:
        results = self.results
        yield html.callout(results.outcome(), results.outcome_in_words())
        yield html.heading("What a linear head reads from each")
        yield html.table(("features", *(heading for *_, heading in COLUMNS)), map(_unbroken, results.lines()))
        panels = []
        for task, metric, heading in COLUMNS:
            scores = [results.score(task, store) for store in results.stores]
            panels.append((heading, [score["metrics"][metric] for score in scores], scores[0]["baseline"][metric]))
        caption = f"Scores with 95 % intervals over people, further right is better. Dashed: the {BASELINE}."
        yield self._figure(demo_figures.intervals(panels, [NAMES[store] for store in results.stores]), caption)
        yield html.heading("What these numbers show, and what they do not")
        yield html.points(results.meaning())

    def _photos(self) -> Iterator[str]:
        yield html.heading("The photos")
        yield html.paragraph("Drawn by mefem, never taken: nobody here exists. From the lowest BMI to the highest.")
        yield html.tiles((html.thumbnail(self._source(row)), _who(row)) for row in self.people)
        yield html.heading("The crops")
        yield html.paragraph(
            "The same people: BlazeFace finds the face, and the crop is the square of twice its box, at 224 px."
        )
        yield html.tiles(
            (html.thumbnail(self.demo.crops / row["path"]), f"BMI {row[LABEL + 'bmi']:.1f}") for row in self.people
        )

    def _source(self, row: Row) -> Path:
        return Path(text_to_path(row["source"]))

    def _rejects(self) -> Iterator[str]:
        rejected = [row for row in self.rows if row["status"] == REJECTED]
        yield html.heading("The rejects")
        counts = Counter(row["reason"] for row in rejected)
        yield html.paragraph(
            f"{len(rejected)} of {len(self.rows)} pictures gave no crop. A few are broken on purpose, to show the "
            "reasons. Yellow: face box. Red: the square that was wanted."
        )
        lines = [(reason, count, REASONS_IN_WORDS.get(reason, "")) for reason, count in counts.most_common()]
        yield html.table(("reason", "pictures", "meaning"), lines)
        shown = [row for reason in counts for row in [one for one in rejected if one["reason"] == reason][:NUM_REJECTS]]
        drawn = ((demo_figures.reject_picture(row, self._source(row)), row) for row in shown)
        yield html.tiles((data, row["detail"] or row["reason"]) for data, row in drawn if data is not None)

    def _masks(self) -> Iterator[str]:
        yield html.heading("What the encoder learns from")
        crops = [(self.demo.crops / row["path"]).read_bytes() for row in self.people[:: max(1, len(self.people) // 4)]]
        caption = (
            "From the patches in colour the encoder predicts the features of the veiled ones. Where the CLS token "
            "joins the source, one of its patches becomes a target in its place. Right: how often a patch is seen."
        )
        yield self._figure(demo_figures.masks(self.run, crops), caption)

    def _training(self) -> Iterator[str]:
        yield html.heading("The training")
        caption = (
            "The loss may rise as its targets grow richer, so it does not tell by itself whether training works. "
            "RankMe counts the directions that the features use; the last curve compares with a predictor that sees "
            "nothing and knows only where a patch lies (dashed, 1). Both are measured on faces never trained on."
        )
        yield self._figure(demo_figures.training(self.run, int(self.demo.options.recipe["epochs"])), caption)

    def _predictions(self) -> Iterator[str]:
        yield html.heading("Predicted and true BMI")
        table = pq.read_table(self.demo.scores / "numbers" / "predictions.parquet")
        panels = []
        for store in (PRETRAINED, STEP0, PIXELS):
            score = self.results.score("bmi", store)
            rows = table.filter(pc.and_(pc.equal(table["task"], "bmi"), pc.equal(table["store"], score["store"])))
            title = demo_figures.panel_title(NAMES[store], score)
            panels.append((title, rows["target"].to_numpy(), rows["prediction"].to_numpy()))
        caption = "Each dot is one photo of a person whose labels the head had not seen. Dashed: predicted = true."
        yield self._figure(demo_figures.predictions(panels), caption)

    def _subgroups(self) -> Iterator[str]:
        yield html.heading("Is it as good for everyone?")
        score, subgroups = self.results.score("bmi", PRETRAINED), self.results.select("subgroup", "bmi")
        if not subgroups:
            yield html.paragraph("There are too few people in each group to tell (20 are wanted).")
            return
        rows = [score, *subgroups]
        groups = [row["value"] if row["by"] == "sex" else f"skin tone {row['value']}" for row in subgroups]
        names = [f"{name} ({row['n_groups']})" for name, row in zip(["everyone", *groups], rows, strict=True)]
        panels = [
            (title, [row["metrics"][metric] for row in rows], score["metrics"][metric]["value"])
            for metric, title in (("r2", "BMI r2"), ("mae", "mean absolute error, kg/m2"))
        ]
        caption = (
            "BMI from the pretrained features, by group (people in brackets), with 95 % intervals. Dashed: everyone. "
            "An r2 also depends on how much BMI varies within the group; the error does not."
        )
        yield self._figure(demo_figures.intervals(panels, names), caption)

    def _commands(self) -> Iterator[str]:
        yield html.heading("The commands")
        yield html.paragraph("Type them in the same folder to do it by hand, or with your own photos.")
        yield html.code(step.line for step in self.demo.steps)
        seconds = [(name, f"{taken:.1f}") for name, taken in self.demo.recorded_seconds.items()]
        yield html.table(("step", "seconds"), seconds)
        options = {**self.demo.options.identity, "mefem": __version__, **_device(self.run)}
        yield html.table(("option", "value"), options.items())

    def _figure(self, draw: Any, caption: str) -> str:
        return html.themed_figure(*demo_figures.themed(draw), caption)


def _unbroken(cells: list[str]) -> list[str]:
    """Return cells that the browser keeps in one line each."""
    return [cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in cells]


def _who(row: Row) -> str:
    label = {name.removeprefix(LABEL): value for name, value in row.items()}
    return f"BMI {label['bmi']:.1f}, {label['sex']}, {label['age']:.0f} y, skin tone {label['skin_tone']:.0f}"


def _device(run: Run) -> dict[str, str]:
    record = json.loads((run.path / "model.json").read_text(encoding="utf-8"))["provenance"]
    return {"device": record["device"], "torch": record["versions"]["torch"]}
