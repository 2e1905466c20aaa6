"""report.html of a probe: its figures say what the predictions say, it is safe, offline, and shows the right faces."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix
from synthetic import write_crops

from mefem_cli.evaluation.evaluate import ProbeOptions
from mefem_cli.evaluation.job import Job, Results
from mefem_cli.probes import attentive
from mefem_cli.reports import probe, probe_faces, probe_figures
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore, FeatureWriter

FACES, GRID, WIDTH = 120, 2, 6
HOSTILE = '<img src=x onerror="alert(1)"> & </script><script>$x_{1}$'


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """A store of 60 people, two faces each, with patches; labels, names and the model's name are hostile."""
    folder = tmp_path_factory.mktemp("report")
    crops = Crops.open(write_crops(folder / "crops", FACES, size=40))
    rng = np.random.default_rng(0)
    hidden = np.repeat(rng.normal(size=(FACES // 2, 3)), 2, axis=0)
    features = np.concatenate([hidden + 0.5 * rng.normal(size=hidden.shape), rng.normal(size=(FACES, 3))], axis=1)
    patches = features[:, None] + rng.normal(size=(FACES, GRID**2, WIDTH))
    labels = {
        "bmi": 25 + 4 * hidden[:, 0],
        "sex": np.where(hidden[:, 1] > 0, HOSTILE, "male").astype(object),
        "site": np.where(np.arange(FACES) % 4 < 2, HOSTILE, "b").astype(object),
        "subject": np.array([f"p{row // 2}" for row in range(FACES)], dtype=object),
    }
    record = {"model": {"name": HOSTILE}, "inputs": crops.inputs()}
    with FeatureWriter(folder / "a.h5", record, WIDTH, num_patches=GRID**2) as writer:
        writer.append(crops.ids, features, features, patches)
        meta = {name: crops.columns[name] for name in ("source", "crop_sha256")}
        meta["source"] = np.array([f"{name}{HOSTILE}" for name in meta["source"]], dtype=object)
        writer.finish(labels, meta)
    return FeatureStore.open(folder / "a.h5")


@pytest.fixture(scope="module")
def results(store) -> Results:
    options = ProbeOptions(head="linear,attentive", by=["site"], bootstraps=100, device="cpu", fraction="0.5,1")
    job = Job.prepare([store], ["bmi", "sex"], options)
    return job.run({"attentive": attentive.Options(learning_rates="1e-2", epochs=2)})


RECORD = {"command": ["mefem", "probe", HOSTILE], "mefem": "0", "options": {"by": [HOSTILE]}}


@pytest.fixture(scope="module")
def page(results, store) -> str:
    return probe.page(results, [store], RECORD, show_faces=True)


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def pictures(page: str, kind: str = "jpeg") -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(rf"data:image/{kind};base64,([\w+/=]+)", page)]


def test_the_page_runs_nothing_and_asks_for_nothing(page):
    reader = Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "iframe", "link", "object", "embed"}
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    assert "url(http" not in page and "@import" not in page
    assert HOSTILE in reader.text  # it is shown as it is


def test_sections_of_a_full_probe(page):
    text = Reader(page).text
    for words in (
        "bmi (kg/m2)",
        "Predicted and true",
        "Errors (Bland-Altman)",
        "Calibration",
        "MAE by site",
        "accuracy by site",
        "r2 by the number of people",
        "Which classes are mixed up",
        "Where the head looks",
        "Largest errors",
        "Wrong with the most confidence",
        "What these scores do not say",
    ):
        assert words in text, words
    assert "prefers-color-scheme: dark" in page
    assert "#1d2330" not in page.replace("--ink: #1d2330", "").replace("var(--ink, #1d2330)", "")  # no fixed ink


def test_sections_without_their_data_are_left_out(results, store):
    bare = Results(scores=[replace(score, attention=None) for score in results.scores])
    text = Reader(probe.page(bare, [store], RECORD, show_faces=True)).text
    for words in ("by site", "by the number of people", "Where the head looks", "Differences"):
        assert words not in text
    assert "Predicted and true" in text


def test_confusion_matrix_equals_scikit_learns(results):
    score = next(one for one in results.scores if one.task == "sex")
    found = re.findall(r">(\d+) <span", probe._confusion(score))
    expected = confusion_matrix(score.predictions.target, score.predictions.prediction)
    assert [int(one) for one in found] == expected.ravel().tolist()
    assert 0 < expected[0, 1] < expected[0, 0]


def test_calibration_bins_and_limits_by_hand():
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=200)
    observed = predicted + rng.normal(size=200)
    found = probe_figures.bins(predicted, observed, np.arange(200))
    order = np.argsort(predicted)
    assert found.count.tolist() == [20] * 10
    for number in range(10):
        rows = order[20 * number : 20 * number + 20]
        assert found.predicted[number] == pytest.approx(predicted[rows].mean())
        assert found.observed[number] == pytest.approx(observed[rows].mean())
        assert found.half_width[number] == pytest.approx(1.96 * observed[rows].std(ddof=1) / 20**0.5)
    twice = probe_figures.bins(np.repeat(predicted, 2), np.repeat(observed, 2), np.repeat(np.arange(200), 2))
    np.testing.assert_allclose(twice.half_width, found.half_width)  # copies of people do not narrow it
    mean, low, high = probe_figures.limits_of_agreement(np.zeros(4), np.array([1.0, 1, 3, 3]))
    assert (mean, high - mean, mean - low) == pytest.approx((2, 1.96 * (4 / 3) ** 0.5, 1.96 * (4 / 3) ** 0.5))


