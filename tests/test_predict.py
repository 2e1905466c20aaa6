"""`mefem probe --save`, `mefem predict`: the head is scikit-learn's, photos get what a store gives, intervals hold."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import write_run

from mefem_cli.evaluation import saved
from mefem_cli.evaluation.evaluate import ProbeOptions, read_features
from mefem_cli.evaluation.job import Job
from mefem_cli.faces.render import render_folder
from mefem_cli.main import main
from mefem_cli.probes import attentive, mlp
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.stores.product import file_sha256

PEOPLE = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Photos of rendered people, crops, two random encoders, a store with patches, and bmi.head."""
    folder = tmp_path_factory.mktemp("predict")
    render_folder(folder, num_people=PEOPLE, photos_per_person=1, seed=3, num_workers=1)
    write_run(folder / "run")
    write_run(folder / "other", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        words = ("crop", "photos", "--labels", "labels.csv", "--scale", "1.9", "--workers", "1", "-q")
        assert _run(folder, patch, *words) == 0
        assert _run(folder, patch, "embed", "crops", "--model", "run", "--patches", "--precision", "fp32", "-q") == 0
        words = ("bmi", "--head", "linear", "--features", "mean", "--bootstraps", "100", "--save", "bmi.head", "-q")
        assert _run(folder, patch, "probe", *words) == 0
    return folder


def _run(folder: Path, patch: pytest.MonkeyPatch, *words: str) -> int:
    patch.chdir(folder)
    patch.setattr("mefem_cli.console.stdin_is_pipe", lambda: False)
    patch.setattr(sys, "argv", ["mefem", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def mefem(work, monkeypatch, capsys):
    """Return a function that runs a command in the folder: its exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return _run(work, monkeypatch, *words), *capsys.readouterr()

    return run


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


# The file -------------------------------------------------------------------------------------------------------------


def test_the_kept_head_is_ridge_on_all_faces(work):
    head = saved.load(work / "bmi.head")
    with FeatureStore.open(work / "features.h5") as store:
        features, bmi = store.read("mean").astype(float), store.labels["bmi"]
    model = make_pipeline(StandardScaler(), Ridge(head.about["chosen"]["penalty"])).fit(features, bmi)
    np.testing.assert_allclose(head.predict(features), model.predict(features), rtol=1e-6)


def test_the_header_says_what_must_be_known_to_use_it(work):
    about = saved.load(work / "bmi.head").about
    with FeatureStore.open(work / "features.h5") as store:
        bmi = store.labels["bmi"]
        assert about["model"]["sha256"] == store.model_sha256
    assert (about["task"], about["kind"], about["unit"], about["head"]) == ("bmi", "regression", "kg/m2", "linear")
    assert about["features"] == "mean"
    assert about["crop_rule"]["scale"] == 1.9
    assert about["encoder"]["spec"] == str(work / "run")
    assert about["labels"]["n"] == len(bmi)
    assert (about["labels"]["min"], about["labels"]["max"]) == (bmi.min(), bmi.max())
    assert about["scores"]["mae"]["low"] < about["scores"]["mae"]["value"] < about["scores"]["mae"]["high"]
    assert "Diagnosis" in about["must_not_be_used_for"][0]
    with safe_open(work / "bmi.head", "np") as file:  # no pickle: a safetensors file with a JSON header
        json.loads(file.metadata()["mefem"])
        assert not [name for name in file.keys() if len(bmi) in file.get_tensor(name).shape]  # noqa: SIM118


def test_half_widths_are_the_conformal_quantiles_of_errors_out_of_fold(work, tmp_path):
    with FeatureStore.open(work / "features.h5") as store:
        job = Job.prepare([store], ["bmi"], ProbeOptions(head="linear", features="mean", bootstraps=100))
        results = job.run()
        saved.save(tmp_path / "a.head", job, results, {}, {})
    found = results.scores[0].predictions
    errors = np.sort(np.abs(found.output - found.target))
    head = saved.load(tmp_path / "a.head")
    for level in ("0.5", "0.8", "0.9"):  # one photo a person: the rank ceil((n + 1) level)
        assert head.half_width(level) == errors[int(np.ceil((len(errors) + 1) * float(level))) - 1]
    assert head.half_width("0.99") == float("inf")  # 24 people cannot say


def planted(path: Path, num: int = 400, width: int = 6, seed: int = 0) -> Path:
    """Write a store whose mean features tell a number and a class; cls features have other scales."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, width)) * [1, 1, 1, 1, 5, 0.1]
    patches = features[:, None] + 0.1 * rng.normal(size=(num, 4, width))
    labels = {
        "value": 10 + 2 * features[:, 0] + rng.normal(size=num),
        "kind": np.where(features[:, 1] + 0.3 * rng.normal(size=num) > 0, "high", "low").astype(object),
        "subject": np.array([f"p{row}" for row in range(num)], dtype=object),
    }
    with FeatureWriter(path, {"model": {"name": "m", "sha256": "1" * 64}}, width, "float32", num_patches=4) as writer:
        writer.append([f"{row:04x}" for row in range(num)], features, features, patches)
        writer.finish(labels, {})
    return path


@pytest.mark.parametrize(
    ("task", "head", "features", "options"),
    [
        ("value", "linear", "cls+mean", None),
        ("kind", "linear", "cls", None),
        ("value", "mlp", "cls", mlp.Options(learning_rates="1e-2", weight_decays="0.01,1", epochs=4)),
        ("kind", "attentive", "patches", attentive.Options(learning_rates="1e-2", epochs=2)),
    ],
)
def test_intervals_hold_new_faces_at_their_level_and_strange_faces_are_far(tmp_path, task, head, features, options):
    store = FeatureStore.open(planted(tmp_path / "a.h5"))
    job = Job.prepare([store], [task], ProbeOptions(head=head, features=features, bootstraps=100, device="cpu"))
    results = job.run({head: options} if options else {})
    saved.save(tmp_path / "a.head", job, results, {head: options} if options else {}, {})
    kept = saved.load(tmp_path / "a.head")
    new = FeatureStore.open(planted(tmp_path / "b.h5", num=1500, seed=7))
    read = read_features(new, features, np.arange(len(new)))
    output = kept.predict(read)
    if task == "value":
        is_held = np.abs(output - new.labels["value"]) <= kept.half_width("0.8")
    else:
        truth = np.array([kept.classes.index(name) for name in new.labels["kind"]])
        is_held = 1 - output[np.arange(len(new)), truth] <= kept.half_width("0.8")
    assert 0.74 < is_held.mean() < 0.88  # 400 people: the level varies by 2 %
    assert 0.002 < (kept.distance(read) > kept.far).mean() < 0.03
    strange = read.copy()
    strange[..., 5] += 2.0  # twenty deviations of the smallest feature, unseen in the largest one's scale
    assert (kept.distance(strange) > kept.far).all()
    store.close(), new.close()


def test_distance_is_that_of_mahalanobis(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5000, 3)) @ np.array([[2.0, 0, 0], [1, 1, 0], [0, 0.5, 0.1]])
    centre = saved._centre(vectors)
    shifted = vectors[:50] - vectors.mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", shifted, np.linalg.inv(np.cov(vectors.T)), shifted))
    np.testing.assert_allclose(saved._distance(centre, vectors[:50]), expected, rtol=0.02)


# Photos, crops, stores ------------------------------------------------------------------------------------------------


def test_photos_crops_and_store_give_the_same(work, mefem):
    shutil.copy(work / "labels.csv", work / "photos")  # crop would say how to join it, predict has no such option
    code, photos, said = mefem("predict", "photos", "--head", "bmi.head", "--precision", "fp32", "--workers", "1")
    (work / "photos/labels.csv").unlink()
    assert code == 0 and "labels.csv" not in said
    _, crops, _ = mefem("predict", "crops", "--head", "bmi.head", "--precision", "fp32", "-q")
    _, store, _ = mefem("predict", "features.h5", "--head", "bmi.head", "-q")
    with FeatureStore.open(work / "features.h5") as opened:
        expected = dict(
            zip(opened.meta["source"], saved.load(work / "bmi.head").predict(opened.read("mean")), strict=True)
        )
    assert photos.splitlines()[0] == "source,face,prediction,low,high,warning,reject"
    for text in (photos, crops, store):
        found = {row["source"]: float(row["prediction"]) for row in rows_of(text) if not row["reject"]}
        assert found.keys() == expected.keys()
        for source, value in found.items():
            assert value == pytest.approx(expected[source], rel=1e-5)
    row = rows_of(store)[0]
    width = saved.load(work / "bmi.head").half_width("0.9")
    assert float(row["high"]) - float(row["prediction"]) == pytest.approx(width, rel=1e-3)
    assert float(row["prediction"]) - float(row["low"]) == pytest.approx(width, rel=1e-3)


def test_rejected_photos_are_rows_with_the_reason(work, mefem, tmp_path):
    photos = sorted((work / "photos").rglob("*.jpg"))
    (tmp_path / "in").mkdir()
    shutil.copy(photos[0], tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no picture")
    words = ("predict", str(tmp_path / "in"), "--head", "bmi.head", "--workers", "1", "-q")
    code, text, _ = mefem(*words, "--json")
    good, bad = (json.loads(line) for line in text.splitlines())
    assert code == 0
    assert good["reject"] == "" and good["low"] < good["prediction"] < good["high"]
    assert bad["reject"].startswith("unreadable") and bad["prediction"] is None
    assert mefem(*words, "-o", str(tmp_path / "out.csv"))[1].strip() == str(tmp_path / "out.csv")
    assert rows_of((tmp_path / "out.csv").read_text())[1]["reject"].startswith("unreadable")
    assert mefem(*words, "-o", str(tmp_path / "out.csv"))[0] == 4
    (tmp_path / "in" / "a.jpg").unlink()
    code, text, said = mefem(*words)
    assert code == 3 and "no face could be used" in said
    assert [row["source"].endswith("b.jpg") for row in rows_of(text)] == [True]
    code, text, said = mefem(*words, "-o", str(tmp_path / "none.csv"))
    assert (code, text) == (3, "") and "none.csv says why" in said
    assert [row["reject"][:10] for row in rows_of((tmp_path / "none.csv").read_text())] == ["unreadable"]


def test_strange_faces_and_predictions_beyond_the_labels_are_warned_of(work, mefem, tmp_path):
    with FeatureStore.open(work / "features.h5") as store:
        features, record = store.read("mean")[:3], store.provenance
    features[1] += 30
    features[2] = features[0]
    with FeatureWriter(tmp_path / "odd.h5", record, features.shape[1], "float32") as writer:
        writer.append(["a", "b", "c"], features, features)
        writer.finish({}, {})
    _, text, _ = mefem("predict", str(tmp_path / "odd.h5"), "--head", "bmi.head", "-q")
    first, second, third = rows_of(text)
    assert first["warning"] == third["warning"] == ""
    assert "far from the training faces" in second["warning"]
    assert "beyond the labels learned from" in second["warning"]


def test_another_encoder_is_refused_with_both_hashes(work, mefem):
    ours, theirs = (file_sha256(work / name / "model.safetensors") for name in ("run", "other"))
    code, text, said = mefem("predict", "photos", "--head", "bmi.head", "--model", "other")
    assert (code, text) == (4, "")
    assert "is another encoder" in said and ours in said and theirs in said and len(said.splitlines()) == 1
    assert mefem("embed", "crops", "--model", "other", "-o", "other.h5", "-q")[0] == 0
    code, _, said = mefem("predict", "other.h5", "--head", "bmi.head")
    assert code == 4 and ours in said and theirs in said


def test_the_encoder_is_found_where_it_was_then_in_runs_latest_else_asked_for(work, mefem):
    words = ("predict", "crops", "--head", "bmi.head", "--precision", "fp32", "-q", "--limit", "1")
    expected = mefem(*words)[1]
    (work / "run").rename(work / "moved")
    try:
        code, _, said = mefem(*words)
        assert code == 3 and "name it with --model" in said
        assert mefem(*words, "--model", "moved")[1] == expected
        (work / "runs").mkdir()
        (work / "runs" / "latest").symlink_to(work / "moved")
        assert mefem(*words)[1] == expected
    finally:
        shutil.rmtree(work / "runs", ignore_errors=True)
        (work / "moved").rename(work / "run")


def test_crops_of_another_rule_are_refused(work, mefem):
    shutil.rmtree(work / "wide", ignore_errors=True)
    assert mefem("crop", "photos", "-o", "wide", "--scale", "1.5", "--limit", "2", "--min-size", "100", "-q")[0] == 0
    code, _, said = mefem("predict", "wide", "--head", "bmi.head")
    assert code == 4 and "scale was 1.9, is 1.5" in said


def test_the_card(mefem):
    code, text, _ = mefem("predict", "--head", "bmi.head", "-n")
    assert code == 0
    for words in ("bmi kg/m2, linear on mean", "24 faces of 24 people", "no medical device", "scale 1.9"):
        assert words in text
    assert json.loads(mefem("predict", "--head", "bmi.head", "-n", "--json")[1])["must_not_be_used_for"]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("bmi", "age", "--save", "x.head"), 2, "name one task"),
        (("bmi", "--head", "knn", "--save", "x.head"), 2, "should not travel"),
        (("bmi", "--save", "bmi.head"), 4, "exists"),
        (("bmi", "--save", "x.head", "--aggregate", "subject"), 2, "one photo"),
    ],
)
def test_heads_that_cannot_be_kept_are_refused_before_the_first_fit(mefem, words, code, told):
    found, _, said = mefem("probe", *words, "-q")
    assert found == code and told in said


