"""report.html of a run: its verdict and curves, names that mean harm, runs that end early, corrupt crops."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from synthetic import write_crops

from mefem_cli import console
from mefem_cli.engine import alarm
from mefem_cli.errors import Diverged, OutputError
from mefem_cli.parts import Given
from mefem_cli.pretraining import Job
from mefem_cli.reports import curves, health
from mefem_cli.reports.curves import Curve, Panel
from mefem_cli.reports.panels import panels, start_middle_end
from mefem_cli.stores.product import ProductOptions
from mefem_cli.stores.runs import Run

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>$\\frac{"
VOID = {"meta", "img", "br", "link", "input", "source"}


def epoch_row(epoch: int, ratio: float | None = 0.5, spread: float | None = 0.3, **more) -> dict:
    return {
        "kind": "epoch",
        "epoch": epoch,
        "step": 50 * epoch,
        "loss": 0.1,
        "monitor_loss": None if ratio is None else 0.1,
        "feature_std": spread,
        "rankme": 6.0,
        "rankme_centred": 9.0,
        "rankme_cls": 5.0,
        "spectrum": [0.6, 0.3, 0.1],
        "loss_over_position": ratio,
        "loss_rings": [0.1, 0.2, None],
        "rings_over_position": [0.4, 0.6, None],
        "monitor_faces": 99,
        "images_per_second": 120.5,
        "data_wait": 0.01,
        **more,
    }


def step_rows(count: int) -> list[dict]:
    return [
        {"kind": "step", "step": step, "epoch": 0, "loss": 0.2, "grad_norm": 0.1, "lr": 1e-3, "ema": 0.99}
        for step in range(10, 10 * count + 1, 10)
    ]


def make_run(path: Path, rows: list[dict], **config) -> Run:
    run = Run.create(path, {"crops": ["crops"], "lr": 1e-3, "ema": "0:0", "predictor_depth": 0, **config})
    for row in rows:
        run.append_metrics(row)
    return run


def write(run: Run, state: str = "it is finished", corrupt=(), total_epochs=10, **more) -> str:
    about = health.About([("crops", "12 in crops")], 0, total_epochs, lambda: list(corrupt))
    return health.write(run, about, state, **more).read_text()


@pytest.fixture
def without_curves(monkeypatch):
    """Drawing takes most of a page's second; tests of its words do without."""
    monkeypatch.setattr(health.curves, "draw", lambda panel: "<svg></svg>")


