"""What is read from a finished grid: headings and references, paired differences, the best of a group, cost."""

import json
import math
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from ablations import write_scores
from probing import people, write_store

from mefem_cli.ablation import cost, differences, reading, results, tables, timing
from mefem_cli.ablation import grid as grids
from mefem_cli.ablation.differences import Differences, Reference, find_references, known_references, reference_of
from mefem_cli.ablation.grid import Cell, Grid, Row, expand
from mefem_cli.ablation.grid_file import read_grid
from mefem_cli.ablation.results import Line
from mefem_cli.ablation.runner import Outcome, Strand
from mefem_cli.errors import UsageError
from mefem_cli.evaluation import report
from mefem_cli.evaluation.bootstrap import Interval
from mefem_cli.evaluation.job import Job as ProbeJob
from mefem_cli.evaluation.options import ProbeOptions


def grid_file(folder: Path, text: str) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(text)
    return read_grid(str(path))


# Headings, published values and references of grid files --------------------------------------------------------------


def test_keys_of_known_cells_have_not_changed():
    cells = expand(read_grid("table4"))
    keys = [(one.pretrain_key(["x"], 0), one.embed_key()) for one in (cells[0], cells[-1])]
    assert keys == [("85d24ace63a8b5a8", "be53429afd2c0ac2"), ("4558489eefa62125", "be53429afd2c0ac2")]
    (cell,) = expand(Grid("a", fixed={"head": "linear", "width": 4}))
    keys = (cell.pretrain_key(["x"], 0), cell.embed_key(), cell.probe_key("bmi"))
    assert keys == ("dd6d11ae2017420e", "940e7ca89cdde793", "5bbf430e0c46b2d0")


def test_headings_and_published_values_change_no_key_and_no_name(tmp_path):
    plain = expand(grid_file(tmp_path, "rows: [{mask: stripes, width: 2}, {mask: quadrants}]"))
    told = expand(
        grid_file(
            tmp_path,
            "rows: [{group: Masks, mask: stripes, width: 2, published: {r2: 0.5}}, {mask: quadrants}]\n"
            "reference: {mask: quadrants}",
        )
    )
    assert [one.name for one in told] == [one.name for one in plain]
    for one, other in zip(told, plain, strict=True):
        assert one.pretrain_key(["x"], 1) == other.pretrain_key(["x"], 1)
        assert (one.embed_key(), one.probe_key("bmi")) == (other.embed_key(), other.probe_key("bmi"))
    assert [one.group for one in told] == ["Masks", "Masks"]  # up to the next heading
    assert [one.published for one in told] == [{"bmi": {"r2": 0.5}}, {}]


def test_the_probes_own_group_is_named_with_its_command(tmp_path):
    (cell,) = expand(grid_file(tmp_path, "rows: [{group: Clinics, probe.group: clinic}]"))
    assert (cell.group, cell.probe["group"]) == ("Clinics", "clinic")


@pytest.mark.parametrize(("preset", "groups"), [("table4", [5, 3, 9]), ("table4-fair", [5, 3, 9, 3])])
def test_rows_of_the_paper_stand_in_its_groups_with_a_reference_each(preset, groups):
    grid = read_grid(preset)
    cells = expand(grid)
    assert [len(list(several)) for _, several in groupby(cells, lambda cell: cell.group)] == groups
    lines = [Line(one, one.probe["head"], one.probe["features"], {}) for one in cells]
    compared = [reference_of(one, lines, find_references(grid.references, cells)) for one in lines]
    assert all(one is not None for one in compared)
    names = ("mask", "width", "cls_prob", "loss_weight")
    shown = [tuple(one.cell.shown.get(name) for name in names) for one in compared]
    assert shown == [("stripes", 3, None, None)] * 5 + [("stripes", 3, 0.5, "circular")] * (len(cells) - 5)
    assert [one.features for one in compared] == [one.features for one in lines]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{group: [a], width: 2}]", "`group` wants a heading"),
        ("rows: [{width: 2, published: 0.4}]", "`published` wants metrics"),
        ("rows: [{width: 2, published: {r3: 0.4}}]", 'no metric "r3"'),
        ("rows: [{width: 2, published: {r2: high}}]", "r2 wants a number"),
        ("rows: [{width: 2, published: {bmi: {r2: 1}, r2: 0.4}}]", "under each task"),
        ("task: [bmi, age]\nrows: [{width: 2, published: {r2: 0.4}}]", "wants them by task"),
        ("rows: [{width: 2}]\nreference: {widht: 2}", 'did you mean "width"'),
        ("rows: [{width: 2}]\nreference: [stripes]", "`reference` wants options"),
    ],
)
def test_wrong_keys_of_tables_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match="grid.yaml") as error:
        grid_file(tmp_path, text)
    assert message in str(error.value)


