"""Running grids: with a stand-in for the steps where timing and failures matter, and once for real."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_crops

from mefem_cli.ablation import plan as plans
from mefem_cli.ablation import runner
from mefem_cli.ablation.job import AblateOptions, Job
from mefem_cli.errors import NoInputError, OutputError, Stopped, UsageError
from mefem_cli.executors import local, processes
from mefem_cli.stores.features import FeatureWriter
from mefem_cli.stores.product import ProductOptions

FACES = 60
TINY = {
    "backbone": "vit_tiny_patch16_224",
    "depth": 1,
    "embed_dim": 48,
    "num_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "predictor_depth": 1,
    "predictor_width": 24,
    "batch_size": 16,
    "monitor": 0,
    "learning_rates": "1e-3",
    "probe.epochs": 1,
    "bootstraps": 100,
}
TINY_FLAGS = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]

# Does what the steps do to files, at once, and writes down what it was asked. A file named like an option makes steps
# with that option fail; `slow` makes pretraining wait for SIGTERM.
STAND_IN = """
import json, os, shutil, signal, sys, time
from pathlib import Path

step, words, here = sys.argv[1], sys.argv[2:], Path(__file__).parent
out = Path(words[words.index("-o") + 1])
began = time.time()
seconds = float((here / "seconds").read_text()) if (here / "seconds").exists() else 0
def log(code):
    shown = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MEFEM_PROBE_HEAD")}
    with (here / "calls").open("a") as file:
        file.write(json.dumps([step, words, began, time.time(), code, shown]) + "\\n")
    sys.exit(code)
for word in words:
    if (here / f"{step}{word}").exists():
        print(f"some note\\nmefem {step}: {word} does not work", file=sys.stderr)
        log(int((here / f"{step}{word}").read_text() or 2))
if step == "pretrain":
    def stop(*_):
        while (here / "hold").exists():
            time.sleep(0.02)
        log(75)
    signal.signal(signal.SIGTERM, stop)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").touch()
    if (here / "slow").exists():
        time.sleep(30)
    time.sleep(seconds)
    (out / "model.json").touch()
if step == "embed":
    shutil.copy(here / "store.h5", out)
if step == "probe":
    out.mkdir()
    value = int(words[words.index("--seed") + 1]) / 10
    metrics = {"r2": {"value": value, "low": value - 1, "high": value + 1}}
    score = {"row": "score", "task": words[-1], "head": "linear", "features": "cls", "metrics": metrics}
    (out / "scores.json").write_text(json.dumps([score, {"row": "subgroup"}]))
