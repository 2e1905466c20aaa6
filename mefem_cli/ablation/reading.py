"""What the tables and figures of a grid show: lines in groups, differences to a reference, the best of each group."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mefem_cli.ablation import results
from mefem_cli.ablation.differences import Differences, Reference, reference_of, verdict
from mefem_cli.ablation.grid import shown_value
from mefem_cli.ablation.results import Line
from mefem_cli.ablation.runner import Outcome
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.metrics import LOWER_IS_BETTER
from mefem_cli.evaluation.numbers import SHOWN, TITLES, cell, number

BEST = "best"
CAPTION_ONE_SEED = "Brackets: 95 % bootstrap intervals over people, with the trained models fixed."
CAPTION_SEEDS = (
    "Values are means over {} seeds; a seed sets initialisation, data order, masks and folds. Brackets: 95 % "
    "intervals of the mean, from the bootstrap over people (more seeds do not shrink it: all see the same people) and "
    "the t-interval over seeds, added in quadrature, cut where a metric ends (AUROC 1, MAE 0). results.csv has each "
    "seed with its own bootstrap interval."
)
CAPTION_LACKING = (
    "Where seeds are missing, a mean is of those that are there and a difference of those that both rows have; such a "
    "row is not marked."
)
CAPTION_DIFFERENCES = (
    "Differences are paired: each bootstrap draws the same people for a row and for its reference, seed by seed; over "
    "seeds they are combined as the means are. Better or worse: the interval excludes 0; unclear is not equal."
)
CAPTION_BEST = (
    '"best" (bold): its paired difference to every other row of its group excludes 0; "highest" or "lowest": by its '
    "value alone, the others may be as good."
)
CAPTION_BEST_LATEX = (
    "Bold: its paired difference to every other row of its group excludes 0; underlined: the best by its value alone, "
    "the others may be as good."
)
CAPTION_PUBLISHED = "Published values are of another data set, other splits and often other training: no comparison."


@dataclass(frozen=True)
class Entry:
    """A line of the table with what is said of it."""

    line: Line
    reference: Line | None = None  # what it is compared with: another line, itself, or none
    differences: dict[str, Interval] = field(default_factory=dict)  # metric -> line minus reference
    marks: dict[str, str] = field(default_factory=dict)  # metric -> `best`, or `highest` or `lowest` by value alone

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it."""
        return self.reference is self.line

    def verdict(self, metric: str) -> str:
        """`better`, `worse` or `unclear` than the reference; empty where it is not compared."""
        return verdict(metric, self.differences[metric]) if metric in self.differences else ""


@dataclass(frozen=True)
class Group:
    """Entries under one heading; without headings all are one group."""

    heading: str
    entries: list[Entry]


@dataclass(frozen=True)
class Table:
    """All that was found on one task."""

    task: str
    num_seeds: int  # asked for
    groups: list[Group]

    @property
    def entries(self) -> list[Entry]:
        """The entries of all groups."""
        return [entry for group in self.groups for entry in group.entries]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics shown; results.csv has all."""
        known = {name for entry in self.entries for name in entry.line.metrics}
        return [name for names in SHOWN.values() for name in names if name in known]

    @cached_property
    def options(self) -> list[str]:
        """The options that tell cells from each other."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.line.cell.shown))

    @cached_property
    def published(self) -> list[str]:
        """The metrics for which others have published values."""
        known = {name for entry in self.entries for name in entry.line.published(self.task)}
        return [name for name in self.metrics if name in known]

    @cached_property
    def baseline(self) -> dict[str, float]:
        """What guessing without a face scores by each shown metric: the mean over lines and seeds, as folds differ."""
        scores = [score for entry in self.entries for score in entry.line.seeds.values()]
        found = {name: [score.get("baseline", {}).get(name) for score in scores] for name in self.metrics}
        known = {name: [one for one in values if one is not None] for name, values in found.items()}
        return {name: statistics.fmean(values) for name, values in known.items() if values}

    @property
    def lacks_seeds(self) -> bool:
        """Whether a line has not all of several seeds."""
        return self.num_seeds > 1 and any(len(entry.line.seeds) < self.num_seeds for entry in self.entries)

    @property
    def is_compared(self) -> bool:
        """Whether any line is compared with another."""
        return any(entry.differences for entry in self.entries)


def read(
    outcomes: Sequence[Outcome],
    tasks: Sequence[str],
    num_seeds: int,
    references: Sequence[Reference],
    differences: Differences,
) -> list[Table]:
    """Return a table for each task that was scored, in the order asked for; targets of a task have one each."""
    return [
        Table(task, num_seeds, _groups(results.lines_of(outcomes, task), task, references, differences))
        for task in results.tasks_of(outcomes, tasks)
    ]


def _groups(lines: Sequence[Line], task: str, references: Sequence[Reference], differences: Differences) -> list[Group]:
    groups = []
    for heading in dict.fromkeys(line.cell.group for line in lines):
        own = [line for line in lines if line.cell.group == heading]
        own = [line for name in dict.fromkeys(one.cell.name for one in own) for line in own if line.cell.name == name]
        marks = _marks(own, task, differences)
        entries = []
        for place, line in enumerate(own):
            reference = reference_of(line, lines, references)
            found = {} if reference is None or reference is line else differences.between(line, reference, task)
            entries.append(Entry(line, reference, found, marks.get(place, {})))
        groups.append(Group(heading, entries))
    return groups