def cells_of(**vary) -> list[Cell]:
    return expand(Grid("g", vary=vary))


def named(typed: str, cells: list[Cell]) -> list[str]:
    wanted = [grids.parse_reference(typed)]
    known_references(wanted, cells, is_exact=True)
    return [one.name for one in find_references(wanted, cells)]


def test_a_reference_is_named_by_what_is_shown_or_by_any_option():
    cells = cells_of(mask=["stripes", "quadrants"], width=[2, 3])
    assert named("mask=stripes width=3", cells) == ["mask=stripes width=3"]
    assert named("width=2", cells) == ["mask=stripes width=2"]
    assert named("mask=quadrants", cells) == ["mask=quadrants"]
    assert named("width=3 cls_prob=0.5", cells_of(cls_prob=[0.0, 0.5])) == ["cls_prob=0.5"]  # a default counts
    rows = [Row({"mask": "stripes"}), Row({"mask": "stripes", "cls_prob": 0.0})]
    assert named("mask=stripes", expand(Grid("g", rows=rows))) == ["mask=stripes"]  # just so
    assert find_references([], cells) == [Reference("mask=stripes width=2", {})]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("mask=stripes", "fits 2 cells (mask=stripes width=2; mask=stripes width=3)"),
        ("width=7", "fits no cell of this grid; there is mask=stripes width=2"),
        ("widht=3", 'did you mean "width"'),
        ("mask", "wanted option=value"),
        ("mask=quadrants head=attentive", "fits no cell of this grid; there is mask=stripes width=2 (linear, mlp)"),
        ("mask=quadrants head=mlp features=patches", "fits no cell of this grid; there is"),
    ],
)
def test_a_reference_that_is_none_or_several_is_an_error(typed, message):
    with pytest.raises(UsageError) as error:
        named(typed, cells_of(mask=["stripes", "quadrants"], width=[2, 3]))
    assert message in str(error.value)


def test_a_reference_may_name_a_head_and_features_that_are_read():
    cells = cells_of(mask=["stripes", "quadrants"])
    assert named("mask=quadrants head=mlp features=cls", cells) == ["mask=quadrants"]
    without = cells_of(cls_prob=[None, 0.5])  # no CLS token: the default of its heads is another
    assert named("cls_prob=none features=mean", without) == ["cls_prob=none"]
    with pytest.raises(UsageError, match="fits no cell"):
        named("cls_prob=0.5 features=mean", without)


def test_a_group_has_one_reference():
    cells = expand(Grid("g", rows=[Row({"width": 2}, "A"), Row({"width": 3}, "A"), Row({"width": 4}, "B")]))
    assert known_references([{"width": 3}, {"width": 4}], cells, is_exact=True) == [{"width": 3}, {"width": 4}]
    with pytest.raises(UsageError, match='"width=2" and "width=3": the group "A" has one reference'):
        known_references([{"width": 2}, {"width": 3}], cells, is_exact=True)


def test_a_presets_reference_that_flags_took_away_is_a_warning(capsys):
    cells = cells_of(mask=["quadrants", "multiblock"])
    assert known_references([{"mask": "stripes"}], cells, is_exact=False) == []
    assert "mask=stripes, fits no cell" in capsys.readouterr().err


# Paired differences ---------------------------------------------------------------------------------------------------