log(0)
"""


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    labels = {
        "bmi": [float(one) for one in rng.normal(25, 4, FACES)],
        "subject": [f"p{row // 2}" for row in range(FACES)],
    }
    return write_crops(tmp_path_factory.mktemp("faces") / "crops", FACES, **labels, constant=[1.0] * FACES)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "mefem.py").write_text(STAND_IN)
    with FeatureWriter(folder / "store.h5", {}, 2, has_mean=False) as writer:
        writer.append(["a"], cls=np.ones((1, 2)))
        writer.finish({}, {})
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "-S", "-E", str(folder / "mefem.py")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def calls(folder: Path) -> list[list]:
    path = folder / "calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def steps_called(folder: Path) -> list[str]:
    return [step for step, *_ in calls(folder)]


def prepare(crops: Path, out: Path, *vary: str, named=(), seed=0, overwrite=False, machine=None, **flags) -> Job:
    options = AblateOptions(vary=list(vary), crops=[str(crops)], **flags)
    return Job.prepare(
        list(named), options, machine or {}, ProductOptions(out=str(out), seed=seed, overwrite=overwrite)
    )


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_cells_of_one_pretraining_share_it(crops, stand_in, tmp_path):
    job = prepare(crops, tmp_path / "out", "folds=3,4,5", "mask=stripes,quadrants", task=["bmi"])
    assert job.run() == {"cells": 6, "pretrainings": 2, "failed": 0, "reused": 0}
    called = steps_called(stand_in)
    assert [called.count(step) for step in ("pretrain", "embed", "probe")] == [2, 2, 6]
    before = (tmp_path / "out/results.csv").read_bytes()
    assert prepare(crops, tmp_path / "out", "folds=3,4,5", "mask=stripes,quadrants").run()["reused"] == 6
    assert steps_called(stand_in) == []
    assert (tmp_path / "out/results.csv").read_bytes() == before
    prepare(crops, tmp_path / "out", "folds=3,6", "mask=stripes,multiblock").run()  # another grid: what is new
    called = steps_called(stand_in)
    assert [called.count(step) for step in ("pretrain", "embed", "probe")] == [1, 1, 3]
    assert {row["cell"] for row in read_csv(tmp_path / "out")} == {
        f"folds={folds} mask={mask}" for folds in (3, 6) for mask in ("stripes", "multiblock")
    }


def test_table4_runs_nine_pretrainings_and_seventeen_probes(crops, stand_in, tmp_path):
    job = prepare(crops, tmp_path / "out", named=["table4"])
    assert job.run()["pretrainings"] == 9
    called = calls(stand_in)
    assert [sum(step == one for step, *_ in called) for one in ("pretrain", "embed", "probe")] == [9, 9, 17]
    words = next(words for step, words, *_ in called if step == "pretrain")
    assert {"--mask=multiblock", "--cls-prob=none", "--epochs=33"} <= set(words)
    assert all("--patches" in words for step, words, *_ in called if step == "embed")


def test_seeds_are_counted_from_the_given_one_and_averaged(crops, stand_in, tmp_path):
    prepare(crops, tmp_path / "out", "width=2,3", seeds=3, seed=4).run()
    assert [(row["cell"], row["seed"], row["value"]) for row in read_csv(tmp_path / "out")] == [
        (f"width={width}", str(seed), str(seed / 10)) for width in (2, 3) for seed in (4, 5, 6)
    ]
    text = (tmp_path / "out/results.md").read_text()
    assert "| 2     | linear | cls      | 0.500 [" in text  # the mean of .4, .5 and .6
    assert "seeds: 4, 5, 6" in text


@pytest.mark.parametrize(
    ("broken", "cells"),
    [("pretrain--width=2", {"width=2"}), ("embed--dtype=float32", {"width=2 dtype=float32", "width=3 dtype=float32"})],
)
def test_a_failed_cell_is_recorded_and_tried_again(crops, stand_in, tmp_path, broken, cells):
    vary = ["width=2,3", *(["dtype=float16,float32"] if "dtype" in broken else [])]
    (stand_in / broken).touch()
    counts = prepare(crops, tmp_path / "out", *vary, seeds=2).run()
    assert counts["failed"] == 2 * len(cells)
    rows = read_csv(tmp_path / "out")
    step, _, word = broken.partition("--")
    failed = [row for row in rows if row["status"] != "ok"]
    assert {row["cell"] for row in failed} == cells and len(failed) == 2 * len(cells)
    assert {row["status"] for row in failed} == {f"failed: mefem {step}: --{word} does not work"}
    assert {row["value"] for row in failed} == {""}
    assert "failed" in (tmp_path / "out/results.md").read_text()
    calls(stand_in)
    (stand_in / broken).unlink()
    assert prepare(crops, tmp_path / "out", *vary, seeds=2).run()["failed"] == 0
    assert steps_called(stand_in).count("pretrain") == (2 if step == "pretrain" else 0)
    assert {row["status"] for row in read_csv(tmp_path / "out")} == {"ok"}


def test_one_failing_task_leaves_the_others(crops, stand_in, tmp_path):
    (stand_in / "probesubject").touch()
    job = prepare(crops, tmp_path / "out", "width=2", task=["bmi"])
    job.strands = [replace(one, tasks=("subject", "bmi")) for one in job.strands]
    job.grid = type(job.grid)(**{**vars(job.grid), "tasks": ("subject", "bmi")})
    assert job.run()["failed"] == 1
    assert [(row["task"], row["status"][:6]) for row in read_csv(tmp_path / "out")] == [
        ("subject", "failed"),
        ("bmi", "ok"),
    ]


def test_no_result_at_all_is_an_error(crops, stand_in, tmp_path):
    (stand_in / "pretrain--width=2").touch()
    with pytest.raises(NoInputError, match="--width=2 does not work"):
        prepare(crops, tmp_path / "out", "width=2").run()
    assert read_csv(tmp_path / "out")[0]["status"].startswith("failed: ")


def test_jobs_run_side_by_side_with_a_share_of_the_cores_and_a_gpu_each(crops, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("MEFEM_PROBE_HEAD", "knn")  # would change scores behind the key's back
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "cores", lambda: 8)
    (stand_in / "seconds").write_text("0.4")
    job = prepare(crops, tmp_path / "out", "width=2,3,4,5")
    assert (job.jobs, job.gpus) == (2, ["3", "5"])
    job.run()
    called = calls(stand_in)
    spans = [(begin, end) for step, _, begin, end, *_ in called if step == "pretrain"]
    overlaps = sum(first[0] < second[1] and second[0] < first[1] for first in spans for second in spans) - len(spans)
    assert 2 <= overlaps <= 6  # pairs counted twice: two at a time, never more
    environments = [shown for *_, shown in called]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in environments} == {"3", "5"}
    assert {(one["OMP_NUM_THREADS"], one["MEFEM_PROBE_HEAD"]) for one in environments} == {("4", None)}
    assert prepare(crops, tmp_path / "out", "width=2", machine={"device": "cpu"}).gpus == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_steps_and_a_rerun_resumes(crops, stand_in, tmp_path, number):
    (stand_in / "slow").touch()
    job = prepare(crops, tmp_path / "out", "width=2,3,4", jobs=2)
    script = "import os, signal, sys, time; time.sleep(1.5); os.kill(int(sys.argv[1]), int(sys.argv[2]))"
    killer = subprocess.Popen([sys.executable, "-S", "-c", script, str(os.getpid()), str(int(number))])
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped):
        job.run()
    killer.wait()
    assert [(step, code) for step, _, _, _, code, _ in calls(stand_in)] == [("pretrain", 75)] * 2
    assert not (tmp_path / "out/results.csv").exists()  # a stop is no failure
    (stand_in / "slow").unlink()
    assert prepare(crops, tmp_path / "out", "width=2,3,4", jobs=2).run()["failed"] == 0
    resumed = ["--resume" in words for step, words, *_ in calls(stand_in) if step == "pretrain"]
    assert sorted(resumed) == [False, True, True]


def test_what_cannot_be_resumed_is_trained_anew(crops, stand_in, tmp_path, capsys):
    job = prepare(crops, tmp_path / "out", "width=2")
    job.strands[0].run.mkdir(parents=True)
    (job.strands[0].run / "config.yaml").touch()
    (stand_in / "pretrain--resume").write_text("4")
    job.run()
    called = [words[-1] for step, words, *_ in calls(stand_in) if step == "pretrain"]
    assert called == ["--resume", "--overwrite"]
    assert "training anew" in capsys.readouterr().err


def test_a_damaged_store_is_made_again(crops, stand_in, tmp_path):
    job = prepare(crops, tmp_path / "out", "width=2")
    job.run()
    (strand,) = job.strands
    store = strand.store(job.cells[0])
    store.write_bytes(store.read_bytes()[:1000])
    leftover = strand.folder / ".scores.1.tmp"
    leftover.mkdir()
    prepare(crops, tmp_path / "out", "width=2", task=["bmi"]).run()  # scores are there: nobody looks
    assert store.stat().st_size == 1000
    calls(stand_in)
    prepare(crops, tmp_path / "out", "width=2", set=["folds=3"]).run()
    assert steps_called(stand_in) == ["embed", "probe"]
    assert not leftover.exists()


def test_overwrite_starts_anew_but_removes_nothing_else(crops, stand_in, tmp_path):
    out = tmp_path / "out"
    prepare(crops, out, "width=2").run()
    calls(stand_in)
    prepare(crops, out, "width=2", overwrite=True).run()
    assert steps_called(stand_in) == ["pretrain", "embed", "probe"]
    with pytest.raises(OutputError, match="holds something else"):
        prepare(crops, crops, "width=2", overwrite=True).run()
    assert (crops / "manifest.parquet").exists()


def start_driver(stand_in: Path, crops: Path, out: Path) -> subprocess.Popen:
    code = (
        "import sys; from mefem_cli.executors import processes; from mefem_cli.ablation.job import *\n"
        "processes.PROGRAM = (sys.executable, '-S', '-E', sys.argv[1])\n"
        "options = AblateOptions(vary=['width=2'], crops=[sys.argv[2]])\n"
        "Job.prepare([], options, {}, ProductOptions(out=sys.argv[3])).run()"
    )
    command = [sys.executable, "-c", code, str(stand_in / "mefem.py"), str(crops), str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_folder_that_nobody_named_keeps_its_tables(crops, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(out: str | None = None, seed: int = 0, **flags) -> Path:
        options = AblateOptions(vary=["width=2,3"], **{"crops": [str(crops)], **flags})
        job = Job.prepare([], options, {}, ProductOptions(out=out, seed=seed))
        job.run()
        return job.out

    out = run()
    before = (out / "results.csv").read_bytes()
    for other in ({"set": ["mask=stripes", "folds=4"]}, {"seed": 7}, {"head": "knn"}):
        with pytest.raises(OutputError, match="width: holds the tables of another grid"):
            run(**other)
    assert (out / "results.csv").read_bytes() == before
    with pytest.raises(OutputError, match="width: holds the tables of other crops"):
        run(crops=[str(write_crops(tmp_path / "others", 20, bmi=[20.0 + one for one in range(20)]))])
    assert run(seeds=2, reference=["width=3"]) == out  # more of the same
    with pytest.raises(OutputError, match="type -o ablations/width to replace them"):
        run()  # one seed of two
    assert run(out=str(out)) == out
    assert (out / "results.csv").read_bytes() == before


def test_two_drivers_take_turns(crops, stand_in, tmp_path):
    (stand_in / "seconds").write_text("1")
    drivers = [start_driver(stand_in, crops, tmp_path / "out") for _ in range(2)]
    notes = [driver.communicate(timeout=300)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert sum("waiting for it" in note for note in notes) == 1
    assert sorted(steps_called(stand_in)) == ["embed", "pretrain", "probe"]


def test_the_steps_of_a_killed_driver_are_stopped_and_waited_for(crops, stand_in, tmp_path, monkeypatch):
    for name in ("slow", "hold"):
        (stand_in / name).touch()
    driver = start_driver(stand_in, crops, tmp_path / "out")
    while not list(tmp_path.glob("out/cells/*/run/config.yaml")) and driver.poll() is None:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    driver.stderr.close()  # the step still has the other end
    (stand_in / "slow").unlink()
    told = []

    def note(message):
        told.append(message)
        (stand_in / "hold").unlink(missing_ok=True)

    monkeypatch.setattr(runner.console, "note", note)
    prepare(crops, tmp_path / "out", "width=2").run()
    assert "waiting for it" in told[0]
    called = calls(stand_in)
    assert [(step, code) for step, _, _, _, code, _ in called] == [
        ("pretrain", 75),
        ("pretrain", 0),
        ("embed", 0),
        ("probe", 0),
    ]
    (_, first, _, ended, *_), (_, second, begun, *_), *_ = called
    assert ("--resume" in first, "--resume" in second) == (False, True)
    assert begun > ended  # never two in one run


def test_a_file_whose_reference_fits_no_row_fails_before(crops, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text("rows: [{width: 2}, {width: 3}]\nreference: {width: 7}")
    with pytest.raises(UsageError, match='--reference "width=7" fits no cell of this grid; there is width=2; width=3'):
        prepare(crops, tmp_path / "out", named=[str(path)])
    prepare(crops, tmp_path / "out", named=[str(path)], set=["width=3"])  # changed on purpose
    assert "width=7, fits no cell now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"task": ["age"]}, NoInputError, "there is no label age; there is bmi, constant, subject"),
        ({"task": ["constant"]}, NoInputError, "the label is 1 for all 60 faces"),
        ({"set": ["folds=31"]}, UsageError, "fewer than the 31 folds"),
        ({"set": ["folds=31"]}, UsageError, "type --set folds=30"),
        ({"set": ["folds=1"]}, UsageError, "--folds 1"),
        ({"set": ["weight_decay=x"]}, UsageError, "--weight-decay x"),
        ({"machine": {"workers": "0"}}, UsageError, "--workers 0: wanted 1 or more"),
        ({"set": ["workers=0"]}, UsageError, "--workers 0: wanted 1 or more"),
        ({"set": ["cls_prob=none"], "features": "cls"}, UsageError, "cls_prob=none have no CLS token"),
    ],
)
def test_what_would_fail_after_training_fails_before(crops, tmp_path, flags, error, message):
    with pytest.raises(error) as raised:
        prepare(crops, tmp_path / "out", "width=2", **flags)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_plan_lists_cells_and_counts_steps(crops, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "_try", lambda strand: plans.Cost(1.0, 0.0))
    job = prepare(crops, tmp_path / "out", "width=2,3", "folds=3,4", epochs=4, seeds=2, set=["batch_size=10"])
    plan = plans.describe(job)
    assert (len(plan["cells"]), plan["pretrainings"], plan["to_train"]) == (4, 4, 4)
    assert plan["steps"] == 4 * 4 * 5  # 57 of 60 faces train, in batches of 10
    assert not (tmp_path / "out").exists()
    job.run()
    assert (plans.describe(job)["to_train"], plans.describe(job)["steps"]) == (0, 0)
    assert {state for cell in plans.describe(job)["cells"] for state in cell["states"]} == {"finished"}


def test_the_plan_says_what_cannot_run(crops, tmp_path):
    job = prepare(crops, tmp_path / "out", "width=99")
    plan = plans.describe(job)
    assert [cell["states"] for cell in plan["cells"]] == [["cannot run"]]
    assert "time: it cannot be told" in plans.summary(plan)


# With the real steps --------------------------------------------------------------------------------------------


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mefem_cli", "ablate", *words, *TINY_FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def mefem(folder: Path, *words: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    driver = start(folder, *words)
    try:
        out, err = driver.communicate(timeout=900)
    finally:
        driver.terminate()  # where it is still there, it stops its steps
    return driver.returncode, out, err


@pytest.mark.slow
def test_a_grid_for_real_and_after_a_stop(crops):
    folder = crops.parent
    code, out, err = mefem(folder, "--vary", "mask=stripes,quadrants", "--set", "width=12", "--epochs", "12", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["out"], told["cells"], told["failed"], told["crops"]) == (str(folder / "ablations/mask"), 2, 1, FACES)
    rows = read_csv(folder / "ablations/mask")
    assert ",".join(rows[0]) == "cell,seed,task,head,features,metric,value,low,high,status"
    assert (rows[0]["cell"], rows[0]["value"]) == ("mask=stripes", "")
    assert "--width 12: a grid of 8 x 8 patches" in rows[0]["status"]
    assert [(row["cell"], row["head"], row["metric"]) for row in rows[1:]] == [
        ("mask=quadrants", head, metric) for head in ("linear", "mlp") for metric in ("r2", "mae", "rmse", "pearson_r")
    ]
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows[1:])
    model = next((folder / "ablations/mask/cells").glob("*/run/model.json"))

    words = ["--vary", "mask=quadrants", "--epochs", "12", "--set", "checkpoint_every=0", "-o", "stopped"]
    driver = start(folder, *words)
    while not list(folder.glob("stopped/cells/*/run/last.ckpt")) and driver.poll() is None:
        time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=300)
    assert (driver.returncode, out) == (130, ""), err
    assert not list(folder.glob("stopped/cells/*/run/model.json"))
    code, out, err = mefem(folder, *words)
    assert (code, out) == (0, f"{folder / 'stopped'}\n"), err
    assert read_csv(folder / "stopped") == rows[1:]  # as if it had not been stopped
    (again,) = folder.glob("stopped/cells/*/run")
    assert again.parent.name == model.parent.parent.name  # another checkpoint interval is the same pretraining
    assert "stopped by signal" in (again / "run.log").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--vary", "widht=2"], 2, 'did you mean "width"?'),
        (["table4", "--task", "age"], 3, "there is bmi, constant, subject"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(crops, words, code, message):
    returned, out, err = mefem(crops.parent, *words)
    assert (returned, out, len(err.splitlines())) == (code, "", 1), err
    assert message in err
    assert not (crops.parent / "ablations/table4").exists()


def test_dry_run_lists_the_cells_as_json(crops):
    code, out, err = mefem(crops.parent, "table4", "-n", "--json", "-q")
    assert (code, len(json.loads(out)["cells"]), err) == (0, 17, "")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mefem', 'ablate', '--help']\n"
        "from mefem_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'h5py', 'sklearn', 'scipy', 'pyarrow', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--vary", "--set", "--task", "--seeds", "--epochs", "--jobs", "--crops", "--head", "--features"):
        assert option in done.stdout