def test_worst_errors_are_shown_with_their_own_crops(results, store):
    score = results.scores[0]
    errors = np.abs(score.predictions.output - score.predictions.target)
    worst = score.predictions.ids[np.argsort(-errors)[: probe.NUM_WORST]]
    shown = pictures("".join(probe._worst(score, probe_faces.Faces(store))))
    crops = Crops.open(*map(Path, store.provenance["inputs"]))
    assert len(shown) == probe.NUM_WORST
    for data, name in zip(shown, worst, strict=True):
        crop = Image.open(io.BytesIO(crops.read_bytes(crops.ids.index(name)))).resize((160, 160))
        found = np.asarray(Image.open(io.BytesIO(data)), float)
        assert np.abs(found - np.asarray(crop, float)).mean() < 8
    text = Reader("".join(probe._worst(score, None))).text
    row = list(score.predictions.ids).index(worst[0])
    assert f"true {score.predictions.target[row]:.4g}, said {score.predictions.output[row]:.4g}" in text


def test_no_faces_leaves_every_picture_of_a_face_out(results, store, page):
    assert pictures(page)
    without = probe.page(results, [store], RECORD, show_faces=False)
    assert not pictures(without)
    assert "Where the head looks" in without  # the map over the grid holds no face


def test_crops_that_changed_or_went_are_not_shown(store, results, tmp_path):
    faces = probe_faces.Faces(store)
    name = str(store.ids[3])
    assert faces.pixels(name) is not None
    faces._digests[name] = "0" * 64
    assert faces.pixels(name) is None
    assert faces.pixels("nobody") is None
    gone = FeatureStore.open(store.path)  # its crops were moved
    gone.provenance["inputs"] = {str(tmp_path / "gone"): "0"}
    page = probe.page(results, [gone], RECORD, show_faces=True)
    assert not pictures(page)
    assert "Their crops are no longer where they were embedded from." in page


def test_attention_is_drawn_where_it_is():
    pixels = np.full((160, 160, 3), 128, np.uint8)
    shares = np.zeros((2, 2))
    shares[0, 1] = 1.0  # upper right
    drawn = probe_faces.with_heat(pixels, shares).astype(float)
    even = probe_faces.with_heat(pixels, np.full((2, 2), 0.25)).astype(int)
    nearly = probe_faces.with_heat(pixels, np.array([[0.24, 0.26], [0.25, 0.25]])).astype(int)
    assert np.abs(even - nearly).max() < 12  # what is nearly even looks even
    yellowness = drawn[..., 0] - drawn[..., 2]
    for other in (yellowness[:60, :60], yellowness[100:, :60], yellowness[100:, 100:]):
        assert yellowness[:60, 100:].mean() > other.mean() + 50


def test_many_points_become_a_picture_so_that_the_page_stays_small():
    rng = np.random.default_rng(0)
    few, many = (probe_figures.scatter(rng.normal(size=n), rng.normal(size=n), "") for n in (100, 20_000))
    assert few.count("<use") > 100 and "data:image/png" not in few
    assert "data:image/png" in many and len(many) < 300_000


def test_a_data_set_has_its_targets_together_and_what_was_published(tmp_path, monkeypatch):
    from probing import write_store

    rng = np.random.default_rng(0)
    labels = {name: centre + rng.normal(size=60) for name, centre in (("upper_ap", 120), ("saturation", 97))}
    store = write_store(tmp_path / "a.h5", rng.normal(size=(60, 3)), labels)
    options = ProbeOptions(head="linear,knn", bootstraps=100, device="cpu")
    results = Job.prepare([store], ["mcd_rppg"], options).run()
    monkeypatch.setattr(probe, "MOST_DETAILED", 2)
    text = probe.page(results, [store], RECORD, show_faces=False)
    assert "mcd_rppg: 2 targets" in text
    assert text.count("published by others") == 2
    assert "12.82" in text and "0.980" in text
    best = [max((one for one in results.scores if one.task == task), key=lambda one: one.metrics["r2"].value)
            for task in dict.fromkeys(one.task for one in results.scores)]  # fmt: skip
    assert re.findall(r"<summary>(\w+) on", text) == [one.head for one in best]
    assert "Figures are drawn for 2 scores of 4, the best of each task first" in text
