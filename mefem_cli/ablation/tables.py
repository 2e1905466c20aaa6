"""The tables of a grid for a terminal, as Markdown and as LaTeX, in the layout of the paper's ablation table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mefem_cli.ablation import cost, reading, results
from mefem_cli.ablation.cost import Cost
from mefem_cli.ablation.grid import shown_value
from mefem_cli.ablation.reading import BEST, Entry, Group, Table
from mefem_cli.ablation.results import FAILED
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.numbers import TITLES, cell, number

if TYPE_CHECKING:
    import rich.table

REFERENCE, VERDICT, SAME, NOTHING = "reference", "verdict", "same", "-"
WIDTH = 120  # characters of a table that goes into a file
UNLIMITED = 10_000  # characters, to measure how wide a table would be
MOST_ON_TERMINAL = 6  # tables: a task may have forty targets
FITTED = (  # to a line, where it is wider
    r"\noindent\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"
    r"{\footnotesize\setlength{\tabcolsep}{3pt}%"
)
LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


@dataclass(frozen=True)
class Content:
    """What stands in one place of a table."""

    text: str
    interval: str = ""  # behind the text, in brackets
    mark: str = ""  # `best`, `highest` or `lowest`

    @property
    def plain(self) -> str:
        """Everything as one text."""
        return " ".join(part for part in (self.text, self.interval, self.mark) if part)


# Layout -----------------------------------------------------------------------------------------------------------


def header(table: Table) -> list[str]:
    """Return the names of the columns."""
    numbers = _number_columns(table, table.metrics)
    return [*table.options, *["seeds"] * table.lacks_seeds, "head", "features", *numbers]


def _number_columns(table: Table, metrics: Sequence[str]) -> list[str]:
    compared = [f"{TITLES[metrics[0]]} - reference", VERDICT] if table.is_compared else []
    return [
        *(f"{TITLES[name]} [95 %]" for name in metrics),
        *compared,
        *(f"{TITLES[name]} published*" for name in _published(table, metrics)),
    ]


def _published(table: Table, metrics: Sequence[str]) -> list[str]:
    return [name for name in table.published if name in metrics]


def num_text_columns(table: Table) -> int:
    """Return how many columns come before the numbers."""
    return len(table.options) + table.lacks_seeds + 2


def rows(group: Group, table: Table) -> Iterator[list[Content]]:
    """Yield the rows of a group; the options of one encoder stand once, over the features read from it."""
    before = ""
    for entry in group.entries:
        name = entry.line.cell.name
        yield [*_options(entry, table, name == before), *_numbers(entry, table, table.metrics)]
        before = name


def _options(entry: Entry, table: Table, is_repeated: bool) -> Iterator[Content]:
    line = entry.line
    for name in table.options:
        is_shown = name in line.cell.shown and not is_repeated
        yield Content(shown_value(line.cell.shown[name]) if is_shown else "")
    if table.lacks_seeds:
        yield Content(f"{len(line.seeds)} of {table.num_seeds}")
    yield Content(line.head.replace(",", ", "))
    yield Content(line.features)


def _numbers(entry: Entry, table: Table, metrics: Sequence[str]) -> Iterator[Content]:
    line = entry.line
    for name in metrics:
        yield _content(line.metrics.get(name), entry.marks.get(name, "")) if line.seeds else Content(FAILED)
    if table.is_compared:
        metric = metrics[0]
        yield Content(REFERENCE) if entry.is_reference else _content(entry.differences.get(metric), sign="+")
        yield Content(entry.verdict(metric))
    for name in _published(table, metrics):
        yield Content(number(line.published(table.task).get(name, math.nan)))


def _content(interval: Interval | None, mark: str = "", sign: str = "") -> Content:
    if interval is None or not math.isfinite(interval.value):
        return Content(NOTHING)
    text, _, brackets = cell(interval, sign).partition(" ")
    return Content(text, brackets, mark)


def captions(tables: Sequence[Table], best: str = reading.CAPTION_BEST) -> list[str]:
    """Return what a reader must know to read tables; `best` explains their marks."""
    num_seeds = max((table.num_seeds for table in tables), default=1)
    found = [reading.CAPTION_SEEDS.format(num_seeds) if num_seeds > 1 else reading.CAPTION_ONE_SEED]
    if any(table.lacks_seeds for table in tables):
        found.append(reading.CAPTION_LACKING)
    if any(entry.marks for table in tables for entry in table.entries):
        found.append(best)
    if any(table.is_compared for table in tables):
        found.append(reading.CAPTION_DIFFERENCES)
    if any(table.published for table in tables):
        found.append(f"* {reading.CAPTION_PUBLISHED}")
    return found


# Terminal ---------------------------------------------------------------------------------------------------------


def to_terminal(table: Table, width: int = WIDTH) -> rich.table.Table:
    """Return a table for a terminal of some width.

    It has all metrics with the differences by the first, as the other tables; where that is too wide, the metrics that
    others have published, or the first.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=UNLIMITED)
    whole = _terminal(table, table.metrics)
    is_narrow = Measurement.get(console, console.options, whole).maximum > width
    return _terminal(table, table.published or table.metrics[:1]) if is_narrow else whole


