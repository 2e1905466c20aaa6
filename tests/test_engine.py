"""The engine: training, exact resume, stops, monitors, the data stream, and objectives from outside the package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic import write_crops
from torch import nn

from mefem_cli.engine import checkpoint, monitors, seeds
from mefem_cli.engine.device import Device, choose_device
from mefem_cli.engine.fit import Trainer
from mefem_cli.engine.plan import TrainOptions, make_plan
from mefem_cli.engine.stream import ImageStream, decode
from mefem_cli.errors import Diverged, NoInputError, OutputError, UsageError
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.runs import Run

TINY_MODEL = [
    "--backbone",
    "vit_tiny_patch16_224",
    "--depth",
    "1",
    "--embed-dim",
    "48",
    "--num-heads",
    "3",
    "--image-size",
    "64",
    "--patch-size",
    "8",
    "--predictor-depth",
    "1",
    "--precision",
    "fp32",
]
CPU = Device(torch.device("cpu"), torch.float32, "test")


@pytest.fixture(scope="module")
def crops_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "crops"
    subjects = [f"s{number // 2}" for number in range(240)]
    return write_crops(folder, 240, size=64, subject=subjects)


def pretrain(*arguments: str, cwd: Path, wait: bool = True) -> subprocess.Popen:
    command = [sys.executable, "-m", "mefem_cli", "pretrain", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if wait:
        process.out, process.err = process.communicate(timeout=300)  # type: ignore[attr-defined]
    return process


def comparable(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in monitors.MACHINE_COLUMNS} for row in rows]


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(2400):
        if (run / "last.ckpt").exists() and (run / "metrics.jsonl").exists():
            rows = (run / "metrics.jsonl").read_text().splitlines()
            if rows and json.loads(rows[-1])["step"] >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"{run} never reached step {step}")


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(crops_folder, tmp_path):
    """Kill -9 in the middle of an epoch, SIGTERM later, resume twice: the same weights, metrics and optimiser."""
    options = [str(crops_folder), *TINY_MODEL, "--epochs", "8", "--batch-size", "16", "--checkpoint-every", "0"]
    whole = pretrain(*options, "-o", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.err
    assert whole.out == f"{tmp_path / 'whole'}\n"

    killed = pretrain(*options, "-o", "killed", cwd=tmp_path, wait=False)
    wait_for_step(tmp_path / "killed", 20)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "model.json").exists()

    resumed = pretrain("--resume", "-o", "killed", cwd=tmp_path, wait=False)
    wait_for_step(tmp_path / "killed", 60)
    os.kill(resumed.pid, signal.SIGTERM)
    _, err = resumed.communicate()
    assert resumed.returncode == 75, err
    assert "--resume" in err

    finished = pretrain("--resume", "-o", "killed", cwd=tmp_path)
    assert finished.returncode == 0, finished.err
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    for name in ("model.safetensors", "source.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, second = (checkpoint.load(tmp_path / run / "last.ckpt") for run in ("killed", "whole"))
    for one, other in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)

    changed = pretrain("--resume", "-o", "whole", "--epochs", "9", "--lr", "0.5", cwd=tmp_path)
    assert changed.returncode == 4
    assert "lr was" in changed.err
    again = pretrain(*options, "-o", "whole", cwd=tmp_path)
    assert again.returncode == 4
    assert "--overwrite" in again.err


class Toy(nn.Module):
    """An objective from outside the package: predict the mean colour; no masks, no EMA, two loss terms."""

    image_size = 64

    def __init__(self, poison_step: int = -1):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.poison_step, self.calls, self.after = poison_step, 0, 0
        self.seen: list[torch.Tensor] = []

    def draw(self, num_faces, generator):
        return {"noise": torch.rand(num_faces, 3, generator=generator)}

    def forward(self, images, draws):
        assert images.dtype == torch.uint8
        colour = images.float().mean((2, 3)) / 255
        self.seen.append(draws["noise"])
        self.calls += 1
        error = (self.head(self.encoder(colour + 0.01 * draws["noise"])) - colour).pow(2).mean()
        if self.calls - 1 >= self.poison_step >= 0:
            error = error * float("nan")
        return {"colour": error, "norm": 1e-3 * self.encoder.weight.pow(2).sum()}, {"brightness": colour.mean()}

    def after_step(self, step, total_steps):
        self.after += 1
        return {"tau": step / total_steps}

    def encoders(self):
        encoder = nn.Module()
        encoder.features = lambda images: {"mean": self.encoder(images.float().mean((2, 3)) / 255)}  # type: ignore[assignment]
        return {"only": encoder}


def train_toy(toy: Toy, folder: Path, crops_folder: Path, epochs: int = 4, **options) -> list[dict]:
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=epochs, lr=0.05, weight_decay="0", **options), len(crops), "40")
    run = Run.create(folder, {})
    trainer = Trainer(toy, ImageStream(crops, 64), np.arange(len(crops)), plan, CPU, run, seed=0)
    trainer.fit(np.arange(20), 1e9, resume=False)
    return list(run.metrics())


def test_an_objective_from_outside_trains_without_a_change_in_the_engine(crops_folder, tmp_path):
    torch.manual_seed(0)
    rows = train_toy(toy := Toy(), tmp_path / "run", crops_folder, epochs=10)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == list(range(11))
    assert epochs[-1]["loss"] < 0.2 * epochs[1]["loss"]
    assert epochs[-1]["loss"] == pytest.approx(epochs[-1]["loss_colour"] + epochs[-1]["loss_norm"])
    assert {"brightness", "tau", "rankme", "feature_std"} <= epochs[-1].keys()
    assert toy.after == 60


def test_accumulation_gives_the_same_losses_and_draws(crops_folder, tmp_path):
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        toy = Toy()
        rows = train_toy(toy, tmp_path / str(accumulate), crops_folder, accumulate=accumulate)
        results.append(([row["loss"] for row in rows if row["kind"] == "step"], torch.cat(toy.seen)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_a_non_finite_step_is_skipped_and_three_in_a_row_end_the_run(crops_folder, tmp_path):
    torch.manual_seed(0)
    toy = Toy(poison_step=5)
    with pytest.raises(Diverged, match="--lr"):
        train_toy(toy, tmp_path / "run", crops_folder)
    assert all(torch.isfinite(parameter).all() for parameter in toy.parameters())


def test_one_non_finite_step_changes_neither_weights_nor_moments(crops_folder, tmp_path):
    torch.manual_seed(0)
    toy = Toy()
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=1), len(crops), "40")
    trainer = Trainer(toy, ImageStream(crops, 64), np.arange(240), plan, CPU, Run.create(tmp_path / "run", {}), seed=0)
    batch = next(trainer.stream.batches([np.arange(40)], CPU.torch))
    trainer._train_step(batch)
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    moments = [value["exp_avg"].clone() for value in trainer.optimizer.state.values()]
    toy.poison_step = 0
    trainer._train_step(batch)
    assert all(torch.equal(before[name], value) for name, value in toy.state_dict().items())
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, trainer.optimizer.state.values(), strict=True))
    assert trainer.skipped.item() == 1
    toy.poison_step = -1
    trainer._train_step(batch)
    assert not all(torch.equal(before[name], value) for name, value in toy.state_dict().items())


def test_the_order_depends_on_seed_and_epoch_only(crops_folder, tmp_path):
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=3), len(crops), "50")

    def order(step: int, seed: int = 0) -> list[list[int]]:
        trainer = Trainer(Toy(), ImageStream(crops, 64), np.arange(240), plan, CPU, Run(tmp_path), seed=seed)
        trainer.step = step
        return [batch.tolist() for batch in trainer._order()]

    whole = order(0)
    assert order(5) == whole[5:]
    assert order(0, seed=1) != whole
    first_epoch = sum(whole[:4], [])
    assert len(set(first_epoch)) == 200
    assert sum(whole[4:8], []) != first_epoch


def test_monitor_faces_are_whole_subjects_and_at_most_five_percent():
    subjects = np.array([f"s{number // 4}" for number in range(1000)])
    training, monitor = monitors.split_monitor_faces(1000, subjects, 1024, seed=0)
    assert 40 <= len(monitor) <= 50
    assert len(training) + len(monitor) == 1000
    assert not set(subjects[training]) & set(subjects[monitor])
    assert len(monitors.split_monitor_faces(1000, subjects, 12, seed=0)[1]) == 12
    assert len(monitors.split_monitor_faces(100, None, 1024, seed=0)[1]) == 0  # 5 would say nothing


def test_rankme_equals_its_formula_and_knows_collapse():
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    assert monitors.rankme(features) == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-9)
    shifted = features + 100
    assert monitors.rankme(shifted) < 2 < monitors.rankme(shifted, centred=True)
    assert monitors.rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)
    assert monitors.feature_std(torch.ones(50, 8)) == 0
    orthogonal = torch.eye(8).repeat(4, 1)
    assert monitors.rankme(orthogonal) == pytest.approx(8, rel=1e-4)


def test_corrupt_crops_are_named_and_replaced(crops_folder, tmp_path, capsys):
    folder = write_crops(tmp_path / "crops", 12, size=64)
    (folder / "images" / "0003.jpg").write_bytes(b"\xff\xd8 not a picture")
    (folder / "images" / "0007.jpg").unlink()
    stream = ImageStream(Crops.open(folder), 64)
    (batch,) = stream.batches([np.arange(12)], torch.device("cpu"))
    assert batch.images.shape == (12, 3, 64, 64)
    assert batch.readable.tolist() == [row not in (3, 7) for row in range(12)]
    assert stream.corrupt == [stream.crops.ids[3], stream.crops.ids[7]]
    assert "0003.jpg" in capsys.readouterr().err
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(NoInputError, match="rerun mefem crop"):
        list(ImageStream(Crops.open(folder), 64).batches([np.arange(12)], torch.device("cpu")))


def test_batches_hold_the_pixels_of_their_rows(tmp_path):
    crops = Crops.open(write_crops(tmp_path / "crops", 10, size=64))
    stream = ImageStream(crops, 32, workers=3)
    rows = [np.array([4, 1, 7]), np.array([0, 9, 9])]
    for batch, index in zip(stream.batches(rows, torch.device("cpu")), rows, strict=True):
        for image, row in zip(batch.images, index, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(crops.read_bytes(int(row)), 32))


def test_seeds_are_independent_streams():
    draws = {
        tuple(torch.rand(3, generator=seeds.torch_generator(*key)).tolist())
        for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    }
    assert len(draws) == 4
    assert seeds.numpy_generator(5, seeds.ORDER, 2).integers(1 << 40) == seeds.numpy_generator(
        5, seeds.ORDER, 2
    ).integers(1 << 40)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="--overwrite"):
        checkpoint.load(path)


def test_checkpoints_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"format": checkpoint.FORMAT, "version": 1, "payload": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(OutputError):
        checkpoint.load(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_model_names_what_does_not_fit(tmp_path):
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    with pytest.raises(OutputError, match=r"1 missing \(2.weight\).*1 unexpected \(1.bias\)|missing"):
        checkpoint.load_into(
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2)), state, tmp_path
        )
    with pytest.raises(OutputError, match="another shape"):
        checkpoint.load_into(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), state, tmp_path)


def test_a_newer_checkpoint_asks_for_an_upgrade(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1}, tmp_path / "last.ckpt")
    with pytest.raises(OutputError, match="newer mefem"):
        checkpoint.load(tmp_path / "last.ckpt")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "gpu"])
def test_absent_devices_are_refused(device):
    with pytest.raises(UsageError, match="--device"):
        choose_device(device)


def test_precision_follows_the_hardware_unless_asked():
    assert choose_device("cpu", "fp32").dtype is torch.float32
    assert choose_device("cpu", "bf16").dtype is torch.bfloat16
    native = Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert (choose_device("cpu").dtype is torch.bfloat16) == native


def test_faces_without_a_subject_are_nobodys_kin():
    """A half-filled subject column must not make one huge person of all the rest."""
    subjects = np.array([f"s{number // 2}" if number < 200 else "" for number in range(1000)], dtype=object)
    _, monitor = monitors.split_monitor_faces(1000, subjects, 1024, seed=0)
    assert len(monitor) == 50
    large = np.array(["clinic"] * 900 + [f"s{number}" for number in range(100)])
    assert len(monitors.split_monitor_faces(1000, large, 1024, seed=0)[1]) == 50


def test_overwrite_removes_runs_and_nothing_else(crops_folder, tmp_path):
    from mefem_cli.stores.product import refuse_existing

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"precious")
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "photos", tmp_path / "file", crops_folder):
        with pytest.raises(OutputError, match="name another -o"):
            refuse_existing(path, overwrite=True, holds="config.yaml")
    assert (tmp_path / "photos" / "me.jpg").exists()
    run = Run.create(tmp_path / "run", {"crops": []})
    with pytest.raises(OutputError, match="--overwrite"):
        refuse_existing(run.path, overwrite=False, holds="config.yaml")
    refuse_existing(run.path, overwrite=True, holds="config.yaml")
    assert not run.path.exists()


@pytest.mark.parametrize("option", [{"seed": -1}, {"limit": 0}, {"limit": -5}])
def test_impossible_product_options_are_refused(option):
    from mefem_cli.stores.product import ProductOptions

    with pytest.raises(UsageError, match="--" + next(iter(option))):
        ProductOptions(**option)


def test_latest_replaces_links_only(tmp_path):
    run = Run.create(tmp_path / "run", {"crops": []})
    run.become_latest()
    assert (tmp_path / "latest").resolve() == run.path.resolve()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("mine")
    run.become_latest()
    assert (tmp_path / "latest").read_text() == "mine"
