"""What the demo found: the rows of `mefem probe`, as a table for the terminal and in plain words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli.demo import CONTROL, PIXEL_SIDE, PIXELS, PRETRAINED, STEP0

if TYPE_CHECKING:
    from rich.table import Table

# The columns of the table: the task, the metric that stands for it, and its heading.
COLUMNS = (
    ("bmi", "r2", "BMI r2"),
    ("age", "r2", "age r2"),
    ("sex", "balanced_accuracy", "sex bal. acc."),
    ("skin_tone", "r2", "skin tone r2"),
)
NAMES = {
    PRETRAINED: "pretrained",
    STEP0: "step 0",
    PIXELS: f"raw {PIXEL_SIDE} x {PIXEL_SIDE} pixels",
    CONTROL: "control, frozen target",
}
BASELINE = "mean baseline"
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of all probes of a demo, as `mefem probe --json` prints them."""

    rows: list[Row]

    @classmethod
    def read(cls, scores: Path) -> Results:
        """Read the scores.json of every probe below a folder."""
        paths = sorted(scores.glob("*/scores.json"))
        return cls([row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))])

    def select(self, kind: str, task: str, store: str = PRETRAINED) -> list[Row]:
        """Return the rows of a kind (score, subgroup, difference) of one task and one store, named without `.h5`."""
        found = [row for row in self.rows if row["row"] == kind and row["task"] == task]
        return [row for row in found if Path(row["store"]).stem == store]

    def score(self, task: str, store: str) -> Row:
        """Return the one score of a task and a store."""
        return self.select("score", task, store)[0]

    @property
    def stores(self) -> list[str]:
        """The stores that were probed, in the order of the table."""
        return [name for name in NAMES if self.select("score", "bmi", name)]

    @property
    def difference(self) -> Row:
        """The outcome, fixed in advance: BMI of pretrained minus step 0."""
        rows = self.select("difference", "bmi")
        return next(row for row in rows if Path(row["minus_store"]).stem == STEP0)

    def as_json(self) -> Row:
        """Return what `--json` prints beside the path and the time."""
        scores = [row for row in self.rows if row["row"] == "score"]
        return {"crops": self.score("bmi", PRETRAINED)["n"], "scores": scores, "difference": self.difference}

    # As a table -------------------------------------------------------------------------------------------------

    def lines(self) -> list[list[str]]:
        """Return the table's lines: a name, then a cell for each of COLUMNS."""
        lines = [
            [NAMES[store], *(cell(self.score(task, store)["metrics"][metric]) for task, metric, _ in COLUMNS)]
            for store in self.stores
        ]
        baseline = (self.score(task, PRETRAINED)["baseline"][metric] for task, metric, _ in COLUMNS)
        return [*lines, [BASELINE, *(number(value) for value in baseline)]]

    def table(self) -> Table:
        """Return the table for the terminal."""
        from rich import box
        from rich.table import Table

        row = self.score("bmi", PRETRAINED)
        title = f"{row['n']:,} faces of {row['n_groups']:,} imaginary people; linear heads, 95 % intervals"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        for *_, heading in COLUMNS:
            table.add_column(heading, justify="right")
        for line in self.lines():
            table.add_row(*line, style="dim" if line[0] == BASELINE else "bold" if line[0] == NAMES[PRETRAINED] else "")
        return table

    # In words ---------------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """`better`, `unclear` or `worse`: whether the interval of the difference excludes 0."""
        return self.difference["verdict"]["r2"]

    def outcome(self) -> str:
        """Return the outcome in one line."""
        return f"BMI r2, pretrained minus step 0: {cell(self.difference['metrics']['r2'], '+')}: {self.verdict}"

    def outcome_in_words(self) -> str:
        """Return what the verdict means."""
        return {
            "better": "Training without any label made BMI easier to read from these faces than the same encoder's "
            "untrained features: the 95 % interval of the difference lies above 0.",
            "unclear": "On these faces one cannot tell whether training without labels helped to read BMI: the 95 % "
            "interval of the difference holds 0. More people or more epochs would narrow it or move it.",
            "worse": "Training without labels made BMI harder to read from these faces than the same encoder's "
            "untrained features: the 95 % interval of the difference lies below 0.",
        }[self.verdict]

    def meaning(self) -> list[str]:
        """Return, one point each, what these numbers show and what they do not."""
        points = [
            "These are rendered people, not patients. Their BMI, age, sex and skin tone shaped the drawing, so the "
            "labels are exact and the pictures simpler than any photo. Nothing here says how well BMI can be read from "
            "a real face.",
            "The encoder was trained on these same faces, without their labels. The heads then learned from some "
            "people's labels and were scored on other people's. A claim about new faces needs faces that pretraining "
            "never saw.",
            "Step 0 is the same encoder before training: what its random wiring keeps of a picture. Raw pixels are the "
            f"crop shrunk to {PIXEL_SIDE} x {PIXEL_SIDE}: what colour and light give away without any encoder. The "
            "mean baseline predicts the other people's average, or the commoner sex.",
            "r2 is the share of the variance that is predicted: 1 is perfect, 0 is no better than the average. "
            "Balanced accuracy of sex is .5 by guessing. The intervals say how much a score would vary with other "
            "people, not with another training run: repeat the demo with other seeds for that.",
            "This encoder must not be used to judge anyone: not health, not weight, not sex, not origin.",
        ]
        if CONTROL in self.stores:
            points.insert(3, "The control is an encoder that learned to predict one that stayed as it was at step 0.")
        return points


def cell(interval: Row, sign: str = "") -> str:
    """Return `0.412 [0.380, 0.441]`."""
    return f"{number(interval['value'], sign)} [{number(interval['low'])}, {number(interval['high'])}]"


def number(value: float | None, sign: str = "") -> str:
    """Return three decimals, or `-` for an undefined number."""
    if value is None:
        return "-"
    value += 0.0 if abs(value) >= 0.0005 else -value  # no "-0.000"
    return f"{value:{sign}.3f}"
