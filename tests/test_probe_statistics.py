"""Intervals that cover, no leak, baselines, calibration, prediction intervals, permutations, means over repeats."""

from dataclasses import replace

import numpy as np
import pytest
from probing import people, text, write_store
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mefem_cli.evaluation import bootstrap, calibration, conformal, covariates, metrics, numbers
from mefem_cli.evaluation.evaluate import (
    compare,
    evaluate,
    permutation_test,
    prepare,
    score_age_and_sex,
    shuffle_people,
)
from mefem_cli.evaluation.job import Job
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.report import rows
from mefem_cli.probes.linear import PENALTIES

FAST = ProbeOptions(bootstraps=200, head="linear", device="cpu")


def regression(num_people=80, photos=1, seed=0, error=1.0) -> Predictions:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_people), photos)
    output = rng.normal(size=num_people)[group]
    target = output + error * rng.normal(size=num_people)[group] + 0.3 * rng.normal(size=len(group))
    return Predictions(text(*range(len(group))), target, output, group % 5, group)


def classification(num_rows=120, num_classes=3, seed=0) -> Predictions:
    rng = np.random.default_rng(seed)
    output = rng.dirichlet(np.ones(num_classes), num_rows)
    target = np.array([rng.choice(num_classes, p=one) for one in output])
    names = tuple(f"c{index}" for index in range(num_classes))
    rows = np.arange(num_rows)
    return Predictions(text(*rows), target, output, rows % 5, rows, names)


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_95_percent_intervals_cover_93_to_97_percent():
    """2,000 simulated studies of 300 people, of whom a third have two photos; truths are those of the population."""
    simulations, num_people = 2000, 300
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(num_people), 1 + (np.arange(num_people) % 3 == 0))
    ids, fold = text(*range(len(group))), np.zeros(len(group), int)
    truth = {"r2": 0.5, "mae": np.sqrt(2 / np.pi * 0.5)}
    covered = dict.fromkeys(truth, 0)
    for number in range(simulations):
        prediction = rng.normal(0, np.sqrt(0.5), num_people)[group]
        error = rng.normal(0, np.sqrt(0.4), num_people)[group] + rng.normal(0, np.sqrt(0.1), len(group))
        one = Predictions(ids, prediction + error, prediction, fold, group)
        found = bootstrap.intervals(one, 400, number)
        for name in truth:
            covered[name] += found[name].low <= truth[name] <= found[name].high
    for name, count in covered.items():
        assert 0.93 <= count / simulations <= 0.97, (name, count / simulations)


def test_a_mean_over_predictions_sees_the_same_people_in_all():
    first, second = regression(), regression(seed=1)
    second = replace(second, group=first.group)
    found = bootstrap.mean_intervals([first, second], 300, 7)
    drawn = np.concatenate(list(bootstrap.draw_weights(first.group, 300, 7)))
    values = (metrics.compute(first, drawn)["r2"] + metrics.compute(second, drawn)["r2"]) / 2
    low, high = np.percentile(values, [2.5, 97.5])
    assert (found["r2"].low, found["r2"].high) == pytest.approx((low, high))
    halves = [np.arange(0, 40), np.arange(40, 80)]
    parts = [first.subset(one) for one in halves]
    by_part = bootstrap.mean_intervals(parts, 300, 7, halves, first.group)["mae"]
    expected = sum(metrics.compute(part, drawn[:, one])["mae"] for part, one in zip(parts, halves, strict=True)) / 2
    assert by_part.low == pytest.approx(np.percentile(expected, 2.5))


def test_repeats_widen_by_what_the_folds_change():
    base = regression()
    same = bootstrap.repeated_intervals([base, base, base], 300, 0)["mae"]
    assert same == bootstrap.intervals(base, 300, 0)["mae"]
    rng = np.random.default_rng(0)
    repeats = [replace(base, output=base.output + 0.5 * rng.normal(size=80)) for _ in range(4)]
    values = np.array([metrics.compute(one, np.ones((1, 80)))["mae"][0] for one in repeats])
    found = bootstrap.repeated_intervals(repeats, 300, 0)["mae"]
    plain = bootstrap.mean_intervals(repeats, 300, 0)["mae"]
    assert found.value == pytest.approx(values.mean())
    between = values.var(ddof=1) / 4
    total = ((plain.value - plain.low) / stats.norm.ppf(0.975)) ** 2 + between
    freedom = total**2 / (between**2 / 3)  # Satterthwaite; the bootstrap's variance counts as known
    assert found.value - found.low == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(total))
    assert found.low < plain.low < plain.high < found.high


