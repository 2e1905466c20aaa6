"""Labels, folds, metrics, intervals, and that no choice ever sees a test fold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import bootstrap, metrics
from mefem_cli.evaluation.evaluate import (
    ProbeOptions,
    compare,
    evaluate,
    evaluate_head,
    prepare,
    subgroups,
)
from mefem_cli.evaluation.folds import assign_folds, join_rows, strata
from mefem_cli.evaluation.labels import load_target
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.tasks import age, bmi

FAST = ProbeOptions(bootstraps=200, device="cpu")


def text(*values):
    return np.array(values, dtype=object)


@pytest.fixture
def make_store(tmp_path):
    """Return a function that writes a store of `num_faces` with features that hold `age` and `sex`, and opens it."""

    def make(num_faces=200, people=100, noise=1.0, seed=0, name="a", order=None, patches=0, drop=(), **labels):
        rng = np.random.default_rng(0)  # labels do not depend on the seed: two stores hold the same people
        person = np.arange(num_faces) % people
        hidden = rng.normal(size=(people, 4))[person] + 0.3 * rng.normal(size=(num_faces, 4))
        columns = {
            "age": np.round(40 + 10 * hidden[:, 0], 1),
            "sex": text(*np.where(hidden[:, 1] > 0, "female", "male")),
            "subject": text(*(f"p{number}" for number in person)),
            **labels,
        }
        noisy = np.random.default_rng(seed + 1)
        cls = np.concatenate(
            [hidden + noise * noisy.normal(size=hidden.shape), noisy.normal(size=(num_faces, 4))], axis=1
        )
        ids = [f"{number:04x}" for number in range(num_faces)]
        rows = np.arange(num_faces) if order is None else order
        rows = rows[~np.isin(rows, drop)]
        path = tmp_path / f"{name}.h5"
        tokens = cls[:, None] + noisy.normal(size=(num_faces, max(patches, 1), 8))
        with FeatureWriter(path, {"model": {"name": name}}, 8, num_patches=patches) as writer:
            writer.append([ids[row] for row in rows], cls[rows], cls[rows] * 2, tokens[rows] if patches else None)
            sha256 = text(*(f"sha{number}" for number in range(num_faces)))
            writer.finish({key: value[rows] for key, value in columns.items()}, {"sha256": sha256[rows]})
        return FeatureStore.open(path)

    return make


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (text("f", "m", "", "f"), "classification", ("f", "m")),
        (np.array([0.0, 1.0, np.nan, 1.0]), "classification", ("0", "1")),
        (np.array([1.5, 2.0, 3.0]), "regression", ()),
        (np.arange(11.0), "regression", ()),
        (np.arange(10.0), "classification", tuple("0123456789")),
        (text("1.5", " 2 ", "NA", "3"), "regression", ()),
        (text("1", "1.0", "2"), "classification", ("1", "2")),
    ],
)
def test_kind_is_read_from_the_label(values, kind, classes):
    target = load_target({"x": values}, "x")
    assert (target.kind, target.classes) == (kind, classes)


def test_kind_can_be_overridden():
    assert load_target({"x": np.array([0.0, 1, 1])}, "x", "regression").kind == "regression"
    assert load_target({"x": np.array([1.5, 2.5])}, "x", "classification").classes == ("1.5", "2.5")


def test_missing_values_are_left_out_and_counted():
    target = load_target({"x": np.array([1.5, np.nan, 3.5, np.inf])}, "x")
    np.testing.assert_array_equal(target.rows, [0, 2])
    assert "2 of 4 faces" in target.notes[0]


@pytest.mark.parametrize(
    ("labels", "task", "kind", "error", "words"),
    [
        ({"age_est": np.ones(3)}, "age_es", None, NoInputError, 'no label "age_es"; did you mean "age_est"'),
        ({}, "x", None, NoInputError, "no labels.*--labels"),
        ({"age_est": np.ones(3)}, "age", None, NoInputError, "no label age; did you mean"),
        ({"height_cm": np.ones(3)}, "bmi", None, NoInputError, "bmi, nor weight_kg with height_cm"),
        ({"x": np.ones(3)}, "x", None, NoInputError, "the label is 1 for all 3 faces"),
        ({"x": text("a", "a")}, "x", None, NoInputError, "the label is a for all 2 faces"),
        ({"x": np.full(3, np.nan)}, "x", None, NoInputError, "no face has a usable label"),
        ({"x": text("", "NA")}, "x", None, NoInputError, "no face has a usable label"),
        ({"x": text("a", "b", "c")}, "x", "regression", UsageError, "'a' is no number"),
        ({"age": text("31", "old")}, "age", None, UsageError, "label age: 'old' is no number"),
    ],
)
def test_unusable_labels_are_one_line(labels, task, kind, error, words):
    with pytest.raises(error, match=words) as caught:
        load_target(labels, task, kind)
    assert "\n" not in str(caught.value)


def test_bmi_from_weight_and_height():
    labels = {"weight_kg": np.array([70.0, 90, np.nan, 5000]), "height_cm": np.array([175.0, 180, 170, 160])}
    values = bmi.target(labels)
    np.testing.assert_allclose(values.values, [70 / 1.75**2, 90 / 1.8**2, np.nan, np.nan])
    assert values.notes == ("weight_kg: 1 implausible values left out (outside 2-400 kg, e.g. 5000)",)
    own = load_target({"bmi": np.array([20.0, 30, 300]), **{k: v[:3] for k, v in labels.items()}}, "bmi")
    np.testing.assert_array_equal(own.values, [20, 30])
    assert own.kind == "regression"


@pytest.mark.parametrize(("factor", "unit"), [(0.01, "metres"), (1 / 30.48, "feet"), (1 / 2.54, "inches")])
def test_heights_in_another_unit_are_named(factor, unit):
    labels = {"weight_kg": np.array([70.0, 90, 60]), "height_cm": np.array([175.0, 180, 160]) * factor}
    if unit == "inches":  # some inches pass for centimetres: the note is there all the same
        assert "looks like inches" in bmi.target(labels).notes[0]
        return
    with pytest.raises(NoInputError, match=f"all values look like {unit}"):
        load_target(labels, "bmi")


def test_some_heights_in_metres_and_weights_in_pounds_are_named():
    height, weight = np.array([175.0, 1.8, 1.6, 180]), np.array([70.0, 90, 60, 80])
    made = bmi.target({"weight_kg": weight, "height_cm": height})
    assert made.notes[0] == "height_cm: 2 of 4 values look like metres (e.g. 1.8); multiply them by 100"
    assert not [note for note in made.notes if "inches" in note or "pounds" in note]
    tall = np.array([175.0, 180, 160, 180])
    notes = bmi.target({"weight_kg": weight / 0.4536, "height_cm": tall}).notes
    assert notes == ("weight_kg looks like pounds (median body mass index 53.1); multiply it by 0.4536",)
    assert bmi.target({"weight_kg": weight, "height_cm": tall}).notes == ()


def test_words_among_numbers_are_named_rather_than_made_classes_of_all_numbers():
    cells = text(*(f"{20 + number / 10:.1f}" for number in range(30)), "unknown", "NA")
    with pytest.raises(UsageError, match="label x: 'unknown' is no number, as 30 other values are; empty it"):
        load_target({"x": cells}, "x")
    assert load_target({"x": cells}, "x", "classification").kind == "classification"
    grades = text("1", "2", "3", "unknown")
    assert load_target({"x": grades}, "x").classes == ("1", "2", "3", "unknown")
    names = text(*(f"p{number}" for number in range(30)), "7")
    assert load_target({"x": names}, "x").kind == "classification"


def test_ages_out_of_range_are_left_out():
    values = age.target({"age": np.array([-1.0, 0, 120, 999])})
    np.testing.assert_array_equal(values.values, [np.nan, 0, 120, np.nan])


# Folds ----------------------------------------------------------------------------------------------------------------


def test_rows_are_joined_by_any_shared_key():
    subject = text("ann", "ann", "bob", "", "", "cy")
    sha256 = text("1", "2", "2", "3", "4", "5")
    np.testing.assert_array_equal(join_rows(subject, sha256), [0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(join_rows(np.array([7.0, np.nan, np.nan, 7.0])), [0, 1, 2, 0])


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 30), min_size=20, max_size=120),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_folds_keep_groups_together_and_repeat(groups, num_folds, seed):
    group = np.unique(groups, return_inverse=True)[1]
    row_strata = np.arange(len(group)) % 3
    fold = assign_folds(group, row_strata, num_folds, seed)
    assert ((fold >= 0) & (fold < num_folds)).all()
    assert all(len(np.unique(fold[group == one])) == 1 for one in range(group.max() + 1))
    np.testing.assert_array_equal(fold, assign_folds(group, row_strata, num_folds, seed))


def test_single_faces_are_stratified_exactly():
    row_strata = np.repeat([0, 1, 2], [52, 31, 17])
    fold = assign_folds(np.arange(100), row_strata, 5, 0)
    counts = np.stack([np.bincount(row_strata[fold == number], minlength=3) for number in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert not np.array_equal(fold, assign_folds(np.arange(100), row_strata, 5, 1))


def test_people_with_several_faces_are_stratified_nearly():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 200)
    group = np.repeat(np.arange(200), sizes)
    row_strata = np.repeat(rng.integers(0, 4, 200), sizes)
    fold = assign_folds(group, row_strata, 5, 0)
    counts = np.stack([np.bincount(row_strata[fold == number], minlength=4) for number in range(5)])
    assert (np.ptp(counts, axis=0) <= 3).all()
    assert np.ptp(counts.sum(axis=1)) <= 6


def test_strata_of_numbers_are_quantile_bins():
    values = np.random.default_rng(0).normal(size=1000)
    found = strata(values, False, 5)
    assert set(np.bincount(found)) == {100}
    assert all(values[found == one].max() <= values[found == one + 1].min() for one in range(9))
    np.testing.assert_array_equal(strata(np.array([3.0, 1, 2]), False, 5), [0, 0, 0])


def test_folds_ignore_features_and_row_order(make_store):
    first = prepare(make_store(), "age", FAST)
    other = prepare(make_store(name="b", noise=5.0, seed=9), "age", FAST)
    shuffled = prepare(make_store(name="c", order=np.random.default_rng(3).permutation(200)), "age", FAST)
    for problem in (other, shuffled):
        np.testing.assert_array_equal(problem.ids, first.ids)
        np.testing.assert_array_equal(problem.fold, first.fold)
        for one, two in zip(problem.inner, first.inner, strict=True):
            np.testing.assert_array_equal(one, two)
    assert not np.array_equal(prepare(make_store(), "age", FAST, seed=1).fold, first.fold)


def test_people_and_copies_stay_in_one_fold(make_store):
    store = make_store()
    store.meta._read["sha256"] = text(*(f"sha{number}" for number in range(199)), "sha0")  # the last copies the first
    problem = prepare(store, "age", FAST)
    assert (problem.num_groups, len(problem.ids)) == (99, 200)
    assert problem.fold[0] == problem.fold[199] == problem.fold[100] == problem.fold[99]
    assert any("1 person shares a photo" in note for note in problem.notes)
    for number, inner in enumerate(problem.inner):
        group = problem.group[problem.fold != number]
        assert all(len(np.unique(inner[group == one])) == 1 for one in np.unique(group))


def test_without_groups_there_is_a_warning(make_store):
    store = make_store()
    assert not any("--group" in note for note in prepare(store, "age", FAST).notes)
    del store.labels._stored_names["subject"]
    problem = prepare(store, "age", FAST)
    assert problem.num_groups == 200
    assert any("--group" in note for note in problem.notes)
    with pytest.raises(NoInputError, match='no label "who"'):
        prepare(store, "age", replace(FAST, group="who"))


def test_too_few_for_the_folds(make_store):
    rare = text(*["a"] * 194, *["b"] * 3, *[""] * 3)
    few = np.array([1.5, 2.5, 3.5] + [np.nan] * 197)
    store = make_store(rare=rare, few=few)
    with pytest.raises(UsageError, match='class "b" has 3 groups, fewer than the 5 folds.*--folds 3'):
        prepare(store, "rare", FAST)
    with pytest.raises(UsageError, match="3 faces of 3 groups.*--folds 3"):
        prepare(store, "few", FAST)
    assert prepare(store, "rare", replace(FAST, folds=3)).num_folds == 3


# Metrics and intervals ------------------------------------------------------------------------------------------------


def random_predictions(num_classes: int, num_rows: int = 90, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    ids, fold = text(*map(str, range(num_rows))), np.arange(num_rows) % 3
    if num_classes:
        output = np.round(rng.dirichlet(np.ones(num_classes), num_rows), 1)  # with ties
        output /= output.sum(axis=1, keepdims=True)
        names = tuple(f"c{index}" for index in range(num_classes))
        return Predictions(ids, rng.integers(0, num_classes, num_rows), output, fold, np.arange(num_rows), names)
    target = rng.normal(500, 2, num_rows)
    return Predictions(ids, target, target + rng.normal(size=num_rows), fold, np.arange(num_rows))


def test_regression_metrics_equal_scikit_learn():
    one = random_predictions(0)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, len(one))).astype(float)
    found = metrics.compute(one, weights)
    for row, w in enumerate(weights):
        args = (one.target, one.output)
        assert found["r2"][row] == pytest.approx(sklearn_metrics.r2_score(*args, sample_weight=w))
        assert found["mae"][row] == pytest.approx(sklearn_metrics.mean_absolute_error(*args, sample_weight=w))
        assert found["rmse"][row] ** 2 == pytest.approx(sklearn_metrics.mean_squared_error(*args, sample_weight=w))
        repeated = np.repeat(np.arange(len(one)), w.astype(int))
        assert found["pearson_r"][row] == pytest.approx(np.corrcoef(one.target[repeated], one.output[repeated])[0, 1])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_classification_metrics_equal_scikit_learn(num_classes):
    one = random_predictions(num_classes)
    weights = np.random.default_rng(1).integers(1, 4, size=(5, len(one))).astype(float)
    found = metrics.compute(one, weights)
    for row, w in enumerate(weights):
        args = (one.target, one.prediction)
        assert found["accuracy"][row] == pytest.approx(sklearn_metrics.accuracy_score(*args, sample_weight=w))
        balanced = sklearn_metrics.balanced_accuracy_score(*args, sample_weight=w)
        assert found["balanced_accuracy"][row] == pytest.approx(balanced)
        assert found["f1"][row] == pytest.approx(sklearn_metrics.f1_score(*args, average="macro", sample_weight=w))
        areas = []
        for fold in range(3):
            rows = one.fold == fold
            positives = [1] if num_classes == 2 else range(num_classes)
            each = [
                sklearn_metrics.roc_auc_score(one.target[rows] == p, one.output[rows, p], sample_weight=w[rows])
                for p in positives
            ]
            areas.append(np.mean(each))
        assert found["auroc"][row] == pytest.approx(np.mean(areas))


def test_undefined_metrics_are_nan_not_errors():
    constant = replace(random_predictions(0), output=np.full(90, 500.0))
    assert np.isnan(metrics.compute(constant, np.ones((1, 90)))["pearson_r"][0])
    same = replace(random_predictions(2), target=np.zeros(90, int))
    found = metrics.compute(same, np.ones((1, 90)))
    assert np.isnan(found["auroc"][0])
    assert found["balanced_accuracy"][0] == found["accuracy"][0]
    assert np.isnan(bootstrap.intervals(same, 100, 0)["auroc"].low)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 simulated studies of 100 people with 3 faces; a face's error is mostly its person's."""
    simulations, people, faces = 400, 100, 3
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(people), faces)
    ids, fold = text(*map(str, range(len(group)))), np.zeros(len(group), int)
    truth = {"r2": 0.5, "mae": np.sqrt(2 / np.pi * 0.5), "rmse": np.sqrt(0.5)}
    covered = dict.fromkeys(truth, 0)
    for number in range(simulations):
        prediction = rng.normal(0, np.sqrt(0.5), people)[group]
        error = rng.normal(0, np.sqrt(0.4), people)[group] + rng.normal(0, np.sqrt(0.1), len(group))
        one = Predictions(ids, prediction + error, prediction, fold, group)
        for name, interval in bootstrap.intervals(one, 300, number).items():
            if name in truth:
                covered[name] += interval.low <= truth[name] <= interval.high
    # Binomial: 95 % +- 4 standard errors of 1.1 points; percentile intervals of 100 people fall about a point short.
    # Resampling faces instead of people covers r2 in about 74 % of the studies.
    for name, count in covered.items():
        assert 0.895 <= count / simulations <= 0.994, (name, count / simulations)


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    first = random_predictions(0, 400)
    worse = replace(first, output=first.output + 0.3 * rng.normal(size=400))
    difference = bootstrap.paired_difference(first, worse, 1000, 0)["r2"]
    one, two = bootstrap.intervals(first, 1000, 0)["r2"], bootstrap.intervals(worse, 1000, 0)["r2"]
    assert difference.value == pytest.approx(one.value - two.value)
    assert difference.low > 0
    assert one.low < two.high  # the intervals overlap, so only the pairing shows it
    same = bootstrap.paired_difference(first, first, 200, 0)["r2"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_compare_aligns_by_id_and_names_the_better(make_store):
    good = evaluate(make_store(), "age", options=FAST)
    store = make_store(name="b", noise=3.0, order=np.random.default_rng(1).permutation(200), drop=[3, 5])
    bad = evaluate(store, "age", options=FAST)
    difference = compare(good, bad, 500)
    assert difference.num_rows == 198
    assert difference.metrics["r2"].low > 0
    assert {name: difference.verdict(name) for name in ("r2", "mae")} == {"r2": "better", "mae": "better"}
    assert compare(bad, good, 500).verdict("mae") == "worse"
    relabelled = make_store(name="c", age=np.arange(200.0))
    with pytest.raises(NoInputError, match="disagree on age"):
        compare(good, evaluate(relabelled, "age", options=FAST))


# No leak --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "features", "task"),
    [
        ("linear", "cls", "age"),
        ("linear", "cls+mean", "sex"),
        ("knn", "mean", "sex"),
        ("mlp", "cls", "age"),
        ("attentive", "patches+cls", "sex"),
    ],
)
def test_predictions_of_a_fold_do_not_depend_on_its_labels(make_store, head, features, task):
    store = make_store(patches=3)
    problem = prepare(store, task, FAST)
    before = evaluate_head(store, problem, head, features, FAST).predictions
    target = problem.target.copy()
    tested = np.flatnonzero(problem.fold == 2)
    target[tested] = target[tested][::-1]
    after = evaluate_head(store, replace(problem, target=target), head, features, FAST).predictions
    np.testing.assert_array_equal(before.output[tested], after.output[tested])
    assert not np.array_equal(before.output, after.output)  # the others learned from those labels


