"""What is written about a grid beside results.csv: tables, pictures, a page; anew each time, from what is there.

`summary.csv` has means, marks, paired differences and published values, a row for each line and metric; `costs.csv`
seconds and images of each cell; `results.md` and `results.tex` the tables; `report.html` all of it with the figures,
which are also in `figures/`, scores-<task> and differences-<task> as SVG and PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mefem_cli import console
from mefem_cli.ablation import cost, differences, reading, results, tables
from mefem_cli.ablation.grid import Cell, Grid
from mefem_cli.ablation.reading import Table
from mefem_cli.ablation.runner import Outcome, Strand
from mefem_cli.reports import ablation, ablation_figures, fonts
from mefem_cli.stores import product
from mefem_cli.stores.ablations import CELLS
from mefem_cli.stores.joining import Faces

SUMMARY, COSTS, MARKDOWN, LATEX, REPORT = "summary.csv", "costs.csv", "results.md", "results.tex", "report.html"
FIGURES = "figures"
MOST_DRAWN = 12  # tasks with figures: seconds each, and some tasks have forty targets


def write(
    folder: Path,
    grid: Grid,
    cells: Sequence[Cell],
    strands: Sequence[Strand],
    outcomes: Sequence[Outcome],
    faces: Faces,
    notes: Sequence[str],
) -> list[Table]:
    """Write all files and return the tables, one for each task that has scores.

    `outcomes` in the order of the tables; `faces` has the ids, labels and columns of the crops, features are not read;
    `notes` say how it was made.
    """
    references = differences.find_references(grid.references, cells)
    paired = differences.Differences(folder / CELLS, strands, faces)
    found = reading.read(outcomes, grid.tasks, grid.seeds, references, paired)
    paired.save()
    scored = [entry.line for table in found for entry in table.entries if entry.line.seeds]
    for one in references:
        if scored and not any(one.names(line) for line in scored):
            console.warn(f"the reference, {one}, has no scores: no row is compared with it")
    costs = cost.costs(cells, strands)
    failures = tables.failures_of(results.rows_of(outcomes))
    product.write_text(folder / SUMMARY, reading.to_csv(found))
    product.write_text(folder / COSTS, cost.to_csv(costs))
    product.write_text(folder / MARKDOWN, tables.document(grid.name, found, costs, failures, notes))
    product.write_text(folder / LATEX, tables.to_latex(grid.name, found))
    drawn = {table.task: ablation_figures.draw(table) for table in found[:MOST_DRAWN] if table.metrics}
    lost: dict[str, None] = {}  # texts that no installed font can write
    for task, figures in drawn.items():
        for kind, figure in figures.items():
            lost |= dict.fromkeys(ablation_figures.save(figure, folder / FIGURES, f"{kind}-{task}"))
    fonts.warn(list(lost))
    product.write_text(folder / REPORT, ablation.page(grid.name, found, drawn, costs, failures, notes))
    return [table for table in found if table.metrics]
