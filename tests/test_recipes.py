"""The recipes of examples/, as their first lines say to run them, on few people and with a tiny network."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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

    def run_recipe(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{binaries}:/usr/bin:/bin", "RECIPE": TINY, "PEOPLE": "40"}
        command = ["bash", RECIPES / name, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    return run_recipe


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_recipes_begin_with_command_time_and_expected_score(recipe):
    head = "".join(line for line in recipe.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Command:", "Time:", "Expected:"):
        assert f"# {word}" in head
    assert os.access(recipe, os.X_OK)


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


def test_without_slurm_the_job_script_is_printed(run, tmp_path):
    from mefem_cli.faces.render import render_folder

    photos = render_folder(tmp_path / "drawn", num_people=1, photos_per_person=1, seed=0, num_workers=1)
    crop = [sys.executable, "-m", "mefem_cli", "crop", str(photos / "photos"), "-o", str(tmp_path / "crops"), "-q"]
    subprocess.run(crop, check=True, capture_output=True)
    done = run("slurm_pretrain.sh", "crops", "a_run", "--epochs", "7")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --signal=USR1@300" in done.stdout
    assert "--epochs 7" in done.stdout
