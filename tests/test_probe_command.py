"""`mefem probe` as users meet it: real processes, stdout for the product only, exit codes, the pipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from mefem_cli.evaluation.evaluate import ProbeOptions
from mefem_cli.evaluation.heads import choose_pairs
from mefem_cli.evaluation.job import Job
from mefem_cli.evaluation.report import rows
from mefem_cli.main import main
from mefem_cli.stores.features import FeatureStore, FeatureWriter

FACES = 120


def write_store(path: Path, noise: float, patches: int = 0, first: int = 0) -> Path:
    """Write a store of 60 people with two faces each; the faces before `first` are left out."""
    rng = np.random.default_rng(0)
    hidden = np.repeat(rng.normal(size=(FACES // 2, 3)), 2, axis=0)
    features = np.concatenate([hidden + noise * rng.normal(size=hidden.shape), rng.normal(size=(FACES, 5))], axis=1)
    height = 170 + 5 * rng.normal(size=FACES)
    labels = {
        "weight_kg": (24 + 3 * hidden[:, 0]) * (height / 100) ** 2,
        "height_cm": height,
        "sex": np.where(hidden[:, 1] > 0, "female", "male").astype(object),
        "subject": np.array([f"p{row // 2}" for row in range(FACES)], dtype=object),
        "constant": np.ones(FACES),
    }
    tokens = features[:, None] + rng.normal(size=(FACES, max(patches, 1), 8))
    with FeatureWriter(path, {"model": {"name": path.stem}}, 8, num_patches=patches) as writer:
        ids = [f"{row:04x}" for row in range(first, FACES)]
        writer.append(ids, features[first:], features[first:], tokens[first:] if patches else None)
        writer.finish({name: values[first:] for name, values in labels.items()}, {})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with features.h5 (three patches a face) and noisy.h5 (none) of the same people."""
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "features.h5", noise=0.3, patches=3)
    write_store(folder / "noisy.h5", noise=3.0)
    return folder


