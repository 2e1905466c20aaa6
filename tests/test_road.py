"""The whole road on rendered faces, as a user types it: crop | pretrain | embed | probe, through real pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mefem_cli.faces.render import render_folder

TINY = (
    "--backbone vit_tiny_patch16_224 --depth 1 --embed-dim 48 --num-heads 3 --image-size 64 --patch-size 8 "
    "--predictor-depth 1 --epochs 2"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return render_folder(tmp_path_factory.mktemp("road"), num_people=60, photos_per_person=1, seed=3, num_workers=1)


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command line with `mefem` standing for this Python's."""
    script = f'set -o pipefail; mefem() {{ "{sys.executable}" -m mefem_cli "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def test_crop_pretrain_embed_probe_in_one_pipe(photos):
    done = shell(
        f"mefem crop photos --labels labels.csv | mefem pretrain {TINY} | mefem embed --patches | "
        "mefem probe bmi --json --epochs 2 --bootstraps 200",
        photos,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    scores = [row for row in rows if row["row"] == "score"]
    assert rows[: len(scores)] == scores  # they come first
    assert [(row["head"], row["features"]) for row in scores] == [
        ("linear", "cls"),
        ("mlp", "cls"),
        ("attentive", "patches"),
    ]
    assert {row["row"] for row in rows[len(scores) :]} == {"baseline", "difference"}  # age and sex alone
    for row in scores:
        assert row["metrics"]["r2"].keys() == {"value", "low", "high"}
        assert row["n"] >= 57
        assert row["folds"] == 5
    for product in ("crops/manifest.parquet", "crops/contact.html", "runs/latest/model.safetensors", "features.h5"):
        assert (photos / product).exists()

    described = shell("mefem embed --patches --json -q", photos)
    assert json.loads(described.stdout)["out"] == str(photos / "features.h5")
    assert json.loads(described.stdout)["embedded"] == 0
    assert described.stderr == ""


def test_nothing_in_the_pipe_is_exit_3(tmp_path):
    done = shell("mefem crop nowhere -q | mefem embed -q", tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "the command before it in the pipe made nothing" in done.stderr
