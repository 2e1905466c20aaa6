"""mefem pretrain -n: what it says about data, choices and cost, against counts made by hand and a real run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import write_crops

from mefem_cli import main
from mefem_cli.engine import estimate
from mefem_cli.engine.device import Device
from mefem_cli.engine.order import FaceOrder
from mefem_cli.engine.plan import TrainOptions, explain, make_plan
from mefem_cli.engine.stream import ImageStream
from mefem_cli.errors import NoInputError
from mefem_cli.parts import Given
from mefem_cli.pretraining import Job
from mefem_cli.reports import plan as plan_page
from mefem_cli.stores import crops as crops_store
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.product import ProductOptions

MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "depth": 2,
    "embed_dim": 48,
    "num_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "predictor_depth": 1,
    "precision": "fp32",
    "workers": 1,
}
TINY = [word for name, value in MODEL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
CPU = Device(torch.device("cpu"), torch.float32, "test")
EMA_REASON = "a run under 5,000 steps: the target stays, then follows; END is 1 - 4.5 / steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """240 crops of 120 people in `a`, three of them twice; 40 without labels in `b`."""
    folder = tmp_path_factory.mktemp("plan")
    age = [float(number) if number % 3 else math.nan for number in range(240)]
    sex = ["" if number < 100 else "f" for number in range(240)]
    write_crops(folder / "a", 240, size=64, subject=[f"s{number // 2}" for number in range(240)], age=age, sex=sex)
    write_crops(folder / "b", 40, size=64, seed=1)
    rows = crops_store.read_manifest(folder / "a")
    digests = rows["crop_sha256"].to_pylist()
    digests[1:4] = [digests[0]] * 3  # four crops with the same bytes
    at = rows.schema.get_field_index("crop_sha256")
    crops_store.write_manifest(folder / "a", rows.set_column(at, "crop_sha256", [digests]))
    return folder


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(plan_page, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(plan_page, "ALTERNATIVE_SECONDS", 0.02)


def dry_run(folder: Path, capsys, *words: str, json_too: bool = True) -> dict:
    """The plan as an object; nothing may be written."""
    before = sorted(folder.rglob("*"))
    main.dispatch(["pretrain", "-n", "--json", *TINY, "-o", str(folder / "run"), *words])
    assert sorted(folder.rglob("*")) == before
    return json.loads(capsys.readouterr().out)


def test_the_fingerprint_counts_folders_labels_people_and_duplicates(folder, capsys):
    plan = dry_run(folder, capsys, f"{folder}/a", f"{folder}/b=1.5")
    assert plan["crops"] == 280
    assert plan["data"] == {
        "folders": [
            {"path": f"{folder}/a", "crops": 240, "weight": 1.0},
            {"path": f"{folder}/b", "crops": 40, "weight": 1.5},
        ],
        "size": 64,
        "labels": {"subject": 240, "age": 160, "sex": 140},
        "subject_label": "subject",
        "subjects": 120 + 40,  # a face without a subject is its own
        "exact_duplicates": 3,
    }
    assert plan["training_faces"] + plan["monitor_faces"] == 280
    assert 8 <= plan["monitor_faces"] <= 14


def test_choices_are_those_of_the_run_and_say_why(folder, capsys):
    plan = dry_run(folder, capsys, f"{folder}/a", "--epochs", "3", "--lr", "1e-3")
    choices = {choice["name"]: choice for choice in plan["choices"]}
    assert choices["batch"]["value"] == plan["batch_size"] == 64
    assert choices["batch"]["reason"] == "for under 20,000 faces"
    assert choices["epochs"] == {"name": "epochs", "value": 3, "reason": "as asked"}
    assert choices["learning rate"]["reason"] == "as asked"
    assert choices["steps"]["value"] == plan["steps"] == 3 * (plan["training_faces"] // 64)
    assert choices["EMA"] == {"name": "EMA", "value": "1:0.95", "reason": EMA_REASON}
    assert choices["tokens"]["value"] == "24 source and 41 target"
    assert all(choice["reason"] for choice in plan["choices"])
    assert np.array(plan["p_source"]).shape == (8, 8)
    assert np.sum(plan["p_source"]) == pytest.approx(24, abs=1e-2)
    assert plan["options"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("options", "faces", "asked", "expected"),
    [
        ({}, 30_000, "auto", {"batch_size": "for under 100,000 faces", "preset": "under 1,000,000 faces"}),
        ({}, 100, "auto", {"batch_size": "half of the faces", "warmup_steps": "3 epochs, as in the paper"}),
        (
            {},
            2_000_000,
            "auto",
            {"batch_size": "the paper's", "lr": "the paper's", "preset": "at least 1,000,000 faces"},
        ),
        (
            {},
            5000,
            "50",
            {"batch_size": "as asked", "lr": "0.001 x sqrt(50 / 2048), at least 0.0001", "steps": "100 an epoch"},
        ),
        (
            {"epochs": 4, "warmup_epochs": 9},
            640,
            "auto",
            {"epochs": "as asked", "warmup_steps": "half of the run at most"},
        ),
        ({"preset": "paper", "weight_decay": "0"}, 5000, "auto", {"preset": "as asked", "weight_decay": "as asked"}),
        ({}, 700, "auto", {"steps": "10 an epoch, 60 faces left over, others in each"}),
    ],
)
def test_reasons(options, faces, asked, expected):
    chosen = TrainOptions(**options)
    reasons = explain(make_plan(chosen, faces, asked), chosen, asked, faces)
    assert {name: reasons[name] for name in expected} == expected


def job_of(folder: Path, **options) -> Job:
    given = Given({**MODEL, "out": str(folder / "run"), "overwrite": True, **options})
    return Job.prepare([folder / "a"], given, ProductOptions(out=str(folder / "run"), overwrite=True))


def test_the_disk_is_what_a_run_takes(folder):
    job = job_of(folder, epochs=1, batch_size=32, keep=1, limit=40)
    predicted = estimate.disk_bytes(job.objective, keep=1), estimate.checkpoint_bytes(job.objective)
    job.train()
    files = {path: path.stat().st_size for path in job.run.path.rglob("*") if path.is_file()}
    weights = sum(size for path, size in files.items() if path.suffix in (".ckpt", ".safetensors"))
    assert predicted[0] - estimate.REPORT_BYTES == pytest.approx(weights, rel=0.1)
    assert predicted[1] == pytest.approx(files[job.run.checkpoint_path], rel=0.1)
    shutil.rmtree(job.run.path)


def trial_of(job: Job, most: int = 64, seconds: float = 0.2) -> estimate.Trial:
    faces, _ = estimate.read_faces(job.stream, job.order, CPU, 0)
    trainer = estimate.make_trainer(job.objective, job.stream, job.order, job.plan, CPU, job.train_options)
    return estimate.try_steps(trainer, faces, most, seconds)


@pytest.mark.parametrize(
    ("step_seconds", "most", "tick", "chosen"),
    [
        (lambda faces: 1e-4 * faces, 64, 0.1, 64),  # quick: all of them
        (lambda faces: 1.0, 64, 0.1, 32),  # a busy machine: two faces take as long as many
        (lambda faces: 1.0, 5, 0.1, 5),
        (lambda faces: 0.01 * faces, 128, 0.1, 32),  # as many as a step has time for, of 1 s / 4
        (lambda faces: 1.0, 64, 3.0, 8),  # time is up
    ],
)
def test_slow_steps_of_few_faces_are_not_believed(step_seconds, most, tick, chosen, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: tick * next(clock))
    monkeypatch.setattr(estimate, "_take_step", lambda trainer, faces: step_seconds(len(faces)))
    assert len(estimate._choose_faces(None, torch.zeros(64, 3, 1, 1), most, 1.0)) == chosen


def test_what_the_backward_pass_keeps_of_a_face(folder):
    """Counted by hand for a block: 16 widths of numbers a token, in 4 bytes; weights are no face's.

    They are the inputs of both norms (2) and of the four matrix products (1 + 1 + 1 + 4), queries, keys and values (3)
    and the input of GELU (4).
    """
    shallow, deep = (trial_of(job_of(folder, depth=depth, predictor_depth=0)).kept_bytes for depth in (2, 4))
    assert (deep - shallow) / 2 == pytest.approx(16 * 48 * 24 * 4, rel=0.05)
    less = trial_of(job_of(folder, depth=4, predictor_depth=0, activation_checkpointing=True)).kept_bytes
    assert less < deep / 3


def estimate_of(job: Job, trial: estimate.Trial, read_seconds: float = 0.0, **options) -> estimate.Estimate:
    trainer = estimate.make_trainer(job.objective, job.stream, job.order, job.plan, CPU, job.train_options)
    settings = {"num_monitor": 0, "processes": 1, "cache_bytes": 0, **options}
    return estimate.estimate_run(trial, read_seconds, trainer, job.plan, **settings)


TRIAL = estimate.Trial(
    num_faces=10,
    num_steps=3,
    step_seconds=1.2,
    update_seconds=0.2,
    forward_seconds=0.05,
    kept_bytes=1e6,
    peak_bytes=10**9,
)


def test_time_is_update_plus_faces_plus_reading_plus_watching(folder):
    job = job_of(folder, epochs=4, batch_size=50)  # of 228 faces: 4 steps an epoch
    assert job.plan.total_steps == 16
    step = 0.2 + 50 * 0.1
    assert estimate_of(job, TRIAL).seconds == pytest.approx(16 * step)
    assert estimate_of(job, TRIAL, read_seconds=0.01).seconds == pytest.approx(16 * (step + 0.5))
    cached = estimate_of(job, TRIAL, read_seconds=0.01, cache_bytes=10**6)
    assert cached.seconds == pytest.approx(16 * step + 4 * 0.5)  # decoded in the first epoch
    watched = estimate_of(job, TRIAL, num_monitor=12)
    assert watched.seconds == pytest.approx(16 * step + 5 * (2 * 12 + 64) * 0.05)
    assert watched.watch_share == pytest.approx(22 / watched.seconds)


def test_memory_grows_with_the_faces_of_a_micro_batch(folder):
    job = job_of(folder, batch_size=50)
    copy = estimate.checkpoint_bytes(job.objective)
    assert estimate_of(job, TRIAL).memory_bytes == 10**9 + copy + 40 * 10**6
    assert estimate_of(job, TRIAL, cache_bytes=7).memory_bytes == 10**9 + copy + 40 * 10**6 + 7
    halved = job_of(folder, batch_size=50, accumulate=2)
    assert estimate_of(halved, TRIAL).memory_bytes == 10**9 + copy + 15 * 10**6
    assert estimate_of(job, TRIAL, processes=5).memory_bytes == 10**9 + copy


def test_timed_steps_are_the_trainers_own(folder):
    """They change the weights, of both encoders, and count the faces of the plan's micro-batch at most."""
    job = job_of(folder, batch_size=16, ema="0.99:1")
    before = {name: value.clone() for name, value in job.objective.state_dict().items()}
    trial = trial_of(job, most=4, seconds=4.0)
    assert trial.num_faces == 4
    assert trial.num_steps >= 1
    changed = {
        name.split(".")[0] for name, value in job.objective.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"source_encoder", "target_encoder", "predictor"}
    assert trial.update_seconds > 0 and trial.step_seconds > 0