class Page(HTMLParser):
    """What a browser would make of a page: its elements, attributes and texts; tags must close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.usefixtures("without_curves")
@pytest.mark.parametrize(
    ("rows", "headline", "words"),
    [
        ([epoch_row(0, 2.0), epoch_row(1, 0.6), epoch_row(2)], "Healthy", "differ from face to face"),
        ([epoch_row(0, 2.0), epoch_row(1, 1.4, 0.02), epoch_row(2, 1.1, 0.02)], "Collapsed", "Try --predictor-depth 6"),
        ([epoch_row(one, 1.5) for one in range(9)], "Not learning", "lets the target follow the source"),
        ([epoch_row(0, 2.0), epoch_row(1, 1.5)], "Too early to tell", "first few hundred steps"),
        ([epoch_row(0), epoch_row(1, None, None, loss=None)], "Diverged", "Try --lr 0.0003"),
        ([{"kind": "epoch", "epoch": 0, "step": 0}], "Not measured", "No faces were set aside"),
        ([], "Too early to tell", ""),
    ],
)
def test_the_verdict_stands_at_the_top_in_words(tmp_path, rows, headline, words):
    text = write(make_run(tmp_path / "run", rows))
    top = text[: text.index("<h2>")]
    assert f"<strong>{headline}" in top
    assert words in top
    assert ("verdict bad" in top) == (headline in ("Collapsed", "Not learning", "Diverged") or "Not learning" in top)


@pytest.mark.usefixtures("without_curves")
def test_a_run_that_ends_before_it_learns_is_told_so(tmp_path, without_curves):
    rows = [epoch_row(0, 2.0), epoch_row(1, 1.5), epoch_row(2, 1.2)]
    page = write(make_run(tmp_path / "run", rows), total_epochs=2)
    assert "Ended before it learned" in page and "Try more --epochs" in page
    assert "Ended before it learned" not in write(make_run(tmp_path / "longer", rows), total_epochs=9)


def test_what_happened_before_is_told(tmp_path):
    back = [epoch_row(0, 2.0), epoch_row(1, 1.4, 0.02), epoch_row(2, 1.1, 0.02), epoch_row(3), epoch_row(4)]
    last = epoch_row(5, skipped=7, data_wait=0.31)
    text = write(make_run(tmp_path / "run", [*back, last]))
    assert "<strong>Healthy" in text
    assert "The alarm sounded at epoch 2 (collapsed)" in text
    assert "7 steps were skipped" in text
    assert "31 % of the last epoch" in text
    assert "99 faces that are never trained on" in text


def test_every_curve_says_how_to_read_it(tmp_path):
    rows = [
        *step_rows(30),
        *(epoch_row(one, watch_age_ridge_r2=0.1, watch_age_knn_r2=0.0, watch_age_n=512) for one in range(5)),
    ]
    run = make_run(tmp_path / "run", rows)
    page = Page(write(run))
    figures = [tag for tag, _ in page.tags if tag == "figure"]
    captions = [tag for tag, _ in page.tags if tag == "figcaption"]
    pictures = [tag for tag, _ in page.tags if tag == "svg"]
    names = sorted(path.stem for path in run.figures.iterdir())
    assert len(figures) == len(captions) == len(pictures) == len(names)
    assert {"loss", "loss_over_position", "rankme", "feature_std", "spectrum", "rings", "grad_norm", "schedules"} <= {
        *names
    }
    assert {"throughput", "watch_0"} <= {*names}
    assert "memory" not in names  # nothing was measured, so nothing is drawn
    assert "Watched label: age" in page.texts
    assert any("512 faces" in text for text in page.texts)


def test_the_spectrum_ends_with_the_last_direction_that_is_one():
    """16 faces vary along 15 directions; the share of the sixteenth is rounding, 1e-32, and would fill the picture."""
    shares = [0.5**rank for rank in range(1, 16)] + [1e-32]
    rows = [{**epoch_row(epoch), "spectrum": shares} for epoch in range(3)]
    (panel,) = (one for one in panels([], rows) if one.name == "spectrum")
    assert [list(curve.y) for curve in panel.curves] == [shares[:-1]] * 3
    (panel,) = (one for one in panels([], [{**epoch_row(0), "spectrum": [0.0, 0.0]}]) if one.name == "spectrum")
    assert panel.is_empty


def test_the_page_needs_no_network_and_follows_light_and_dark(tmp_path):
    text = write(make_run(tmp_path / "run", [*step_rows(3), epoch_row(0), epoch_row(1)]))
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", drawn))
    assert colours
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours)
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", drawn))
    assert text.count("prefers-color-scheme: dark") >= 2


def test_hostile_names_stay_text(tmp_path):
    """In the run's name, in labels, in options, in the data and in the files of crops that cannot be read."""
    rows = [epoch_row(one, **{f"watch_{HOSTILE}_ridge_r2": 0.1, f"watch_{HOSTILE}_n": 60}) for one in range(3)]
    run = make_run(tmp_path / HOSTILE.replace("/", ":"), rows, mask=HOSTILE)
    about = health.About([(HOSTILE, HOSTILE)], 0, 3, lambda: [HOSTILE, "caf\udce9.jpg"])
    page = Page(health.write(run, about, f"it ended early: {HOSTILE}", has_diverged=True).read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert f"Watched label: {HOSTILE}" in page.texts
    assert sum(HOSTILE in text for text in page.texts) >= 6


@pytest.mark.usefixtures("without_curves")
def test_a_run_that_diverged_between_epochs_is_called_so(tmp_path):
    run = make_run(tmp_path / "run", [epoch_row(0, 2.0), epoch_row(1)])
    about = health.About([], 0, 10)
    health.write_end(run, about, Diverged("the loss was not finite for 3 steps in a row near step 70"))
    text = (run.path / "report.html").read_text()
    assert "<strong>Diverged" in text
    assert "near step 70" in text
    health.write_end(run, about, KeyboardInterrupt())
    text = (run.path / "report.html").read_text()
    assert "<strong>Healthy" in text
    assert "it ended early: Ctrl-C" in text


@pytest.mark.usefixtures("without_curves")
def test_trouble_in_writing_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", [epoch_row(0)])

    def full(*_):
        raise OutputError("the disk is full")

    monkeypatch.setattr(health.product, "write_text", full)
    console.configure(console.ConsoleOptions())  # another test may have asked for silence
    health.write_end(run, health.About([], 0, 10), Diverged("x"))
    assert "could not be written: the disk is full" in capsys.readouterr().err


def test_reports_of_a_running_job_take_two_per_cent_of_its_time(tmp_path, monkeypatch):
    clock, written = [0.0], []
    monkeypatch.setattr(health.time, "monotonic", lambda: clock[0])

    def slow(run, about, state):
        written.append(clock[0])
        clock[0] += 3  # seconds

    monkeypatch.setattr(health, "write", slow)
    reporter = health.Reporter(health.About([], 0, 10))
    first, other = (SimpleNamespace(world=SimpleNamespace(is_first=is_first), run=None) for is_first in (True, False))
    for _ in range(1000):
        clock[0] += 1
        reporter.see(first, {"kind": "step"})
        reporter.see(other, {"kind": "epoch"})
        reporter.see(first, {"kind": "epoch"})
    assert written[0] == 75
    assert 5 <= len(written) <= 7
    assert 3 * len(written) <= 0.02 * clock[0]


# Curves -------------------------------------------------------------------------------------------------------------


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """The vertices of every drawn line that is thicker than the grid."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke-width: 1\.6', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in paths]


def test_curves_have_the_shape_of_their_values_and_gaps_where_there_are_none():
    svg = curves.draw(Panel("a", "", "", [Curve("", range(6), [0, 1, None, math.nan, 2, 4])]))
    (line,) = points_of(svg)
    assert len(line) == 4  # two pieces of two points
    (x0, y0), (x1, y1), (x4, y4), (x5, y5) = line
    assert x5 - x4 == pytest.approx(x1 - x0, rel=1e-3)
    assert x4 - x1 == pytest.approx(3 * (x1 - x0), rel=1e-3)
    assert y5 - y4 == pytest.approx(2 * (y1 - y0), rel=1e-3)
    assert y1 < y0  # upwards


def test_many_points_are_thinned_to_means():
    values = list(np.random.default_rng(0).normal(size=4003))
    thinned = curves._thinned([(float(place), value) for place, value in enumerate(values)])
    assert len(thinned) <= curves.MAX_POINTS
    width = math.ceil(4003 / curves.MAX_POINTS)
    assert thinned[0] == pytest.approx((np.mean(range(width)), np.mean(values[:width])))
    with_gap = curves._thinned([(float(place), math.nan if place == 1 else 2.0) for place in range(1000)])
    assert with_gap[0][1] == 2
    assert curves._thinned([(0.0, 1.0)]) == [(0.0, 1.0)]


def test_log_panels_take_zeros_and_constants():
    for values in ([0.0, 0.1, 10.0], [0.0, 0.0], [2.0, 2.0], [None]):
        assert curves.draw(Panel("a", "", "", [Curve("x", range(len(values)), values)], log=True)).startswith("<svg")


def test_rows_of_earlier_versions_and_of_other_objectives_have_panels():
    old = [{"kind": "epoch", "epoch": one, "step": one, "loss": 0.1} for one in range(3)]
    drawn = [panel.name for panel in panels([], old) if not panel.is_empty]
    assert drawn == []
    assert [row["epoch"] for row in start_middle_end(old)] == [0, 1, 2]
    assert start_middle_end(old[:1]) == old[:1]


# A whole run --------------------------------------------------------------------------------------------------------


def test_a_run_on_crops_of_which_a_fifth_is_corrupt(tmp_path, capsys):
    """It trains, says which crops they are, and its report names them all."""
    folder = write_crops(tmp_path / "crops", 200, size=32)
    broken = list(range(0, 200, 5))
    for number in broken:
        path = folder / "images" / f"{number:04d}.jpg"
        path.write_bytes(path.read_bytes()[:100] if number % 2 else b"")
    options = {
        "backbone": "vit_tiny_patch16_224",
        "depth": 1,
        "embed_dim": 24,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "width": 1,
        "predictor_depth": 1,
        "precision": "fp32",
        "device": "cpu",
        "batch_size": 32,
        "epochs": 2,
        "out": str(tmp_path / "run"),
    }
    torch.manual_seed(0)
    job = Job.prepare([folder], Given(options), ProductOptions(out=str(tmp_path / "run")))
    job.train()
    page = Page((tmp_path / "run" / "report.html").read_text())
    named = {text for text in page.texts if re.search(r"images/\d{4}\.jpg", text)}
    met = {number for number in broken if any(f"images/{number:04d}.jpg" in text for text in named)}
    assert len(met) >= 0.9 * len(broken)  # the last faces of an epoch may be left over twice
    assert len(named) == len(met)
    assert any(f"{len(named)} crops could not be read" in text for text in page.texts)
    last = [row for row in job.run.metrics() if row["kind"] == "epoch"][-1]
    unreadable = sum(row in broken for row in job.monitor_rows)
    assert last["monitor_faces"] == len(job.monitor_rows) - unreadable
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 2
    assert any("200 in " in text for text in page.texts)
    assert alarm.judge([row for row in job.run.metrics() if row["kind"] == "epoch"]).kind != "diverged"
