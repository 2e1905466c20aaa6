"""The files about a finished grid: tables in four forms, the page, the figures, and a rerun that writes them anew."""

import io
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from ablations import finish
from PIL import Image
from rich.console import Console
from synthetic import write_crops

from mefem_cli.ablation import differences, reading, summary, tables
from mefem_cli.ablation.cost import Cost
from mefem_cli.ablation.grid import Grid, Row, expand
from mefem_cli.ablation.job import AblateOptions, Job
from mefem_cli.ablation.reading import Entry, Group, Table
from mefem_cli.ablation.results import Line
from mefem_cli.ablation.runner import Outcome
from mefem_cli.errors import UsageError
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.reports import ablation, ablation_figures
from mefem_cli.stores.product import ProductOptions

FACES = 60
GRID = """
task: bmi
seeds: 3
set: {bootstraps: 200, features: cls, head: linear}
reference: {mask: stripes, width: 2}
rows:
  - {group: "Masks <b> & 5 $", mask: stripes, width: 2, published: {r2: 0.61}}
  - {mask: stripes, width: 2, head: mlp}
  - {mask: quadrants}
  - {group: Weight, mask: stripes, loss_weight: uniform}
"""
WRITTEN = ("results.csv", "summary.csv", "costs.csv", "results.md", "results.tex", "report.html")
FIGURES = tuple(f"figures/{kind}-bmi.{form}" for kind in ("scores", "differences") for form in ("svg", "png"))
HEADER = ["mask", "width", "loss_weight", "head", "features", "r2 [95 %]", "MAE [95 %]"]
HEADER += ["r2 - reference", "verdict", "r2 published*"]


