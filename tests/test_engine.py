"""The engine: training, exact resume, stops, monitors, the data stream, and objectives from outside the package."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic import write_crops
from torch import nn

from mefem_cli.backbones import vit
from mefem_cli.engine import checkpoint, fit, monitors, seeds, tune
from mefem_cli.engine.device import Device, DeviceOptions, choose_device
from mefem_cli.engine.fit import Trainer
from mefem_cli.engine.plan import TrainOptions, make_plan
from mefem_cli.engine.stream import ImageStream, decode
from mefem_cli.errors import Diverged, Interrupted, NoInputError, OutOfMemory, OutputError, Stopped, UsageError
from mefem_cli.objectives import mefem
from mefem_cli.parts import Given
from mefem_cli.pretraining import Job
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

    with pytest.raises(OutputError, match="lr was"):
        train_job([], out=str(tmp_path / "whole"), resume="true", epochs="9", lr="0.5")
    with pytest.raises(OutputError, match="--overwrite"):
        train_job([crops_folder], out=str(tmp_path / "whole"))


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


# The step -------------------------------------------------------------------------------------------------------------


def tiny_mefem(**options) -> mefem.MeFEm:
    """A ViT of one block and 24 features on an 8 x 8 grid; the same weights at every call."""
    seeds.seed_initialisation(0)
    backbone = vit.Options("vit_tiny_patch16_224", image_size=32, patch_size=4, depth=1, embed_dim=24, num_heads=3)
    chosen = mefem.Options(predictor_depth=1, ema="0.9:1", **options)
    return mefem.build(chosen, vit.build(backbone), Given({}))


def mefem_trainer(crops_folder: Path, run: Path, epochs: int = 2, batch: str = "40", **options) -> Trainer:
    crops = Crops.open(crops_folder)
    rows = np.arange(len(crops) - 20)
    chosen = {name: options.pop(name) for name in ("accumulate",) if name in options}
    plan = make_plan(TrainOptions(epochs=epochs, **chosen), len(rows), batch)
    return Trainer(tiny_mefem(), ImageStream(crops, 32, 2), rows, plan, CPU, Run.create(run, {}), seed=0, **options)


SYNCS = ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero")


def test_nothing_in_a_step_waits_for_the_device(crops_folder, tmp_path, monkeypatch):
    """Every way in which Python asks a tensor for its value is closed during the step."""
    trainer = mefem_trainer(crops_folder, tmp_path / "run", accumulate=2)
    batch = next(trainer.stream.batches([np.arange(40)], CPU.torch))
    trainer.meter.add(trainer._train_step(batch)[0])  # whatever is made once
    with monkeypatch.context() as closed:
        for name in SYNCS:
            closed.setattr(torch.Tensor, name, functools.partialmethod(_refuse, name))
        with pytest.raises(AssertionError, match="item"):
            torch.ones(1).item()
        losses, _ = trainer._train_step(batch)
        trainer.meter.add(losses)
    assert trainer.meter.sums["loss"].item() > 0


def _refuse(tensor: torch.Tensor, name: str, *arguments) -> None:
    raise AssertionError(f"Tensor.{name} waits for the device")


def test_attention_is_fused_and_the_optimiser_too(crops_folder, tmp_path):
    trainer = mefem_trainer(crops_folder, tmp_path / "run")
    attention = [module for module in trainer.objective.modules() if hasattr(module, "fused_attn")]
    assert len(attention) == 3  # two encoders and the predictor, a block each
    assert all(module.fused_attn for module in attention)
    assert trainer.optimizer.defaults["fused"]


def test_recomputed_activations_give_the_same_gradients_and_keep_less(crops_folder, tmp_path):
    """Bit for bit; and the backward pass holds the inputs of blocks only."""
    results = []
    for recompute in (False, True):
        trainer = mefem_trainer(crops_folder, tmp_path / str(recompute), activation_checkpointing=recompute)
        batch = next(trainer.stream.batches([np.arange(40)], CPU.torch))
        draws = trainer.objective.draw(40, seeds.torch_generator(0, seeds.MASKS, 0))
        held = numbers_held(functools.partial(trainer._backward, batch.images, draws))
        gradients = {name: one.grad for name, one in trainer.objective.named_parameters() if one.grad is not None}
        results.append((gradients, held, trainer.objective.state_dict().keys()))
    (plain, held, names), (recomputed, held_recomputed, same_names) = results
    assert plain.keys() == recomputed.keys() and names == same_names
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert held_recomputed < 0.5 * held


def numbers_held(function: Callable[[], object]) -> int:
    """Return how many numbers a forward pass keeps for its backward pass."""
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: held.append(one.numel()) or one, lambda one: one):
        function()
    return sum(held)


def test_recomputing_what_has_no_blocks_is_told(crops_folder, tmp_path, capsys):
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=1), len(crops), "40")
    run = Run.create(tmp_path / "run", {})
    Trainer(Toy(), ImageStream(crops, 64), np.arange(240), plan, CPU, run, 0, activation_checkpointing=True)
    assert "--activation-checkpointing has no effect" in capsys.readouterr().err


def test_a_compiled_run_is_the_run_with_the_same_names_and_is_compiled_once(crops_folder, tmp_path, monkeypatch):
    """With the compiler's tracing but not its code generation, which takes a minute; one graph, never a second one."""
    compiled = torch.compiler
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(tune, "compile_objective", functools.partial(tune.compile_objective, backend=backend))
    compiled.reset()
    runs = {}
    for mode in ("off", "on"):
        trainer = mefem_trainer(crops_folder, tmp_path / mode, compile=mode, accumulate=2)
        trainer.fit(np.arange(220, 240), 1e9, resume=False)
        runs[mode] = (trainer.objective.state_dict(), comparable(tmp_path / mode))
    assert len(graphs) == 1
    assert runs["on"][0].keys() == runs["off"][0].keys()
    for name, value in runs["off"][0].items():
        torch.testing.assert_close(runs["on"][0][name], value, rtol=1e-4, atol=1e-6, msg=name)
    ours, theirs = ([row["loss"] for row in runs[mode][1][1:]] for mode in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    compiled.reset()


def test_a_compiler_that_fails_is_told_and_left_alone_unless_it_was_asked_for(
    crops_folder, tmp_path, monkeypatch, capsys
):
    def backend(graph, inputs):
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr(tune, "compile_objective", functools.partial(tune.compile_objective, backend=backend))
    monkeypatch.setattr(tune, "wants_compile", lambda *arguments: True)
    torch.compiler.reset()
    trainer = mefem_trainer(crops_folder, tmp_path / "auto", epochs=1, compile="auto")
    trainer.fit(np.arange(0), 1e9, resume=False)
    assert trainer.step == 5
    assert "torch.compile fails here" in capsys.readouterr().err
    with pytest.raises(UsageError, match="type --compile off"):
        mefem_trainer(crops_folder, tmp_path / "on", epochs=1, compile="on").fit(np.arange(0), 1e9, resume=False)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("asked", "device", "steps", "compiled"),
    [
        ("auto", "cpu", 10**6, False),
        ("auto", "cuda", 10**6, True),
        ("auto", "cuda", 100, False),
        ("on", "cpu", 1, True),
        ("off", "cuda", 10**6, False),
    ],
)
def test_what_is_compiled_by_itself(asked, device, steps, compiled):
    assert tune.wants_compile(asked, Device(torch.device(device), torch.float32, ""), steps) is compiled