def probe(folder: Path, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", "mefem_cli", "probe", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **source)


@pytest.fixture
def here(folder, monkeypatch, capsys):
    """Return a function that runs `mefem probe` in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mefem_cli.console.stdin_is_pipe", lambda: False)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mefem", "probe", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_table_is_the_only_output(folder):
    before = sorted(folder.iterdir())
    done = probe(folder, "bmi", "sex", "--head", "linear,knn", "--bootstraps", "200")
    assert (done.returncode, done.stderr) == (0, "")
    assert "bmi: 120 faces of 60 people, 5 folds" in done.stdout
    for word in ("linear", "knn", "cls", "r2 [95 %]", "AUROC [95 %]", "baseline", "majority"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert sorted(folder.iterdir()) == before


def test_json_rows_and_the_paired_difference(folder):
    stores = ("--store", "features.h5", "--store", "noisy.h5")
    done = probe(folder, "bmi", *stores, "--head", "linear", "--by", "sex", "--bootstraps", "200", "--json")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["row"] for row in found] == ["score"] * 2 + ["subgroup"] * 4 + ["difference"]
    score, difference = found[0], found[-1]
    wanted = "row task head features store model n n_groups folds metrics per_fold baseline"
    for row in found:
        assert set(wanted.split()) <= set(row)
    assert (score["task"], score["head"], score["features"], score["model"]) == ("bmi", "linear", "cls", "features")
    assert (score["n"], score["n_groups"], score["folds"]) == (120, 60, 5)
    assert score["metrics"]["r2"]["low"] < score["metrics"]["r2"]["value"] < score["metrics"]["r2"]["high"]
    assert len(score["per_fold"]["r2"]) == 5
    assert score["baseline"]["r2"] <= 0
    assert {row["value"] for row in found[2:6]} == {"female", "male"}
    assert sum(row["n"] for row in found[2:4]) == 120
    assert (difference["model"], difference["minus_model"]) == ("features", "noisy")
    assert difference["verdict"]["r2"] == "better"
    gain = score["metrics"]["r2"]["value"] - found[1]["metrics"]["r2"]["value"]
    assert difference["metrics"]["r2"]["value"] == pytest.approx(gain)


def test_out_holds_scores_and_out_of_fold_predictions(folder, tmp_path):
    out = tmp_path / "results"
    words = ("bmi", "sex", "--head", "linear", "--bootstraps", "200", "-o", str(out))
    assert probe(folder, *words).returncode == 0
    files = ["predictions.parquet", "provenance.json", "report.html", "scores.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    scores = json.loads((out / "scores.json").read_text())
    assert [row["task"] for row in scores] == ["bmi", "sex"]
    assert len(scores[0]["chosen"]) == 5
    table = pyarrow.parquet.read_table(out / "predictions.parquet").to_pydict()
    assert {"id", "task", "head", "features", "target", "prediction", "fold"} <= set(table)
    bmi = np.array([table["task"][row] == "bmi" for row in range(2 * FACES)])
    target, prediction = np.array(table["target"])[bmi], np.array(table["prediction"])[bmi]
    r2 = 1 - ((target - prediction) ** 2).sum() / ((target - target.mean()) ** 2).sum()
    assert r2 == pytest.approx(scores[0]["metrics"]["r2"]["value"])
    assert set(np.array(table["target_class"])[~bmi]) == {"female", "male"}
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["inputs"] == {str(folder / "features.h5"): FeatureStore.open(folder / "features.h5").sha256}
    again = probe(folder, *words)
    assert (again.returncode, again.stdout) == (4, "")
    assert "--overwrite" in again.stderr
    assert probe(folder, *words, "--overwrite", "--seed", "1").returncode == 0


def test_dry_run_says_what_would_be_fitted_and_touches_nothing(folder, tmp_path):
    out = tmp_path / "results"
    done = probe(folder, "sex", "-n", "--json", "-o", str(out))
    (plan,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert plan["heads"] == ["linear on cls", "mlp on cls", "attentive on patches"]
    assert (plan["task"], plan["kind"], plan["n"], plan["n_groups"]) == ("sex", "classification", 120, 60)
    assert not out.exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_pipe_brings_the_store(folder, tmp_path, as_json):
    path = str(folder / "noisy.h5")
    line = json.dumps({"out": path, "seconds": 1}) if as_json else path
    done = probe(tmp_path, "sex", "--head", "linear", "--bootstraps", "200", "--json", stdin=line + "\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["store"] == path


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        ("", "made nothing"),
        ("/nowhere/features.h5\n", "no existing path"),
        ("{crops}\n", "crops folder.*mefem embed"),
        ("{run}\n", "run folder.*mefem embed"),
    ],
)
def test_a_pipe_without_a_store_is_exit_3(folder, tmp_path, stdin, words):
    for name, file in (("crops", "manifest.parquet"), ("run", "model.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    stdin = stdin.format(crops=tmp_path / "crops", run=tmp_path / "run")
    done = probe(folder, "sex", stdin=stdin)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.search(words, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "name a task, such as `mefem probe bmi`; there is constant, height_cm"),
        (["bmo"], 3, 'no label "bmo"'),
        (["constant"], 3, "the label is 1 for all 120 faces"),
        (["sex", "--kind", "regression"], 2, "is no number"),
        (["sex", "--folds", "1"], 2, "--folds 1"),
        (["sex", "--folds", "100"], 2, "fewer than the 100 folds"),
        (["sex", "--head", "liner"], 2, 'did you mean "linear"?'),
        (["sex", "--head", "linear", "--features", "patches"], 2, "linear takes cls or mean or cls+mean"),
        (["sex", "--head", "attentive", "--store", "noisy.h5"], 3, "mefem embed --patches"),
        (["sex", "--store", "absent.h5"], 3, "absent.h5 does not exist"),
        (["sex", "--store", "noisy.h5", "--store", "./noisy.h5"], 2, "given twice"),
        (["sex", "--bootstraps", "5"], 2, "--bootstraps 5"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(here, words, code, message):
    found, stdout, stderr = here(*words)
    assert (found, stdout) == (code, ""), stderr
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr


def test_a_process_ends_with_the_exit_code(folder):
    done = probe(folder, "bmo")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith('mefem probe: there is no label "bmo"')


def test_options_without_effect_are_named(here):
    words = ("sex", "--head", "linear", "--neighbors", "3", "--bootstraps", "200")
    assert here(*words)[::2] == (0, "warning: --neighbors has no effect here\n")
    assert here(*words, "-q")[::2] == (0, "")


def test_help_imports_nothing_heavy(folder):
    code = (
        "import sys; sys.argv = ['mefem', 'probe', '--help']\n"
        "from mefem_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'h5py', 'sklearn', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--store", "--head", "--features", "--kind", "--group", "--folds", "--by", "--neighbors"):
        assert option in done.stdout


def test_heads_and_features_by_default(folder):
    with FeatureStore.open(folder / "features.h5") as full, FeatureStore.open(folder / "noisy.h5") as plain:
        linear_and_mlp = [("linear", "cls"), ("mlp", "cls")]
        assert choose_pairs([full], "default", None) == [*linear_and_mlp, ("attentive", "patches")]
        assert choose_pairs([full, plain], "default", None) == linear_and_mlp
        assert choose_pairs([full], "default", "mean") == [("linear", "mean"), ("mlp", "mean")]
        assert choose_pairs([full], "default", "patches+cls") == [("attentive", "patches+cls")]
        everything = [("attentive", "patches"), ("knn", "cls"), ("linear", "cls"), ("mlp", "cls")]
        assert choose_pairs([full], "all", None) == everything
        assert choose_pairs([plain], "all", None) == everything[1:]


def test_two_stores_are_compared_on_the_faces_of_both(folder, tmp_path):
    later = write_store(tmp_path / "later.h5", noise=1.0, first=10)
    with FeatureStore.open(folder / "features.h5") as first, FeatureStore.open(later) as second:
        job = Job.prepare([first, second], ["bmi"], ProbeOptions(head="linear", bootstraps=200))
        found = rows(job.run())
    assert [row["n"] for row in found] == [FACES - 10] * 3
    assert "10 faces that not all stores have" in job.notes[0]
    np.testing.assert_array_equal(job.problems[0][0].fold, job.problems[0][1].fold)


def test_limit_keeps_the_first_faces(folder):
    with FeatureStore.open(folder / "features.h5") as store:
        options = ProbeOptions(head="linear", bootstraps=200)
        job = Job.prepare([store], ["sex"], options, limit=40)
        assert len(job.problems[0][0].ids) == 40
        (row,) = rows(job.run())
        assert row["n"] == 40