def _terminal(table: Table, metrics: Sequence[str]) -> rich.table.Table:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.task), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    shown.show_edge = False
    notes = [
        reading.baseline(table, metrics),
        f"* {reading.CAPTION_PUBLISHED}" if _published(table, metrics) else "",
    ]
    shown.caption, shown.caption_justify = Text("\n".join(filter(None, notes))), "left"
    shown.add_column("", overflow="fold")
    for name in _number_columns(table, metrics):
        shown.add_column(Text(name), justify="left" if name == VERDICT else "right", no_wrap=True)
    for group in table.groups:
        if group.heading:
            shown.add_row(Text(group.heading, "bold"))
        for entry in group.entries:
            numbers = _numbers(entry, table, metrics)
            texts = [Text(f"{one.text} {one.interval}".rstrip(), "bold" if one.mark == BEST else "") for one in numbers]
            num_seeds, name = len(entry.line.seeds), reading.label(entry, group, table)
            if table.lacks_seeds and num_seeds < table.num_seeds:
                name += f" [{num_seeds} of {table.num_seeds} seeds]"
            shown.add_row(Text(name), *texts)
    return shown


# Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """Return a table whose source reads as a table too."""
    lines = [[_escaped(one) for one in header(table)]]
    for group in table.groups:
        if group.heading:
            lines.append([f"**{_escaped(group.heading)}**", *[""] * (len(lines[0]) - 1)])
        lines += [[_markdown(content) for content in row] for row in rows(group, table)]
    return aligned(lines)


def _markdown(content: Content) -> str:
    text = f"**{content.text}**" if content.mark == BEST else _escaped(content.text)
    return " ".join(part for part in (text, content.interval, content.mark) if part)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Return rows of escaped texts, the header first, as a Markdown table with columns of even width."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join(
        "| " + " | ".join(one.ljust(width) for one, width in zip(row, widths, strict=True)) + " |" for row in lines
    )


