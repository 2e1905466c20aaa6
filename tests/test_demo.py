"""The demo for real, on few people: stopped once, gone on with, and looked at from all sides."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mefem_cli import main
from mefem_cli.demo import PRETRAINED, RECIPE, STEP0, Demo, DemoOptions, run_command
from mefem_cli.errors import Interrupted, OutputError, Stopped, UsageError
from mefem_cli.reports import html
from mefem_cli.reports.demo_results import NAMES, Results
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore
from mefem_cli.stores.runs import Run

PEOPLE, EPOCHS = 40, 3
WORDS = ("demo", "--people", str(PEOPLE), "--photos-per-person", "1", "--epochs", str(EPOCHS))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mefem_cli", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def stopped(folder):
    """A demo that got a Ctrl-C as soon as it trained."""
    process = start(folder, *WORDS)
    while process.poll() is None and not (folder / "mefem-demo/runs/pretrained/config.yaml").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    return finish(process)


@pytest.fixture(scope="module")
def shown(folder, stopped):
    """The same command again, to its end."""
    done = finish(start(folder, *WORDS))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def demo(shown, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return Demo(DemoOptions(people=PEOPLE, photos_per_person=1, epochs=EPOCHS))


def test_ctrl_c_is_130_and_the_same_command_goes_on(stopped, shown):
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    assert stopped.stderr.endswith("mefem demo: stopped by Ctrl-C; run the same command again to go on\n")
    assert "complete already" in shown.stderr  # the photos at least
    assert "--resume" in shown.stderr


@pytest.mark.parametrize(("error", "raised"), [(Interrupted, KeyboardInterrupt), (Stopped, Stopped)])
def test_a_pretraining_that_was_stopped_does_not_advise_to_go_on_by_itself(monkeypatch, error, raised):
    def stop(words):
        raise error("stopped with a checkpoint saved; go on with mefem pretrain --resume -o runs/one")

    monkeypatch.setattr(main, "dispatch", stop)
    with pytest.raises(raised) as found:
        run_command(("pretrain",))
    assert "pretrain" not in str(found.value)


def test_stdout_is_the_table_the_outcome_its_meaning_and_the_report(shown, folder):
    lines = shown.stdout.splitlines()
    names = ("pretrained", "step 0", "raw 16 x 16 pixels", "mean baseline")
    rows = [next(line for line in lines if line.strip().startswith(name)) for name in names]
    interval = r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]"
    assert [len(re.findall(interval, row)) for row in rows] == [4, 4, 4, 0]
    outcome = next(line for line in lines if line.startswith("BMI r2, pretrained minus step 0: "))
    assert re.fullmatch(r".*: [+-]\d\.\d{3} \[.*\]: (better|unclear|worse)", outcome)
    assert "not patients" in shown.stdout
    assert "must not be used to judge anyone" in shown.stdout
    assert lines[-1] == str(folder / "mefem-demo" / "report.html")
    assert Path(lines[-1]).is_file()


def test_each_command_line_is_shown_and_is_what_ran(shown, demo):
    lines = [line.removeprefix("$ ") for line in shown.stderr.splitlines() if line.startswith("$ ")]
    for line, step in zip(lines, demo.steps, strict=True):
        assert line in (step.line, f"{step.line} --resume")
        _, command, *words = shlex.split(line)
        main.build_command(command).make_context(command, words)  # raises for what the command does not know
    for name, epochs in ((PRETRAINED, EPOCHS), (STEP0, 0)):
        record = json.loads((demo.run_path(name) / "model.json").read_text())["provenance"]
        assert shlex.join(record["command"]) in lines
        config = Run(demo.run_path(name)).config()
        assert config["epochs"] == epochs
        wanted = {**demo.options.recipe, "epochs": str(epochs)}
        assert {option: _as_number(config[option]) for option in wanted} == {
            option: _as_number(value) for option, value in wanted.items()
        }
    seconds = re.findall(r"^ +\d+\.\d s  (.+)$", shown.stderr, re.MULTILINE)
    assert seconds == ["render", "crop", "pretrain pretrained", "pretrain step0", "embed", "pixels", "probe", "all"]


def _as_number(value):
    try:
        return float(value)
    except ValueError:
        return value


def test_step0_is_the_encoder_from_which_pretraining_began(demo):
    with FeatureStore.open(demo.store_path(PRETRAINED)) as trained, FeatureStore.open(demo.store_path(STEP0)) as before:
        assert list(trained.ids) == list(before.ids)
        assert trained.model_sha256 != before.model_sha256
    first, step0 = (Run(demo.run_path(name)).config() for name in (PRETRAINED, STEP0))
    assert {name for name in first if first[name] != step0[name]} <= {"epochs", "ema"}


def test_pixels_are_block_means_of_the_crops(demo):
    crops = Crops.open(demo.crops)
    with FeatureStore.open(demo.store_path("pixels")) as store:
        assert not store.has("cls")
        found = store.read("mean")[3].reshape(16, 16, 3)
        assert store.labels["bmi"][3] == crops.labels["bmi"][3]
    pixels = np.asarray(Image.open(io.BytesIO(crops.read_bytes(3))), dtype=np.float64) / 255
    expected = pixels.reshape(16, 14, 16, 14, 3).mean(axis=(1, 3))
    assert np.abs(found - expected).max() < 0.003  # whole grey levels, then float16


def test_rerun_reuses_what_is_complete(shown, demo, folder):
    made = [demo.run_path(PRETRAINED) / "model.safetensors", demo.store_path(STEP0), demo.scores / "sex"]
    before = [path.stat().st_mtime_ns for path in made]
    again = finish(start(folder, *WORDS, "--json"))
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in made] == before
    assert again.stderr.count("complete already") == len(demo.steps) - 1 + 2  # all but crop; photos and pixels
    answer = json.loads(again.stdout)
    assert answer["out"] == str(folder / "mefem-demo")
    assert answer["crops"] + sum(answer["rejects"].values()) == PEOPLE
    values = {(row["task"], Path(row["store"]).stem): row["metrics"] for row in answer["scores"]}
    assert len(values) == 4 * 3
    gain = values["bmi", PRETRAINED]["r2"]["value"] - values["bmi", STEP0]["r2"]["value"]
    assert answer["difference"]["metrics"]["r2"]["value"] == pytest.approx(gain, abs=1e-12)


def test_a_shown_line_works_in_a_shell(demo, folder):
    done = subprocess.run(
        f"{sys.executable} -m mefem_cli" + demo.steps[0].line[5:], shell=True, cwd=folder, capture_output=True
    )
    assert (done.returncode, done.stdout.decode().strip()) == (0, str(folder / "mefem-demo" / "crops")), done.stderr


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources, self.headings, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_report_is_whole_and_needs_nothing_beside_it(demo):
    text = (demo.out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "url(" not in text
    wanted = ("photos", "crops", "rejects", "learns", "training", "Predicted", "everyone", "commands")
    assert [sum(word in heading for heading in page.headings) for word in wanted] == [1] * len(wanted)
    assert len([source for source in page.sources if source.startswith("data:image/png")]) >= 2 * 4  # light and dark
    assert demo.steps[1].line in text
    assert Results.read(demo.scores).outcome() in text.replace("&#x27;", "'")


def test_helpers_of_the_page_escape():
    for made in (
        html.callout("<b>", "<i>"),
        html.points(["<b>"]),
        html.code(["<b>"]),
        html.themed_figure(b"", b"", '<"b>'),
    ):
        assert "<b>" not in made and '<"b>' not in made and "<i>" not in made
        assert "&lt;" in made


def test_subgroups_are_read_beside_the_average(demo):
    results = Results.read(demo.scores)
    assert list(NAMES)[:3] == results.stores
    shown = results.select("subgroup", "bmi")
    assert {row["by"] for row in shown} <= {"sex", "skin_tone"}
    assert all(row["n"] < results.score("bmi", PRETRAINED)["n"] for row in shown)


def test_another_demo_in_the_folder_is_refused_by_name(demo):
    other = Demo(DemoOptions(people=PEOPLE + 1, photos_per_person=1, epochs=EPOCHS, seed=7))
    with pytest.raises(OutputError, match="people was 40, is 41; seed was 0, is 7"):
        other.check_folder()
    assert OutputError.exit_code == 4
    Demo(DemoOptions(people=PEOPLE + 1, overwrite=True)).check_folder()
    demo.check_folder()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_demo_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="no demo folder"):
        Demo(DemoOptions(out=str(tmp_path), overwrite=overwrite)).run()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_dry_run_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = json.loads(run_command((*WORDS, "--dry-run", "--json")))
    assert plan["photos"] == PEOPLE
    assert plan["commands"][0] == "mefem crop mefem-demo/photos --labels mefem-demo/labels.csv -o mefem-demo/crops"
    assert plan["estimated_seconds"] > 0
    text = run_command((*WORDS, "-n"))
    assert all(f"$ {line}\n" in text for line in plan["commands"])
    assert list(tmp_path.iterdir()) == []


def test_what_a_stopped_run_needs_to_go_on(tmp_path, demo):
    step = demo.encoder_steps[1]
    assert step.out == demo.run_path(PRETRAINED)
    assert demo._flags_to_go_on(step) is None
    fresh = Demo(DemoOptions(out=str(tmp_path)))
    step = fresh.encoder_steps[1]
    assert fresh._flags_to_go_on(step) == ()
    step.out.mkdir(parents=True)
    assert fresh._flags_to_go_on(step) == ("--overwrite",)
    (step.out / "config.yaml").write_text(yaml.safe_dump({"inputs": {"crops": "0" * 64}}))
    assert fresh._flags_to_go_on(step) == ("--resume",)


def test_an_encoder_of_other_crops_is_not_reused(tmp_path, demo, monkeypatch):
    step = demo.encoder_steps[1]
    monkeypatch.setattr(Run, "config", lambda run: {"inputs": {"crops": "0" * 64}})
    with pytest.raises(OutputError, match="changed since"):
        demo._flags_to_go_on(step)


def test_the_control_is_the_recipe_with_a_frozen_target():
    plain, control = Demo(DemoOptions()), Demo(DemoOptions(control=True))
    added = [step.line for step in control.steps if step.line not in [one.line for one in plain.steps]]
    assert [line.split()[1] for line in added] == ["pretrain", "embed", "probe", "probe"]
    assert "--ema 1:1" in added[0]
    assert "--encoder source" in added[1]  # the target encoder of such a run is step 0 itself
    assert "mefem-demo/control.h5" in added[2]


def test_options_are_checked_and_the_batch_fits_few_photos():
    for wrong in ({"people": 39}, {"photos_per_person": 0}, {"epochs": 0}, {"workers": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match="wanted"):
            DemoOptions(**wrong)
    assert DemoOptions(people=40, photos_per_person=1).recipe["batch_size"] == "20"
    assert DemoOptions(people=4000).recipe == RECIPE
