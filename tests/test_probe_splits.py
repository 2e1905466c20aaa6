"""Who is tested on: given splits, files of folds, sources left out, two stores; fractions, averages, look-alikes."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probing import people, text, write_store

from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.evaluation import duplicates, splits
from mefem_cli.evaluation.evaluate import compare, evaluate, learning_curve, prepare
from mefem_cli.evaluation.job import Job, open_pairs
from mefem_cli.evaluation.metrics import Predictions
from mefem_cli.evaluation.options import ProbeOptions
from mefem_cli.evaluation.pair import StorePair
from mefem_cli.evaluation.problem import with_fraction
from mefem_cli.evaluation.report import rows
from mefem_cli.main import main
from mefem_cli.probes.linear import ridge_path

FAST = ProbeOptions(bootstraps=100, head="linear", device="cpu")


@pytest.fixture
def make_store(tmp_path):
    """Return a function that writes a store of 60 people with two photos each, with more labels and meta columns."""

    def make(name="a", meta=None, seed=0, noise=0.5, model=None, num_people=60, **more):
        features, labels = people(num_people, 2, seed, noise)
        return write_store(tmp_path / f"{name}.h5", features, {**labels, **more}, meta, model)

    return make


# Words and numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fold", "chooses"),
    [
        (text("train", "test", "", "train"), [-1, 0, -2, -1], []),
        (text("Training", "TEST", "Validation", "NA"), [-1, 0, -1, -2], [2]),
        (text("train", "val", "train"), [-1, 0, -1], []),  # without test, val is tested on
        (text("3", "5", "3"), [0, 1, 0], []),
        (np.array([0.0, 1, np.nan, 4]), [0, 1, -2, 2], []),
    ],
)
def test_words_and_numbers_say_who_is_tested_on(values, fold, chooses):
    split = splits.parse(values, "--split part")
    np.testing.assert_array_equal(split.fold, fold)
    np.testing.assert_array_equal(np.flatnonzero(split.chooses), chooses)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (text("train", "holdout"), '"holdout" is none of train, val, test'),
        (text("train", "train"), "holds only train; wanted train and test"),
        (text("test", ""), "holds only test"),
        (text("", "NA"), "wanted"),
        (np.array([0.5, 1.5]), "wanted 2 to 50 whole ones"),
        (np.arange(60.0), "holds 60 numbers"),
        (np.array([1.0, 1.0]), "holds 1 numbers"),
    ],
)
def test_other_splits_are_one_line(values, words):
    with pytest.raises(UsageError, match=words) as caught:
        splits.parse(values, "--split part")
    assert str(caught.value).startswith("--split part")


def test_a_split_trains_on_train_chooses_on_val_and_predicts_test(make_store):
    part = text(*["train"] * 60, *["val"] * 24, *["test"] * 34, *[""] * 2)
    store = make_store(part=part)
    problem = prepare(store, "y", replace(FAST, split="part"))
    assert len(problem.ids) == 118
    np.testing.assert_array_equal(problem.train[0], np.arange(84))
    np.testing.assert_array_equal(problem.inner[0], [-1] * 60 + [0] * 24)
    score = evaluate(store, "y", options=replace(FAST, split="part"))
    np.testing.assert_array_equal(score.predictions.ids, problem.ids[84:])
    x, y = store.read("cls").astype(float), store.labels["y"]
    penalty = score.chosen[0]["penalty"]
    expected = ridge_path(x[:84], y[:84], x[84:118], [penalty])[0]
    np.testing.assert_allclose(score.predictions.output, expected)
    from mefem_cli.probes.linear import PENALTIES

    errors = ((ridge_path(x[:60], y[:60], x[60:84], PENALTIES) - y[60:84]) ** 2).sum(axis=1)
    assert penalty == PENALTIES[int(np.argmin(errors))]


@pytest.mark.parametrize("head", ["linear", "mlp", "knn"])
def test_labels_of_the_test_part_teach_nothing(make_store, head):
    part = text(*["train"] * 60, *["val"] * 24, *["test"] * 36)
    store = make_store(part=part)
    options = replace(FAST, split="part", head=head)
    before = evaluate(store, "y", head, options=options).predictions.output
    changed = store.labels["y"].copy()
    changed[84:] = changed[84:][::-1]
    store.labels._read["y"] = changed
    np.testing.assert_array_equal(evaluate(store, "y", head, options=options).predictions.output, before)


def test_people_on_both_sides_are_not_learned_from(make_store):
    part = text(*["train"] * 61, *["test"] * 59)  # row 60 and 61 are one person
    problem = prepare(make_store(part=part), "y", replace(FAST, split="part"))
    np.testing.assert_array_equal(problem.train[0], np.arange(60))
    assert any("1 faces are not learned from in a fold that tests the same people" in note for note in problem.notes)


def test_numbered_folds_are_used_as_they_are(make_store):
    number = np.repeat(np.arange(60) % 3, 2).astype(float) + 1
    store = make_store(number=number)
    problem = prepare(store, "c", replace(FAST, split="number"))
    np.testing.assert_array_equal(problem.fold, number - 1)
    assert problem.fold_names == ("1", "2", "3")
    assert len(evaluate(store, "c", options=replace(FAST, split="number")).predictions) == 120


@pytest.mark.parametrize("key", ["subject", "id", "path"])
def test_a_file_of_folds(make_store, tmp_path, key):
    store = make_store(meta={"source": text(*(f"/photos/{row}.jpg" for row in range(120)))})
    fold = np.repeat(np.arange(60) % 4, 2)
    keys = {
        "subject": np.repeat(np.arange(60), 2),
        "id": store.ids,
        "path": [f"photos/{row}.jpg" for row in range(120)],
    }
    lines = dict.fromkeys(f"{one},{two}" for one, two in zip(keys[key], fold, strict=True))
    path = tmp_path / "folds.csv"
    path.write_text(f"{key},fold\n" + "\n".join([*lines][:-1]) + "\n")  # the last has no fold
    problem = prepare(store, "y", replace(FAST, folds=str(path)))
    count = 118 if key == "subject" else 119
    np.testing.assert_array_equal(problem.fold, fold[:count])
    assert any("belong to no part of the split" in note for note in problem.notes)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("subject,part\n1,2\n", UsageError, "it has no column fold"),
        ("who,fold\n1,2\n", UsageError, "it has no column path, id or a label"),
        ("subject,fold\nanna,1\nbob,2\n", NoInputError, "names none of the faces"),
        ("subject,fold\n1,first\n2,second\n", UsageError, '"first" is none of train'),
    ],
)
def test_a_file_that_holds_no_folds_is_one_line(make_store, tmp_path, content, error, words):
    (tmp_path / "folds.csv").write_text(content)
    with pytest.raises(error, match=words):
        prepare(make_store(), "y", replace(FAST, folds=str(tmp_path / "folds.csv")))


def test_sources_are_left_out_one_at_a_time(make_store):
    site = text(*["north"] * 50, *["south"] * 40, *["west"] * 28, "", "")
    store = make_store(site=site)
    options = replace(FAST, leave_out="site")
    problem = prepare(store, "y", options)
    assert problem.fold_names == ("north", "south", "west")
    np.testing.assert_array_equal(problem.train[1], [*range(50), *range(90, 120)])
    results = Job.prepare([store], ["y"], options).run()
    assert len(results.scores[0].predictions) == 118  # who belongs to no source is only learned from
    assert [one.value for one in results.subgroups] == ["north", "south"]  # west has 14 people
    with pytest.raises(UsageError, match="--leave-out y: it has"):
        prepare(store, "y", replace(FAST, leave_out="y"))
    with pytest.raises(UsageError, match='--leave-out sit: there is no label "sit"; did you mean "site"'):
        prepare(store, "y", replace(FAST, leave_out="sit"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"split": "a", "leave_out": "b"}, "--split and --leave-out both say who is tested on"),
        ({"folds": "x.csv", "split": "a"}, "--split and --folds FILE"),
        ({"train_store": ["a"]}, "come in pairs"),
        ({"train_store": ["a"], "test_store": ["b"], "store": ["c"]}, "--store and --train-store"),
        ({"fraction": "0"}, "--fraction 0: wanted"),
        ({"fraction": "0.1,2"}, "--fraction 0.1,2: wanted"),
        ({"fraction": "few"}, "--fraction few: wanted"),
        ({"repeats": 0}, "--repeats 0"),
        ({"permute": -1}, "--permute -1"),
    ],
)
def test_options_that_contradict_each_other(given, words):
    with pytest.raises(UsageError, match=words):
        ProbeOptions(**given)


# Two stores -----------------------------------------------------------------------------------------------------------


def test_one_store_teaches_another_is_tested_on(make_store):
    train, test = make_store("train"), make_store("test", seed=1, num_people=40)
    options = replace(FAST, train_store=[str(train.path)], test_store=[str(test.path)])
    (pair,) = open_pairs(options)
    score = evaluate(pair, "y", options=options)
    np.testing.assert_array_equal(score.predictions.ids, test.ids)
    np.testing.assert_array_equal(score.predictions.target, test.labels["y"])
    x, y = train.read("cls").astype(float), train.labels["y"]
    expected = ridge_path(x, y, test.read("cls").astype(float), [score.chosen[0]["penalty"]])[0]
    np.testing.assert_allclose(score.predictions.output, expected)
    problem = prepare(pair, "y", options)
    assert problem.num_groups == 40  # subject 1 of one store is not subject 1 of the other
    assert len(problem.train[0]) == 120
    assert Job.prepare([pair], ["y"], options, limit=50).problems[0][0].fold.tolist() == [0] * 50 + [-1] * 50
    inputs = Job.prepare([pair], ["y"], options).inputs
    assert inputs == {str(store.path): store.sha256 for store in (train, test)}


def test_pairs_are_compared_on_the_test_faces(make_store):
    good = StorePair(make_store("g1", noise=0.2), make_store("g2", noise=0.2, seed=1))
    bad = StorePair(make_store("b1", noise=3), make_store("b2", noise=3, seed=1))
    difference = compare(evaluate(good, "y", options=FAST), evaluate(bad, "y", options=FAST), 200)
    assert (difference.num_rows, difference.verdict("r2")) == (120, "better")


def test_copies_in_the_other_store_are_not_learned_from(make_store):
    sha = [f"sha{row}" for row in range(120)]
    train = make_store("train", meta={"sha256": text(*sha)})
    test = make_store("test", seed=1, meta={"sha256": text(*(f"other{row}" for row in range(119)), sha[6])})
    problem = prepare(StorePair(train, test), "y", FAST)
    assert len(problem.train[0]) == 118  # both photos of that person
    assert any("not learned from" in note for note in problem.notes)


def test_two_encoders_are_refused(make_store):
    one = make_store("one", model={"name": "x", "sha256": "a" * 64})
    two = make_store("two", model={"name": "y", "sha256": "b" * 64})
    with pytest.raises(UsageError, match=r"of encoder x \(aaaaaaaaaaaa\).* of y \(bbbbbbbbbbbb\)"):
        StorePair(one, two)
    with pytest.raises(UsageError, match="are one; type --store"):
        open_pairs(replace(FAST, train_store=[str(one.path)], test_store=[str(one.path)]))


# Fractions ------------------------------------------------------------------------------------------------------------


def test_fractions_are_nested_stratified_and_of_people(make_store):
    store = make_store(rare=np.repeat(np.where(np.arange(60) % 5 == 0, "r", "s"), 2).astype(object))
    problem = prepare(store, "rare", FAST)
    before = [set() for _ in problem.train]
    for fraction in (0.1, 0.25, 0.5, 1.0):
        less = with_fraction(problem, fraction)
        np.testing.assert_array_equal(less.fold, problem.fold)
        for number, rows_ in enumerate(less.train):
            groups = set(problem.group[rows_])
            assert before[number] <= groups <= set(problem.group[problem.train[number]])
            assert len(groups) == np.ceil(fraction * 48)
            assert len(rows_) == 2 * len(groups)
            share = (problem.target[rows_] == 0).mean()
            assert abs(share - 0.2) <= 1 / len(groups) + 1e-9
            assert len(less.inner[number]) == len(rows_)
            before[number] = groups
    for one, two in zip(less.train, problem.train, strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(less.inner, problem.inner, strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(UsageError, match="--fraction 0.01: there are 2 faces of 1 people"):
        with_fraction(problem, 0.01)


def test_a_curve_ends_at_the_score(make_store):
    store = make_store()
    options = replace(FAST, fraction="0.1,0.5,1")
    results = Job.prepare([store], ["y"], options).run()
    assert [one.fraction for one in results.curves] == [0.1, 0.5, 1.0]
    assert [one.num_train for one in results.curves] == [5, 24, 48]
    assert results.curves[-1].metrics == results.scores[0].metrics
    found = [row for row in rows(results) if row["row"] == "curve"]
    assert [(row["fraction"], row["n_train"], row["n"]) for row in found] == [
        (0.1, 5, 120),
        (0.5, 24, 120),
        (1, 48, 120),
    ]
    assert results.curves[0].metrics["r2"].value < results.scores[0].metrics["r2"].value
    problem = prepare(store, "y", FAST)
    (again,) = learning_curve(store, problem, "linear", "cls", [1.0], FAST)
    np.testing.assert_array_equal(again.predictions.output, results.scores[0].predictions.output)


# Averages of photos ---------------------------------------------------------------------------------------------------


def test_predictions_for_one_person_are_averaged(make_store):
    store = make_store(noise=1.5)
    single = evaluate(store, "y", options=FAST).predictions
    score = evaluate(store, "y", options=replace(FAST, aggregate="subject"))
    found = score.predictions
    assert len(found) == 60
    np.testing.assert_array_equal(found.ids, store.ids[::2])
    np.testing.assert_allclose(found.output, single.output.reshape(60, 2).mean(axis=1))
    np.testing.assert_allclose(found.target, store.labels["y"][::2])
    assert score.metrics["mae"].value < np.abs(single.output - single.target).mean()
    classes = evaluate(store, "c", options=replace(FAST, aggregate="subject")).predictions
    np.testing.assert_allclose(classes.output.sum(axis=1), 1)


def test_averaged_photos_are_of_one_person_in_one_fold(make_store):
    site = text(*np.arange(120) // 40)
    store = make_store(site=site, who=make_store("b").labels["subject"])
    with pytest.raises(UsageError, match="--aggregate site: some of its values hold photos of several people"):
        prepare(store, "y", replace(FAST, aggregate="site"))
    del store.labels._stored_names["subject"]
    assert prepare(store, "y", FAST).num_groups == 120
    assert prepare(store, "y", replace(FAST, aggregate="who")).num_groups == 60  # it also says who is who


def test_photos_of_two_classes_or_nobody_are_not_averaged():
    number = np.array([0, 0, 0, 1, 2])
    target = np.array([0, 1, 0, 1, 1])
    output = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8], [0.3, 0.7]])
    ids, fold = text(*"abcde"), np.zeros(5, int)
    found = Predictions(ids, target, output, fold, np.array([0, 0, 0, 1, 2]), ("x", "y")).averaged(number)
    np.testing.assert_array_equal(found.ids, ["a", "b", "d", "e"])
    np.testing.assert_allclose(found.output[:2], [[0.7, 0.3], [0.5, 0.5]])
    np.testing.assert_array_equal(found.target, [0, 1, 1, 1])


# Look-alikes ----------------------------------------------------------------------------------------------------------


def flip(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_similar_pairs_are_those_that_a_slow_search_finds(hashes, random):
    near = [flip(one, *random.sample(range(64), random.randint(0, 6))) for one in hashes]
    every = np.array(hashes + near, dtype=np.uint64)
    first, second, distance = duplicates.similar_pairs((np.arange(len(every)), every))
    found = {}
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
    for one, two, bits in zip(first.tolist(), second.tolist(), distance.tolist(), strict=True):
        assert bin(int(every[one]) ^ int(every[two])).count("1") == bits
        found[tuple(sorted((int(every[one]), int(every[two]))))] = bits
    for one in range(len(every)):
        for two in range(one):
            bits = bin(int(every[one]) ^ int(every[two])).count("1")
            pair = tuple(sorted((int(every[one]), int(every[two]))))
            assert (pair in found) == (bits <= 4)


def hashed(values) -> np.ndarray:
    return text(*(f"{value:016x}" for value in values))


def test_a_planted_look_alike_shares_the_fold(make_store):
    rng = np.random.default_rng(0)
    values = [int(one) for one in rng.integers(0, 2**63, 120)]
    values[119] = flip(values[0], 3, 20, 40, 63)  # of person 59, four bits from a photo of person 0
    values[117] = flip(values[2], 3, 20, 40, 50, 63)  # five bits
    store = make_store(meta={"phash": hashed(values)})
    problem = prepare(store, "y", FAST)
    assert problem.num_groups == 59
    assert problem.group[119] == problem.group[118] == problem.group[0]
    assert problem.group[117] != problem.group[2]
    assert problem.fold[119] == problem.fold[0]
    assert any("1 person has a photo that looks the same as another's" in note for note in problem.notes)


def test_chains_of_likeness_end(make_store, monkeypatch):
    """60 people, each four bits from the next: without the cap all would be one."""
    monkeypatch.setattr(duplicates, "MAX_PEOPLE", 10)
    value, values = 0, []
    for person in range(60):
        values += [value, flip(value, 1)]
        value = flip(value, *((4 * person + bit) % 61 + 2 for bit in range(4)))
    store = make_store(meta={"phash": hashed(values)})
    problem = prepare(store, "y", FAST)
    assert np.bincount(problem.group).max() <= 2 * duplicates.MAX_PEOPLE
    assert any("would chain over 10 people together" in note for note in problem.notes)
    order = np.random.default_rng(1).permutation(120)
    shuffled = duplicates.cluster(
        store.ids[order], store.labels["subject"][order], {"phash": store.meta["phash"][order]}
    )
    straight = duplicates.cluster(store.ids, store.labels["subject"], {"phash": store.meta["phash"]})
    same = straight.group[order][:, None] == straight.group[order][None]
    np.testing.assert_array_equal(shuffled.group[:, None] == shuffled.group[None], same)


def test_the_nearest_are_joined_first(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PEOPLE", 2)
    far, middle, near = flip(0, 20, 30, 40, 50), 0, flip(0, 0)  # 4 bits and 1 bit from the middle
    found = duplicates.cluster(text(*"abc"), text("", "", ""), {"phash": hashed([far, middle, near])})
    np.testing.assert_array_equal(found.group == found.group[1], [False, True, True])
    assert (found.num_alike, found.num_refused) == (1, 1)


def test_hashes_that_are_none_are_alone():
    meta = {"phash": text("", "zz", "0" * 15, "x" * 16, "0" * 16, "-" + "0" * 15)}
    found = duplicates.cluster(text(*"abcdef"), text(*[""] * 6), meta)
    assert len(np.unique(found.group)) == 6
    assert duplicates.parse_hashes(meta["phash"])[0].tolist() == [4]


def test_twins_of_the_encoder_are_counted_and_change_no_fold(make_store):
    features, labels = people(60, 2)
    store = make_store()
    before = prepare(store, "y", FAST)
    group, fold = before.group, before.fold
    assert duplicates.twins(features, group, fold) == 0
    apart = next(row for row in range(2, 120) if fold[row] != fold[0])
    features[apart] = features[0]
    assert duplicates.twins(features, group, fold) == 2
    assert duplicates.twins(features, group, np.zeros(120, int)) == 0
    assert duplicates.twins(features, np.zeros(120, int), fold) == 0  # photos of one person may be alike


# As users meet it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mefem(monkeypatch, capsys):
    monkeypatch.setattr("mefem_cli.console.stdin_is_pipe", lambda: False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mefem", "probe", *words, "--head", "linear", "--bootstraps", "100"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_two_stores_and_repeats_on_the_command_line(make_store, mefem, tmp_path):
    train, test = make_store("train"), make_store("test", seed=1)
    words = ("y", "--train-store", str(train.path), "--test-store", str(test.path), "--json", "--repeats", "2")
    code, stdout, stderr = mefem(*words, "-o", str(tmp_path / "out"))
    assert code == 0, stderr
    (row,) = [json.loads(line) for line in stdout.splitlines()]
    assert (row["n"], row["folds"], row["fold_names"], row["repeats"]) == (120, 1, ["test"], 2)
    assert row["store"] == str(test.path)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert set(provenance["inputs"]) == {str(train.path), str(test.path)}


def test_messages_have_one_line(make_store, mefem):
    store = str(make_store(part=text(*["fit"] * 60, *["test"] * 60)).path)
    for words, code, message in (
        (("y", "--split", "part"), 2, '--split part: "fit" is none of train, val, test'),
        (("y", "--folds", "nowhere.csv"), 2, "nowhere.csv"),
        (("y", "--folds", "1"), 2, "--folds 1: wanted a whole number from 2"),
        (("y", "--fraction", "0.001"), 2, "--fraction 0.001: there are 2 faces of 1 people"),
        (("y", "--aggregate", "person"), 2, '--aggregate person: there is no label "person"'),
        (("y", "--test-store", "b.h5"), 2, "come in pairs"),
    ):
        found, stdout, stderr = mefem(*words, "--store", store)
        assert (found, stdout) == (code, ""), stderr
        assert message in stderr
        assert len(stderr.strip().splitlines()) == 1, stderr