def _marks(lines: Sequence[Line], task: str, differences: Differences) -> dict[int, dict[str, str]]:
    """Return which line of a group, by its place, is the best by each shown metric, and whether that can be told.

    A line that lacks seeds is another mean and leads nothing; where two are equal, neither does.
    """
    marks: dict[int, dict[str, str]] = {}
    most = max((len(line.seeds) for line in lines), default=0)
    whole = {place: line for place, line in enumerate(lines) if len(line.seeds) == most}
    for metric in [name for names in SHOWN.values() for name in names]:
        values = {place: line.metrics[metric].value for place, line in whole.items() if metric in line.metrics}
        values = {place: value for place, value in values.items() if math.isfinite(value)}
        sign = -1 if metric in LOWER_IS_BETTER else 1
        if len(values) < 2:
            continue
        first, *others = sorted(values, key=lambda place: -sign * values[place])
        if values[first] == values[others[0]]:
            continue
        is_told = all(_is_better(lines[first], lines[other], task, metric, differences) for other in others)
        marks.setdefault(first, {})[metric] = BEST if is_told else "highest" if sign > 0 else "lowest"
    return marks


def _is_better(first: Line, second: Line, task: str, metric: str, differences: Differences) -> bool:
    found = differences.between(first, second, task)
    return metric in found and verdict(metric, found[metric]) == "better"


def label(entry: Entry, group: Group, table: Table) -> str:
    """Return a short name for a line: what varies in its group, options, head and features.

    Of a row alone in its group it is what tells it from its reference.
    """
    compared = [entry.reference] if len(group.entries) == 1 and entry.reference else []
    cells = [line.cell for line in (*(one.line for one in group.entries), *compared)]
    varying = [name for name in table.options if len({shown_value(one.shown.get(name, "")) for one in cells}) > 1]
    words = [f"{name}={shown_value(value)}" for name, value in entry.line.cell.shown.items() if name in varying]
    if len({reads(one.line) for one in group.entries}) > 1:
        words.append(f"({reads(entry.line)})" if words else reads(entry.line))
    return " ".join(words) or entry.line.cell.name


def title(group: Group, table: Table) -> str:
    """Return a group's heading, with head and features where they vary in the table but not in the group."""
    own, all_of = ({reads(one.line) for one in entries} for entries in (group.entries, table.entries))
    return f"{group.heading}, {own.pop()}" if group.heading and len(own) == 1 < len(all_of) else group.heading


def reads(line: Line) -> str:
    """Return what a line reads with: `linear on cls`."""
    return f"{line.head} on {line.features}" if line.features else line.head


def findings(table: Table) -> Iterator[str]:
    """Yield what the table says in plain words, one sentence or two for each group, by the first metric."""
    if not table.metrics:
        return
    metric = table.metrics[0]
    for group in table.groups:
        prefix, said = title(group, table), " ".join(_sentences(group, table, metric))
        if said:
            yield f"{prefix}: {said}" if prefix else said
    if guessing := baseline(table, table.metrics):
        yield guessing


def baseline(table: Table, metrics: Sequence[str]) -> str:
    """Return what guessing scores by these metrics, in a sentence; empty where it is not known."""
    told = ", ".join(f"{TITLES[name]} {number(table.baseline[name])}" for name in metrics if name in table.baseline)
    guess = "the average" if set(table.metrics) <= set(SHOWN["regression"]) else "the most frequent class"
    return f"Guessing {guess} for everyone: {told}." if told else ""


def _sentences(group: Group, table: Table, metric: str) -> Iterator[str]:
    for entry in group.entries:
        if metric in entry.marks:
            value = cell(entry.line.metrics[metric])
            name = label(entry, group, table)
            if entry.marks[metric] == BEST:
                yield f"{name} has the best {TITLES[metric]}, {value}, told apart from every other row."
            else:
                yield f"{name} has the {entry.marks[metric]} {TITLES[metric]}, {value}; another row may be as good."
    compared = [entry for entry in group.entries if entry.verdict(metric)]
    names = {entry.reference.cell.name for entry in compared if entry.reference is not None}
    reference = " or ".join(sorted(names))
    for word in ("better", "worse"):
        named = [label(entry, group, table) for entry in compared if entry.verdict(metric) == word]
        if named:
            yield f"{word.capitalize()} than the reference ({reference}): {'; '.join(named)}."
    unclear = sum(entry.verdict(metric) == "unclear" for entry in compared)
    if unclear:
        yield f"Not told apart from the reference ({reference}): {unclear} of {len(compared)}."


# summary.csv ----------------------------------------------------------------------------------------------------

SUMMARY_COLUMNS = (
    *("group", "cell", "task", "head", "features", "metric", "seeds", "mean", "low", "high", "mark"),
    *("reference", "difference", "difference_low", "difference_high", "verdict", "published"),
)


def to_csv(tables: Sequence[Table]) -> str:
    """Return summary.csv: means, marks, paired differences and published values, a row for each line and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SUMMARY_COLUMNS)
    for table in tables:
        for group in table.groups:
            for entry in group.entries:
                writer.writerows(_summary_rows(group, entry, table.task))
    return text.getvalue()


def _summary_rows(group: Group, entry: Entry, task: str) -> Iterator[list[str]]:
    line, reference = entry.line, entry.reference
    compared = "" if reference is None or reference is line else f"{reference.cell.name} ({reads(reference)})"
    for metric, mean in line.metrics.items():
        difference = entry.differences.get(metric, Interval(math.nan, math.nan, math.nan))
        yield [
            *(group.heading, line.cell.name, task, line.head, line.features, metric, str(len(line.seeds))),
            *map(_number, (mean.value, mean.low, mean.high)),
            entry.marks.get(metric, ""),
            *(compared, *map(_number, (difference.value, difference.low, difference.high)), entry.verdict(metric)),
            _number(line.published(task).get(metric, math.nan)),
        ]


def _number(value: float) -> str:
    return f"{value:.{results.SIGNIFICANT_DIGITS}g}" if math.isfinite(value) else ""