class Greedy(Toy):
    """Runs out of memory with more than `fits` faces at a time."""

    def __init__(self, fits: int):
        super().__init__()
        self.fits, self.tried = fits, []

    def forward(self, images, draws):
        self.tried.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(images, draws)


def test_out_of_memory_cuts_the_batch_until_it_fits_and_changes_nothing_else(crops_folder, tmp_path, capsys):
    losses = []
    for fits in (40, 7):
        torch.manual_seed(0)
        toy = Greedy(fits)
        rows = train_toy(toy, tmp_path / str(fits), crops_folder, epochs=1)
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
    assert toy.tried[:4] == [40, 20, 10, 5]
    assert set(toy.tried[3:]) == {5}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "out of memory with 10 faces at a time: going on with 5" in capsys.readouterr().err
    assert "going on with 5" in (tmp_path / "7" / "run.log").read_text()
    with pytest.raises(OutOfMemory, match="--backbone"):
        train_toy(Greedy(0), tmp_path / "none", crops_folder)


def test_the_trial_before_a_run_on_a_gpu_finds_what_fits_and_leaves_no_trace(crops_folder, tmp_path):
    """As on a GPU: before the first step, on blank faces, with the optimiser's memory taken."""
    torch.manual_seed(0)
    toy = Greedy(12)
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=1), len(crops), "40")
    trainer = Trainer(toy, ImageStream(crops, 64), np.arange(240), plan, CPU, Run.create(tmp_path / "run", {}), seed=0)
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    while not trainer._try_micro_batch():
        pass
    assert toy.tried == [40, 20, 10]
    assert trainer.accumulate == 4
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())
    moments = trainer.optimizer.state_dict()["state"].values()
    assert len(moments) == 4 and all(not one["exp_avg"].any() and one["step"] == 0 for one in moments)
    assert all(parameter.grad is None for parameter in toy.parameters())