def test_a_run_of_more_than_a_day_names_what_is_faster(folder, capsys, monkeypatch):
    def trial_by_size(job, objective, faces, seconds):
        trainer = estimate.make_trainer(objective, job.stream, job.order, job.plan, CPU, job.train_options)
        assert faces.shape[2:] == (objective.image_size, objective.image_size)
        return replace(TRIAL, step_seconds=objective.image_size / 64, update_seconds=0.0), trainer

    monkeypatch.setattr(plan_page, "_try", trial_by_size)
    monkeypatch.setitem(plan_page.SMALLER, "image_size", 32)
    words = [f"{folder}/a", "--epochs", "1000", "--embed-dim", "192", "--depth", "3"]
    assert dry_run(folder, capsys, *words)["instead"] == []
    monkeypatch.setattr(plan_page, "TOO_LONG", 100.0)
    plan = dry_run(folder, capsys, *words)
    by_epochs, by_size = plan["instead"]  # no other backbone: it would be no smaller
    assert by_size == {"type": "--image-size 32", "seconds": pytest.approx(plan["estimated_seconds"] / 2, abs=1)}
    option, epochs = by_epochs["type"].split()
    assert option == "--epochs"
    assert by_epochs["seconds"] <= 100
    assert int(epochs) == pytest.approx(1000 * 100 / plan["estimated_seconds"], abs=1)


