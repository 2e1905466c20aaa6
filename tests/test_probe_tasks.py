"""Data sets' own protocols: their files, classes, splits, malformed rows, published values."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from probing import text, write_store

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation.job import Job
from mefem_cli.evaluation.labels import load_task
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.report import rows
from mefem_cli.main import main
from mefem_cli.tasks import Faces, _files, bmi, celeba, fairface, mcd_rppg, utkface

FAST = ProbeOptions(bootstraps=100, head="linear", device="cpu")


def faces(sources=(), **labels):
    return Faces(labels, text(*sources))


# CelebA ---------------------------------------------------------------------------------------------------------------


def write_celeba(folder: Path, num_faces: int = 120, seed: int = 0) -> np.ndarray:
    """Write CelebA's two files for two attributes; returns the states [N, 2], 1 or -1."""
    rng = np.random.default_rng(seed)
    states = np.where(rng.random((num_faces, 2)) < 0.5, 1, -1)
    lines = [f"{row + 1:06d}.jpg {' '.join(f'{one:2d}' for one in states[row])}" for row in range(num_faces)]
    (folder / "list_attr_celeba.txt").write_text(f"{num_faces}\nSmiling Young \n" + "\n".join(lines) + "\n")
    parts = [f"{row + 1:06d}.jpg {0 if row < 60 else 1 if row < 80 else 2}" for row in range(num_faces)]
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return states


def celeba_sources(folder: Path, num_faces: int = 120) -> list[str]:
    return [str(folder / "img_align_celeba" / f"{row + 1:06d}.jpg") for row in range(num_faces)]


@pytest.mark.parametrize("annotations", [None, "folder", "file"])
def test_celeba_reads_its_files_beside_the_photos_or_where_the_option_says(tmp_path, annotations):
    data = tmp_path / "Anno" if annotations is None else tmp_path / "elsewhere"
    data.mkdir()
    states = write_celeba(data)
    given = {None: None, "folder": str(data), "file": str(data / "list_attr_celeba.txt")}[annotations]
    order = np.random.default_rng(1).permutation(120)
    sources = [*np.array(celeba_sources(tmp_path))[order], "/nowhere/else.jpg"]
    made = celeba.protocol(faces(sources), celeba.Options(given))
    assert list(made.targets) == ["Smiling", "Young"]
    np.testing.assert_array_equal(made.targets["Young"].values[:-1], np.where(states[order, 1] > 0, "yes", "no"))
    assert made.targets["Young"].values[-1] == made.split[-1] == ""
    np.testing.assert_array_equal(made.split[:-1], np.array(["train"] * 60 + ["val"] * 20 + ["test"] * 40)[order])
    assert made.notes == ("celeba: 1 faces are not in list_attr_celeba.txt and are left out",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("1\nSmiling Young\n000001.jpg 1\n", 'line "000001.jpg 1" is not a name and 2 times'),
        ("1\nSmiling Young\n000001.jpg 1 maybe\n", "is not a name and 2 times"),
        ("1\nSmiling Young\nother.jpg 1 1\n", "names none of the photos"),
    ],
)
def test_a_damaged_celeba_file_is_one_line(tmp_path, content, words):
    write_celeba(tmp_path)
    (tmp_path / "list_attr_celeba.txt").write_text(content)
    with pytest.raises(NoInputError, match=words) as caught:
        celeba.protocol(faces(celeba_sources(tmp_path)), celeba.Options())
    assert "\n" not in str(caught.value)
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(NoInputError, match="there is no list_attr_celeba.txt .*--annotations"):
        celeba.protocol(faces(celeba_sources(tmp_path)), celeba.Options())


@pytest.fixture
def celeba_store(tmp_path):
    states = write_celeba(tmp_path)
    rng = np.random.default_rng(0)
    features = np.concatenate([states + rng.normal(size=states.shape), rng.normal(size=(len(states), 3))], axis=1)
    return write_store(tmp_path / "f.h5", features, {}, {"source": text(*celeba_sources(tmp_path))})