def test_shuffled_labels_score_nothing(make_store):
    rng = np.random.default_rng(0)
    shuffled = {f"x{number}": rng.permutation(np.linspace(1.5, 9, 200)) for number in range(8)}
    coin = text(*rng.permutation(np.repeat(["a", "b"], 100)))
    store = make_store(coin=coin, **shuffled)
    scores = [evaluate(store, name, head, options=FAST) for name in shuffled for head in ("linear", "knn")]
    values = [score.metrics["r2"].value for score in scores]
    assert np.mean(values) <= 0
    assert max(values) < 0.05
    accuracy = evaluate(store, "coin", options=FAST).metrics["accuracy"].value
    assert abs(accuracy - 0.5) < 4 * 0.5 / np.sqrt(200)


def test_scores_stand_beside_their_baseline(make_store):
    store = make_store(noise=0.3)
    score = evaluate(store, "age", options=FAST)
    assert score.metrics["r2"].value > 0.8
    assert -0.05 < score.baseline["r2"] <= 0
    assert "pearson_r" not in score.baseline
    assert len(score.chosen) == 5
    sexes = evaluate(store, "sex", options=FAST)
    share = max(np.mean(store.labels["sex"] == one) for one in ("female", "male"))
    assert sexes.baseline["accuracy"] == pytest.approx(share)
    assert sexes.baseline["auroc"] == 0.5


def test_subgroups_are_those_faces_and_small_ones_are_hidden(make_store):
    site = text(*["north"] * 120, *["south"] * 75, *["tiny"] * 3, *[""] * 2)
    store = make_store(site=site, people=200)
    score = evaluate(store, "age", options=FAST)
    shown, num_hidden = subgroups(score, "site", site, 200)
    assert [one.value for one in shown] == ["north", "south"]
    assert num_hidden == 1
    rows = slice(0, 120)
    expected = sklearn_metrics.r2_score(score.predictions.target[rows], score.predictions.output[rows])
    assert shown[0].metrics["r2"].value == pytest.approx(expected)
    quarters, _ = subgroups(score, "age", store.labels["age"], 200)
    assert len(quarters) == 4
    assert sum(len(one.predictions) for one in quarters) == 200