def test_repeats_are_other_folds_of_the_same_faces(tmp_path):
    store = write_store(tmp_path / "a.h5", *people(60, 2))
    score = evaluate(store, "y", options=replace(FAST, repeats=3))
    first, *others = score.seeds
    assert len(others) == 2
    singles = [evaluate(store, "y", options=FAST, seed=seed) for seed in range(3)]
    for one, single in zip(score.seeds, singles, strict=True):
        np.testing.assert_array_equal(one.output, single.predictions.output)
        np.testing.assert_array_equal(one.ids, first.ids)
        np.testing.assert_array_equal(one.group, first.group)
    assert not np.array_equal(first.fold, others[0].fold)
    mean = np.mean([single.metrics["r2"].value for single in singles])
    assert score.metrics["r2"].value == pytest.approx(mean)
    (row,) = rows(Job.prepare([store], ["y"], replace(FAST, repeats=3)).run())
    assert (row["repeats"], row["folds"], len(row["per_fold"]["r2"])) == (3, 5, 15)


def test_repeats_are_compared_pair_by_pair(tmp_path):
    options = replace(FAST, repeats=3)
    stores = [
        write_store(tmp_path / f"{name}.h5", *people(60, 2, noise=noise)) for name, noise in (("a", 0.3), ("b", 2))
    ]
    good, bad = (evaluate(store, "y", options=options) for store in stores)
    difference = compare(good, bad, 200)
    gain = good.metrics["r2"].value - bad.metrics["r2"].value
    assert difference.metrics["r2"].value == pytest.approx(gain)
    assert difference.verdict("r2") == "better"
    assert compare(good, good, 200).metrics["r2"].low == 0


# No leak --------------------------------------------------------------------------------------------------------------