def document(
    name: str, tables: Sequence[Table], costs: Sequence[Cost], failures: Sequence[str], notes: Sequence[str]
) -> str:
    """Return results.md: for each task a table and what it says, then failures, cost, and how it was made."""
    parts = [f"# Ablation {name}"]
    for table in tables:
        found = "\n".join(f"- {_escaped(one)}" for one in reading.findings(table))
        parts += [f"## {table.task}", to_markdown(table), found]
    parts += ["\n".join(f"- {one}" for one in captions(tables))]
    if failures:
        parts += ["## Failed", "\n".join(f"- {_escaped(one)}" for one in failures)]
    parts += ["## Cost", aligned([COST_HEADER, *cost_rows(costs)]), COST_CAPTION]
    parts += ["## How it was made", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


# Cost -------------------------------------------------------------------------------------------------------------

COST_HEADER = ["cell", "pretraining", "images", "images/s", "embedding", "probing"]
COST_CAPTION = (
    "Means over the seeds, heads and features of one encoder together; times of whole processes, which may have shared "
    "the machine with others. Images are those seen in training. same: that of a row above, whose encoder or features "
    "these are. A dash: not recorded."
)


def cost_rows(costs: Sequence[Cost]) -> list[list[str]]:
    """Return the cost of each cell as texts, below several of them all together."""
    return [
        [
            one.name,
            _unless_shared(duration(one.pretrain_seconds), one.pretraining_of),
            _unless_shared(_count(one.images), one.pretraining_of),
            _unless_shared(_count(one.images_per_second), one.pretraining_of),
            _unless_shared(duration(one.embed_seconds), one.embedding_of),
            duration(one.probe_seconds),
        ]
        for one in [*costs, *([cost.total(costs)] if len(costs) > 1 else [])]
    ]


def _unless_shared(told: str, owner: str) -> str:
    return SAME if owner and told != NOTHING else told


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: `42 s`, `12 min`, `3.4 h`; a dash for None."""
    if seconds is None:
        return NOTHING
    if 0 < seconds < 0.05:
        return "under 0.1 s"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def about(seconds: float) -> str:
    """Return an estimate as people say it: `about 12 min`, `under 0.1 s`."""
    told = duration(seconds)
    return told if told.startswith("under") else f"about {told}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


# LaTeX ------------------------------------------------------------------------------------------------------------


def to_latex(name: str, tables: Sequence[Table]) -> str:
    r"""Return results.tex: a tabular with booktabs' rules for each task, for `\input{results.tex}`."""
    parts = [
        f"% Ablation {_one_line(name)}: made by mefem ablate, rewritten when it runs again.",
        r"% \usepackage{booktabs,graphicx} in the preamble, \input{results.tex} where the tables belong, best in a",
        r"% table* of two columns: what is wider than a line is shrunk to it. Names in other scripts than Latin want",
        r"% XeLaTeX or LuaLaTeX.",
    ]
    for table in tables:
        parts += [
            "",
            *[r"\bigskip"] * (table is not tables[0]),
            f"% {_one_line(table.task)}",
            *(f"% {one}" for one in captions([table], reading.CAPTION_BEST_LATEX)),
            *_tabular(table),
        ]
    return "\n".join(parts) + "\n"


def _tabular(table: Table) -> Iterator[str]:
    names = header(table)
    num_texts = num_text_columns(table)
    yield FITTED
    yield rf"\begin{{tabular}}{{@{{}}{'l' * num_texts}{'r' * (len(names) - num_texts)}@{{}}}}"
    yield r"\toprule"
    yield " & ".join(map(latex, names)) + r" \\"
    for group in table.groups:
        yield r"\midrule"
        if group.heading:
            yield rf"\multicolumn{{{len(names)}}}{{@{{}}l}}{{\textit{{{latex(group.heading)}}}}} \\"
        for row in rows(group, table):
            yield " & ".join(_latex_content(one) for one in row) + r" \\[2pt]"
    yield r"\bottomrule"
    yield r"\end{tabular}}"


def _latex_content(content: Content) -> str:
    text = latex(content.text)
    if content.interval:
        text = _minus(text)
        text = rf"\textbf{{{text}}}" if content.mark == BEST else rf"\underline{{{text}}}" if content.mark else text
        return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{text}\\{{\scriptsize {_minus(content.interval)}}}\end{{tabular}}"
    return text


def _minus(text: str) -> str:
    return text.replace("-", "$-$")


def latex(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(LATEX.get(char, char if char.isprintable() else " ") for char in text)


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def failures_of(rows: Sequence[results.Row]) -> list[str]:
    """Return one text for each failure."""
    return list(dict.fromkeys(f"{row.cell}, seed {row.seed}: {row.status}" for row in rows if row.status != results.OK))
