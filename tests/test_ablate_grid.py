"""Grids: what is dropped, what is merged, what a key depends on, and the paper's table."""

import math

import numpy as np
import pytest
import scipy.stats

from mefem_cli.ablation import grid as grids
from mefem_cli.ablation import results, steps
from mefem_cli.ablation.grid import Grid, expand, parse_set, parse_vary, with_flags
from mefem_cli.ablation.grid_file import read_grid
from mefem_cli.ablation.job import AblateOptions
from mefem_cli.ablation.job import read_grid as grid_from_flags
from mefem_cli.ablation.runner import Outcome
from mefem_cli.errors import UsageError


def cells_of(*vary: str, **flags) -> list[grids.Cell]:
    return expand(grid_from_flags([], AblateOptions(vary=list(vary), **flags), {}))


def test_every_combination_without_what_a_mask_does_not_use():
    cells = cells_of("mask=stripes,quadrants,multiblock", "width=2,3,4")
    assert [cell.name for cell in cells] == [
        "mask=stripes width=2",
        "mask=stripes width=3",
        "mask=stripes width=4",
        "mask=quadrants",
        "mask=multiblock",
    ]
    assert cells[3].pretrain == {"mask": "quadrants"}


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        (["cls_prob=0.5,.5,none"], ["cls_prob=0.5", "cls_prob=none"]),
        (["width=3,2", "spread=0.2"], ["width=3 spread=0.2", "width=2 spread=0.2"]),
        (
            ["loss-weight=circular,uniform", "r0=4,5"],
            ["loss_weight=circular r0=4", "loss_weight=circular r0=5", "loss_weight=uniform"],
        ),
        (["head=linear,knn", "neighbors=5"], ["default", "neighbors=5"]),
        (["head=linear,mlp"], ["default", "default"]),  # told apart by their column in the results
        (["probe.epochs=5,9"], ["probe.epochs=5", "probe.epochs=9"]),
    ],
)
def test_equal_cells_are_merged_and_others_are_not(vary, names):
    assert [cell.name for cell in cells_of(*vary)] == names


def test_a_default_spelt_out_is_the_default():
    spelt, default = cells_of("width=3"), cells_of("mask=stripes")
    assert spelt[0].pretrain_key(["a"], 0) == default[0].pretrain_key(["a"], 0)


@pytest.mark.parametrize(
    ("options", "encoder", "features", "scores"),
    [
        ({}, True, True, True),
        ({"width": 4}, False, True, True),
        ({"depth": 2}, False, True, True),
        ({"epochs": 5}, False, True, True),
        ({"precision": "fp32"}, False, False, True),  # shared with embed
        ({"device": "cpu"}, True, True, True),
        ({"workers": 1}, True, True, True),
        ({"checkpoint_every": 1.0}, True, True, True),
        ({"dtype": "float32"}, True, False, False),
        ({"encoder": "source"}, True, False, False),
        ({"patches": True}, True, False, False),  # and attentive among the default heads
        ({"folds": 4}, True, True, False),
        ({"features": "mean"}, True, True, False),
        ({"probe.epochs": 3}, True, True, False),
    ],
)
def test_keys_change_with_what_determines_the_product(options, encoder, features, scores):
    (plain,), (other,) = expand(Grid("a")), expand(Grid("b", fixed=options))
    assert (plain.pretrain_key(["x"], 0) == other.pretrain_key(["x"], 0)) is encoder
    assert (plain.embed_key() == other.embed_key()) is features
    if "precision" not in options:
        assert (plain.probe_key("bmi") == other.probe_key("bmi")) is scores


def test_keys_depend_on_crops_seed_and_task():
    (cell,) = expand(Grid("a"))
    keys = {cell.pretrain_key(crops, seed) for crops in (["x"], ["y"], ["x", "y"], ["y", "x"]) for seed in (0, 1)}
    assert len(keys) == 8
    assert cell.probe_key("bmi") != cell.probe_key("age")
    assert cell.pretrain_key(["x"], 0) == expand(Grid("b"))[0].pretrain_key(["x"], 0)


def test_table4_is_nine_pretrainings_and_seventeen_rows():
    cells = expand(read_grid("table4"))
    encoders = {}
    for cell in cells:
        encoders.setdefault(cell.pretrain_key([], 0), []).append(cell)
    assert (len(cells), len(encoders)) == (17, 9)
    assert len({(cell.pretrain_key([], 0), cell.embed_key()) for cell in cells}) == 9
    found = []
    for several in encoders.values():
        options = steps.settled("pretrain", several[0].pretrain)
        read = [(cell.probe["head"], cell.probe["features"]) for cell in several]
        found.append(
            (
                options["mask"],
                options.get("width"),
                options["cls_prob"],
                options["loss_weight"],
                options["epochs"],
                read,
            )
        )
    patches = [("attentive", "patches")]
    three = [*patches, ("mlp", "cls"), ("attentive", "patches+cls")]
    assert found == [
        ("multiblock", None, None, "circular", 33, patches),
        ("quadrants", None, None, "circular", 33, patches),
        ("stripes", 2, None, "circular", 33, patches),
        ("stripes", 3, None, "circular", 33, patches),
        ("stripes", 4, None, "circular", 33, patches),
        ("stripes", 3, 0.5, "uniform", 33, three),
        ("stripes", 3, 0.0, "circular", 66, three),
        ("stripes", 3, 0.5, "circular", 66, three),
        ("stripes", 3, 1.0, "circular", 66, three),
    ]
    assert all(cell.embed == {"patches": True} for cell in cells)