def test_shuffled_labels_score_nothing_in_20_seeds(tmp_path):
    """Labels shuffled between people; features of two photos of a person are nearly equal, so a leak would show."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(100, 8)), 2, axis=0) + 0.05 * rng.normal(size=(200, 8))
    labels = {f"x{seed}": np.repeat(rng.normal(size=100), 2) for seed in range(20)}
    labels["coin"] = np.repeat(rng.permutation(np.repeat(["a", "b"], 50)), 2).astype(object)
    store = write_store(tmp_path / "a.h5", features, {**labels, "subject": text(*np.repeat(np.arange(100), 2))})
    for head in ("linear", "knn"):
        scores = [evaluate(store, f"x{seed}", head, options=FAST, seed=seed) for seed in range(20)]
        values = [score.metrics["r2"].value for score in scores]
        assert np.mean(values) <= 0
        assert max(values) <= 0.05
    accuracy = evaluate(store, "coin", options=FAST).metrics["accuracy"].value
    assert abs(accuracy - 0.5) < 4 * 0.5 / np.sqrt(100)
    del store.labels._stored_names["subject"]  # who does not say who is who gets what the warning says
    leaked = [evaluate(store, f"x{seed}", "knn", options=FAST, seed=seed).metrics["r2"].value for seed in range(3)]
    assert min(leaked) > 0.5


# Baselines ------------------------------------------------------------------------------------------------------------


def age_sex_store(tmp_path, drop=()):
    features, labels = people(100, 2)
    rng = np.random.default_rng(5)
    age = np.repeat(rng.uniform(20, 80, 100), 2)
    sex = np.repeat(rng.choice(["f", "m"], 100), 2)
    labels |= {"bmi": 20 + 0.1 * age + 2 * (sex == "m") + rng.normal(size=200), "age": age, "sex": sex.astype(object)}
    return write_store(tmp_path / "a.h5", features, {name: one for name, one in labels.items() if name not in drop})


def test_age_and_sex_are_a_ridge_on_the_same_folds(tmp_path):
    store = age_sex_store(tmp_path)
    problem = prepare(store, "bmi", FAST)
    score = score_age_and_sex(store, problem, FAST)
    x = np.stack([store.labels["age"], store.labels["sex"] == "m", store.labels["sex"] == "f"], axis=1)[problem.rows]
    expected = np.zeros(200)
    for number in range(5):
        train, test = problem.fold != number, problem.fold == number
        errors = [
            sum(
                ((_ridge(x[train], problem.target[train], problem.inner[number], held, penalty)) ** 2).sum()
                for held in range(5)
            )
            for penalty in PENALTIES
        ]
        best = PENALTIES[int(np.argmin(errors))]
        model = make_pipeline(StandardScaler(), Ridge(best)).fit(x[train], problem.target[train])
        expected[test] = model.predict(x[test])
    np.testing.assert_allclose(score.predictions.output, expected, rtol=1e-6)
    assert score.metrics["r2"].value > 0.5


def _ridge(x, y, inner, held, penalty):
    model = make_pipeline(StandardScaler(), Ridge(penalty)).fit(x[inner != held], y[inner != held])
    return model.predict(x[inner == held]) - y[inner == held]


def test_age_and_sex_stand_beside_and_are_compared_with(tmp_path):
    store = age_sex_store(tmp_path)
    found = rows(Job.prepare([store], ["bmi"], FAST).run())
    assert [row["row"] for row in found] == ["score", "baseline", "difference"]
    score, baseline, difference = found
    assert baseline["features"] == difference["minus_features"] == "age+sex"
    gain = score["metrics"]["mae"]["value"] - baseline["metrics"]["mae"]["value"]
    assert difference["metrics"]["mae"]["value"] == pytest.approx(gain)
    assert difference["verdict"]["r2"] == "worse"  # these features know nothing of bmi


@pytest.mark.parametrize(("task", "drop"), [("age", ()), ("sex", ()), ("bmi", ("age",)), ("bmi", ("sex",))])
def test_without_the_labels_or_for_themselves_there_is_no_such_baseline(tmp_path, task, drop):
    store = age_sex_store(tmp_path, drop)
    assert score_age_and_sex(store, prepare(store, task, FAST), FAST) is None


def test_missing_ages_and_sexes_are_marked(tmp_path):
    store = age_sex_store(tmp_path)
    problem = prepare(store, "bmi", FAST)
    columns = {"age": store.labels["age"].copy(), "sex": store.labels["sex"].copy()}
    columns["age"][problem.rows[3]], columns["sex"][problem.rows[4]] = np.nan, "NA"
    read = covariates.age_and_sex(columns, problem)
    assert np.isfinite(read).all()
    assert read[3, 1] == 1
    assert read[:, 1].sum() == 1
    assert read[4, 2] == 1
    assert read[:, 2].sum() == 1


# Calibration ----------------------------------------------------------------------------------------------------------


def test_slope_and_intercept_are_the_least_squares_line():
    one = regression()
    line = LinearRegression().fit(one.output[:, None], one.target)
    found = calibration.calibration(one)
    assert (found["slope"], found["intercept"]) == pytest.approx((line.coef_[0], line.intercept_))
    doubled = calibration.calibration(replace(one, output=2 * one.output))
    assert doubled["slope"] == pytest.approx(found["slope"] / 2)
    assert np.isnan(calibration.calibration(replace(one, output=np.full(80, 3.0)))["slope"])


def test_the_calibration_error_is_the_binned_one():
    one = classification()
    confidence, right = one.output.max(axis=1), one.prediction == one.target
    expected = 0.0
    for number in range(15):
        rows = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if rows.any():
            expected += rows.mean() * abs(right[rows].mean() - confidence[rows].mean())
    assert calibration.calibration(one)["ece"] == pytest.approx(expected)
    sure = replace(one, output=np.eye(3)[one.prediction])
    assert calibration.calibration(sure)["ece"] == pytest.approx(1 - right.mean())


# Prediction intervals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rank"), [(19, 18), (20, 19), (9, 9), (8, None), (199, 180)])
def test_the_rank_is_that_of_a_finite_sample(count, rank):
    scores = np.random.default_rng(0).permutation(count) + 1.0
    assert conformal.quantile(scores, np.arange(count)) == (rank or np.inf)


def test_each_photo_counts_a_share_of_its_person():
    scores = np.concatenate([np.zeros(50), np.arange(1.0, 19)])  # one person with 50 photos, 18 with one
    group = np.concatenate([np.zeros(50, int), np.arange(1, 19)])
    assert conformal.quantile(scores, group) == 17  # 18 of 19 people, the first of whom has 0


def test_split_conformal_holds_90_percent_of_new_people():
    """19 people to calibrate on: 18 of 20 ranks hold the new one, 90 % exactly; with the plain quantile it is less."""
    rng = np.random.default_rng(0)
    hits = [_holds(rng, 19, lambda one, group: conformal.quantile(one, group)) for _ in range(8000)]
    assert np.mean(hits) == pytest.approx(0.9, abs=0.011)  # 3 standard errors


def test_many_photos_of_few_people_do_not_make_it_too_sure():
    rng = np.random.default_rng(0)
    hits = [_holds(rng, 25, lambda one, group: conformal.quantile(one, group), photos=9) for _ in range(4000)]
    assert 0.89 < np.mean(hits) < 0.95
    naive = [_holds(rng, 25, lambda one, group: conformal.quantile(one, np.arange(len(one))), 9) for _ in range(4000)]
    assert np.mean(naive) < np.mean(hits)


def _holds(rng, num_people, bound, photos=1):
    """One study: photos of a person share most of their error; the first person is new."""
    group = np.concatenate([[0], 1 + np.repeat(np.arange(num_people), rng.integers(1, photos + 1, num_people))])
    scores = np.abs(3 * rng.normal(size=num_people + 1)[group] + rng.normal(size=len(group)))
    return scores[0] <= bound(scores[1:], group[1:])


def test_coverage_is_measured_on_folds_that_the_interval_has_not_seen():
    one = regression(300)
    found = conformal.cross(one)
    held, width = np.zeros(300, bool), np.zeros(300)
    for number in range(5):
        errors = np.sort(np.abs(one.target - one.output)[one.fold != number])
        bound = errors[int(np.ceil((len(errors) + 1) * 0.9)) - 1]
        held[one.fold == number] = (np.abs(one.target - one.output) <= bound)[one.fold == number]
        width[one.fold == number] = 2 * bound
    assert (found.coverage, found.width) == pytest.approx((held.mean(), width.mean()))
    assert 0.85 < found.coverage < 0.95
    sets = conformal.cross(classification(600))
    assert 0.85 < sets.coverage < 0.95
    assert 1 < sets.width < 3
    single = conformal.cross(replace(one, fold=np.zeros(300, int)))
    assert 0.83 < single.coverage < 0.96
    assert conformal.cross(regression(5)).half_width == np.inf


# Permutations ---------------------------------------------------------------------------------------------------------


def test_shuffling_moves_whole_people():
    group = np.array([0, 0, 1, 1, 2, 2, 3, 4, 4, 4])
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        source = shuffle_people(group, rng)
        assert sorted(source) == list(range(10))
        assert source[6] == 6  # the only person with one photo
        for one in range(3):
            photos = source[2 * one : 2 * one + 2]
            assert photos[0] % 2 == 0
            assert photos[1] == photos[0] + 1
        seen.add(tuple(source[:6]))
    assert len(seen) == 6


def test_p_is_small_for_a_signal_and_spread_out_for_none(tmp_path):
    features, labels = people(60)
    rng = np.random.default_rng(0)
    labels |= {f"x{number}": rng.normal(size=60) for number in range(12)}
    store = write_store(tmp_path / "a.h5", features, labels)
    options = replace(FAST, permute=19, bootstraps=100)

    def p_value(task):
        problem = prepare(store, task, options)
        return permutation_test(store, problem, evaluate(store, task, options=options), options).p_values["r2"]

    assert p_value("y") == 1 / 20
    values = [p_value(f"x{number}") for number in range(12)]
    assert min(values) >= 1 / 20
    assert 0.2 < np.mean(values) < 0.8
    found = rows(Job.prepare([store], ["y"], options).run())[0]
    assert found["permutation"]["n"] == 19
    assert found["permutation"]["p"]["mae"] == 1 / 20


def test_rows_say_it_all(tmp_path):
    features, labels = people(60, 2)
    store = write_store(tmp_path / "a.h5", features, labels)
    number, classes = rows(Job.prepare([store], ["y", "c"], FAST).run())
    assert set(number["calibration"]) == {"slope", "intercept"}
    assert set(classes["calibration"]) == {"ece"}
    for row in (number, classes):
        assert set(row["conformal"]) == {"level", "half_width", "coverage", "width"}
        assert 0.8 < row["conformal"]["coverage"] <= 1


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ((0.412, 0.371, 0.45), "+0.412 [0.371, 0.450]"),
        ((-0.0002, -0.0004, -0.0001), "-0.0002 [-0.0004, -0.0001]"),  # a clear difference has its sign
        ((0.0124, 0.0002, 0.03), "+0.0124 [0.0002, 0.0300]"),  # its end is not 0
        ((-0.0002, -0.03, 0.03), "0.000 [-0.030, 0.030]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
        ((13.7, 12.31, 17.01), "+13.70 [12.31, 17.01]"),
        ((1234.5, 1200.0, 1300.0), "+1234 [1200, 1300]"),
        ((1e-9, 1e-10, 2e-9), "0.000000 [0.000000, 0.000000]"),  # there is an end to it
        ((float("nan"), float("nan"), float("nan")), "- [-, -]"),
    ],
)
def test_an_interval_has_the_digits_that_tell_its_ends_apart(interval, shown):
    assert numbers.cell(bootstrap.Interval(*interval), "+") == shown