def test_celeba_is_scored_on_its_test_part_and_averaged_over_attributes(celeba_store):
    job = Job.prepare([celeba_store], ["celeba"], FAST)
    (problem,), _ = job.problems
    np.testing.assert_array_equal(problem.fold, [-1] * 80 + [0] * 40)
    np.testing.assert_array_equal(problem.inner[0], [-1] * 60 + [0] * 20)  # options are chosen on val
    found = rows(job.run())
    scores = [row for row in found if row["row"] == "score"]
    assert [(row["task"], row["n"], row["folds"]) for row in scores] == [
        ("celeba.Smiling", 40, 1),
        ("celeba.Young", 40, 1),
    ]
    (mean,) = [row for row in found if row["row"] == "mean"]
    values = [row["metrics"]["accuracy"]["value"] for row in scores]
    assert min(values) > 0.6
    assert mean["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(values))
    assert mean["metrics"]["accuracy"]["low"] < np.mean(values) < mean["metrics"]["accuracy"]["high"]
    assert (mean["task"], mean["over"], mean["count"]) == ("celeba", "targets", 2)


def test_one_attribute_is_the_official_fit(celeba_store):
    """The chosen penalty is the best on val, of fits on train alone; the last fit learns from both."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mefem_cli.probes.linear import STRENGTHS

    job = Job.prepare([celeba_store], ["celeba.Young"], FAST)
    (score,) = job.run().scores
    x = celeba_store.read_rows("cls", slice(None)).astype(float)
    y = job.problems[0][0].target

    def model(strength):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-8))

    losses = [log_loss(y[60:80], model(one).fit(x[:60], y[:60]).predict_proba(x[60:80])) for one in STRENGTHS]
    best = STRENGTHS[int(np.argmin(losses))]
    assert score.chosen == ({"penalty": 1 / best},)
    expected = model(best).fit(x[:80], y[:80]).predict_proba(x[80:])
    np.testing.assert_allclose(score.predictions.output, expected, atol=2e-3)


def test_the_command_line_takes_a_protocol_with_its_option(celeba_store, monkeypatch, capsys):
    words = ["celeba", "--annotations", str(celeba_store.path.parent), "--store", str(celeba_store.path)]
    monkeypatch.setattr(sys, "argv", ["mefem", "probe", *words, "--head", "linear", "--bootstraps", "100"])
    with pytest.raises(SystemExit) as ended:
        main()
    stdout, stderr = capsys.readouterr()
    assert not ended.value.code, stderr
    for word in ("celeba: 40 faces, tested on test", "Smiling", "mean of 2"):
        assert word in stdout
    monkeypatch.setattr(sys, "argv", ["mefem", "probe", "celeba.Smilin", "--store", str(celeba_store.path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert 'did you mean "Smiling"' in capsys.readouterr().err


# FairFace -------------------------------------------------------------------------------------------------------------


def write_fairface(folder: Path, num_train: int = 300, num_val: int = 120) -> tuple[list[str], dict[str, list[str]]]:
    rng = np.random.default_rng(0)
    sources, columns = [], {name: [] for name in fairface.COLUMNS}
    for part, count in (("train", num_train), ("val", num_val)):
        table = {
            "age": rng.choice(fairface.AGES[3:6], count),
            "gender": rng.choice(["Male", "Female"], count),
            "race": rng.choice(["White", "Black", "East Asian"], count),
        }
        lines = [
            f"{part}/{row + 1}.jpg,{','.join(str(table[name][row]) for name in table)},True" for row in range(count)
        ]
        (folder / f"fairface_label_{part}.csv").write_text("file,age,gender,race,service_test\n" + "\n".join(lines))
        sources += [str(folder / part / f"{row + 1}.jpg") for row in range(count)]
        for name in columns:
            columns[name] += [str(one) for one in table[name]]
    return sources, columns


def test_fairface_joins_its_files_by_the_end_of_the_path_and_tests_on_val(tmp_path):
    sources, columns = write_fairface(tmp_path)
    made = fairface.protocol(faces(sources), fairface.Options())
    np.testing.assert_array_equal(made.targets["age"].values, columns["age"])
    np.testing.assert_array_equal(made.targets["sex"].values, columns["gender"])
    white = np.where(np.array(columns["race"]) == "White", "White", "non-White")
    np.testing.assert_array_equal(made.targets["age"].by["race (two)"], white)
    np.testing.assert_array_equal(made.split, ["train"] * 300 + ["val"] * 120)
    odd = {name: text(*values) for name, values in columns.items()}
    odd["age"][0] = "9-Mar"  # what a spreadsheet makes of 3-9
    of_store = fairface.protocol(faces(sources, **odd), fairface.Options())
    assert of_store.targets["age"].values[0] == ""
    assert "1 faces have an age that is none of the nine classes" in of_store.notes[0]


def test_classes_come_in_the_order_of_the_task():
    """Sorted as text, 3-9 would come last."""
    ages = ["20-29", "0-2", "3-9", "10-19", "3-9", ""]
    made = load_task(faces([""] * 6, age=text(*ages), gender=text(*"mfmfmf"), race=text(*"wwwwww")), "fairface.age")
    (target,) = made.targets
    assert target.classes == ("0-2", "3-9", "10-19", "20-29")
    assert [target.classes[one] for one in target.values] == ages[:-1]


def test_fairface_shows_both_readings(tmp_path):
    sources, columns = write_fairface(tmp_path)
    rng = np.random.default_rng(1)
    signal = np.stack([np.unique(columns[name], return_inverse=True)[1] for name in ("age", "gender")], axis=1)
    features = np.concatenate([signal + 0.5 * rng.normal(size=signal.shape), rng.normal(size=(420, 2))], axis=1)
    store = write_store(tmp_path / "f.h5", features, {}, {"source": text(*sources)})
    job = Job.prepare([store], ["fairface"], FAST)
    assert job.problems[0][0].classes == fairface.AGES[3:6]  # in the order of years
    results = job.run()
    age, sex, _ = results.scores
    assert len(age.predictions) == 120
    by_race = {one.value: one for one in results.subgroups if one.score is age}
    assert set(by_race) == {"White", "non-White"}
    is_white = np.array(columns["race"])[300:] == "White"
    # ids are hexadecimal row numbers, so predictions lie in the order of the rows
    accuracy = (age.predictions.prediction == age.predictions.target)[is_white].mean()
    assert by_race["White"].metrics["accuracy"].value == pytest.approx(accuracy)
    (mean,) = results.means
    ages = np.array(columns["age"])[300:]
    right = sex.predictions.prediction == sex.predictions.target
    within = [right[ages == one].mean() for one in fairface.AGES[3:6]]
    assert (mean.task, mean.over, mean.count) == ("fairface.sex", "age class", 3)
    assert mean.metrics["accuracy"].value == pytest.approx(np.mean(within))
    interval = mean.metrics["accuracy"]
    assert interval.low < interval.value < interval.high


def test_fairface_has_its_option_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    write_fairface(tmp_path / "elsewhere", 60, 30)
    sources = [f"/photos/{part}/{row + 1}.jpg" for part, count in (("train", 60), ("val", 30)) for row in range(count)]
    store = write_store(
        tmp_path / "f.h5", np.random.default_rng(0).normal(size=(90, 3)), {}, {"source": text(*sources)}
    )
    words = [
        "fairface.sex",
        "--store",
        str(store.path),
        "--annotations",
        str(tmp_path / "elsewhere"),
        "--head",
        "linear",
    ]
    monkeypatch.setattr(sys, "argv", ["mefem", "probe", *words, "-n"])
    with pytest.raises(SystemExit) as ended:
        main()
    stdout, stderr = capsys.readouterr()
    assert not ended.value.code, stderr
    assert "fairface.sex" in stdout
    assert "no effect" not in stderr


def test_a_fairface_file_without_its_columns_is_named(tmp_path):
    sources, _ = write_fairface(tmp_path)
    (tmp_path / "fairface_label_val.csv").write_text("file,age\n1,2\n")
    with pytest.raises(NoInputError, match='fairface_label_val.csv has no column "gender"'):
        fairface.protocol(faces(sources), fairface.Options())


# UTKFace --------------------------------------------------------------------------------------------------------------


def test_utkface_reads_file_names_and_counts_malformed_ones():
    names = {
        "26_1_2_20170116172920397.jpg.chip.jpg": (26, "female", "Asian"),
        "100_0_0_20170112213500903.jpg": (100, "male", "White"),
        "1_1_4_20161219154253148.jpg": (1, "female", "Others"),
        "61_1_20170109142408075.jpg.chip.jpg": None,  # the three that lack the race, as published
        "39_1_20170116174525125.jpg.chip.jpg": None,
        "61_3_20170109150557335.jpg": None,
        "121_0_0_20170112213500903.jpg": None,
        "anna.jpg": None,
        "": None,
    }
    made = utkface.protocol(faces([f"/data/{name}" if name else "" for name in names]))
    for row, known in enumerate(names.values()):
        found = [made.targets[name].values[row] for name in ("age", "sex", "race")]
        if known:
            assert tuple(found) == known
        else:
            assert np.isnan(found[0])
            assert found[1:] == ["", ""]
    assert made.notes == ('utkface: 6 malformed names left out (e.g. "61_1_20170109142408075.jpg.chip.jpg")',)
    with pytest.raises(NoInputError, match='no photo is named age_gender_race_date, such as "anna.jpg"'):
        utkface.protocol(faces(["/data/anna.jpg"]))


# MCD-rPPG -------------------------------------------------------------------------------------------------------------


def test_mcd_rppg_keeps_patients_and_folds_and_shows_what_was_published():
    labels = {
        "upper_ap": np.array([120.0, 700, 110, 130]),
        "hba1c": np.array([5.0, 5.5, np.nan, 6]),
        "patient_id": np.array([1.0, 1, 2, 3]),
        "fold": np.array([0.0, 0, 1, np.nan]),
    }
    made = mcd_rppg.protocol(faces(**labels))
    assert list(made.targets) == ["glycated_hemoglobin", "systolic"]
    np.testing.assert_array_equal(made.targets["systolic"].values, [120, np.nan, 110, 130])
    assert made.targets["systolic"].published == {"mae": 12.82}
    assert made.targets["glycated_hemoglobin"].published == {"mae": 0.41}
    np.testing.assert_array_equal(made.split, ["0", "0", "1", ""])
    np.testing.assert_array_equal(made.people, [1, 1, 2, 3])
    assert "the store has no hemoglobin, cholesterol, diastolic, saturation" in made.notes[0]
    assert mcd_rppg.protocol(faces(spo2=np.array([97.0, 99]))).split is None
    with pytest.raises(NoInputError, match="mcd_rppg: there is no label hemoglobin"):
        mcd_rppg.protocol(faces(x=np.ones(2)))


def test_published_values_stand_beside_as_published(tmp_path):
    rng = np.random.default_rng(0)
    labels = {"saturation": np.clip(97 + rng.normal(size=60), 90, 100), "patient_id": np.repeat(np.arange(30.0), 2)}
    store = write_store(tmp_path / "f.h5", rng.normal(size=(60, 3)), labels)
    job = Job.prepare([store], ["mcd_rppg"], FAST)
    assert job.problems[0][0].num_groups == 30  # patient_id says who is who
    (row,) = rows(job.run())
    assert row["published"] == {"mae": 0.98}


# The interface --------------------------------------------------------------------------------------------------------


def test_a_task_may_have_one_target_or_several():
    one = load_task(faces(age=np.array([20.0, 30])), "age")
    assert [target.task for target in one.targets] == ["age"]
    names = ["26_1_2_20170116172920397.jpg", "30_0_2_20170116172920397.jpg"]
    asked = load_task(faces(names), "utkface")
    assert [target.task for target in asked.targets] == ["utkface.age", "utkface.sex"]
    assert "utkface.race: the label is Asian for all 2 faces; it must vary; it is left out" in asked.notes[-1]
    assert [target.kind for target in load_task(faces(names), "utkface.sex").targets] == ["classification"]
    with pytest.raises(UsageError, match='no target "sexx"; did you mean "sex"'):
        load_task(faces(names), "utkface.sexx")
    dotted = {"utkface.sex": np.array([0.5, 1.5])}
    assert load_task(Faces(dotted, text("", "")), "utkface.sex").targets[0].kind == "regression"  # a label comes first


def test_the_files_of_a_data_set_are_found_or_named(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "labels.txt").touch()
    sources = text("", str(tmp_path / "a" / "b" / "1.jpg"))
    assert _files.find("t", ["labels.txt"], None, sources) == [tmp_path / "labels.txt"]
    with pytest.raises(NoInputError, match=r"task t: there is no other.txt .*--annotations"):
        _files.find("t", ["other.txt"], None, sources)
    with pytest.raises(NoInputError, match="there is no labels.txt"):
        _files.find("t", ["labels.txt"], "x" * 5000, sources)


def test_bmi_says_what_is_wrong_with_a_height_in_metres():
    made = bmi.target({"weight_kg": np.array([70.0, 80]), "height_cm": np.array([1.7, 1.8])})
    assert made.notes[0] == "height_cm: all values look like metres (e.g. 1.7); multiply them by 100"


def test_json_lines_are_valid(celeba_store, monkeypatch, capsys):
    words = ["probe", "celeba", "--store", str(celeba_store.path), "--head", "linear", "--bootstraps", "100", "--json"]
    monkeypatch.setattr(sys, "argv", ["mefem", *words])
    with pytest.raises(SystemExit):
        main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in found] == ["score", "score", "mean"]
    wanted = {"task", "head", "features", "store", "model", "n", "n_groups", "folds", "metrics", "per_fold", "baseline"}
    assert all(wanted <= set(row) for row in found)
    assert found[0]["fold_names"] == ["test"]