@pytest.mark.parametrize(("epochs", "short", "long"), [(10, 5, 10), (1, 1, 1), (3, 2, 3), (132, 66, 132)])
def test_epochs_scale_a_preset_in_proportion(epochs, short, long):
    cells = expand(with_flags(read_grid("table4"), {}, {}, [], None, epochs))
    assert [cell.pretrain["epochs"] for cell in cells] == [short] * 8 + [long] * 9


def test_the_fair_table_is_nine_pretrainings_of_one_length_and_an_untrained_encoder():
    grid = with_flags(read_grid("table4-fair"), {}, {}, [], None, 10)
    epochs = {cell.pretrain_key([], 0): cell.pretrain["epochs"] for cell in expand(grid)}
    assert list(epochs.values()) == [10] * 9 + [0]
    assert [cell.name for cell in expand(grid)[-3:]] == ["epochs=0"] * 3
    paper = {
        cell.pretrain_key([], 0) for cell in expand(with_flags(read_grid("table4"), {}, {"epochs": 10}, [], 1, None))
    }
    assert set(epochs) - paper == {list(epochs)[-1]}  # but for the length they are the paper's


def test_flags_win_over_a_preset():
    tiny = dict([parse_set("backbone=vit_tiny_patch16_224"), parse_set("image_size=112")])
    cells = expand(with_flags(read_grid("table4"), {}, tiny, [], None, None))
    assert len(cells) == 17
    assert {cell.pretrain["backbone"] for cell in cells} == {"vit_tiny_patch16_224"}
    cells = expand(with_flags(read_grid("table4"), {}, {"head": "linear"}, [], None, None))
    assert len(cells) == 9  # the rows' own features went with their heads
    assert all(cell.probe == {"head": "linear"} and not cell.embed["patches"] for cell in cells)
    cells = expand(with_flags(read_grid("table4"), {}, {"epochs": 2}, ["age"], 2, None))
    assert {cell.pretrain["epochs"] for cell in cells} == {2}


def test_patches_are_stored_where_a_head_reads_them():
    assert not cells_of("width=2")[0].embed["patches"]
    assert cells_of("width=2", head="attentive")[0].embed["patches"]
    assert cells_of("width=2", features="patches+cls")[0].probe["head"] == "attentive"
    together = cells_of("head=linear,attentive")
    assert [cell.embed["patches"] for cell in together] == [True, True]  # one store for both
    assert together[0].probe_key("bmi") == cells_of("head=linear")[0].probe_key("bmi")  # and the same scores as alone


def test_a_grid_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "vary: {width: [2, 3]}\nset: {epochs: 4, width: 9}\nrows: [{mask: stripes}, {mask: quadrants, epochs: 2}]\n"
        "task: [age, sex]\nseeds: 2\n"
    )
    grid = read_grid(str(path))
    assert (grid.name, grid.tasks, grid.seeds) == ("mine", ("age", "sex"), 2)
    cells = expand(grid)
    assert [cell.name for cell in cells] == ["mask=stripes width=2", "mask=stripes width=3", "mask=quadrants epochs=2"]
    assert [cell.pretrain["epochs"] for cell in cells] == [4, 4, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("varied: {width: [2]}", 'no key "varied"'),
        ("vary: {widht: [2]}", 'no option "widht"; did you mean "width"'),
        ("vary: {width: [two]}", "--width two"),
        ("rows: {mask: stripes}", "wants a list"),
        ("rows: [stripes]", "wants options with values"),
        ("seeds: many", "--seeds many"),
        ("set: {mask: strips}", 'did you mean "stripes"'),
        ("a: b: c", "cannot be read as YAML"),
        ("", "wanted a grid"),
    ],
)
def test_a_wrong_grid_file_names_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="grid.yaml") as error:
        read_grid(str(path))
    assert message in str(error.value)