def test_the_table_is_aligned_and_obeys_no_control_characters(folder, capsys):
    rows = crops_store.read_manifest(folder / "a")
    hostile = folder / "hostile"
    shutil.copytree(folder / "a", hostile)
    names = ["label:\x1b[2J[red]age" if name == "label:age" else name for name in rows.column_names]
    crops_store.write_manifest(hostile, rows.rename_columns(names))
    main.dispatch(["pretrain", "-n", *TINY, "-o", str(folder / "run"), str(hostile)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "?[2J[red]age 160" in out
    table = [line for line in out.splitlines() if "│" in line]
    assert len({tuple(at for at, letter in enumerate(line) if letter == "│") for line in table}) == 1
    shown = {line.split("│")[0].strip() for line in table}
    assert {"crops", "backbone", "batch", "learning rate", "EMA", "time", "memory", "disk"} <= shown
    assert "--backbone vit_tiny_patch16_224" in out
    shutil.rmtree(hostile)


def test_no_epochs_take_no_time(folder, capsys):
    plan = dry_run(folder, capsys, f"{folder}/a", "--epochs", "0")
    assert plan["estimated_seconds"] == 0
    assert plan["memory"] is None


def test_several_gpus_share_a_batch(folder, capsys):
    plan = dry_run(folder, capsys, f"{folder}/a", "--gpus", "2", "--device", "cpu")
    choices = {choice["name"]: choice for choice in plan["choices"]}
    assert choices["processes"]["value"] == 2
    assert choices["processes"]["reason"] == "32 faces of each batch for each"


def test_crops_that_cannot_be_read_are_told(folder, capsys, tmp_path):
    shutil.copytree(folder / "b", tmp_path / "b")
    for path in (tmp_path / "b" / "images").iterdir():
        path.write_bytes(b"no picture")
    stream = ImageStream(Crops.open(tmp_path / "b"), 64, 1)
    with pytest.raises(NoInputError, match="no crop of a whole batch can be read"):
        estimate.read_faces(stream, FaceOrder(np.arange(40)), CPU, 0)