def test_files_that_are_no_head_or_damaged_are_refused(work, mefem, tmp_path):
    (tmp_path / "junk.head").write_bytes(b"junk")
    tensors = load_file(work / "bmi.head")
    with safe_open(work / "bmi.head", "np") as file:
        header = file.metadata()
    about = json.loads(header["mefem"])
    del about["half_widths"]
    save_file(tensors, tmp_path / "poor.head", metadata={"mefem": json.dumps(about)})
    tensors["state/weight"] = tensors["state/weight"][:-1]
    save_file(tensors, tmp_path / "short.head", metadata=header)
    newer = {"mefem": json.dumps({**json.loads(header["mefem"]), "version": 2})}
    save_file(tensors, tmp_path / "newer.head", metadata=newer)
    save_file(tensors, tmp_path / "list.head", metadata={"mefem": "[]"})
    codes = {"junk": 3, "poor": 3, "short": 3, "list": 3, "newer": 2, "absent": 3}
    for name, code in codes.items():
        found, text, said = mefem("predict", "photos", "--head", str(tmp_path / f"{name}.head"))
        assert (found, text, len(said.splitlines())) == (code, "", 1), (name, said)
    assert mefem("predict", "photos")[0] == 2


def test_of_several_heads_the_best_out_of_fold_is_kept(tmp_path):
    store = FeatureStore.open(planted(tmp_path / "a.h5", num=120))
    job = Job.prepare([store], ["value"], ProbeOptions(head="linear,knn", bootstraps=100))
    results = job.run()
    score = saved.save(tmp_path / "a.head", job, results, {}, {})
    assert score.head == "linear"
    assert saved.load(tmp_path / "a.head").about["chosen_among"] == ["linear on cls", "knn on cls"]
    store.close()