def test_an_option_among_the_keys_of_a_file_is_told_its_place(tmp_path):
    path = tmp_path / "grid.yaml"
    for text, message in [
        ("head: linear", 'a grid has no key "head"; options of all cells stand under `set`'),
        ("sets: {width: 2}", 'a grid has no key "sets"; did you mean "set"'),
        ("rows: []", "`rows` wants a list of options"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError) as error:
            read_grid(str(path))
        assert message in str(error.value)


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("vary: {width: [2]}\nvary: {mask: [quadrants]}\n")
    with pytest.raises(UsageError, match='the key "vary" stands there twice, in lines 1 and 2'):
        read_grid(str(path))
    path.write_text("set: {width: 2, width: 3}\n")
    with pytest.raises(UsageError, match='the key "width" stands there twice, in lines 1 and 1'):
        read_grid(str(path))


@pytest.mark.parametrize(
    ("named", "flags", "message"),
    [
        ([], {}, "name a preset"),
        (["tabel4"], {}, 'did you mean "table4"'),
        (["table4", "b"], {}, "one preset"),
        ([], {"vary": ["widht=2"]}, 'did you mean "width"'),
        ([], {"vary": ["width"]}, "wanted option=value"),
        ([], {"vary": ["width=2,,3"]}, "an empty value"),
        ([], {"vary": ["width=2", "width=3"]}, "given twice"),
        ([], {"vary": ["width=two"]}, "--width two"),
        ([], {"vary": ["mask=strips"]}, 'did you mean "stripes"'),
        ([], {"vary": ["head=liner"]}, 'did you mean "linear"'),
        ([], {"vary": ["seed=1,2"]}, "type mefem ablate --seeds N"),
        ([], {"vary": ["print-sbatch=true"]}, "has no place"),
        ([], {"vary": ["fraction=0.2,1"]}, "has no place"),
        ([], {"vary": ["width=2"], "set": ["by=sex"]}, "--by has no place"),
        ([], {"vary": ["workers=1,2"]}, "--vary workers: it changes no result"),
        ([], {"vary": ["probe.device=cpu,auto"]}, "--vary probe.device: it changes no result"),
        ([], {"vary": ["width=2"], "set": ["head=linear"], "head": "mlp"}, "--set head and --head: give one"),
        ([], {"vary": ["limit=50,100"]}, "type mefem ablate --limit N"),
        ([], {"vary": ["width=2"], "set": ["width=3"]}, "give one"),
        ([], {"vary": ["epochs=2"], "epochs": 3}, "give one"),
        ([], {"vary": ["width=2"], "head": "linear", "features": "patches"}, "linear takes cls"),
        ([], {"vary": ["width=2"], "features": "pathces"}, "there is cls"),
    ],
)
def test_wrong_flags_are_usage_errors(named, flags, message):
    with pytest.raises(UsageError) as error:
        expand(grid_from_flags(named, AblateOptions(**flags), {}))
    assert message in str(error.value)


def test_options_without_effect_are_known():
    grid = with_flags(Grid("a"), dict([parse_vary("mask=quadrants")]), dict([parse_set("width=3")]), [], None, None)
    assert grids.without_effect(grid, expand(grid)) == ["width"]


# The mean over seeds -------------------------------------------------------------------------------------------


def seeds(*triples):
    return [dict(zip(("value", "low", "high"), triple, strict=True)) for triple in triples]


def test_one_seed_keeps_its_bootstrap_interval():
    assert results.mean_interval(seeds((0.5, 0.3, 0.6))) == (0.5, 0.3, 0.6)


def test_seeds_that_agree_keep_the_width_of_the_bootstrap():
    mean, low, high = results.mean_interval(seeds((0.5, 0.3, 0.7), (0.5, 0.3, 0.7)))
    assert (mean, low, high) == pytest.approx((0.5, 0.3, 0.7))


def test_without_bootstrap_variance_it_is_the_t_interval():
    values = np.array([0.2, 0.5, 0.6])
    _, low, high = results.mean_interval(seeds(*((value, value, value) for value in values)))
    expected = scipy.stats.t.interval(0.95, 2, values.mean(), values.std(ddof=1) / math.sqrt(3))
    assert (low, high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("people", "training"), [(1.0, 0.2), (1.0, 1.0), (0.2, 1.0)])
def test_the_interval_covers_the_truth(people, training):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(3000):
        values = rng.normal(0, people) + rng.normal(0, training, 3)  # all seeds see the same people
        half = 1.959964 * people
        _, low, high = results.mean_interval(seeds(*((value, value - half, value + half) for value in values)))
        hits += low <= 0 <= high
    assert 0.94 <= hits / 3000 <= 0.985


def test_undefined_scores_are_left_out():
    assert results.mean_interval(seeds((None, None, None), (0.5, 0.3, 0.6))) == (0.5, 0.3, 0.6)
    assert all(map(math.isnan, results.mean_interval(seeds((None, None, None)))))


def test_csv_has_one_row_for_a_failure_and_none_twice():
    (cell,) = expand(Grid("a"))
    score = {
        "task": "bmi",
        "head": "linear",
        "features": "cls",
        "metrics": {"r2": {"value": 1 / 3, "low": None, "high": 1.0}},
    }
    rows = results.rows_of(
        [Outcome(cell, 0, "bmi", [score]), Outcome(cell, 0, "bmi", [score]), Outcome(cell, 1, "", failure='no, "x"')]
    )
    assert results.to_csv(rows).splitlines() == [
        "cell,seed,task,head,features,metric,value,low,high,status",
        "default,0,bmi,linear,cls,r2,0.333333,,1,ok",
        'default,1,,"linear,mlp",,,,,,"failed: no, ""x"""',
    ]
