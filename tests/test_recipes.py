"""The recipes of examples/, as their first lines say to run them, on few people and with a tiny network."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parents[1] / "examples"
TINY = (
    "--backbone vit_tiny_patch16_224 --depth 1 --embed-dim 48 --num-heads 3 --image-size 64 --predictor-depth 1 "
    "--epochs 1"
)


@pytest.fixture
def run(tmp_path):
    """Run a recipe with this Python's `mefem` and `python` first on the path; return the finished process."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, words in (("mefem", '-m mefem_cli "$@"'), ("python", '"$@"')):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}\n', encoding="utf-8")
        (binaries / name).chmod(0o755)

    def run_recipe(name: str, *words: str | Path, **changed: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{binaries}:/usr/bin:/bin", "RECIPE": TINY, "PEOPLE": "40", **changed}
        command = ["bash", RECIPES / name, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    return run_recipe


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_recipes_begin_with_command_time_and_expected_score(recipe):
    head = "".join(line for line in recipe.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Command:", "Time:", "Hardware:", "Expected:"):
        assert f"# {word}" in head
    assert os.access(recipe, os.X_OK)
    done = subprocess.run(["bash", recipe], capture_output=True, text=True)
    first = takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines())
    lines = [line.removeprefix("#").removeprefix(" ") for line in first][1:]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", lines)  # it says how to call it


@pytest.mark.slow
def test_quickstart_reads_two_labels_and_compares_with_step_0(run, tmp_path):
    done = run("quickstart.sh", "out")
    assert done.returncode == 0, done.stderr
    assert "bmi: run minus step0, paired" in done.stdout
    scores = json.loads((tmp_path / "out" / "scores" / "scores.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in scores} == {"bmi", "age"}


@pytest.mark.slow
def test_a_clinics_table_becomes_a_head_for_new_photos(run, tmp_path):
    done = run("bmi_from_clinic_table.sh", "out")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    with (tmp_path / "out" / "labels.csv").open(newline="", encoding="utf-8") as file:
        truth = [float(row["bmi"]) for row in csv.DictReader(file)]
    known = [float(row["prediction"]) for row in rows if row["prediction"]]
    assert known
    assert min(truth) < min(known) <= max(known) < max(truth)  # heights in cm with a decimal comma became a BMI


@pytest.mark.slow
def test_clips_are_scored_by_patient_in_the_given_folds(run, tmp_path):
    pytest.importorskip("av")
    done = run("video_biomarkers.sh", "out")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "scores" / "scores.json").read_text(encoding="utf-8"))
    rows = [row for row in scores if row["row"] == "score"]
    assert {row["task"] for row in rows} == {"mcd_rppg.systolic", "mcd_rppg.diastolic"}
    for row in rows:
        assert row["folds"] == 5
        assert 30 <= row["n"] == row["n_groups"] <= 40  # four frames of a patient are one prediction
        assert row["published"]["mae"] in (12.82, 8.39)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    from mefem_cli.faces.render import render_folder

    drawn = render_folder(tmp_path_factory.mktemp("faces"), num_people=24, photos_per_person=1, seed=0, num_workers=1)
    out = drawn / "crops"
    words = ["crop", str(drawn / "photos"), "--labels", str(drawn / "labels.csv"), "-o", str(out), "-q"]
    subprocess.run([sys.executable, "-m", "mefem_cli", *words], check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_the_papers_ablation_is_planned_and_then_done(run, crops, tmp_path):
    coarse = yaml.safe_load((RECIPES / "table4_coarse.yaml").read_text(encoding="utf-8"))
    rows = [row for row in coarse["rows"] if row.get("mask") in ("quadrants", None) and row["head"] == "linear"][:2]
    small = coarse["set"] | {"depth": 1, "embed_dim": 48, "image_size": 48, "predictor_depth": 1, "batch_size": 12}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"set": small, "rows": rows}), encoding="utf-8")
    words = ["--task", "age", "--epochs", "1", "--set", "folds=2"]
    done = run("table4.sh", crops, "out", *words, GRID=str(tmp_path / "grid.yaml"))
    assert done.returncode == 0, done.stderr
    assert "cells: 2" in done.stdout  # an encoder that is trained, and one that is not
    rows = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 2 and all(row.endswith(",ok") for row in rows[1:])


@pytest.mark.slow
def test_the_library_does_what_the_commands_do(crops, tmp_path):
    script = RECIPES / "python_api.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("The four commands as library calls")
    done = subprocess.run([sys.executable, script, crops, "age"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("age r2 ")


def test_without_slurm_the_job_script_is_printed(run, tmp_path):
    from mefem_cli.faces.render import render_folder

    photos = render_folder(tmp_path / "drawn", num_people=1, photos_per_person=1, seed=0, num_workers=1)
    crop = [sys.executable, "-m", "mefem_cli", "crop", str(photos / "photos"), "-o", str(tmp_path / "crops"), "-q"]
    subprocess.run(crop, check=True, capture_output=True)
    done = run("slurm_pretrain.sh", "crops", "new/a_run", "--epochs", "7")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --signal=USR1@300" in done.stdout
    assert "--epochs 7" in done.stdout
