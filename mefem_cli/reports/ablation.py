"""report.html of a grid: what it found in words, forest plots, tables, cost, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from mefem_cli.ablation import reading, tables
from mefem_cli.ablation.cost import Cost
from mefem_cli.ablation.reading import BEST, Table
from mefem_cli.ablation.tables import Content
from mefem_cli.console import plural
from mefem_cli.evaluation.metrics import LOWER_IS_BETTER
from mefem_cli.evaluation.numbers import TITLES
from mefem_cli.reports import curves, html
from mefem_cli.reports.ablation_figures import Drawing

STYLE = (
    "<style>"
    + curves.VARIABLES
    + """
body { max-width: 78rem; } p, ul, figure { max-width: 62rem; }
table.results td, table.results th { white-space: nowrap; padding: .25rem .5rem; font-size: .84rem; }
table.results th.heading { color: var(--ink); padding-top: .9rem; border-bottom: 1px solid var(--soft); }
table.results td.number { text-align: right; } table.results th.number { text-align: right; }
table.results .interval { color: var(--soft); font-size: .76rem; display: block; }
table.results .mark { font-size: .72rem; color: var(--soft); padding: 0 .3em; }
table.results .mark { border: 1px solid var(--line); border-radius: 4px; }
td.better { color: var(--curve-3); } td.worse { color: var(--curve-2); } td.unclear { color: var(--soft); }
figure svg { width: 100%; height: auto; min-width: 46rem; }
</style>"""
)
SCORES = (
    "One line for each row of the table: the mean with its 95 % interval{seeds}. {reference}Intervals of rows may "
    "overlap although their paired difference is clear: all rows see the same people."
)
REFERENCE = "Orange is the reference; the dashed line is its value beside the rows compared with it. "
DIFFERENCES = (
    "Row minus its reference, paired by people, with 95 % intervals. An interval that touches 0 is unclear, which is "
    "not the same as equal. {lower}"
)
LOWER = "Of {names} lower is better: there better lies left of 0."
NOT_SAID = (
    "Whether it holds on other faces. The intervals speak for other people like these; another data set may rank the "
    "rows otherwise.",
    "Whether it holds for larger encoders or longer training. Differences between ways of pretraining often grow, "
    "shrink or turn with data and epochs.",
    "That unclear rows are equal. An interval around 0 as wide as the difference you care about says that more people "
    "or seeds are needed.",
    "That one verdict in twenty is not chance. Verdicts are not corrected for their number; read many rows as one "
    "picture.",
    "With two seeds hardly anything: the t-quantile of one degree of freedom is 12.7, so intervals are wide. Three "
    "seeds are the least, five are better.",
)


def page(
    name: str,
    found: Sequence[Table],
    drawn: Mapping[str, Mapping[str, Drawing]],
    costs: Sequence[Cost],
    failures: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return report.html; `drawn` has the figures of each task, all names are escaped."""
    body = [STYLE]
    if failures:
        body += [html.heading("Failed"), html.points(failures)]
    for table in found:
        body += _task(table, drawn.get(table.task, {}))
    body += [html.heading("How to read the tables"), html.points(tables.captions(found))]
    body += [html.heading("Cost"), html.table(tables.COST_HEADER, tables.cost_rows(costs))]
    body += [f'<p class="soft">{escape(tables.COST_CAPTION)}</p>']
    body += [html.heading("What this does not say"), html.points(NOT_SAID)]
    body += [html.heading("How it was made"), html.points(note.replace("`", "") for note in notes)]
    body.append(html.paragraph("As numbers: results.csv (every seed), summary.csv (means, differences), costs.csv."))
    return html.page(f"mefem ablate: {name}", _lead(found), body)


def _lead(found: Sequence[Table]) -> str:
    rows = max((len(table.entries) for table in found), default=0)
    seeds = max((table.num_seeds for table in found), default=1)
    tasks = ", ".join(table.task for table in found[: tables.MOST_ON_TERMINAL])
    more = ", ..." if len(found) > tables.MOST_ON_TERMINAL else ""
    return f"{plural(rows, 'row')} of {plural(seeds, 'seed')}, scored on {tasks}{more}."


def _task(table: Table, figures: Mapping[str, Drawing]) -> Iterator[str]:
    yield html.heading(table.task)
    yield html.points(reading.findings(table))
    if "scores" in figures:
        seeds = ", small dots the seeds" if table.num_seeds > 1 else ""
        caption = SCORES.format(
            seeds=seeds, reference=REFERENCE if any(one.is_reference for one in table.entries) else ""
        )
        yield _figure(figures["scores"], caption)
    if "differences" in figures:
        lower = [TITLES[name] for name in table.metrics if name in LOWER_IS_BETTER]
        told = LOWER.format(names=" and ".join(lower)) if lower else ""
        yield _figure(figures["differences"], DIFFERENCES.format(lower=told).strip())
    yield _table(table)


def _figure(drawing: Drawing, caption: str) -> str:
    return f'<figure><div class="scroll">{drawing.svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _table(table: Table) -> str:
    """Return the table with a heading over each group; numbers stand to the right."""
    names = tables.header(table)
    num_texts = tables.num_text_columns(table)
    kinds = [""] * num_texts + [' class="number"'] * (len(names) - num_texts)
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    lines = []
    for group in table.groups:
        if group.heading:
            lines.append(f'<tr><th class="heading" colspan="{len(names)}">{escape(group.heading)}</th></tr>')
        for row in tables.rows(group, table):
            lines.append("<tr>" + "".join(map(_content, row, kinds)) + "</tr>")
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _content(content: Content, kind: str) -> str:
    if content.text in ("better", "worse", "unclear"):
        kind = f' class="{content.text}"'
    text = f"<strong>{escape(content.text)}</strong>" if content.mark == BEST else escape(content.text)
    interval = f'<span class="interval">{escape(content.interval)}</span>' if content.interval else ""
    mark = f'<span class="mark">{escape(content.mark)}</span> ' if content.mark else ""
    return f"<td{kind}>{mark}{text}{interval}</td>"