def prepare(folder: Path, **flags) -> Job:
    options = AblateOptions(crops=[str(folder / "crops")], **flags)
    return Job.prepare([str(folder / "grid.yaml")], options, {}, ProductOptions(out=str(folder / "out")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with crops and a grid whose cells all have scores, and its tables."""
    folder = tmp_path_factory.mktemp("finished")
    bmi = np.random.default_rng(0).normal(25, 4, FACES)
    subject = np.arange(FACES) // 2
    crops = write_crops(folder / "crops", FACES, 32, bmi=list(bmi), subject=[f"p{one}" for one in subject])
    (folder / "grid.yaml").write_text(GRID)
    job = prepare(folder)
    assert crops == job.crops.folders[0]

    def predict(cell, seed, head, features):
        noise = {"stripes": 1.0, "quadrants": 3.0}[cell.shown["mask"]] + 0.3 * (head == "mlp")
        return bmi + noise * np.random.default_rng(len(cell.name)).normal(1 + 0.01 * seed, 1, FACES)

    finish(job.strands, predict, list(job.crops.ids), bmi, subject)
    assert job.run()["reused"] == 12
    return folder


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.partition("## bmi")[2].partition("## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_everything_is_written_and_a_rerun_writes_the_same(finished, capsys):
    out = finished / "out"
    before = {name: (out / name).read_bytes() for name in (*WRITTEN, *FIGURES)}
    kept = (out / "cells" / differences.KEPT).stat().st_mtime_ns
    for name in ("results.md", "summary.csv", "report.html", *FIGURES):
        (out / name).unlink()
    assert prepare(finished).run()["reused"] == 12
    shown = capsys.readouterr().err
    assert "Masks <b> & 5 $" in shown and "mask=quadrants" in shown and "worse" in shown and "MAE" not in shown
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "cells" / differences.KEPT).stat().st_mtime_ns == kept  # nothing was computed again
    assert not list(out.rglob("*.tmp"))


def test_without_predictions_there_are_scores_and_no_differences(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_DRAWN", 0)
    shutil.copytree(finished, tmp_path / "copy")
    job = prepare(tmp_path / "copy")
    (job.out / "cells" / differences.KEPT).unlink()
    for path in job.out.rglob(differences.PREDICTIONS):
        path.unlink()
    job.run()
    header, _, *rows = markdown_rows((job.out / "results.md").read_text())
    assert header == [*HEADER[:7], HEADER[-1]]  # no differences
    assert all(row[5].startswith(("0.", "-")) for row in rows if row[3])


def test_markdown_has_groups_with_the_features_of_an_encoder_under_each_other(finished):
    header, rule, *rows = markdown_rows((finished / "out/results.md").read_text())
    assert header == HEADER and all(set(one) == {"-"} for one in rule)
    assert [row[:5] for row in rows] == [
        ["**Masks \\<b> & 5 $**", "", "", "", ""],
        ["stripes", "2", "", "linear", "cls"],
        ["", "", "", "mlp", "cls"],
        ["quadrants", "", "", "linear", "cls"],
        ["**Weight**", "", "", "", ""],
        ["stripes", "", "uniform", "linear", "cls"],
    ]
    assert [row[7] for row in rows if row[3]][:2] == ["reference", "reference"]
    assert [row[8] for row in rows if row[3]] == ["", "", "worse", "unclear"]
    assert [row[9] for row in rows if row[3]] == ["0.610", "-", "-", "-"]
    text = (finished / "out/results.md").read_text()
    assert (
        "\n- Guessing the average for everyone: r2 0.000, MAE " in text
    )  # beside the scores, what no face is needed for
    assert reading.CAPTION_PUBLISHED in text and reading.CAPTION_SEEDS.format(3) in text


def test_latex_has_as_many_places_in_each_row_and_compiles(finished, tmp_path):
    text = (finished / "out/results.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith((r"\\", r"\\[2pt]")) and "multicolumn" not in line]
    assert len(rows) == 1 + 4 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(HEADER) - 1}
    assert (
        rf"\multicolumn{{{len(HEADER)}}}{{@{{}}l}}{{\textit{{Masks \textless{{}}b\textgreater{{}} \& 5 \$}}}} \\"
        in text
    )
    assert r"\begin{tabular}{@{}" + "l" * 5 + "r" * 5 + "@{}}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no pdflatex")
    (tmp_path / "results.tex").write_text(text)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\\input{results.tex}\\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    if "booktabs.sty' not found" in done.stdout:
        pytest.skip("this LaTeX has no booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_latex_prints_any_name():
    assert tables.latex("a_b & 50% $x$ #1 {y} ~z ^2 \\n <|>") == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textasciitilde{}z \textasciicircum{}2 "
        r"\textbackslash{}n \textless{}\textbar{}\textgreater{}"
    )
    assert tables.latex("line\nbreak") == "line break"


def test_the_page_holds_figures_and_tables_and_escapes_names(finished):
    text = (finished / "out/report.html").read_text()
    assert "<b>" not in text and "Masks &lt;b&gt; &amp; 5 $" in text
    assert text.count("<svg") == 2 and "var(--curve-1" in text
    assert "src=" not in text.replace('src="data:', "") and "<script" not in text  # nothing from elsewhere
    for word in ("worse", "reference", "Cost", "What this does not say", "Published values are of another data set"):
        assert word in text
    assert re.search(r'<td class="worse">worse</td>', text)
    assert text.count('<th class="heading"') == 2


def test_figures_have_a_line_for_each_row_under_its_heading(finished):
    for kind, lines in (("scores", 4), ("differences", 2)):
        svg = (finished / f"out/figures/{kind}-bmi.svg").read_text()
        texts = [
            "".join(one.itertext()) for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert {"Masks <b> & 5 $", "Weight, linear on cls"} <= set(texts)
        names = [one for one in texts if one.startswith(("mask=", "loss_weight="))]
        assert len(names) == lines, texts
        assert "loss_weight=uniform" in names  # alone in its group: what tells it from its reference
        assert {"r2" + " - reference" * (kind == "differences")} <= set(texts)
        assert texts.count("worse") == (2 if kind == "differences" else 0)  # by r2 and by MAE
    for name in FIGURES:
        if name.endswith(".png"):
            with Image.open(finished / "out" / name) as picture:
                picture.load()
                assert picture.width > 1500 and picture.convert("L").getextrema() != (255, 255)


def test_another_reference_is_asked_for_on_the_command_line(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_DRAWN", 0)
    shutil.copytree(finished, tmp_path / "copy")
    prepare(tmp_path / "copy", reference=["mask=quadrants"]).run()
    rows = [row for row in markdown_rows((tmp_path / "copy/out/results.md").read_text())[2:] if row[3]]
    assert [(row[7][:9], row[8]) for row in rows][2] == ("reference", "")
    assert rows[0][8] == "better" and rows[1][7] == "-"  # quadrants have no mlp to compare with
    with pytest.raises(UsageError, match="fits no cell of this grid"):
        prepare(tmp_path / "copy", reference=["mask=multiblock"])


def test_a_reference_without_scores_is_told(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(summary, "MOST_DRAWN", 0)
    shutil.copytree(finished, tmp_path / "copy")
    job = prepare(tmp_path / "copy")
    job.grid.references[:] = [{"mask": "quadrants", "features": "mean"}]
    monkeypatch.setattr(differences, "_reads", lambda cell, columns: True)  # as of a given encoder without a CLS token
    job.run()
    assert "the reference, mask=quadrants features=mean, has no scores: no row" in capsys.readouterr().err


# Without files --------------------------------------------------------------------------------------------------------


def table(*entries: Entry, task: str = "bmi") -> Table:
    return Table(task, 2, [Group("", list(entries))])


def entry(width: int, r2: float | None, marks=None) -> Entry:
    (cell,) = expand(Grid("g", rows=[Row({"width": width})], fixed={"head": "linear"}))
    metrics = {"r2": {"value": r2, "low": r2, "high": r2}}
    seeds = {} if r2 is None else {0: {"metrics": metrics}}
    return Entry(Line(cell, "linear", "cls", seeds), marks=marks or {})


def test_failed_rows_and_missing_seeds_are_told():
    text = tables.to_markdown(table(entry(2, 0.5, {"r2": "best"}), entry(3, None)))
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    assert rows[2] == ["2", "1 of 2", "linear", "cls", "**0.500** [0.500, 0.500] best"]
    assert rows[3] == ["3", "0 of 2", "linear", "cls", "failed"]


def test_a_row_that_lacks_a_seed_leads_nothing_and_is_counted_everywhere():
    outcomes = [
        Outcome(cell, seed, "bmi", [row(value)])
        for width, values in ((2, (0.1, 0.3)), (3, (0.9, None)), (4, (0.1, 0.2)))
        for cell in expand(Grid("g", rows=[Row({"width": width})], fixed={"head": "linear"}))
        for seed, value in enumerate(values)
        if value is not None
    ]
    (found,) = reading.read(outcomes, ("bmi",), 2, [], NoDifferences())
    assert [one.marks for one in found.entries] == [{"r2": "highest"}, {}, {}]
    assert reading.CAPTION_LACKING in tables.captions([found])
    terminal = Console(width=100, file=io.StringIO())
    terminal.print(tables.to_terminal(found))
    assert "width=3 [1 of 2 seeds]" in terminal.file.getvalue()


def test_equal_values_have_no_first():
    outcomes = [
        Outcome(cell, 0, "bmi", [row(value)])
        for width, value in ((2, 0.3), (3, 0.3), (4, 0.1))
        for cell in expand(Grid("g", rows=[Row({"width": width})], fixed={"head": "linear"}))
    ]
    (found,) = reading.read(outcomes, ("bmi",), 1, [], NoDifferences())
    assert [one.marks for one in found.entries] == [{}, {}, {}]


def row(r2: float) -> dict:
    metrics = {"r2": {"value": r2, "low": r2 - 0.1, "high": r2 + 0.1}}
    return {"task": "bmi", "head": "linear", "features": "cls", "metrics": metrics}


class NoDifferences:
    """Differences of rows whose predictions are missing."""

    def between(self, first, second, task):
        """Nothing is known."""
        return {}


def test_failures_are_listed_and_escaped():
    failures = ["width=2, seed 0: failed: <img src=x> | no"]
    text = tables.document("g", [table(entry(2, None))], [], failures, [])
    assert "## Failed\n\n- width=2, seed 0" in text
    page = ablation.page("<g>", [table(entry(2, None))], {}, [], failures, [])
    assert "&lt;img src=x&gt;" in page and "<img" not in page and "&lt;g&gt;" in page


def test_a_bar_in_a_name_does_not_end_its_place():
    assert tables.aligned([["a"], [tables._escaped("x|y\nz")]]).splitlines()[2] == "| x\\|y z |"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.0, "0.0 s"),
        (0.03, "under 0.1 s"),
        (3.21, "3.2 s"),
        (42, "42 s"),
        (750, "12 min"),
        (12240, "3.4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, shown):
    assert tables.duration(seconds) == shown


def test_costs_that_are_not_known_are_a_dash():
    assert tables.cost_rows([Cost("width=2", 61.0, 12800, None, None, 2.5)]) == [
        ["width=2", "61 s", "12,800", "-", "-", "2.5 s"]
    ]


def test_a_terminal_of_80_columns_shows_whole_numbers():
    wide = [entry(2, 0.5), entry(3, 0.4)]
    compared = Entry(wide[1].line, wide[0].line, {"r2": Interval(-0.1, -0.15, -0.05)})
    text = io.StringIO()
    Console(file=text, width=80).print(tables.to_terminal(table(wide[0], compared)))
    assert "0.400 [0.400, 0.400]" in text.getvalue() and "-0.100 [-0.150, -0.050]" in text.getvalue()
    assert "worse" in text.getvalue()


def shown_on(width: int, found: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(tables.to_terminal(found, width))
    return text.getvalue()


def test_a_terminal_shows_published_values_and_as_many_metrics_as_it_has_room_for():
    (cell,) = expand(Grid("g", rows=[Row({"width": 2})], fixed={"head": "linear"}))
    metrics = {name: {"value": value, "low": value, "high": value} for name, value in (("r2", 0.25), ("mae", 7.5))}
    score = {"metrics": metrics, "published": {"mae": 6.25}, "baseline": {"r2": -0.5, "mae": 9.75}}
    found = table(Entry(Line(cell, "linear", "cls", {0: score})))
    wide, narrow = shown_on(120, found), shown_on(60, found)
    assert all(one in wide for one in ("0.250", "7.500", "r2 -0.500, MAE 9.750", reading.CAPTION_PUBLISHED[:30]))
    assert "0.250" not in narrow and "r2" not in narrow
    for text in (wide, narrow):
        assert "MAE published*" in text and "6.250" in text and "MAE 9.750" in text


def test_differences_are_of_the_first_metric_that_is_shown():
    first, second = entry(2, 0.5), entry(3, 0.4)
    score = {"metrics": {"mae": {"value": 7.5, "low": 7.0, "high": 8.0}}, "published": {"mae": 6.0}}
    for one in (first, second):
        one.line.seeds[0] = {**score, "metrics": {**one.line.seeds[0]["metrics"], **score["metrics"]}}
    differences = {"r2": Interval(-0.1, -0.15, -0.05), "mae": Interval(0.5, -1.0, 2.0)}
    found = table(first, Entry(second.line, first.line, differences))
    assert "r2 - reference" in shown_on(140, found) and "worse" in shown_on(140, found)
    assert "MAE - reference" in shown_on(90, found) and "unclear" in shown_on(90, found)


def test_names_in_sentences_of_markdown_are_escaped():
    found = Table("bmi", 1, [Group("<b> & 5 |", [entry(2, 0.5, {"r2": "highest"}), entry(3, 0.4)])])
    text = tables.document("g", [found], [], [], [])
    assert "- \\<b> & 5 \\|: width=2 has the highest r2" in text and "<b>" not in text.replace("\\<b>", "")


def test_letters_that_no_font_has_are_told_of_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    for heading, expected in (("女", ["女"]), ("Zoë", [])):
        drawn = ablation_figures.draw(Table("bmi", 1, [Group(heading, [entry(2, 0.5), entry(3, 0.4)])]))
        assert {tuple(ablation_figures.save(one, tmp_path, "x")) for one in drawn.values()} == {tuple(expected)}