# Resume ---------------------------------------------------------------------------------------------------------------


class SignalAfter(Toy):
    """Sends this process a signal in a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM):
        super().__init__()
        self.step, self.number = step, number

    def after_step(self, step, total_steps):
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return super().after_step(step, total_steps)


def toy_trainer(toy: Toy, folder: Path, crops_folder: Path, epochs: int = 3) -> Trainer:
    crops = Crops.open(crops_folder)
    plan = make_plan(TrainOptions(epochs=epochs, lr=0.05), 48, "4")
    return Trainer(toy, ImageStream(crops, 64, 3), np.arange(48), plan, CPU, Run.create(folder, {}), seed=0)


def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(crops_folder, tmp_path, monkeypatch):
    """At each of 36 steps, among them both sides of log lines and epochs; with three decoding threads."""
    monkeypatch.setattr(fit, "LOG_EVERY_STEPS", 5)
    torch.manual_seed(0)
    start = Toy().state_dict()

    def run(name: str, toy: Toy, resume: bool = False) -> Trainer:
        toy.load_state_dict(start)
        trainer = toy_trainer(toy, tmp_path / name, crops_folder)
        trainer.fit(np.arange(48, 80), 1e9, resume)
        return trainer

    whole = run("whole", Toy())
    assert whole.step == 36
    for step in range(36):
        with pytest.raises(Stopped, match="--resume"):
            run(f"at{step}", SignalAfter(step))
        assert checkpoint.load(tmp_path / f"at{step}" / "last.ckpt")["step"] == step + 1
        resumed = run(f"at{step}", Toy(), resume=True)
        assert comparable(tmp_path / f"at{step}") == comparable(tmp_path / "whole"), step
        for name, value in whole.objective.state_dict().items():
            assert torch.equal(value, resumed.objective.state_dict()[name]), (step, name)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGUSR1, Stopped), (signal.SIGINT, Interrupted)])
def test_other_signals_stop_with_a_checkpoint_too(crops_folder, tmp_path, number, error):
    with pytest.raises(error, match=r"mefem pretrain --resume -o '.*/a run'") as raised:
        toy_trainer(SignalAfter(7, number), tmp_path / "a run", crops_folder).fit(np.arange(0), 1e9, resume=False)
    assert raised.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert checkpoint.load(tmp_path / "a run" / "last.ckpt")["step"] == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


class Photograph(fit.Observer):
    """Copies the run folder while training goes on: what a power cut would leave."""

    def __init__(self, folder: Path):
        self.folder, self.pictures = folder, []

    def see(self, trainer, row):
        picture = self.folder / f"{row['kind']}{row['step']}"
        shutil.copytree(trainer.run.path, picture, ignore=shutil.ignore_patterns("*.tmp"))
        self.pictures.append(picture)


def test_what_a_crash_leaves_at_any_time_goes_on_to_the_same_end(crops_folder, tmp_path, monkeypatch):
    """The log is ahead of the checkpoint, which a thread writes; the resumed run drops those lines and repeats them."""
    monkeypatch.setattr(fit, "LOG_EVERY_STEPS", 5)
    torch.manual_seed(0)
    start = Toy().state_dict()
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: time.sleep(0.01) or save(*arguments))

    def run(folder: Path, resume: bool, observers: list[fit.Observer]) -> list[dict]:
        toy = Toy()
        toy.load_state_dict(start)
        toy_trainer(toy, folder, crops_folder).fit(np.arange(48, 80), 0, resume, observers)
        return comparable(folder)

    photograph = Photograph(tmp_path)
    whole = run(tmp_path / "whole", False, [photograph])
    assert len(photograph.pictures) == 14
    ahead = 0
    for picture in photograph.pictures:
        resume = (picture / "last.ckpt").exists()
        if resume:
            ahead += comparable(picture)[-1]["step"] > checkpoint.load(picture / "last.ckpt")["step"]
        assert run(picture, resume, []) == whole or not resume
    assert ahead > 5


def test_checkpoints_are_written_while_training_goes_on_one_at_a_time(tmp_path, monkeypatch):
    written: list[int] = []
    may_write = threading.Event()

    def slow_save(path: Path, state: dict) -> None:
        assert may_write.wait(30)
        written.append(state["value"].item())

    monkeypatch.setattr(checkpoint, "save", slow_save)
    value = torch.tensor(1)
    with checkpoint.Writer(tmp_path / "last.ckpt") as writer:
        writer.save({"value": value})
        value += 1  # training goes on; the copy does not change
        assert written == []
        threading.Timer(0.05, may_write.set).start()
        writer.save({"value": value})  # waits for the first
        assert written[0] == 1
    assert written == [1, 2]


def test_an_error_of_the_writing_thread_rises_at_the_next_save_and_at_the_end(tmp_path):
    for end in ("save", "end"):
        (tmp_path / end).write_text("a file where the folder should be")
        with (
            pytest.raises(OutputError, match="cannot be written"),
            checkpoint.Writer(tmp_path / end / "last.ckpt") as writer,
        ):
            writer.save({})
            if end == "save":
                writer.save({})
                pytest.fail("the first error should have risen")
    with pytest.raises(KeyError), checkpoint.Writer(tmp_path / "end" / "last.ckpt") as writer:
        writer.save({})
        raise KeyError  # what ended the run is the news, not the checkpoint


def test_a_kill_during_the_write_leaves_the_earlier_checkpoint(tmp_path):
    """The process dies in the middle of writing a checkpoint; the next save removes what it left."""
    code = """