class Faces:
    """Labels of crops without crops."""

    def __init__(self, ids, labels):
        self.ids, self.labels, self.meta = np.array(ids, dtype=object), labels, {}

    def __len__(self):
        return len(self.ids)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Two stores of features of the same people, probed alone with two seeds, and what `mefem probe` says of both."""
    folder = tmp_path_factory.mktemp("probed")
    good, labels = people(40, photos=2, noise=0.3)
    bad, _ = people(40, photos=2, noise=1.2)
    stores = [write_store(folder / f"{name}.h5", one, labels) for name, one in (("good", good), ("bad", bad))]
    cells = cells_of(width=[2, 3])
    probe = {**cells[0].probe, "bootstraps": 200, "folds": 3, "head": "knn"}
    cells = [Cell(one.shown, one.pretrain, one.embed, probe) for one in cells]
    options = ProbeOptions(bootstraps=200, folds=3, head="knn")
    strands, together = [], {}
    for seed in (0, 1):
        for cell, store in zip(cells, stores, strict=True):
            strand = Strand(folder / "cells" / f"{cell.name}-{seed}", seed, (cell,), ("y", "c"))
            for task in strand.tasks:
                report.save(strand.scores(cell, task), ProbeJob.prepare([store], [task], options, seed).run(), {})
            strands.append(strand)
        for task in ("y", "c"):
            (found,) = ProbeJob.prepare(stores, [task], options, seed).run().differences
            together[task, seed] = found
    return folder / "cells", strands, cells, together, Faces(stores[0].ids, labels)


def line(cell: Cell, head: str = "knn", features: str = "cls", seeds=None) -> Line:
    return Line(cell, head, features, seeds or {})


@pytest.mark.parametrize("task", ["y", "c"])
def test_a_difference_of_one_seed_is_what_probe_says_of_both_stores(probed, task):
    folder, strands, cells, together, faces = probed
    for seed in (0, 1):
        mine = [one for one in strands if one.seed == seed]
        found = Differences(folder, mine, faces).between(line(cells[0]), line(cells[1]), task)
        assert set(found) == set(together[task, seed].metrics)
        for metric, expected in together[task, seed].metrics.items():
            assert vars(found[metric]) == pytest.approx(vars(expected), abs=1e-12), metric
            assert differences.verdict(metric, found[metric]) == together[task, seed].verdict(metric)


def test_seeds_are_combined_as_means_are(probed):
    folder, strands, cells, together, faces = probed
    found = Differences(folder, strands, faces).between(line(cells[0]), line(cells[1]), "y")["r2"]
    values = [together["y", seed].metrics["r2"] for seed in (0, 1)]
    mean = sum(one.value for one in values) / 2
    people_part = sum(((one.high - one.low) / 2) ** 2 for one in values) / 2
    seeds_part = 12.7062**2 * (values[0].value - values[1].value) ** 2 / 2 / 2  # t of one degree of freedom
    half = math.sqrt(people_part + seeds_part)
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-4)


def test_differences_are_kept_and_computed_anew_where_what_was_kept_is_damaged(probed, monkeypatch):
    folder, strands, cells, _, faces = probed

    def between() -> dict[str, Interval]:
        paired = Differences(folder, strands, faces)
        found = paired.between(line(cells[0]), line(cells[1]), "y")
        paired.save()
        return found

    first = between()
    computed = []
    compare = differences.evaluate.compare
    monkeypatch.setattr(differences.evaluate, "compare", lambda *given: computed.append(1) or compare(*given))
    assert between() == first and not computed
    for damage in ("{", "[]", '{"a": 1}', '{"a": {"r2": {"value": 1}}}'):
        (folder / differences.KEPT).write_text(damage)
        assert between() == first
    assert len(computed) == 8  # two seeds, four times


def test_new_predictions_are_compared_anew(probed, tmp_path):
    _, _, cells, _, faces = probed
    strands = [Strand(tmp_path / cell.name, 0, (cell,), ("y",)) for cell in cells]
    ids, target, group = [str(one) for one in faces.ids], np.asarray(faces.labels["y"], float), np.arange(80) // 2

    def between(error: float) -> float:
        for strand, noise in zip(strands, (0.0, error), strict=True):
            folder = strand.scores(strand.cells[0], "y")
            shutil.rmtree(folder, ignore_errors=True)
            output = target + noise * np.cos(np.arange(80))
            write_scores(folder, "y", {("knn", "cls"): output}, ids, target, group)
        paired = Differences(tmp_path, strands, faces)
        found = paired.between(line(cells[1]), line(cells[0]), "y")["mae"].value
        paired.save()
        return found

    assert between(1.0) == pytest.approx(np.abs(np.cos(np.arange(80))).mean())
    assert between(3.0) == pytest.approx(3 * np.abs(np.cos(np.arange(80))).mean())


def test_missing_damaged_and_foreign_predictions_make_no_difference(probed, tmp_path, capsys):
    _, strands, cells, _, faces = probed
    ids = [str(one) for one in faces.ids]
    target, group = np.arange(80.0), np.arange(80) // 2
    strand = Strand(tmp_path / "a", 0, tuple(cells), ("y",))
    folder = strand.scores(cells[0], "y")
    write_scores(folder, "y", {("knn", "cls"): target}, ids, target, group)
    path = folder / differences.PREDICTIONS

    def between(head="knn", known=faces):
        return Differences(tmp_path, [strand], known).between(line(cells[0], head), line(cells[1]), "y")

    assert between(head="mlp") == {}  # no such head there
    assert between(known=Faces(["other"] * 80, faces.labels)) == {}
    path.write_bytes(path.read_bytes()[:100])
    assert between() == {}
    assert str(path) in capsys.readouterr().err
    path.unlink()
    assert between() == {}


# The best of a group --------------------------------------------------------------------------------------------------


class Told:
    """Differences that are known: r2 and MAE of lines by cell name, told apart from `width` on."""

    def __init__(self, width: float):
        self.width = width

    def between(self, first, second, task):
        gap = {name: first.metrics[name].value - second.metrics[name].value for name in first.metrics}
        return {name: Interval(one, one - self.width, one + self.width) for name, one in gap.items()}


def score(r2: float | None, mae: float = 1.0, task: str = "bmi", published=None) -> dict:
    metrics = {name: {"value": one, "low": one, "high": one} for name, one in (("r2", r2), ("mae", mae))}
    found = {"task": task, "head": "linear", "features": "cls", "metrics": metrics}
    return {**found, "published": published} if published else found


def table_of(values: list[tuple[float | None, float]], width: float, groups: list[str] | None = None) -> reading.Table:
    rows = [Row({"width": number}, group) for number, group in enumerate(groups or [""] * len(values), start=2)]
    cells = expand(Grid("g", rows=rows, fixed={"image_size": 224, "head": "linear"}))
    outcomes = [Outcome(cell, 0, "bmi", [score(*value)]) for cell, value in zip(cells, values, strict=True)]
    (table,) = reading.read(outcomes, ("bmi",), 1, find_references([], cells), Told(width))
    return table


def marks(table: reading.Table) -> list[dict[str, str]]:
    return [entry.marks for entry in table.entries]


def test_best_only_where_every_difference_is_clear():
    values = [(0.5, 3.0), (0.7, 2.0), (0.6, 2.5)]
    assert marks(table_of(values, 0.05)) == [{}, {"r2": "best", "mae": "best"}, {}]
    assert marks(table_of(values, 0.15)) == [{}, {"r2": "highest", "mae": "best"}, {}]  # .7 - .6 is within .15
    assert marks(table_of(values, 3.0)) == [{}, {"r2": "highest", "mae": "lowest"}, {}]


def test_groups_have_a_best_each_and_a_lone_row_none():
    values = [(0.5, 3.0), (0.7, 2.0), (0.9, 1.0), (None, 1.0)]
    table = table_of(values, 0.05, ["a", "a", "b", "c"])
    assert [group.heading for group in table.groups] == ["a", "b", "c"]
    assert marks(table) == [{}, {"r2": "best", "mae": "best"}, {}, {}]


def test_what_is_read_from_one_encoder_stands_together():
    rows = [Row({"width": width, "head": head}) for width, head in ((2, "linear"), (3, "linear"), (2, "knn"))]
    cells = expand(Grid("g", rows=rows))
    outcomes = [Outcome(one, 0, "bmi", [{**score(0.5), "head": one.probe["head"]}]) for one in cells]
    (table,) = reading.read(outcomes, ("bmi",), 1, find_references([], cells), Told(1))
    names = [(one.line.cell.name, one.line.head) for one in table.entries]
    assert names == [("width=2", "linear"), ("width=2", "knn"), ("width=3", "linear")]
    (group,) = table.groups
    labels = [reading.label(one, group, table) for one in table.entries]
    assert labels == ["width=2 (linear on cls)", "width=2 (knn on cls)", "width=3 (linear on cls)"]


def test_verdicts_know_that_an_error_is_better_when_lower():
    table = table_of([(0.5, 3.0), (0.7, 2.0), (0.5, 3.01)], 0.05)
    assert [entry.is_reference for entry in table.entries] == [True, False, False]
    assert [(one.verdict("r2"), one.verdict("mae")) for one in table.entries] == [
        ("", ""),
        ("better", "better"),
        ("unclear", "unclear"),
    ]
    text = " ".join(reading.findings(table))
    assert "width=3 has the best r2" in text and "Better than the reference (width=2): width=3." in text
    assert "Not told apart from the reference (width=2): 1 of 2." in text


def test_each_target_of_a_task_has_its_table_and_keeps_its_seeds():
    (cell,) = cells_of(width=[2])
    outcomes = [
        Outcome(cell, seed, "mcd", [score(0.1 * seed, task="mcd.a"), score(0.9, task="mcd.b", published={"mae": 0.41})])
        for seed in (0, 1)
    ]
    found = reading.read(outcomes, ("mcd",), 2, find_references([], [cell]), Told(1))
    assert [table.task for table in found] == ["mcd.a", "mcd.b"]
    assert [table.entries[0].line.metrics["r2"].value for table in found] == pytest.approx([0.05, 0.9])
    assert [len(table.entries[0].line.seeds) for table in found] == [2, 2]  # equal scores are two seeds all the same
    assert [table.published for table in found] == [[], ["mae"]]


def test_published_values_of_a_row_win_over_those_of_the_task():
    cell = Cell({}, {}, {}, {}, published={"bmi": {"r2": 0.6}})
    assert line(cell, seeds={0: score(0.1, published={"r2": 0.5, "mae": 3})}).published("bmi") == {"r2": 0.6, "mae": 3}
    assert line(cell).published("age") == {}


def test_summary_csv_has_means_differences_and_verdicts():
    text = reading.to_csv([table_of([(0.5, 3.0), (0.7, 2.0)], 0.05)]).splitlines()
    assert text[0] == ",".join(reading.SUMMARY_COLUMNS)
    assert text[1] == ",width=2,bmi,linear,cls,r2,1,0.5,0.5,0.5,,,,,,,"
    assert text[3] == ",width=3,bmi,linear,cls,r2,1,0.7,0.7,0.7,best,width=2 (linear on cls),0.2,0.15,0.25,better,"
    assert len(text) == 5


def test_a_cell_that_failed_in_one_seed_keeps_the_others():
    (cell,) = cells_of(width=[2])
    outcomes = [Outcome(cell, 0, "bmi", [score(0.3)]), Outcome(cell, 1, "", failure="no")]
    (only,) = results.lines_of(outcomes, "bmi")
    assert list(only.seeds) == [0]
    (failed,) = results.lines_of(outcomes[1:], "bmi")
    assert not failed.seeds and failed.metrics == {}


# Cost -----------------------------------------------------------------------------------------------------------------


def test_pretraining_adds_up_over_stops_and_other_steps_count_their_last_run(tmp_path):
    log = tmp_path / "pretrain.log"
    for seconds, code in ((10.0, 75), (5.5, 0)):
        timing.note(log, seconds, code)
    timing.note(tmp_path / "features-a.log", 3.0, 1)
    timing.note(tmp_path / "features-a.log", 2.0, 0)
    timing.note(tmp_path / "scores-a.log", 9.0, 1)  # has never ended well
    with (tmp_path / timing.SECONDS).open("a") as file:
        file.write('{"step": "cut sho')
    assert timing.read(tmp_path) == {"pretrain": 15.5, "features-a": 2.0}
    assert timing.read(tmp_path / "none") == {}


@pytest.fixture
def strand(tmp_path) -> Strand:
    (cell,) = cells_of(width=[2])
    strand = Strand(tmp_path / "cells" / "k", 0, (cell,), ("bmi", "age"))
    strand.run.mkdir(parents=True)
    return strand


def test_an_interval_ends_where_its_metric_does():
    values = {"auroc": (0.6, 0.9), "mae": (0.1, 2.0), "r2": (0.9, 0.2)}
    scores = [
        {"metrics": {name: {"value": two[seed], "low": two[seed], "high": two[seed]} for name, two in values.items()}}
        for seed in (0, 1)
    ]
    found = results.Line(*cells_of(width=[2]), "linear", "cls", dict(enumerate(scores))).metrics
    assert (found["auroc"].low, found["auroc"].high) == (0.0, 1.0)
    assert found["mae"].low == 0.0 and found["mae"].high > 2
    assert found["r2"].high == 1.0 and found["r2"].low < -1


def test_cost_of_a_cell_is_its_processes_and_its_images(strand):
    (cell,) = strand.cells
    timing.note(strand.folder / "pretrain.log", 100.0, 0)
    timing.note(strand.store(cell).with_suffix(".log"), 7.0, 0)
    for task in strand.tasks:
        timing.note(strand.scores(cell, task).with_suffix(".log"), 4.0, 0)
    rows = [
        {"kind": "epoch", "samples": 0},
        {"kind": "epoch", "samples": 500, "images_per_second": 40.0},
        {"kind": "step", "samples": 900, "images_per_second": 1.0},
        {"kind": "epoch", "samples": 1000, "images_per_second": 60.0},
        {"kind": "epoch", "samples": 1500, "images_per_second": 500.0},
    ]
    (strand.run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (found,) = cost.costs(strand.cells, [strand])
    assert found == cost.Cost("width=2", 100.0, 1500, 60.0, 7.0, 8.0)
    assert cost.to_csv([found]).splitlines()[1] == "width=2,100,1500,60,7,8,,"


def test_what_cells_share_is_counted_once(tmp_path):
    first, second = cells_of(neighbors=[3, 5], head=["knn"])
    (other,) = cells_of(width=[3])
    found = []
    for name, cells in (("k", (first, second)), ("l", (other,))):
        strand = Strand(tmp_path / "cells" / name, 0, cells, ("bmi",))
        strand.run.mkdir(parents=True)
        timing.note(strand.folder / "pretrain.log", 40.0, 0)
        timing.note(strand.store(cells[0]).with_suffix(".log"), 7.0, 0)
        for cell in cells:
            timing.note(strand.scores(cell, "bmi").with_suffix(".log"), 4.0, 0)
        found.append(strand)
    costs = cost.costs([first, second, other], found)
    assert [(one.pretraining_of, one.embedding_of) for one in costs] == [("", ""), (first.name,) * 2, ("", "")]
    assert [row[1:] for row in tables.cost_rows(costs)] == [
        ["40 s", "-", "-", "7.0 s", "4.0 s"],
        ["same", "-", "-", "same", "4.0 s"],
        ["40 s", "-", "-", "7.0 s", "4.0 s"],
        ["80 s", "-", "-", "14 s", "12 s"],  # of all together
    ]


def test_cost_of_an_older_run_is_read_from_its_log_and_the_rest_is_not_known(strand):
    (strand.run / "run.log").write_text(
        "2026-01-01 10:00:00 device cpu, bf16\n2026-01-01 10:00:30 epoch 1\n2026-01-01 10:00:40 stopped by signal\n"
        "2026-01-02 09:00:00 device cpu, bf16\n    a line without a time\n2026-01-02 09:00:20 epoch 2\n"
    )
    (strand.run / "metrics.jsonl").write_text("{broken")
    assert cost.costs(strand.cells, [strand]) == [cost.Cost("width=2", 60.0, None, None, None, None)]
    (strand.run / "run.log").unlink()
    assert cost.costs(strand.cells, [strand])[0].pretrain_seconds is None


def test_cost_is_the_mean_over_seeds(strand, tmp_path):
    other = Strand(tmp_path / "cells" / "l", 1, strand.cells, strand.tasks)
    other.folder.mkdir()
    timing.note(strand.folder / "pretrain.log", 10.0, 0)
    timing.note(other.folder / "pretrain.log", 20.0, 0)
    assert cost.costs(strand.cells, [strand, other])[0].pretrain_seconds == 15.0
