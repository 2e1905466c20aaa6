"""Several processes train as one: gloo on the CPU, two processes that meet at a file."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import write_crops
from torch import distributed as dist

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.engine import distributed, launch, monitors, seeds
from mefem_cli.engine.device import Device, map_tensors
from mefem_cli.engine.distributed import World
from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.engine.launch import Place, place
from mefem_cli.engine.plan import TrainOptions, make_plan
from mefem_cli.engine.stream import ImageStream
from mefem_cli.errors import Diverged, MefemError, NoInputError, Stopped, UsageError
from mefem_cli.objectives import mefem
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.runs import Run

NUM_FACES, MONITORED, BATCH, EPOCHS = 100, 20, 13, 3  # 13: the parts of two processes are 6 and 7 faces
STEPS = (NUM_FACES - MONITORED) // BATCH * EPOCHS
PATIENCE = 240  # seconds, on a machine that does other things as well
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mefem_cli.engine.fit", "mefem_cli.objectives.mefem", "timm", "test_distributed"])


@pytest.fixture(scope="module")
def crops_folder(tmp_path_factory) -> Path:
    subjects = [f"s{number // 2}" for number in range(NUM_FACES)]
    return write_crops(tmp_path_factory.mktemp("data") / "crops", NUM_FACES, size=32, subject=subjects)


# Running a function in several processes ------------------------------------------------------------------------------


def in_processes(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns in each of `size` joined processes; exceptions are returned too."""
    folder.mkdir(parents=True, exist_ok=True)
    started = [CONTEXT.Process(target=_process, args=(rank, size, folder, function, arguments)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        assert process.exitcode is not None, "a process hangs"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if size > 1:
        distributed.join(rank, size, f"file://{folder / 'meeting'}")
    try:
        result = function(*arguments)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        result = error
    torch.save(result, folder / f"{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


# Training -------------------------------------------------------------------------------------------------------------


class StopAt(Observer):
    """Sends this process a signal when a step's row is written, if it has the rank."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def see(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == self.step and trainer.world.rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train(crops_folder: Path, run: Path, resume: bool = False, stop: StopAt | None = None, **options: Any) -> dict:
    """Train a tiny MeFEm; return its weights and what each step saw."""
    crops = Crops.open(crops_folder)
    rows, monitored = np.arange(NUM_FACES - MONITORED), np.arange(NUM_FACES - MONITORED, NUM_FACES)
    plan = make_plan(TrainOptions(epochs=EPOCHS, **options), len(rows), str(BATCH), distributed.world().size)
    device = Device(torch.device("cpu"), torch.float32, "test")
    seeds.seed_initialisation(0)
    chosen = mefem.Options(predictor_depth=1, ema="0.9:1")
    backbone = vit.Options("vit_tiny_patch16_224", image_size=32, patch_size=4, depth=1, embed_dim=24, num_heads=3)
    objective = mefem.build(chosen, vit.build(backbone), parts.Given({}))
    seen: dict[str, list[torch.Tensor]] = {"pixels": [], "draws": []}

    def note(module: Any, inputs: tuple[torch.Tensor, Any]) -> None:
        if module.training:
            seen["pixels"].append(inputs[0].clone())
            drawn: list[torch.Tensor] = []
            map_tensors(inputs[1], lambda tensor: drawn.append(tensor.reshape(len(tensor), -1).double()))
            seen["draws"].append(torch.cat(drawn, dim=1))

    objective.register_forward_pre_hook(note)
    trainer = Trainer(objective, ImageStream(crops, 32, 2), rows, plan, device, Run.create(run, {}), seed=3)
    trainer.fit(monitored, 1e9, resume, [stop] if stop else [])
    return {"weights": objective.state_dict(), "optimizer": trainer.optimizer.state_dict()["state"], **seen}


@pytest.fixture(scope="module")
def alone(crops_folder, tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process does."""
    folder = tmp_path_factory.mktemp("alone")
    return train(crops_folder, folder / "run"), rows_of(folder / "run")


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(ours: list[dict], theirs: list[dict]) -> None:
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(monitors.MACHINE_COLUMNS) - {"kind"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (one["step"], name)


def assert_same_weights(ours: dict, theirs: dict) -> None:
    for name, value in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_see_and_learn_what_one_does(crops_folder, alone, tmp_path, accumulate):
    """The same faces in the same order, the same masks, losses, monitors, weights and moments at a batch of 13."""
    reference, rows = alone
    batch = {"batch": BATCH, "accumulate": accumulate}
    assert batch["batch"] % 2  # the processes have different numbers of faces
    function = functools.partial(train_cut, accumulate) if accumulate > 1 else train
    results = in_processes(2, function, tmp_path / "job", crops_folder, tmp_path / "run")
    for result in results:
        if isinstance(result, BaseException):
            raise result
    per_step = STEPS * accumulate
    for kind in ("pixels", "draws"):
        assert [len(result[kind]) for result in results] == [per_step, per_step]
        for step in range(STEPS):
            parts_of_step = [
                part for result in results for part in result[kind][step * accumulate : (step + 1) * accumulate]
            ]
            assert torch.equal(torch.cat(parts_of_step), reference[kind][step]), (kind, step)
    assert_same_rows(rows_of(tmp_path / "run"), rows)
    for result in results:
        assert_same_weights(result, reference)
    for name, value in results[0]["weights"].items():  # the processes agree to the last bit
        assert torch.equal(value, results[1]["weights"][name]), name
    lines = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert sum(" epoch " in line for line in lines) == EPOCHS + 1  # one process writes


def train_cut(accumulate: int, *arguments: Any) -> dict:
    """Train with micro-batches that do not divide the batch, as an out-of-memory error would cut it."""
    settle = Trainer._settle_step

    def cut(trainer: Trainer) -> None:
        trainer.accumulate = accumulate
        settle(trainer)

    Trainer._settle_step = cut  # type: ignore[method-assign]
    return train(*arguments)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_in_another_number_of_processes(crops_folder, alone, tmp_path, first, then):
    """Stopped by a signal to the last of `first` processes in the middle of an epoch, gone on with `then`."""
    reference, rows = alone
    run = tmp_path / "run"
    stop = StopAt(10, rank=first - 1)
    stopped = in_processes(first, train, tmp_path / "first", crops_folder, run, False, stop)
    assert [type(error) for error in stopped] == [Stopped] * first
    assert torch.load(run / "last.ckpt", weights_only=True)["step"] == 10
    results = in_processes(then, train, tmp_path / "then", crops_folder, run, True)
    assert len(results[0]["pixels"]) == STEPS - 10
    assert_same_rows(rows_of(run), rows)
    assert_same_weights(results[0], reference)


# What the processes say to each other ---------------------------------------------------------------------------------


def talk() -> dict[str, Any]:
    world = distributed.world()
    mine = {number: number * 10 for number in range(world.rank, 5, world.size)}
    values = torch.arange(3.0) + world.rank
    result = {
        "world": world,
        "sum": world.sum(values),
        "untouched": values,
        "largest": world.largest(-world.rank, 7, world.rank),
        "merge": list(world.merge(mine).items()),
        "from_first": world.from_first(f"rank {world.rank}"),
    }
    for name, error in {"agreed": None, "failed": NoInputError("only here"), "bug": ValueError("odd")}.items():
        try:
            result[name] = world.agree(functools.partial(fail_in_last, error))
        except BaseException as caught:
            result[name] = caught
    return result


def fail_in_last(error: Exception | None) -> str:
    if error is not None and distributed.world().rank == 1:
        raise error
    return "fine"


def test_processes_talk(tmp_path):
    first, last = in_processes(2, talk, tmp_path)
    assert (first["world"], last["world"]) == (World(0, 2), World(1, 2))
    for one in (first, last):
        assert one["sum"].tolist() == [1, 3, 5]
        assert one["largest"] == [0, 7, 1]
        assert one["merge"] == [(number, number * 10) for number in range(5)]
        assert one["from_first"] == "rank 0"
        assert one["agreed"] == "fine"
    assert last["untouched"].tolist() == [1, 2, 3]
    assert isinstance(last["failed"], NoInputError)  # speaks
    assert isinstance(first["failed"], SystemExit) and first["failed"].code == NoInputError.exit_code
    assert isinstance(last["bug"], ValueError)
    assert isinstance(first["bug"], SystemExit) and first["bug"].code == 1


def test_one_process_is_a_world_of_its_own():
    world = distributed.world()
    values = torch.ones(2)
    assert world == World() and world.is_first
    assert world.sum(values) is values
    assert world.largest(2, 3) == [2, 3]
    assert world.merge({3: "c", 1: "a"}) == {1: "a", 3: "c"}
    assert world.agree(lambda: "fine") == "fine"
    with pytest.raises(NoInputError):
        world.agree(functools.partial(_raise, NoInputError("x")))
    module = torch.nn.Linear(2, 2)
    assert world.wrap(module) is module


def _raise(error: Exception) -> None:
    raise error


@given(st.integers(0, 5000), st.integers(1, 64))
def test_the_parts_of_a_batch_are_all_of_it_in_order_and_even(total, size):
    parts_of_it = [World(rank, size).share(total) for rank in range(size)]
    assert [number for part in parts_of_it for number in range(total)[part]] == list(range(total))
    sizes = [part.stop - part.start for part in parts_of_it]
    assert max(sizes) - min(sizes) <= 1


def leave_the_other_alone(folder: Path) -> Any:
    """Rank 1 dies; what a session makes of the collective that then fails in rank 0."""
    if distributed.world().rank == 1:
        torch.save(None, folder / "1.pt")
        os._exit(9)
    try:
        for _ in range(1000):
            distributed.world().largest(1)
            time.sleep(0.01)
    except RuntimeError as error:
        return distributed._is_lost_peer(error), str(error)
    return None


def test_a_lost_process_is_told_from_a_bug(tmp_path):
    told, text = in_processes(2, leave_the_other_alone, tmp_path, tmp_path)[0]
    assert told, text
    assert not distributed._is_lost_peer(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("rank", "launched", "error", "raised", "status"),
    [
        (0, True, Stopped("x"), Stopped, 75),
        (1, True, Stopped("x"), SystemExit, None),
        (0, True, KeyboardInterrupt(), KeyboardInterrupt, 130),
        (1, True, KeyboardInterrupt(), SystemExit, None),
        (1, False, Diverged("x"), SystemExit, None),
        (1, True, NoInputError("x"), NoInputError, None),  # its own to tell
        (1, True, ZeroDivisionError(), ZeroDivisionError, None),
        (0, True, ZeroDivisionError(), ZeroDivisionError, 1),
        (0, True, RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] closed"), SystemExit, None),
        (0, False, RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] closed"), MefemError, None),
        (1, False, RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] closed"), SystemExit, None),
    ],
)
def test_who_tells_of_an_error(rank, launched, error, raised, status, tmp_path, monkeypatch):
    if launched:
        monkeypatch.setenv(launch.STATUS_FILE, str(tmp_path / "status"))
    with pytest.raises(raised) as caught:
        distributed._end(Place(rank, 2), error)
    assert distributed.exit_code(caught.value) == distributed.exit_code(error)
    assert (int((tmp_path / "status").read_text()) if (tmp_path / "status").exists() else None) == status


# Where a process stands -----------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
BATCH_SHELL = {
    "SLURM_JOB_ID": "200505",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NODELIST": "gpu[007-009,012]",
}
SRUN = {
    **BATCH_SHELL,
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[008,012]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


def test_places():
    assert place({}) == Place()
    assert place(TORCHRUN) == Place(5, 8, 1, 4, "node1", 29400)
    assert place(BATCH_SHELL) == Place()  # the other tasks are not there
    assert place(SRUN) == Place(6, 8, 2, 4, "gpu008", 15_000 + 200506 % 15_000)
    assert place({**SRUN, "MASTER_ADDR": "gpu012", "MASTER_PORT": "4242"}) == Place(6, 8, 2, 4, "gpu012", 4242)
    assert place({**SRUN, **TORCHRUN}).size == 8  # torchrun inside srun
    assert place({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == Place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("rack[0-1]node[3,5]", "rack0node3"),
        ("a-b.c,d[1-2]", "a-b.c"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert launch.first_host(nodes) == first


class Failure:
    def __init__(self, exitcode: int):
        self.exitcode = exitcode

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


def test_the_exit_code_of_a_job_without_one():
    assert launch._judge({0: Failure(1), 1: Failure(3)}, 2) == 3  # the first lost its peer, which had no input
    assert launch._judge({0: Failure(-signal.SIGTERM)}, 2) == 1
    with pytest.raises(MefemError, match="process 2 of 4 was killed by SIGKILL.*--resume"):
        launch._judge({0: Failure(1), 2: Failure(-signal.SIGKILL), 3: Failure(-signal.SIGTERM)}, 4)


@pytest.mark.parametrize("gpus", [0, -1])
def test_impossible_numbers_of_processes(gpus):
    with pytest.raises(UsageError, match="--gpus"):
        launch.LaunchOptions(gpus=gpus)
    with pytest.raises(UsageError, match="2 processes x 2 micro-batches"):
        make_plan(TrainOptions(accumulate=2), 100, "2", 2)


def test_the_job_script(tmp_path, monkeypatch):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    arguments = ["pretrain", "my crops", "--gpus", "4", "--lr", "1e-3", "--gpus=2", "--print-sbatch"]
    script = launch.sbatch_script(4, arguments, None)
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0
    assert "#SBATCH --ntasks-per-node=4\n" in script and "#SBATCH --signal=USR1@" in script
    # Run it with stand-ins: the first turn trains, is stopped and asks for another one; the second resumes.
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, does in {
        "srun": 'printf "%s|" "$@" >> calls; echo >> calls; exit 75',
        "scontrol": "echo $@ >> calls",
    }.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (bin_folder / name).chmod(0o755)
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    assert subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment).returncode == 75
    (folder / "runs" / "slurm-77").mkdir(parents=True)
    (folder / "runs" / "slurm-77" / "config.yaml").touch()
    subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment)
    calls = (folder / "calls").read_text().splitlines()
    assert calls[0].endswith("|-m|mefem_cli|pretrain|my crops|--lr|1e-3|-o|runs/slurm-77|")
    assert calls[1] == "requeue 77"
    assert calls[2].endswith("|pretrain|--resume|-o|runs/slurm-77|")
    assert '-o "$out"' not in launch.sbatch_script(1, ["pretrain", "-o", "here"], "here").split("else")[1]


# The whole command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_in_two_processes_is_stopped_killed_and_finished_by_one(crops_folder, tmp_path):
    """SIGUSR1 to the launcher, then SIGKILL to one process, then one process to the end; one line each time."""
    options = "--backbone vit_tiny_patch16_224 --depth 1 --embed-dim 24 --num-heads 3 --image-size 32 --patch-size 4"
    options += " --predictor-depth 1 --precision fp32 --device cpu --epochs 10 --batch-size 4 --checkpoint-every 0"
    job = start(tmp_path, str(crops_folder), *options.split(), "--gpus", "2", "-o", "run")
    wait_for_rows(job, tmp_path / "run", 20)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=PATIENCE)
    assert (job.returncode, out) == (75, ""), err
    assert err.count("mefem pretrain:") == err.count("--resume") == 1

    job = start(tmp_path, "--resume", "-o", "run", "--gpus", "2", "--device", "cpu")
    wait_for_rows(job, tmp_path / "run", 60)
    processes = [pid for pid in map(int, re.findall(r"\d+", children(job.pid))) if rank_of(pid) == "1"]
    os.kill(processes[0], signal.SIGKILL)
    out, err = job.communicate(timeout=PATIENCE)
    assert (job.returncode, out) == (1, ""), err
    assert err.count("mefem pretrain:") == 1
    assert "process 1 of 2 was killed by SIGKILL" in err

    job = start(tmp_path, "--resume", "-o", "run", "--device", "cpu")
    out, err = job.communicate(timeout=PATIENCE)
    assert (job.returncode, out) == (0, f"{tmp_path / 'run'}\n"), err
    whole = start(tmp_path, str(crops_folder), *options.split(), "-o", "whole")
    whole.communicate(timeout=PATIENCE)
    ours, theirs = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    assert [row["loss"] for row in ours[1:]] == pytest.approx([row["loss"] for row in theirs[1:]], rel=1e-3)


def start(cwd: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mefem_cli", "pretrain", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_rows(job: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and job.poll() is None:
        if (run / "last.ckpt").exists() and rows_of(run)[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"never reached step {step}: {job.communicate()[1] if job.poll() is not None else ''}")


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def rank_of(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in environment).get("RANK", "")