import os, sys, torch
from pathlib import Path
from mefem_cli.engine import checkpoint
path = Path(sys.argv[1])
checkpoint.save(path, {"step": 1})
write = torch.save
def die(state, file, *rest):
    write(state, file)
    os.kill(os.getpid(), 9)
torch.save = die
checkpoint.save(path, {"step": 2, "weights": torch.zeros(1000)})
"""
    path = tmp_path / "last.ckpt"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert checkpoint.load(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2
    with checkpoint.Writer(path) as writer:
        writer.save({"step": 3})
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    assert checkpoint.load(path)["step"] == 3


def test_a_longer_run_goes_on_and_says_what_became_of_the_schedules(crops_folder, tmp_path, capsys):
    toy_trainer(Toy(), tmp_path / "run", crops_folder, epochs=2).fit(np.arange(0), 1e9, resume=False)
    longer = toy_trainer(Toy(), tmp_path / "run", crops_folder, epochs=5)
    longer.fit(np.arange(0), 1e9, resume=True)
    assert longer.step == 60
    said = capsys.readouterr().err
    assert "planned anew for 60 steps; at step 24: lr 1e-06 -> " in said
    rate = float(re.search(r"lr 1e-06 -> ([\d.e-]+)", said)[1])
    assert rate == pytest.approx(longer.plan.learning_rate(24), rel=1e-3)
    assert "tau 0.9583 -> 0.4" in said  # the objective's own schedule: 23/24, then 24/60
    assert [row["step"] for row in longer.run.metrics() if row["kind"] == "epoch"] == [0, 12, 24, 36, 48, 60]
    with pytest.raises(OutputError, match="--epochs 1; type a larger number"):
        toy_trainer(Toy(), tmp_path / "run", crops_folder, epochs=1).fit(np.arange(0), 1e9, resume=True)


JOB = {
    "backbone": "vit_tiny_patch16_224",
    "depth": "1",
    "embed_dim": "24",
    "num_heads": "3",
    "image_size": "32",
    "patch_size": "4",
    "predictor_depth": "1",
    "batch_size": "57",
    "device": "cpu",
    "precision": "fp32",
}


def train_job(folders: list[Path], **options: str) -> Job:
    given = Given({**({} if "resume" in options else JOB), **options})
    job = Job.prepare(folders, given, given.build("stores.product", "ProductOptions"))
    job.train()
    return job


def test_encoders_are_kept_on_the_way_and_can_be_used(crops_folder, tmp_path):
    job = train_job([crops_folder], out=str(tmp_path / "run"), epochs="7", keep="3")
    kept = sorted((tmp_path / "run" / "epochs").iterdir())
    assert [folder.name for folder in kept] == ["0002", "0004", "0005"]
    encoder, description, _ = vit.load_encoder(kept[0])
    last, _, _ = vit.load_encoder(tmp_path / "run")
    assert description["embed_dim"] == 24
    assert not torch.equal(encoder.vit.blocks[0].attn.qkv.weight, last.vit.blocks[0].attn.qkv.weight)
    assert torch.equal(last.vit.norm.weight, job.objective.target_encoder.vit.norm.weight)


def test_an_extended_run_that_is_stopped_goes_on_like_any_other(crops_folder, tmp_path, monkeypatch):
    """It is unfinished until it is as long as was asked for, though an encoder of its shorter self was there."""
    run = tmp_path / "run"
    train_job([crops_folder], out=str(run), epochs="2")
    assert Run(run).is_finished
    with pytest.raises(OutputError, match="is finished; extend it with --epochs"):
        train_job([], out=str(run), resume="true")
    after_step = mefem.MeFEm.after_step

    def stop_at_step_10(objective, step, total_steps):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(objective, step, total_steps)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(mefem.MeFEm, "after_step", stop_at_step_10)
        train_job([], out=str(run), resume="true", epochs="4")
    assert not Run(run).is_finished
    job = train_job([], out=str(run), resume="true")
    assert Run(run).is_finished
    assert (job.plan.epochs, list(job.run.metrics())[-1]["step"]) == (4, 16)


def test_an_observer_adds_to_epoch_rows_and_ends_the_run_after_a_checkpoint(crops_folder, tmp_path):
    class Doubter(fit.Observer):
        seen = []

        def measure(self, trainer, row):
            return {"doubt": row["epoch"] + 0.5}

        def see(self, trainer, row):
            self.seen.append((row["kind"], row["step"]))
            if row["kind"] == "epoch" and row["epoch"] == 2:
                raise Diverged("enough")

    trainer = toy_trainer(Toy(), tmp_path / "run", crops_folder)
    with pytest.raises(Diverged, match="enough"):
        trainer.fit(np.arange(0), 1e9, False, [Doubter()])
    assert checkpoint.load(tmp_path / "run" / "last.ckpt")["step"] == 24
    assert [row["doubt"] for row in trainer.run.metrics() if row["kind"] == "epoch"] == [0.5, 1.5, 2.5]
    assert Doubter.seen == [(row["kind"], row["step"]) for row in trainer.run.metrics()]


# Order, seeds, monitors -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("workers", [0, -3])
def test_impossible_numbers_of_threads_are_refused(workers):
    with pytest.raises(UsageError, match=f"--workers {workers}: wanted 1 or more"):
        DeviceOptions(workers=workers)


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
