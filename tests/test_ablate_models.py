"""Grids of given encoders: cells, keys, shared features; and what is shown before a grid runs and meanwhile."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_ablate_run import (  # noqa: F401
    calls,
    crops,  # noqa: F401
    prepare,
    read_csv,
    stand_in,
)

import mefem_cli.ablation.status as statuses
from mefem_cli.ablation import models, plan
from mefem_cli.ablation.grid import expand, with_flags
from mefem_cli.ablation.grid_file import read_grid
from mefem_cli.ablation.runner import FAILURES, NOW
from mefem_cli.console import ConsoleOptions, configure
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.executors import Lost
from mefem_cli.executors.locks import claimed
from mefem_cli.stores import product
from mefem_cli.stores.crops import Crops


@pytest.fixture
def encoders(tmp_path) -> tuple[str, str]:
    """Two files that nobody loads: the steps are stand-ins."""
    (tmp_path / "a.onnx").write_bytes(b"a")
    (tmp_path / "b.pth").write_bytes(b"b")
    return f"onnx:{tmp_path / 'a.onnx'}", f"farl:{tmp_path / 'b.pth'}"


def cells_with(named: str, *given: str, **flags):
    return expand(with_flags(read_grid(named), {}, flags, [], None, None, given))


# Cells and keys -------------------------------------------------------------------------------------------------


def test_table2_is_each_encoder_with_each_pair_of_head_and_features(encoders):
    cells = cells_with("table2", *encoders)
    assert [(cell.model, cell.probe["head"], cell.probe["features"]) for cell in cells] == [
        (model, head, features)
        for model in encoders
        for head, features in (("attentive", "patches"), ("mlp", "cls"), ("attentive", "patches+cls"))
    ]
    assert {cell.name for cell in cells} == {f"model={model}" for model in encoders}
    assert all(cell.pretrain == {} and cell.embed == {"patches": True} for cell in cells)


def test_epochs_of_given_encoders_have_no_effect(crops, tmp_path, encoders, capsys):  # noqa: F811
    prepare(crops, tmp_path / "out", named=["table2"], model=list(encoders), task=["bmi"], epochs=3)
    assert "--epochs has no effect: nothing is trained" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["table2", "table3"])
def test_without_encoders_they_are_asked_for(named):
    with pytest.raises(UsageError, match=f"{named} compares given encoders; name them, such as --model"):
        cells_with(named)


def test_any_grid_takes_encoders_behind_its_own(encoders):
    cells = cells_with("table4", *encoders)
    assert [cell.model for cell in cells] == [""] * 17 + [encoders[0]] * 3 + [encoders[1]] * 3
    assert cells[:17] == cells_with("table4")  # and their keys with them
    assert {cell.group for cell in cells[17:]} == {"Given encoders"}


def test_an_encoders_own_options_are_in_its_key_and_in_no_others(encoders):
    onnx, farl = encoders
    plain, other = cells_with("table2", onnx)[1], cells_with("table2", onnx, **{"embed.preset": "none"})[1]
    assert plain.embed_key() != other.embed_key() and plain.probe_key("bmi") != other.probe_key("bmi")
    plain, other = cells_with("table2", farl)[1], cells_with("table2", farl, **{"embed.preset": "none"})[1]
    assert plain.embed_key() == other.embed_key()


def test_an_encoder_is_known_by_its_bytes(tmp_path, encoders):
    onnx, farl = encoders
    known = models.identity(onnx)
    shutil.copy(tmp_path / "a.onnx", tmp_path / "c.onnx")
    assert models.identity(f"onnx:{tmp_path / 'c.onnx'}") == known
    (tmp_path / "a.onnx").write_bytes(b"other")
    assert models.identity(onnx) != known
    assert models.identity(farl.replace("farl", "franca")) != models.identity(farl)
    assert models.identity("timm:resnet18@random") == {"spec": "timm:resnet18@random"}
    with pytest.raises(NoInputError, match="there is no /nowhere.pth"):
        models.identity("farl:/nowhere.pth")
    with pytest.raises(NoInputError, match="no such run"):
        models.identity(str(tmp_path / "runs" / "x"))


def test_options_of_running_are_in_no_key():
    from mefem_cli.ablation import steps

    assert not {"on", "parts", "shard", "model"} & {name for step in steps.STEPS for name in steps.options(step)}
    with pytest.raises(UsageError, match="encoders are named with --model"):
        steps.resolve_name("model")


def test_folds_may_be_a_table_of_photos_or_people(crops, tmp_path, encoders):  # noqa: F811
    manifest = Crops.open(crops)
    folds = [row // 2 % 3 for row in range(len(manifest))]  # two photos of each person
    tables = {
        "path": [Path(str(one)).name for one in manifest.columns["source"]],
        "subject": list(manifest.labels["subject"]),
        "id": list(manifest.ids),
    }
    for key, values in tables.items():
        of_key = dict(zip(values, folds, strict=True))
        table = tmp_path / f"{key}.csv"
        table.write_text(f"{key},fold\n" + "".join(f"{name},{fold}\n" for name, fold in of_key.items()))
        flags = {"named": ["table2"], "model": list(encoders), "task": ["bmi"]}
        prepare(crops, tmp_path / "out", **flags, set=[f"folds={table}"])
        table.write_text(f"{key},fold\nnobody,1\nno one,2\n")
        with pytest.raises(NoInputError, match=f"its column {key} names none of the faces of"):
            prepare(crops, tmp_path / "out", **flags, set=[f"folds={table}"])


# Running --------------------------------------------------------------------------------------------------------


def test_each_encoder_embeds_once_for_all_seeds(crops, stand_in, tmp_path, encoders):  # noqa: F811
    out = tmp_path / "out"
    flags = {"named": ["table2"], "model": list(encoders), "seeds": 3, "jobs": 2, "task": ["bmi"]}
    assert prepare(crops, out, **flags).run() == {"cells": 6, "pretrainings": 6, "failed": 0, "reused": 0}
    called = calls(stand_in)
    assert [sum(step == one for step, *_ in called) for one in ("pretrain", "embed", "probe")] == [0, 2, 18]
    assert {words[words.index("--model") + 1] for step, words, *_ in called if step == "embed"} == set(encoders)
    assert {(row["cell"], row["seed"]) for row in read_csv(out)} == {
        (f"model={model}", str(seed)) for model in encoders for seed in range(3)
    }
    prepare(crops, out, **{**flags, "seeds": 4}).run()
    assert [step for step, *_ in calls(stand_in)] == ["probe"] * 6  # of the new seed


def test_an_encoder_without_patches_keeps_its_other_cells(crops, stand_in, tmp_path, encoders):  # noqa: F811
    (stand_in / "embed--patches").touch()
    job = prepare(crops, tmp_path / "out", named=["table2"], model=[encoders[0]], task=["bmi"])
    assert job.run()["failed"] == 2
    assert [row["status"] for row in read_csv(tmp_path / "out")] == [
        "failed: mefem embed: --patches does not work",
        "ok",
        "failed: mefem embed: --patches does not work",
    ]


def test_a_presets_tasks_without_labels_are_left_out_and_typed_ones_are_not(crops, tmp_path, encoders, capsys):  # noqa: F811
    job = prepare(crops, tmp_path / "out", named=["table2"], model=[encoders[0]])
    assert job.grid.tasks == ("bmi",)
    assert "left out: task age: there is no label age" in capsys.readouterr().err
    with pytest.raises(NoInputError, match="task age: there is no label age"):
        prepare(crops, tmp_path / "out", named=["table2"], model=[encoders[0]], task=["bmi", "age"])


def test_a_strand_that_ray_lost_is_a_failure_of_its_cells(crops, stand_in, tmp_path, monkeypatch):  # noqa: F811
    class Losing:
        def run(self, work, items, done):
            done(items[0], Lost("lost by Ray: node died"))
            done(items[1], work(items[1], None))

    prepare(crops, tmp_path / "out", "width=2,3").run()
    job = prepare(crops, tmp_path / "out", "width=2,3")
    monkeypatch.setattr("mefem_cli.ablation.job.open_executor", lambda *_: Losing())
    assert job.run()["failed"] == 1
    assert read_csv(tmp_path / "out")[0]["status"] == "failed: lost by Ray: node died"


# The plan and the status ----------------------------------------------------------------------------------------


def test_the_dry_run_times_each_size_once(crops, tmp_path, monkeypatch, encoders):  # noqa: F811
    timed = []

    def a_cost(strand):
        timed.append(strand.cells[0].name)
        return plan.Cost(10.0, 0.5)

    monkeypatch.setattr(plan, "_try", a_cost)
    job = prepare(crops, tmp_path / "out", named=["table4"], seeds=2, jobs=3, model=[encoders[1]])
    found = plan.describe(job)
    assert len(timed) == 7  # three masks and three widths without CLS, stripes with it, the given one
    assert (len(found["cells"]), found["pretrainings"], found["to_train"]) == (20, 18, 18)
    pretraining = 2 * (6 * 33 + 3 * 66) * 10.0  # two seeds; a strand has one store of 60 faces
    assert found["estimated_seconds"] == pytest.approx((pretraining + 19 * 60 * 0.5) / 3)
    assert not (tmp_path / "out").exists()
    text = plan.summary(found)
    assert "pretrainings: 18 (seeds 0, 1), of which 18 to train" in text and "given encoders: 1" in text


def a_launch(*_):
    raise AssertionError


def show_rows(out: Path, capsys) -> list[dict]:
    configure(ConsoleOptions(json=True))
    statuses.show(out)
    configure(ConsoleOptions())
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_status_of_what_runs_failed_and_waits(crops, stand_in, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    job = prepare(crops, out, "width=2,3,4,5,6")
    for broken in ("pretrain--width=2",):
        (stand_in / broken).touch()
    job.run()
    capsys.readouterr()
    states = [(row["cell"], row["state"], row["detail"]) for row in show_rows(out, capsys)]
    assert states[:2] == [
        ("width=2", "failed", "mefem pretrain: --width=2 does not work"),
        ("width=3", "finished", ""),
    ]
    training, probing, waiting = job.strands[2:]
    for strand in job.strands[2:]:
        shutil.rmtree(strand.scores(strand.cells[0], "bmi"))
    (training.run / "run.log").write_text("x Plan(preset='small', steps_per_epoch=10, warmup_steps=2)\n")
    (training.run / "config.yaml").write_text("crops: []\nepochs: 66\nbatch_size: 32\n")
    (training.run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 165, "images_per_second": 64.0}\n')
    product.write_json(training.folder / NOW, {"step": "pretrain", "makes": "pretrain", "since": 0.0})
    scores = probing.scores(probing.cells[0], "bmi").name
    product.write_json(probing.folder / NOW, {"step": "probe", "makes": scores, "since": 0.0})
    product.write_json(waiting.folder / NOW, {"step": "probe", "makes": scores, "since": 0.0})  # of a killed one
    with claimed(training.folder, a_launch), claimed(probing.folder, a_launch):
        rows = {row["cell"]: row for row in show_rows(out, capsys)}
        status = statuses.read(out)
    one = rows["width=4"]
    assert (one["state"], one["detail"], one["progress"], one["left"]) == ("training", "epoch 16/66", 0.25, 495 / 2)
    assert one["reads"] == "linear, mlp"  # tells two cells of one encoder apart
    assert (rows["width=5"]["state"], rows["width=6"]["state"]) == ("probing", "waiting")
    assert not status.is_running
    assert statuses.summary(status).startswith("1 finished, 1 failed, 1 training, 1 probing, 1 waiting; nobody is at")
    few = statuses.to_table(status, most=2)
    assert few.row_count == 2  # those at work
    running = replace(status, is_running=True, left=600.0)
    assert statuses.summary(running).endswith("; about 10 min left")
    assert (waiting.folder / FAILURES).exists() is False


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 10), (200, 50)])
def test_a_live_status_fits_its_terminal_and_ends_with_the_counts(width, height):
    states = [("training", "epoch 3/66", 0.3, 23.0, 400.0), ("failed", "mefem pretrain: " + "no " * 40), ("waiting",)]
    cells = [
        statuses.CellStatus(f"mask=stripes width={one} loss_weight=circular", "attentive on patches+cls", seed, *state)
        for one in range(8)
        for seed, state in enumerate(states)
    ]
    terminal = Console(width=width, height=height, file=io.StringIO())
    terminal.print(statuses._fitting(statuses.Status(cells, True, 600.0), terminal))
    lines = terminal.file.getvalue().splitlines()
    assert len(lines) <= height - 1
    assert lines[-1].startswith("8 failed, 8 training, 8 waiting; about 10 min left")
    assert "training 30 %" in lines[2] and "7 min" in lines[2]
    shown = sum(any(state in line for state in ("training 30 %", "failed: ", " waiting")) for line in lines[:-1])
    assert shown == {10: 1, 24: 8, 50: 24}[height]
    assert (f"... and {24 - shown} more" in lines) == (shown < 24)


def test_status_of_damaged_files_and_of_nothing(crops, stand_in, tmp_path, capsys):  # noqa: F811
    with pytest.raises(NoInputError, match="no ablation was begun there"):
        statuses.show(tmp_path / "out")
    job = prepare(crops, tmp_path / "out", "width=2")
    job.run()
    capsys.readouterr()
    folder = job.strands[0].folder
    shutil.rmtree(job.strands[0].scores(job.cells[0], "bmi"))
    for name in (NOW, FAILURES):
        (folder / name).write_text("[1, 2")
    (folder / "run/metrics.jsonl").write_text('{"step": 1')
    with claimed(folder, a_launch):
        assert [row["state"] for row in show_rows(tmp_path / "out", capsys)] == ["waiting"]


def test_status_from_another_process_imports_no_torch(crops, stand_in, tmp_path):  # noqa: F811
    prepare(crops, tmp_path / "ablations/width", "width=2").run()
    code = (
        "import sys; sys.argv = ['mefem', 'ablate', '--status']\n"
        "from mefem_cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "width=2" in done.stdout and "1 finished" in done.stdout
